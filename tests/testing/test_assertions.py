"""The testing layer: strategies give valid objects that shrink, assertions fail with the audit as their message."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import opdtheory
from opdtheory import TabularPolicy, audit, divergence, estimator, testing
from opdtheory.auditing import VERDICTS
from opdtheory.divergences import names
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.estimators import Claim, Estimator
from opdtheory.estimators.base import Assumptions
from opdtheory.rollouts import Rollouts
from opdtheory.testing import (
    assert_claim,
    assert_unbiased,
    claim_settings,
    divergences,
    gradient_gap,
    policies,
    policy_pairs,
    rollouts,
)


def minimal(strategy, condition=lambda value: True):
    settings = hypothesis.settings(max_examples=500, deadline=None, database=None, derandomize=True)
    return hypothesis.find(strategy, condition, settings=settings)


def python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120
    )


def k1(r):
    return r.token_sum(-r.log_u)


def k2(r):
    return r.token_sum(r.log_u.square() / 2)


def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)


# Strategies.


@pytest.mark.parametrize("name", names())
def test_every_divergence_is_drawn(name):
    assert minimal(divergences(), lambda d: d.name == name).name == name


@given(divergences())
def test_divergences_are_of_the_catalogue(d):
    assert divergence(d.name, **d.parameters) == d


@given(divergences(families=False, smooth=True))
def test_divergences_can_be_restricted(d):
    assert not d.parameters and d.name != "total_variation"


def test_divergences_shrink_to_the_reverse_kl():
    assert minimal(divergences()).label == "reverse_kl"
    assert minimal(divergences(), lambda d: d.parameters).label == "skew_jsd(beta=0.5)"
    assert minimal(divergences(), lambda d: d.parameters.get("alpha", 0.0) > 0.7).label == "alpha(alpha=0.71)"


@given(policies(vocab_size=(2, 5), horizon=(1, 2), eos="any"))
def test_policies_keep_within_their_sizes(policy):
    assert isinstance(policy, TabularPolicy)
    assert 2 <= policy.vocab_size <= 5 and policy.horizon in (1, 2) and policy.eos in (None, 0)
    assert max(float(level.abs().max()) for level in policy.logits) <= 2.0


@given(policies(vocab_size=3, horizon=2, eos=2, zeros=1))
def test_sizes_can_be_fixed(policy):
    assert (policy.vocab_size, policy.horizon, policy.eos) == (3, 2, 2)
    for level in policy.logits:
        assert torch.isneginf(level).sum(-1).eq(1).all() and torch.isneginf(level[:, -1]).all()


def test_policies_shrink_to_a_small_uniform_bandit():
    policy = minimal(policies())
    assert [level.tolist() for level in policy.logits] == [[[0.0, 0.0]]] and policy.eos is None
    large = minimal(policies(vocab_size=6, horizon=3))  # too many logits to draw one by one
    assert not any(level.any() for level in large.logits)


def test_every_kind_of_policy_is_drawn():
    sharp = minimal(policies(sharp=True), lambda p: float(p.logits[0].softmax(-1).max()) > 1 - 1e-9)
    assert sharp.horizon == 1 and sharp.vocab_size == 2
    assert torch.isneginf(minimal(policies(zeros=(0, 2)), lambda p: torch.isneginf(p.logits[0]).any()).logits[0]).any()
    assert minimal(policies(), lambda p: p.eos is not None).eos == 0
    assert minimal(policies(), lambda p: p.horizon == 3 and p.vocab_size == 4).horizon == 3


@given(policy_pairs(zeros=(0, 2), sharp=True))
def test_pairs_range_over_the_same_sequences_and_share_their_zeros(pair):
    student, teacher = pair
    assert [getattr(student, key) == getattr(teacher, key) for key in ("vocab_size", "horizon", "eos")] == [True] * 3
    for ours, theirs in zip(student.logits, teacher.logits, strict=True):
        assert torch.equal(torch.isneginf(ours), torch.isneginf(theirs))


@given(policy_pairs(distinct=True))
def test_distinct_pairs_differ_in_every_row(pair):
    for ours, theirs in zip(*(policy.logits for policy in pair), strict=True):
        assert ((ours.softmax(-1) - theirs.softmax(-1)).abs().amax(-1) > 1e-9).all()


def test_pairs_shrink_to_equal_uniform_bandits():
    student, teacher = minimal(policy_pairs())
    assert student.logits[0].tolist() == teacher.logits[0].tolist() == [[0.0, 0.0]]


def test_near_equal_pairs_are_drawn():
    def near(pair):
        return 0 < gradient_gap(pair[0].logits, pair[1].logits) < 1e-4

    assert near(minimal(policy_pairs(), near))


@given(rollouts(off_policy=True))
def test_rollouts_are_valid_and_differentiable(r):
    assert isinstance(r, Rollouts) and r.student_logits.requires_grad
    (gradient,) = torch.autograd.grad(r.token_sum(r.log_u.square()), r.student_logits)
    assert torch.isfinite(gradient).all()
    assert not gradient[r.mask == 0].any()


@given(rollouts(batch_size=2, horizon=3, vocab_size=5, masked=False, dtype=torch.float32))
def test_rollouts_obey_their_settings(r):
    assert r.student_logits.shape == (2, 3, 5) and r.student_logits.dtype == r.mask.dtype == torch.float32
    assert r.mask.all() and torch.equal(r.behavior_logprobs, r.student_logprobs.detach())


def test_rollouts_shrink_to_one_uniform_token():
    r = minimal(rollouts())
    assert r.tokens.tolist() == [[0]] and r.mask.tolist() == [[1.0]]
    assert r.student_logits.tolist() == r.teacher_logits.tolist() == [[[0.0, 0.0]]]


def test_variable_lengths_and_tokens_of_an_environment_are_drawn():
    small = rollouts(vocab_size=2, horizon=(1, 3), batch_size=(1, 2))
    assert minimal(small, lambda r: r.mask.sum(-1).unique().numel() > 1).tokens.shape == (2, 1)
    minimal(small, lambda r: ((r.mask[:, :-1] == 0) & (r.mask[:, 1:] == 1)).any())


@pytest.mark.parametrize("sizes", [0, (3, 2), (0, 2)])
@pytest.mark.parametrize("strategy", [policies, policy_pairs, rollouts])
def test_impossible_sizes_are_refused_by_name(strategy, sizes):
    @given(st.data())
    @hypothesis.settings(max_examples=1, database=None)
    def draw(data):
        with pytest.raises(InvalidArgumentError, match="vocab_size"):
            data.draw(strategy(vocab_size=sizes))

    draw()


def test_a_failing_property_is_reported_on_a_small_case():
    """The counterexample to "plain OPD is unbiased for the forward KL" is a bandit."""

    def fails(pair):
        biased = opdtheory.expected_gradient(estimator("opd", "forward_kl"), *pair)
        return gradient_gap(biased, opdtheory.exact_gradient(*pair, "forward_kl")) > 1e-6

    student, _ = minimal(policy_pairs(), fails)
    assert student.horizon == 1 and student.vocab_size == 2 and student.eos is None


# assert_unbiased.


@pytest.mark.parametrize(
    ("loss", "objective"),
    [(k2, "reverse_kl"), (k3, "forward_kl"), (estimator("full_vocab", "jsd"), divergence("jsd"))],
)
def test_an_unbiased_loss_passes(loss, objective):
    report = assert_unbiased(loss, objective, eos=0)
    assert report.verdict == "exact" and report.settings["eos"] == 0


@pytest.mark.parametrize(("loss", "verdict"), [(k1, "zero"), (k3, "other_objective")])
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


# assert_claim.


@pytest.mark.parametrize(
    "loss",
    [
        estimator("k1_loss"),
        estimator("k2_loss"),
        estimator("k3_loss"),
        estimator("opd_plus", "jsd"),
        estimator("opd", divergence("skew_reverse_kl", lam=0.1)),
        estimator("return_to_go", "jsd", gamma=0.5),
        estimator("opd_plus", "jsd", reduction="token_mean"),
        estimator("full_vocab", "chi2", importance="prefix"),
    ],
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
    ],
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


# gradient_gap.


def test_the_gap_is_relative_to_what_is_large():
    one, large = torch.ones(2), torch.full((2,), 100.0)
    assert gradient_gap([one, one], [one, one]) == 0.0 == gradient_gap([], [])
    assert gradient_gap([one + 0.5], [one]) == 0.5
    assert gradient_gap([large + 0.5], [large]) == 0.005
    assert gradient_gap([one * torch.nan], [one]) == gradient_gap([one / 0], [one]) == float("inf")
    for wrong in ([one], [one, torch.ones(3)]):
        with pytest.raises(InvalidArgumentError, match="actual.*shapes"):
            gradient_gap(wrong, [one, one])


# Imports.


def test_all_public_names_are_there():
    assert testing is opdtheory.testing
    assert set(testing.__all__) <= set(dir(testing))
    for name in testing.__all__:
        assert getattr(testing, name).__doc__
    with pytest.raises(AttributeError, match="no_such"):
        testing.no_such  # noqa: B018


def test_importing_the_library_leaves_the_testing_layer_alone():
    done = python("import opdtheory, sys; assert not any('testing' in m for m in sys.modules if 'opdtheory' in m)")
    assert done.returncode == 0, done.stderr


def test_assertions_work_without_hypothesis_and_strategies_say_what_is_missing():
    done = python(
        """
        import sys
        sys.modules["hypothesis"] = None
        from opdtheory.testing import assert_unbiased
        assert_unbiased(lambda r: r.token_sum(r.log_u.square() / 2), "reverse_kl")
        try:
            from opdtheory.testing import policies
        except ImportError as error:
            assert "pip install opdtheory[testing]" in str(error), error
        else:
            raise SystemExit("no ImportError")
        """
    )
    assert done.returncode == 0, done.stderr
