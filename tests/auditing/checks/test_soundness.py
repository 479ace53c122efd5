"""Checks on the whole panel: each has a loss that passes and a twin that fails."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.adapters import from_hidden
from opdtheory.auditing.checks.soundness import soundness
from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import Loss, exact_gradient, gradient_moments
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts
from tests.auditing.checks.subjects import checks, failed, forward_kl, reverse_kl
from tests.labels import label
from tests.losses import k2

SURROGATE = {"backward is the derivative of the value"}
ON_POLICY = {"holds under another sampling policy"}


@pytest.mark.parametrize(
    ("loss", "objective", "batch_size", "open_questions"),
    [
        (k2, "reverse_kl", 1, ON_POLICY),
        (opd.estimator("opd_plus", "jsd"), "jsd", 1, SURROGATE | ON_POLICY),
        (opd.estimator("full_vocab", "forward_kl"), "forward_kl", 1, ON_POLICY),
        (opd.estimator("box_cox", alpha=0.5), "hellinger", 1, SURROGATE | ON_POLICY),
        (opd.estimator("opd_plus", "jsd", importance="prefix"), "jsd", 1, SURROGATE),
        (
            opd.estimator("opd_plus", "jsd", baseline="leave_one_out"),
            "jsd",
            2,
            SURROGATE | ON_POLICY | {"mean over the batch"},
        ),
    ],
    ids=label,
)
def test_sound_losses_fail_nothing(loss: Loss, objective: str, batch_size: int, open_questions: set[str]) -> None:
    found = checks(loss, objective, batch_size)
    assert failed(found) == set()
    assert {name for name, check in found.items() if check.passed is None} == open_questions
    for check in found.values():
        assert check.detail and (check.passed is not True or (check.value is not None and check.limit is not None))
    json.dumps([dataclasses.asdict(check) for check in found.values()])


def test_truncation_drives_the_student_from_the_teacher() -> None:
    found = checks(opd.estimator("topk_truncated", "forward_kl", k=2), "forward_kl")
    assert {"stationary at the teacher", "error at the best scale"} <= failed(found)
    assert "leaves it" in found["stationary at the teacher"].detail
    unclaimed = checks(opd.estimator("topk_truncated", "forward_kl", k=2), None)
    assert failed(unclaimed) == set()
    assert unclaimed["stationary at the teacher"].value == pytest.approx(found["stationary at the teacher"].value)


def test_scale_that_differs_between_pairs() -> None:
    def loss(r: Rollouts) -> Tensor:
        return reverse_kl(r) * (1.0 + torch.log_softmax(r.teacher_logits[:, 0], -1).square().mean()).detach()

    assert failed(checks(reverse_kl)) == set()
    assert {"one common scale", "error at the best scale"} <= failed(checks(loss))


@pytest.mark.parametrize("share", [0.05, 1e-3])
def test_a_high_cosine_does_not_pass(share: float) -> None:
    """A loss at a cosine above 0.997 on every pair: a little of another divergence is mixed in."""

    def loss(r: Rollouts) -> Tensor:
        return (1.0 - share) * reverse_kl(r) + share * forward_kl(r)

    for case in Scenario().pairs()[1:4]:
        actual = flat(gradient_moments(loss, case.student, case.teacher).mean)
        exact = flat(exact_gradient(case.student, case.teacher, "reverse_kl"))
        assert float(actual @ exact / (actual.norm() * exact.norm())) > 0.997
    assert {"one common scale", "error at the best scale"} <= failed(checks(loss))


def test_a_perfect_cosine_everywhere_does_not_pass() -> None:
    """The gradient is exact on all pairs of fixed length; that it leaks over padding shows only there."""

    def loss(r: Rollouts) -> Tensor:
        return (r.log_u.square() / 2).sum() / len(r.tokens)

    found = checks(loss)
    assert found["error at the best scale"].passed and found["one common scale"].passed
    assert failed(found) == {"no gradient on padding", "padding values are ignored", "extreme padding is ignored"}


def test_without_the_teacher() -> None:
    found = checks(opd.estimator("k1_loss"))
    assert {"depends on the teacher", "error at the best scale"} <= failed(found)
    assert "though the value does" in found["depends on the teacher"].detail
    entropy = checks(lambda r: r.token_sum(r.student_logprobs.detach() * r.student_logprobs))
    assert "nor does the value" in entropy["depends on the teacher"].detail


def test_the_sampling_policy() -> None:
    name = "holds under another sampling policy"
    plain, weighted = opd.estimator("opd_plus", "jsd"), opd.estimator("opd_plus", "jsd", importance="prefix")
    assert checks(plain, "jsd", off_policy=0.3)[name].passed is False
    assert checks(weighted, "jsd", off_policy=0.3)[name].passed is True
    assert checks(plain, "jsd")[name].passed is None


def test_an_exception_is_a_finding() -> None:
    def loss(r: Rollouts) -> Tensor:
        if (r.mask == 0).any():
            raise RuntimeError("no padding, please")
        return k2(r)

    found = checks(loss)
    # It refuses such rollouts, and is not silently wrong on them.
    refused = {"no gradient on padding", "padding values are ignored", "extreme padding is ignored"}
    assert not failed(found) & refused and all(found[name].passed is None for name in refused)
    assert (
        "RuntimeError" in found["no gradient on padding"].detail and "please" in found["no gradient on padding"].detail
    )


def test_a_refusal_is_no_failure() -> None:
    def fused(student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor, labels: Tensor) -> Tensor:
        log_p, log_q = (student @ head.T).log_softmax(-1), (teacher @ teacher_head.T).log_softmax(-1)
        return (log_q.exp() * (log_q - log_p)).sum(-1)

    found = checks(from_hidden(fused), "forward_kl")
    assert failed(found) == set()
    assert "refuses" in found["finite where the teacher gives zero"].detail


def test_a_zero_gradient_claims_nothing() -> None:
    found = checks(lambda r: 0.0 * k2(r))
    assert found["stationary at the teacher"].passed is None and found["one common scale"].passed is None
    assert "depends on the teacher" in failed(found)


def test_variable_lengths_and_other_seeds() -> None:
    assert failed(checks(k2, worlds={"eos": 0}, seed=3)) == set()


def test_groups_of_one_prompt() -> None:
    grouped = opd.estimator("opd_plus", "jsd", baseline="leave_one_out")
    found = checks(grouped, "jsd", 2, worlds={"prompts": 2}, shared_prompt=True)
    assert failed(found) == set()


def test_work_is_bounded() -> None:
    """The cost is the number of calls, which a busy machine does not change."""
    for loss, batch_size, most in ((k2, 1, 80), (opd.estimator("opd_plus", "jsd", zscore=True), 2, 250)):
        cases = Scenario(batch_size).pairs()[1:4]
        moments = [gradient_moments(loss, c.student, c.teacher, batch_size) for c in cases]
        calls = []

        def counted(r: Rollouts, loss: Loss = loss, calls: list[None] = calls) -> Tensor:
            calls.append(None)
            return loss(r)

        soundness(counted, cases, moments, Objective.of(opd.divergence("reverse_kl")), Scenario(batch_size))
        assert len(calls) < most
