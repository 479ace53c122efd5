"""What a claim may be: sums, softened distributions, teachers, a base, histories, micro-batches, a reward."""

from __future__ import annotations

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing import quick_verdict
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.rollouts import Rollouts
from opdtheory.testing import assert_minimises, assert_unbiased
from tests.losses import k1, k2, k3
from tests.sparse import some


def vocabulary(
    r: Rollouts, divergence: str, teacher: Tensor | None = None, tau: tuple[float, float] = (1, 1)
) -> Tensor:
    """The divergence of the whole vocabulary at every token, by its definition."""
    log_p = (r.student_logits / tau[0]).log_softmax(-1)
    log_q = ((r.teacher_logits if teacher is None else teacher) / tau[1]).log_softmax(-1)
    log_u = log_q - log_p
    terms = {
        "reverse_kl": lambda: log_p.exp() * -log_u,
        "forward_kl": lambda: log_q.exp() * log_u,
        "chi2": lambda: log_p.exp() * log_u.expm1().square(),
        "hellinger": lambda: log_p.exp() * (log_u / 2).expm1().square(),
    }
    return terms[divergence]().sum(-1)


slow = pytest.mark.slow

SUMS = {
    "9*reverse_kl + forward_kl": {"reverse_kl": 9, "forward_kl": 1},
    "0.5*chi2 + 2*hellinger": {"chi2": 0.5, "hellinger": 2},
    "reverse_kl + 0.25*chi2 + hellinger": {"reverse_kl": 1, "chi2": 0.25, "hellinger": 1},
    "2*forward_kl": {"forward_kl": 2},
}


def summed(r: Rollouts, weights: dict[str, float]) -> Tensor:
    return r.token_sum(sum(c * vocabulary(r, name) for name, c in weights.items()))


@pytest.mark.parametrize("claim", some(SUMS, 2))
def test_a_weighted_sum_is_a_claim(claim):
    report = opd.audit(lambda r: summed(r, SUMS[claim]), claim, details=False)
    assert report.verdict == "exact" and report.relative_bias <= 1e-9
    assert report.objective == claim
    # The twin: other weights.
    wrong = {name: c + (name == "forward_kl" or name == "hellinger") for name, c in SUMS[claim].items()}
    verdict = opd.audit(lambda r: summed(r, wrong), claim, details=False).verdict
    assert verdict == ("exact_up_to_scale" if len(wrong) == 1 else "biased")


@pytest.mark.parametrize("granularity", ["token_local", "token_return", "sequence"])
def test_a_sampled_sum_is_exact_in_every_granularity(granularity):
    claim = opd.divergence("9*reverse_kl + forward_kl")

    def loss(r: Rollouts, factor: float = 9.0) -> Tensor:
        u, log_u = r.log_u.detach().exp() * r.mask, r.log_u.detach() * r.mask
        if granularity == "sequence":
            total = log_u.sum(-1, keepdim=True)
            weight = (factor * total + total.exp()).expand_as(log_u)
        else:
            weight = factor * log_u + u
            if granularity == "token_return":
                later = (-factor * log_u + u * log_u).flip(-1).cumsum(-1).flip(-1)
                weight = weight - (later - (-factor * log_u + u * log_u))
        return r.token_sum(-weight * r.student_logprobs)

    assert opd.audit(loss, claim, granularity, details=False).verdict == "exact"
    assert opd.audit(lambda r: loss(r, 8.0), claim, granularity, details=False).verdict != "exact"


@pytest.mark.slow
def test_what_a_biased_sum_is_told():
    report = opd.audit(lambda r: summed(r, {"reverse_kl": 9, "forward_kl": 1}), "8*reverse_kl + forward_kl")
    assert report.verdict == "biased"
    assert report.identified.read().label == "9 * reverse_kl + forward_kl"
    assert any("forward KL" in remedy.text and remedy.verified for remedy in report.remedies)
    assert opd.audit(lambda r: summed(r, {"chi2": 1}), "9*reverse_kl + forward_kl").verdict == "other_objective"


