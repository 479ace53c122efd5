"""Checks on one batch: each has a loss that passes and a twin that fails."""

from __future__ import annotations

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.checks.soundness import soundness
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact import gradient_moments
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts
from tests.auditing.checks.subjects import checks, failed, forward_kl, reverse_kl
from tests.losses import k2


def test_padding_values_matter_though_their_gradient_does_not() -> None:
    def loss(r: Rollouts) -> Tensor:
        return k2(r) * (1.0 + r.teacher_logprobs.square().mean(-1).mean())

    found = checks(loss)
    assert found["no gradient on padding"].passed
    assert "padding values are ignored" in failed(found)


def test_a_product_with_the_mask_lets_infinity_through() -> None:
    def loss(r: Rollouts) -> Tensor:
        return (r.mask * (r.log_u.exp() - 1.0 - r.log_u)).sum() / len(r.tokens)

    found = checks(loss, "forward_kl")
    assert failed(found) == {"extreme padding is ignored"}
    assert found["extreme padding is ignored"].value is None


def test_logits_as_such() -> None:
    def squares(r: Rollouts) -> Tensor:
        return r.token_sum((r.student_logits - r.teacher_logits).square().sum(-1))

    assert {"gradient rows sum to zero", "shifting logits changes nothing"} <= failed(checks(squares))

    def weighted(r: Rollouts) -> Tensor:
        return r.token_sum(r.log_u.square() / 2 * r.student_logits.logsumexp(-1).square().detach())

    found = checks(weighted)
    assert found["gradient rows sum to zero"].passed
    assert found["shifting logits changes nothing"].passed is False


def test_order_of_the_batch() -> None:
    def loss(r: Rollouts) -> Tensor:
        return r.token_sum(r.log_u.square() * torch.arange(1.0, len(r.tokens) + 1.0).double().unsqueeze(-1))

    assert "order of the batch" in failed(checks(loss))


def test_sum_over_the_batch() -> None:
    name = "mean over the batch"
    total = checks(lambda r: len(r.tokens) * k2(r))[name]
    assert total.passed is False and "a sum" in total.detail
    grouped = checks(opd.estimator("opd_plus", "jsd", zscore=True), "jsd", 2)[name]
    assert grouped.passed is None and "couples" in grouped.detail


def test_state_between_calls_is_seen() -> None:
    cases = Scenario().pairs()[1:2]
    moments = [gradient_moments(k2, c.student, c.teacher) for c in cases]
    calls = []

    def loss(r: Rollouts) -> Tensor:
        calls.append(r)
        return k2(r) * (1.0 + 1e-12 * len(calls))

    found = {c.name: c for c in soundness(loss, cases, moments, Objective.of(opd.divergence("reverse_kl")), Scenario())}
    assert found["reproducible"].passed is False
    assert checks(k2)["reproducible"].passed is True
    few = len(calls)
    assert few < 60


def test_rare_tokens() -> None:
    name = "finite at probability 1e-30"
    assert checks(opd.estimator("opd_plus", "chi2"), "chi2")[name].passed is True
    single = checks(lambda r: r.token_sum(r.log_u.float().exp().square()), "chi2", tolerance=1e-4)
    assert single[name].passed is False and "NaN or inf" in single[name].detail


def test_tokens_that_the_teacher_excludes() -> None:
    name = "finite where the teacher gives zero"
    naive = checks(forward_kl, "forward_kl")
    assert failed(naive) == {name} and "the loss is NaN" in naive[name].detail
    # The reverse KL itself is infinite there, and a gradient that is not finite no fault.
    assert checks(reverse_kl)[name].passed is None
    assert checks(reverse_kl, "forward_kl")[name].passed is False
    assert checks(opd.estimator("full_vocab", "forward_kl"), "forward_kl")[name].passed is True


def test_where_an_environment_writes() -> None:
    def unmasked(r: Rollouts) -> Tensor:
        """Masks padding, by the end-of-sequence token, but not the environment's tokens."""
        ended = (r.tokens == 0).long().cumsum(-1) - (r.tokens == 0).long() > 0
        return torch.where(ended, 0.0, r.log_u.square() / 2).sum() / len(r.tokens)

    worlds = {"environment": (1,), "prompts": 2}
    assert failed(checks(k2, worlds=worlds)) == set()
    assert "no gradient on padding" in failed(checks(unmasked, worlds=worlds))
