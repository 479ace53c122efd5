"""The auditor: verdicts, settings, what is refused, and how much work it takes."""

from __future__ import annotations

import json

import pytest
import torch

import opdtheory as opd
from opdtheory.auditing import VERDICTS, quick_verdict
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.rollouts import Rollouts
from tests.auditing.verdicts import audit
from tests.losses import k3
from tests.tolerances import ENUMERATION


@pytest.mark.parametrize(
    ("name", "divergence", "verdict"),
    [
        ("opd_plus", "jsd", "exact"),
        ("opd_plus", "le_cam", "exact"),
        ("opd", "reverse_kl", "exact"),
        ("opd", "forward_kl", "biased"),
        ("opd", "jsd", "biased"),
        ("k1_loss", None, "zero"),
        ("k2_loss", None, "exact"),
        ("k3_reward", None, "biased"),
        ("sign", None, "exact_up_to_scale"),
    ],
)
def test_verdicts(name: str, divergence: str | None, verdict: str) -> None:
    loss = opd.estimator(name, divergence)
    report = audit(loss, loss.claim.divergence)
    assert report.verdict == verdict
    assert verdict in VERDICTS
    assert quick_verdict(loss, loss.claim.divergence) == verdict


def test_sign_flipped_is_not_faithful_even_up_to_scale() -> None:
    loss = opd.estimator("opd_plus", "jsd")
    report = audit(lambda r: -loss(r), "jsd")
    assert report.verdict == "biased"
    assert report.cosine == pytest.approx(-1.0)
    assert report.scale == pytest.approx(-1.0)
    assert "uphill" in report.summary()


def test_one_common_scale_over_the_panel() -> None:
    """A loss that is a different multiple of the right gradient on each pair is no multiple of it."""

    def loss(r: Rollouts) -> torch.Tensor:
        kl = opd.estimator("full_vocab", "reverse_kl")(r)
        # Of the teacher's row for the first token alone, so that every rollout of a pair has the same factor.
        return kl * (1.0 + torch.log_softmax(r.teacher_logits[:, 0], -1).square().mean()).detach()

    report = audit(loss, "reverse_kl")
    assert report.cosine == pytest.approx(1.0)
    assert report.verdict == "biased"


def test_scale_is_reported() -> None:
    loss = opd.estimator("opd_plus", "chi2")
    report = audit(lambda r: 3.0 * loss(r), "chi2")
    assert report.verdict == "exact_up_to_scale"
    assert report.scale == pytest.approx(3.0, abs=1e-12)


def test_group_mean_scales_by_g_minus_one_over_g() -> None:
    loss = opd.estimator("opd_plus", "jsd", baseline="group_mean")
    report = audit(loss, "jsd", batch_size=2)
    assert report.verdict == "exact_up_to_scale"
    assert report.scale == pytest.approx(0.5, abs=1e-12)


def test_variable_lengths_are_looked_at() -> None:
    local = opd.estimator("opd_plus", "jsd")
    kept = audit(local, "jsd").variable_lengths
    assert kept is not None and kept["verdict"] == "exact"
    mean = audit(opd.estimator("opd_plus", "jsd", reduction="token_mean"), "jsd")
    assert mean.verdict == "exact_up_to_scale"
    assert mean.variable_lengths is not None and mean.variable_lengths["verdict"] == "biased"
    assert "T11" in mean.summary()
    assert audit(opd.estimator("opd_plus", "jsd", reduction="token_mean"), "jsd", eos=0).verdict == "biased"


def test_off_policy_needs_the_prefix_ratio() -> None:
    plain, weighted = opd.estimator("opd_plus", "jsd"), opd.estimator("opd_plus", "jsd", importance="prefix")
    assert audit(plain, "jsd", off_policy=0.5).verdict == "biased"
    assert audit(weighted, "jsd", off_policy=0.5).verdict == "exact"


def test_variance_beside_the_whole_vocabulary() -> None:
    report = audit(opd.estimator("full_vocab", "jsd"), "jsd")
    for pair in report.pairs:
        assert pair.variance == pytest.approx(pair.full_vocabulary_variance, rel=1e-9)
    sampled = audit(opd.estimator("opd_plus", "jsd"), "jsd")
    assert all(pair.variance > pair.full_vocabulary_variance for pair in sampled.pairs)


def test_same_seed_same_report() -> None:
    first, second = (audit(k3, "reverse_kl", seed=3).to_dict() for _ in range(2))
    for record in (first, second):
        record.pop("seconds")
    assert first == second
    assert audit(k3, "reverse_kl", seed=4).relative_bias != first["relative_bias"]