def test_estimators_take_sums():
    for name in ("opd_plus", "opd_plus_centred", "full_vocab"):
        loss = opd.estimator(name, "0.5*chi2 + 2*hellinger")
        assert opd.audit(loss, loss.claim.divergence, details=False).verdict == "exact"


def both(loss, objective="reverse_kl", granularity="token_local", **settings) -> str:
    """The verdict of an audit, which the quick one confirms."""
    verdict = opd.audit(loss, objective, granularity, details=False, **settings).verdict
    assert quick_verdict(loss, objective, granularity, **settings) == verdict or verdict == "other_objective"
    return verdict


@pytest.mark.parametrize(
    ("taus", "name"),
    [
        ((1.0, 2.0), "reverse_kl"),
        pytest.param((0.5, 1.5), "chi2", marks=slow),
        pytest.param((2.0, 2.0), "forward_kl", marks=slow),
        pytest.param((3.0, 1.0), "forward_kl", marks=slow),
    ],
)
def test_losses_of_softened_distributions_are_exact_for_them(taus, name):
    def loss(r: Rollouts, pair: tuple[float, float] = taus) -> Tensor:
        return r.token_sum(vocabulary(r, name, tau=pair))

    settings = {"student_temperature": taus[0], "teacher_temperature": taus[1], "eos": 0}
    assert both(loss, name, **settings) == "exact"
    assert both(lambda r: taus[0] ** 2 * loss(r), name, **settings) in ("exact", "exact_up_to_scale")
    assert both(loss, name) != "exact"
    assert both(lambda r: loss(r, (taus[0] + 0.1, taus[1])), name, **settings) == "biased"
    assert both(lambda r: loss(r, (taus[0], taus[1] + 0.1)), name, **settings) == "biased"


def scores_at(tau: float, r: Rollouts) -> tuple[Tensor, Tensor]:
    """The log-probabilities of the sampled tokens under both softened distributions."""
    pair = ((z / tau).log_softmax(-1) for z in (r.student_logits, r.teacher_logits))
    student, teacher = (z.gather(-1, r.tokens.unsqueeze(-1)).squeeze(-1) for z in pair)
    return student, teacher


@pytest.mark.parametrize("tau", some([0.5, 2.0]))
def test_scores_at_a_temperature_need_rollouts_at_that_temperature(tau):
    def loss(r: Rollouts) -> Tensor:
        log_p, log_q = scores_at(tau, r)
        return r.token_sum((log_q - log_p).square() / 2)

    softened = {"student_temperature": tau, "teacher_temperature": tau}
    assert both(loss, **softened, sampling_temperature=tau) == "exact"
    assert both(loss, **softened, sampling_temperature=tau, eos=2) == "exact"
    # T10: sampled at one, the scores of the softened student have a mean.
    assert both(loss, **softened) == "biased"
    assert both(k2, sampling_temperature=tau) == "biased"


@pytest.mark.slow
def test_a_softened_loss_is_described_as_such():
    report = opd.audit(
        lambda r: r.token_sum(vocabulary(r, "forward_kl", tau=(2, 2))),
        "forward_kl",
        student_temperature=2.0,
        teacher_temperature=2.0,
    )
    assert report.faithful and "student at temperature 2 and teacher at 2" in report.summary()
    assert report.weight.depends_on_ratio_only and report.form.label == "forward_kl"
    other = opd.audit(k3, "jsd", student_temperature=2.0, teacher_temperature=2.0, details=False)
    assert other.verdict == "biased" and other.granularity == "token_local"
    named = opd.audit(
        lambda r: r.token_sum(vocabulary(r, "chi2", tau=(2, 2))),
        "forward_kl",
        student_temperature=2.0,
        teacher_temperature=2.0,
    )
    assert (named.verdict, named.descends) == ("other_objective", "chi2")


def token_ratio(r: Rollouts) -> Tensor:
    return (r.student_logprobs - r.behavior_logprobs).exp().detach()


