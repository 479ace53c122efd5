"""Assertions about losses: they pass, or fail with the audit as their message."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory import audit, divergence, estimator
from opdtheory.auditing import VERDICTS
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.estimators import Claim, Estimator
from opdtheory.estimators.base import Assumptions
from opdtheory.testing import (
    assert_claim,
    assert_minimises,
    assert_same_gradient,
    assert_unbiased,
    claim_settings,
    gradient_gap,
)
from tests.losses import k1, k2, k3
from tests.sparse import some


@pytest.mark.parametrize(
    ("loss", "objective"),
    [(k2, "reverse_kl"), (k3, "forward_kl"), (estimator("full_vocab", "jsd"), divergence("jsd"))],
)
def test_an_unbiased_loss_passes(loss, objective):
    report = assert_unbiased(loss, objective, eos=0)
    assert report.verdict == "exact" and report.settings["eos"] == 0


@pytest.mark.parametrize(("loss", "verdict"), some([(k3, "other_objective"), (k1, "zero")]))
def test_a_biased_loss_fails_with_its_audit(loss, verdict):
    with pytest.raises(AssertionError) as caught:
        assert_unbiased(loss, "reverse_kl")
    first, _, rest = str(caught.value).partition("\n\n")
    report = audit(loss, "reverse_kl")
    assert report.verdict == verdict
    assert first == f"{loss.__name__} is not unbiased for reverse_kl (token_local): {VERDICTS[verdict]}."
    assert rest == str(report)


def test_granularity_and_settings_reach_the_audit():
    loss = estimator("return_to_go", "jsd", gamma=0.5, discounted=True)
    report = assert_unbiased(loss, "jsd", "token_return", gamma=0.5, seed=1, name="mine")
    assert (report.name, report.granularity, report.settings["seed"]) == ("mine", "token_return", 1)
    with pytest.raises(AssertionError, match=r"^mine is not unbiased for reverse_kl \(sequence\)"):
        assert_unbiased(k1, "reverse_kl", "sequence", name="mine")


@pytest.mark.slow
def test_a_scale_is_allowed_on_request_only():
    def doubled(r):
        return 2 * k2(r)

    with pytest.raises(AssertionError, match="is not unbiased for"):
        assert_unbiased(doubled, "reverse_kl")
    report = assert_unbiased(doubled, "reverse_kl", up_to_scale=True)
    assert report.verdict == "exact_up_to_scale" and report.scale == pytest.approx(2.0)
    with pytest.raises(AssertionError, match="is not unbiased up to scale for"):
        assert_unbiased(k1, "reverse_kl", up_to_scale=True)


def test_a_loss_that_cannot_be_audited_is_an_error_not_a_failure():
    with pytest.raises(LossError, match="scalar"):
        assert_unbiased(lambda r: r.log_u, "reverse_kl")
    with pytest.raises(InvalidArgumentError, match="objective|divergence"):
        assert_unbiased(k2, "no_such")


@pytest.mark.parametrize(
    "loss",
    some(
        [
            estimator("k1_loss"),
            estimator("k2_loss"),
            estimator("k3_loss"),
            estimator("opd_plus", "jsd"),
            estimator("opd", divergence("skew_reverse_kl", lam=0.1)),
            estimator("return_to_go", "jsd", gamma=0.5),
            estimator("opd_plus", "jsd", reduction="token_mean"),
            estimator("full_vocab", "chi2", importance="prefix"),
        ]
    ),
    ids=repr,
)
def test_claims_that_hold(loss):
    assert assert_claim(loss).verdict == loss.claim.verdict


def claiming(loss: Estimator, **changes) -> Estimator:
    claim = loss.claim
    fields = {key: getattr(claim, key) for key in Claim.__dataclass_fields__}
    return Estimator(loss.name, Claim(**{**fields, **changes}), loss.token_loss, loss.reduction, loss.options)


@pytest.mark.parametrize(
    ("loss", "words"),
    some(
        [
            (claiming(estimator("k3_loss"), verdict="exact"), "claims 'exact', the audit finds 'other_objective'"),
            (claiming(estimator("k2_loss"), verdict="biased"), "claims 'biased', the audit finds 'exact'"),
            (claiming(estimator("k3_loss"), descends="chi2"), "claims to descend chi2, the audit finds forward_kl"),
            (
                claiming(estimator("opd", divergence("skew_reverse_kl", lam=0.1)), descends="skew_jsd(beta=0.8)"),
                r"claims to descend skew_jsd\(beta=0.8\), the audit finds skew_jsd\(beta=0.9\)",
            ),
            (
                claiming(estimator("opd_plus", "jsd", reduction="token_mean"), assumptions=Assumptions()),
                "the audit finds 'biased'",
            ),
            (claiming(estimator("k2_loss"), assumptions=Assumptions()), "the audit finds 'biased'"),
        ]
    ),
)
def test_claims_that_do_not_hold(loss, words):
    with pytest.raises(AssertionError, match=words) as caught:
        assert_claim(loss)
    assert "relative bias" in str(caught.value)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["group_mean", "leave_one_out"])
def test_claims_of_coupled_losses(baseline):
    loss = estimator("opd_plus", "forward_kl", baseline=baseline)
    assert assert_claim(loss).settings["batch_size"] == 2


def test_settings_are_the_widest_that_the_assumptions_leave():
    def settings(granularity="token_local", gamma=1.0, **assumed):
        claim = Claim(divergence("jsd"), granularity, "exact", "T1", gamma=gamma, assumptions=Assumptions(**assumed))
        return claim_settings(claim)

    free = settings()
    assert free["off_policy"] > 0 and free == {**free, "batch_size": 1, "eos": 0, "gamma": 1.0}
    for sampler in ("on_policy", "on_policy_or_one_step"):
        assert settings(sampler=sampler)["off_policy"] == 0.0
    assert settings(fixed_length=True)["eos"] is None
    assert settings(batch_size=3)["batch_size"] == 3
    assert settings("token_return", 0.5)["gamma"] == 0.5


def test_assumptions_out_of_the_panel_s_reach_are_refused():
    with pytest.raises(InvalidArgumentError, match="log-ratios beyond 50 occur.*end at"):
        assert_claim(estimator("opd_plus", "jsd", clip_log_ratio=50.0))
    with pytest.raises(InvalidArgumentError, match="vocabulary above 9.*have 4 tokens"):
        assert_claim(estimator("topk_truncated", "jsd", k=9))


def test_the_gap_is_relative_to_what_is_large():
    one, large = torch.ones(2), torch.full((2,), 100.0)
    assert gradient_gap([one, one], [one, one]) == 0.0 == gradient_gap([], [])
    assert gradient_gap([one + 0.5], [one]) == 0.5
    assert gradient_gap([large + 0.5], [large]) == 0.005
    assert gradient_gap([one * torch.nan], [one]) == gradient_gap([one / 0], [one]) == float("inf")
    for wrong in ([one], [one, torch.ones(3)]):
        with pytest.raises(InvalidArgumentError, match="actual.*shapes"):
            gradient_gap(wrong, [one, one])


@pytest.mark.slow
def test_minimising_is_up_to_a_positive_scale():
    report = assert_minimises(lambda r: 3 * k2(r), "reverse_kl", seed=1)
    assert report.scale == pytest.approx(3.0) and report.settings["seed"] == 1
    assert assert_minimises(k3, opd.divergence("forward_kl"), eos=0).verdict == "exact"
    with pytest.raises(AssertionError) as caught:
        assert_minimises(k3, "reverse_kl")
    assert str(caught.value).startswith(
        "k3 does not minimise reverse_kl (token_local): it descends another objective than the one claimed; "
        "relative bias 0.631, cosine 0.808088, best scale 0.717"
    )
    with pytest.raises(AssertionError, match="relative bias 2, cosine -1"):
        assert_minimises(lambda r: -k2(r), "reverse_kl")
    with pytest.raises(AssertionError, match="k2 does not minimise reverse_kl .sequence"):
        assert_minimises(k2, "reverse_kl", "sequence")


def test_losses_with_the_same_mean_gradient_are_alike():
    def reward(r):
        return r.token_sum(-(r.log_u.detach() + 1.0) * r.student_logprobs)

    assert assert_same_gradient(k2, reward, eos=0) < 1e-9
    # A value with no gradient in the mean is added; the mean gradient of both is zero in the second case.
    assert assert_same_gradient(k3, lambda r: k3(r) + r.token_sum(r.log_u)) < 1e-9
    assert assert_same_gradient(lambda r: r.token_sum(r.log_u), lambda r: r.token_sum(-r.log_u)) == 0.0
    assert assert_same_gradient(lambda r: k2(r).float(), k2) < 1e-4


def test_losses_that_differ_are_told_apart_by_their_numbers():
    with pytest.raises(AssertionError) as caught:
        assert_same_gradient(k2, k3)
    assert str(caught.value).startswith("the expected gradients of k2 and k3 differ by 0.")
    assert str(caught.value).count("sharpness") == 6
    small = pytest.raises(AssertionError, match="more than 1e-09")
    with small:
        assert_same_gradient(k2, lambda r: (1 + 1e-8) * k2(r))
    assert assert_same_gradient(k2, lambda r: (1 + 1e-8) * k2(r), tolerance=1e-6) > 1e-9
    with pytest.raises(AssertionError):
        assert_same_gradient(k2, lambda r: -k2(r))

    # Alike on policy, apart off policy.
    def on_behaviour(r):
        return r.token_sum((r.teacher_logprobs - r.behavior_logprobs) * -r.student_logprobs)

    assert_same_gradient(k2, on_behaviour)
    with pytest.raises(AssertionError):
        assert_same_gradient(k2, on_behaviour, off_policy=0.3)


def test_the_group_of_a_coupled_loss_is_seen():
    def group(r):
        sums = (r.log_u.detach() * r.mask).sum(-1)
        return -((sums - sums.mean()) * (r.student_logprobs * r.mask).sum(-1)).mean()

    def alone(r):
        return -((r.log_u.detach() * r.mask).sum(-1) * (r.student_logprobs * r.mask).sum(-1)).mean() / 2

    assert assert_same_gradient(group, alone, batch_size=2) < 1e-9
    with pytest.raises(AssertionError):
        assert_same_gradient(group, lambda r: 2 * alone(r), batch_size=2)


def test_positions_that_an_environment_writes_are_seen():
    def first_too(r):
        """Trains the first token whoever wrote it."""
        every = r.log_u.detach() * -r.student_logprobs
        return r.token_sum(every) + ((1 - r.mask) * every)[:, 0].mean()

    # A prompt is written by an environment too, and is asked about by default.
    with pytest.raises(AssertionError, match="a prompt: differs"):
        assert_same_gradient(k2, first_too)
    with pytest.raises(AssertionError):
        assert_same_gradient(k2, first_too, environment=[0])
    assert assert_same_gradient(k2, lambda r: k2(r) + 0 * r.log_u.sum(), prompts=2, environment=[1]) < 1e-9


def first_steps(values, upto):
    return values * (torch.arange(values.shape[1]) < upto)


@pytest.mark.parametrize(
    ("second", "where"),
    [
        (lambda r: (r.log_u.square() / 2).sum(-1).mean(), "rollouts that end early"),
        (lambda r: k2(r) + 0.1 * (r.tokens > 6).double().mean() * r.student_logprobs.sum(), "tokens"),
        (lambda r: r.token_sum(first_steps(r.log_u.square() / 2, 3)), "5 steps"),
        (lambda r: r.token_sum(r.log_u.clamp(-12, 12).square() / 2), "log-ratios up to 30"),
    ],
    ids=["padding counted", "rare tokens", "first steps", "clamped"],
)
def test_losses_that_are_alike_on_the_panel_alone_are_told_apart(second, where):
    with pytest.raises(AssertionError, match=where):
        assert_same_gradient(k2, second)


def test_what_a_loss_refuses_is_not_compared():
    def full_lengths_only(r):
        if float(r.mask.min()) < 1.0 or r.student_logits.shape[-1] != 4:
            raise ValueError("four tokens, full lengths")
        return k2(r)

    assert assert_same_gradient(k2, full_lengths_only) < 1e-9
    padded = lambda r: (r.log_u.square() / 2).sum(-1).mean()  # noqa: E731
    with pytest.raises(AssertionError, match="rollouts that end early"):
        assert_same_gradient(k2, padded)
    with pytest.raises(AssertionError, match="a prompt"):
        assert_same_gradient(k2, padded, lengths="fixed")


def test_settings_of_rollouts_reach_both_losses():
    def to_two(r, shares=(0.5, 0.5)):
        return sum(c * k2_to(r, each.logprobs) for c, each in zip(shares, r.teachers, strict=True))

    def k2_to(r, logprobs):
        return r.token_sum(-(logprobs - r.student_logprobs).detach() * r.student_logprobs)

    assert assert_same_gradient(to_two, lambda r: to_two(r), teachers=2) == 0.0
    with pytest.raises(AssertionError):
        assert_same_gradient(to_two, lambda r: to_two(r, (0.6, 0.4)), teachers=2)
    with pytest.raises(InvalidArgumentError, match="divergence"):
        assert_same_gradient(k2, k2, divergence="jsd")


def test_what_cannot_be_compared_is_an_error():
    with pytest.raises(InvalidArgumentError, match="off_policy"):
        assert_same_gradient(k2, k3, off_policy=-1.0)
    with pytest.raises(InvalidArgumentError, match="tolerance"):
        assert_same_gradient(k2, k3, tolerance=-1.0)
    with pytest.raises(LossError, match="scalar"):
        assert_same_gradient(k2, lambda r: r.log_u)
    assert torch.get_default_dtype() == torch.float32


def unmasked(r):
    return (r.log_u.square() / 2).sum() / len(r.tokens)


def unmasked_mean(r):
    return (r.log_u.square() / 2).mean()


@pytest.mark.parametrize("loss", some([unmasked_mean, unmasked]))
def test_a_loss_that_counts_padding_passes_no_assertion(loss):
    with pytest.raises(AssertionError, match="is not unbiased up to scale for reverse_kl"):
        assert_unbiased(loss, "reverse_kl", up_to_scale=True)
    with pytest.raises(AssertionError, match="does not minimise reverse_kl"):
        assert_minimises(loss, "reverse_kl")
    with pytest.raises(AssertionError, match="is not unbiased for reverse_kl"):
        assert_unbiased(loss, "reverse_kl")


class Long:
    """A loss whose name has as many lines as the repr of a large module."""

    def __init__(self, loss):
        self.loss = loss

    def __call__(self, r):
        return self.loss(r)

    def __repr__(self):
        return "\n".join(f"(layer {n})" for n in range(60))


@pytest.mark.slow
def test_failures_are_at_most_forty_lines():
    failing = [
        lambda: assert_unbiased(Long(k3), "reverse_kl"),
        lambda: assert_minimises(Long(k3), "reverse_kl"),
        lambda: assert_same_gradient(Long(k3), k2),
    ]
    for fails in failing:
        with pytest.raises(AssertionError) as caught:
            fails()
        lines = str(caught.value).splitlines()
        assert len(lines) == 40 and "print(report) for the rest" in lines[-1]
    # The report itself is whole.
    assert len(str(audit(Long(k3), "reverse_kl")).splitlines()) > 60