def test_takes_under_three_seconds_in_evaluations() -> None:
    """The work is bounded by the number of calls, which a busy machine does not change."""
    assert audit(k3, "reverse_kl").evaluations < 400
    assert opd.audit(k3, "reverse_kl").evaluations < 1500  # ten worlds beside the panel
    assert audit(opd.estimator("opd_plus", "jsd", baseline="leave_one_out"), "jsd", batch_size=2).evaluations < 2500


@pytest.mark.parametrize(
    ("settings", "argument"),
    [
        ({"objective": "revers_kl"}, "divergence"),
        ({"granularity": "token"}, "objective"),
        ({"gamma": 0.5}, "gamma"),
        ({"granularity": "token_return", "gamma": 1.5}, "gamma"),
        ({"batch_size": 0}, "batch_size"),
        ({"eos": 9}, "eos"),
        ({"off_policy": -1.0}, "off_policy"),
        ({"off_policy": float("nan")}, "off_policy"),
    ],
)
def test_bad_settings_name_the_argument(settings: dict[str, object], argument: str) -> None:
    with pytest.raises(ValueError, match=argument):
        audit(k3, **settings)  # type: ignore[arg-type]


def test_identically_zero_claim_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="objective: must have a nonzero gradient somewhere, got skew_jsd"):
        audit(k3, opd.divergences.skew_jsd(0.0))


def test_a_batch_too_large_states_the_count() -> None:
    with pytest.raises(BudgetExceededError, match=r"needs [\d,]+") as caught:
        audit(opd.estimator("opd_plus", "jsd", baseline="group_mean"), "jsd", batch_size=64, method="exact")
    assert caught.value.count > caught.value.budget


@pytest.mark.parametrize(
    ("loss", "cause"),
    [
        (lambda r: r.log_u, r"shape \(.*\)"),
        (lambda r: r.teacher_logprobs.sum(), "no gradient"),
        (lambda r: r.token_sum(r.log_u.detach()), "no gradient"),
        (lambda r: r.token_sum(r.log_u * torch.rand(())), "not deterministic"),
        (lambda r: r.token_sum(r.log_u) / 0.0 * 0.0, "finite"),
        pytest.param(lambda r: 1.0, "float", marks=pytest.mark.bad_input),
        (lambda r: r.token_sum(torch.where(r.log_u > 9e9, r.log_u.sqrt(), r.student_logprobs)), "NaN or inf"),
    ],
    ids=["not a scalar", "constant", "detached", "random", "NaN", "no tensor", "NaN gradient"],
)
def test_losses_that_cannot_be_audited(loss: object, cause: str) -> None:
    with pytest.raises(LossError, match=cause):
        audit(loss, "reverse_kl")  # type: ignore[arg-type]


def test_zero_gradient_loss_is_zero_not_an_error() -> None:
    report = audit(lambda r: 0.0 * r.token_sum(r.student_logprobs), "reverse_kl")
    assert report.verdict == "zero"
    assert report.identified is None


def test_batches_too_large_to_enumerate_are_exact_if_their_rollouts_do_not_meet() -> None:
    report = opd.audit(opd.estimator("opd_plus", "jsd"), "jsd", batch_size=64)
    assert report.verdict == "exact" and report.monte_carlo is None
    assert report.relative_bias < ENUMERATION


@pytest.mark.parametrize("baseline", ["leave_one_out", "group_mean"])
def test_coupled_batches_too_large_to_enumerate_are_sampled(baseline: str) -> None:
    report = opd.audit(opd.estimator("opd_plus", "jsd", baseline=baseline), "jsd", batch_size=16, details=False)
    assert report.monte_carlo is not None and report.monte_carlo["rollouts"] > 0
    assert report.verdict == ("exact" if baseline == "leave_one_out" else "exact_up_to_scale")
    assert report.summary() == report.monte_carlo["words"]
    json.dumps(report.to_dict(), allow_nan=False)
    assert str(report) and not report.pairs


@pytest.mark.bad_input
def test_methods_and_settings_are_checked() -> None:
    for settings, argument in (
        ({"method": "guess"}, "method"),
        ({"batch_size": 1.5}, "batch_size"),
        ({"seed": "a"}, "seed"),
    ):
        with pytest.raises(InvalidArgumentError, match=argument):
            opd.audit(k3, "reverse_kl", **settings)  # type: ignore[arg-type]


def test_prompts_and_tools_change_nothing_of_an_exact_estimator() -> None:
    loss = opd.estimator("opd_plus", "forward_kl")
    assert opd.audit(loss, "forward_kl", prompts=3, environment=(1,), details=False).verdict == "exact"
    biased = opd.audit(opd.estimator("opd", "forward_kl"), "forward_kl", prompts=3, environment=(1,), details=False)
    assert biased.verdict == "biased"