@pytest.mark.parametrize(
    "settings", [{}, *(pytest.param(each, marks=slow) for each in ({"eos": 0}, {"prompts": 2, "environment": (1,)}))]
)
@pytest.mark.slow
def test_histories_of_the_sampler(settings):
    def ratio(r: Rollouts) -> Tensor:
        return r.token_sum(-token_ratio(r) * r.log_u.detach() * r.student_logprobs)

    def prefixes(r: Rollouts) -> Tensor:
        log_ratio = r.mask * (r.student_logprobs - r.behavior_logprobs).detach()
        return r.token_sum(-log_ratio.cumsum(-1).exp() * r.log_u.detach() * r.student_logprobs)

    sampler = {"off_policy": 0.3, "histories": "sampler", **settings}
    student = {"off_policy": 0.3, **settings}
    whole = opd.estimator("full_vocab", "reverse_kl")
    for loss, at_sampler, at_student in ((ratio, "exact", "biased"), (prefixes, "biased", "exact")):
        assert both(loss, **sampler) == at_sampler
        assert both(loss, **student) == at_student
    assert both(whole, **sampler) == "exact" and both(whole, **student) == "biased"
    assert both(k2, **sampler) == "biased"


def test_a_sound_loss_at_the_samplers_histories_passes_every_check():
    whole = opd.estimator("full_vocab", "jsd")
    report = assert_unbiased(whole, "jsd", off_policy=0.5, histories="sampler")
    assert report.faithful and "histories of the sampler" in report.summary()
    with pytest.raises(AssertionError):
        assert_unbiased(whole, "jsd", off_policy=0.5)
    tempered = {"sampling_temperature": 0.7, "off_policy": 0.2, "histories": "sampler"}
    assert assert_minimises(whole, "jsd", **tempered).faithful


@pytest.mark.parametrize(
    ("weights", "name"),
    [
        ((2.0, 1.0), "hellinger"),
        pytest.param((), "forward_kl", marks=slow),
        pytest.param((0.8, 0.2), "reverse_kl", marks=slow),
    ],
)
@pytest.mark.slow
def test_several_teachers(weights, name):
    def loss(r: Rollouts, shares: tuple[float, ...] = weights or (0.5, 0.5)) -> Tensor:
        return r.token_sum(sum(c * vocabulary(r, name, t.logits) for c, t in zip(shares, r.teachers, strict=True)))

    settings = {"teachers": 2, "teacher_weights": weights, "eos": 0}
    assert both(loss, name, **settings) == "exact"
    assert both(lambda r: loss(r, (0.6, 0.4)), name, **settings) == "biased"
    assert both(lambda r: loss(r, (1.0, 0.0)), name, **settings) == "biased"


@pytest.mark.parametrize("granularity", ["token_local", "sequence"])
@pytest.mark.slow
def test_sampled_rewards_of_three_teachers(granularity):
    def loss(r: Rollouts) -> Tensor:
        total = sum(t.logprobs - r.student_logprobs for t in r.teachers).detach() / 3 * r.mask
        weight = total.sum(-1, keepdim=True) if granularity == "sequence" else total
        return r.token_sum(-weight * r.student_logprobs)

    assert both(loss, "reverse_kl", granularity, teachers=3) == "exact"
    # The twins: another divergence, which is named among those to three teachers, and one teacher less.
    assert both(loss, "forward_kl", granularity, teachers=3) == "other_objective"
    assert both(loss, "reverse_kl", granularity, teachers=3, teacher_weights=(0.5, 0.5, 0.1)) == "biased"


@slow
def test_several_teachers_in_full():
    report = opd.audit(
        lambda r: r.token_sum(sum(vocabulary(r, "chi2", t.logits) for t in r.teachers) / 2), "chi2", teachers=2
    )
    assert report.faithful and "the sum over 2 teachers" in report.summary()
    assert "not a function" not in report.summary()
    # A loss of the first teacher alone is exact for it, and no loss of both.
    assert both(opd.estimator("full_vocab", "chi2"), "chi2") == "exact"
    assert both(opd.estimator("full_vocab", "chi2"), "chi2", teachers=2) == "biased"


@pytest.mark.parametrize("lam", [1.25, pytest.param(0.5, marks=slow), pytest.param(2.0, marks=slow)])
@pytest.mark.slow
def test_an_extrapolated_teacher(lam):
    def loss(r: Rollouts, factor: float = lam) -> Tensor:
        reward = factor * (r.teacher_logprobs - r.base_logprobs) - (r.student_logprobs - r.base_logprobs)
        return r.token_sum(-reward.detach() * r.student_logprobs)

    settings = {"base": True, "extrapolation": lam}
    assert both(loss, **settings) == "exact"
    assert both(loss, **settings, eos=0) == "exact"
    assert both(loss, "reverse_kl", "sequence", **settings) == "other_objective"
    assert both(lambda r: loss(r, lam + 0.1), **settings) == "biased"
    assert both(loss, base=True) == "biased"
    whole = opd.audit(
        lambda r: r.token_sum(vocabulary(r, "chi2", lam * r.teacher_logits + (1 - lam) * r.base_logits)),
        "chi2",
        **settings,
    )
    assert whole.faithful and f"extrapolated to {lam:g}" in whole.summary()


@pytest.mark.slow
def test_a_base_alone_changes_no_claim():
    assert both(k2, base=True) == "exact"
    assert both(lambda r: k2(r) + r.token_sum(r.student_logprobs - r.base_logprobs), base=True) == "exact"
    penalty = lambda r: r.token_sum((r.student_logprobs - r.base_logprobs).square() / 2)  # noqa: E731
    assert both(lambda r: k2(r) + 0.1 * penalty(r), base=True) == "biased"


@pytest.mark.parametrize(("batch_size", "microbatches"), some([(4, 2), (3, 3), (6, 3)], 2))
def test_micro_batches(batch_size, microbatches):
    settings = {"batch_size": batch_size, "microbatches": microbatches}
    assert both(k2, **settings) == "exact"
    report = opd.audit(k2, "reverse_kl", accumulate="sum", details=False, **settings)
    assert report.verdict == "exact_up_to_scale" and report.scale == pytest.approx(microbatches)
    assert report.settings["batch_size"] == batch_size and report.settings["microbatches"] == microbatches

    def by_leave_one_out(r: Rollouts) -> Tensor:
        log_u, count = (r.mask * r.log_u).detach(), len(r.tokens)
        if count == 1:
            return r.token_sum(-log_u * r.student_logprobs)
        return r.token_sum(-(log_u - log_u.mean(0, keepdim=True)) * (count / (count - 1)) * r.student_logprobs)

    assert both(by_leave_one_out, **settings) == "exact"


def test_the_noise_of_micro_batches_is_that_of_the_whole_batch():
    whole, parts = (opd.audit(k2, "reverse_kl", batch_size=4, microbatches=m, details=False) for m in (1, 2))
    # The panels differ in size with the batch that is enumerated, so the ratio to the full vocabulary is compared.
    same = opd.audit(k2, "reverse_kl", batch_size=2, details=False)
    for pair, alone in zip(parts.pairs, same.pairs, strict=True):
        assert pair.variance == pytest.approx(alone.variance / 2)
        assert pair.full_vocabulary_variance == pytest.approx(alone.full_vocabulary_variance / 2)
    assert whole.verdict == parts.verdict == "exact"


def reinforce(r: Rollouts) -> Tensor:
    return r.token_sum(-r.rewards.unsqueeze(-1) * r.student_logprobs)


def k1_penalty(r: Rollouts) -> Tensor:
    return r.token_sum(-r.log_u.detach() * r.student_logprobs)


@pytest.mark.parametrize(
    "settings", [{}, pytest.param({"eos": 0}, marks=slow), pytest.param({"prompts": 2, "eos": 1}, marks=slow)]
)
@pytest.mark.parametrize(
    ("penalty", "verdict"), some([(k1_penalty, "exact"), (k1, "zero"), (k2, "exact"), (k3, "other_objective")], 2)
)
def test_a_penalty_beside_a_reward_is_judged_on_its_own(penalty, verdict, settings):
    loss = lambda r: penalty(r) + 3.0 * reinforce(r)  # noqa: E731
    report = opd.audit(loss, "reverse_kl", reward=True, details=False, **settings)
    assert report.verdict == verdict and report.reward.coefficient == pytest.approx(3.0)
    assert quick_verdict(loss, "reverse_kl", reward=True, eos=settings.get("eos")) in (verdict, "biased")
    # The twin: without the setting, the reward's gradient counts as an error.
    fixed = lambda r: penalty(r) + r.token_sum(-(r.tokens * r.mask).sum(-1, keepdim=True) * r.student_logprobs)  # noqa: E731
    assert opd.audit(fixed, "reverse_kl", details=False, **settings).verdict == "biased"


@pytest.mark.slow
def test_baselines_of_the_group_scale_the_rewards_part():
    def loss(r: Rollouts) -> Tensor:
        return k1_penalty(r) + r.token_sum(-(r.rewards - r.rewards.mean()).unsqueeze(-1) * r.student_logprobs)

    report = opd.audit(loss, "reverse_kl", reward=True, batch_size=2)
    assert report.verdict == "exact" and report.reward.coefficient == pytest.approx(0.5)  # T7e: (G - 1)/G
    assert report.summary().startswith("Set apart: 0.5 times the policy gradient of the task's reward")


def test_a_reward_that_is_standardised_is_no_policy_gradient():
    def loss(r: Rollouts) -> Tensor:
        spread = r.rewards.std(unbiased=False) + 0.1
        advantage = (r.rewards - r.rewards.mean()) / spread
        return k1_penalty(r) + r.token_sum(-advantage.unsqueeze(-1) * r.student_logprobs)

    report = opd.audit(loss, "reverse_kl", reward=True, batch_size=2, details=False)
    assert report.verdict == "biased" and report.reward.error > 0.05
    assert "something else" in report.summary()


@pytest.mark.parametrize(
    ("argument", "settings"),
    [
        ("student_temperature", {"student_temperature": 0.0}),
        ("teacher_temperature", {"teacher_temperature": -1.0}),
        ("sampling_temperature", {"sampling_temperature": float("inf")}),
        ("histories", {"histories": "teacher"}),
        ("teachers", {"teachers": 0}),
        ("teacher_weights", {"teachers": 2, "teacher_weights": (1.0,)}),
        ("teacher_weights", {"teachers": 2, "teacher_weights": (1.0, -1.0)}),
        ("extrapolation", {"extrapolation": 1.5}),
        ("extrapolation", {"extrapolation": 1.5, "base": True, "teachers": 2}),
        ("extrapolation", {"extrapolation": float("nan"), "base": True}),
        ("microbatches", {"microbatches": 0}),
        ("microbatches", {"microbatches": 3, "batch_size": 4}),
        ("accumulate", {"accumulate": "median"}),
        ("reward", {"reward": True, "student_temperature": 2.0}),
        ("reward", {"reward": True, "method": "monte_carlo"}),
        ("teachers", {"teachers": 2, "method": "monte_carlo"}),
        ("histories", {"histories": "sampler", "method": "monte_carlo"}),
        ("student_temperature", {"student_temperature": 2.0, "method": "monte_carlo"}),
    ],
)
def test_settings_out_of_range_are_refused_by_name(argument, settings):
    with pytest.raises(InvalidArgumentError) as caught:
        opd.audit(k2, "reverse_kl", **settings)
    assert caught.value.argument == argument


@pytest.mark.parametrize("field", ["teachers", "base_logits", "base_logprobs", "rewards"])
def test_a_loss_that_reads_what_no_setting_supplies_is_told_which(field):
    with pytest.raises(InvalidArgumentError, match="audit with"):
        opd.audit(lambda r: k2(r) + 0.0 * getattr(r, field)[0].sum(), "reverse_kl")


def test_a_coupled_batch_that_is_too_large_for_a_setting_is_not_sampled():
    def coupled(r: Rollouts) -> Tensor:
        return r.token_sum(-(r.log_u - r.log_u.mean(0, keepdim=True)).detach() * r.student_logprobs)

    with pytest.raises(BudgetExceededError):
        opd.audit(coupled, "reverse_kl", batch_size=40, teachers=2)
    assert opd.audit(k2, "reverse_kl", batch_size=40, base=True, details=False).verdict == "exact"
