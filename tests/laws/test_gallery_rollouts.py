"""The gallery's losses about rollouts, samplers, teachers and rewards: verdicts pinned, evidence that is no audit."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator

import pytest
import torch

import opdtheory as opd
from examples.published_losses import claims_rollouts, gallery, papers
from examples.published_losses import papers_rollouts as rollouts
from opdtheory.exact import local_gradient
from opdtheory.rollouts import Extras, Scored
from tests.sparse import some
from tests.tolerances import ALGEBRA, ENUMERATION, FINITE_DIFFERENCE

RECORDS = json.loads(gallery.RECORD.read_text(encoding="utf-8"))
ENTRY = {entry.function: entry for entry in claims_rollouts.ENTRIES}

# Verdict, what it descends, and for a biased one the cosine to two digits.
EXACT, SCALED, BIASED = "exact", "exact_up_to_scale", "biased"
EXPECTED: dict[str, tuple[str, str | None, float | None]] = {
    "mopd_top_2": (BIASED, None, 0.23),
    "deepseek_v4_opd": (EXACT, "reverse_kl", None),
    "exopd": (EXACT, "reverse_kl", None),
    "opd2": (BIASED, None, 0.38),
    "opd2_ungated": (BIASED, None, 0.27),
    "sdpo_trust_region": (EXACT, "reverse_kl", None),
    "slime_opsd": (BIASED, None, 0.02),
    "kdrl": (SCALED, "reverse_kl", None),
    "areal_distillation": (SCALED, "reverse_kl", None),
    "areal_joint": ("zero", None, None),
    "areal_joint_penalty": (BIASED, None, -0.62),
    "mimo_mopd": (EXACT, "reverse_kl", None),
    "nemotron_mopd": (BIASED, None, 0.98),
    "verl_token_is": (BIASED, None, 1.00),
    "verl_sequence_is": (BIASED, None, 1.00),
    "verl_sequence_mis": (BIASED, None, 0.95),
    "gspo_ratio": (BIASED, None, 0.93),
    "lightning_opd": (BIASED, None, 0.87),
    "prime_rl_reference_kl": (BIASED, None, 1.00),
    "deepseek_v32_k3_stale": (EXACT, "reverse_kl", None),
    "opd_plus_truncated": (BIASED, None, 1.00),
    "opd_plus_truncated_centred": (BIASED, None, 1.00),
    "score_centred": (BIASED, None, 0.98),
    "score_centred_truncated": (BIASED, None, 0.99),
}


def check(found: dict[str, object], function: str) -> None:
    verdict, descends, cosine = EXPECTED[function]
    assert (found["verdict"], found["descends"]) == (verdict, descends)
    if cosine is not None:
        assert float(str(found["cosine"])) == pytest.approx(cosine, abs=0.0051)


def test_every_entry_is_pinned():
    assert list(EXPECTED) == [entry.function for entry in claims_rollouts.ENTRIES]


@pytest.fixture(scope="module", params=some(claims_rollouts.ENTRIES, 8), ids=lambda entry: entry.function)
def audited(request: pytest.FixtureRequest) -> Iterator[tuple[gallery.Entry, opd.Audit]]:
    yield request.param, request.param.audit()


def test_an_audit_of_today_finds_what_is_pinned_and_recorded(audited):
    entry, audit = audited
    check(gallery.record(entry, audit), entry.function)
    assert gallery.record(entry, audit) == RECORDS[entry.function], "regenerate with: gallery.py --page"


def without_base(r: opd.Rollouts) -> torch.Tensor:
    return r.token_sum(-r.log_u.detach() * r.student_logprobs)


def k2_joint(r: opd.Rollouts) -> torch.Tensor:
    return r.token_sum(-r.rewards.unsqueeze(-1) * r.student_logprobs) + 0.005 * r.token_sum(r.log_u**2 / 2)


# Each twin is a loss got slightly wrong, or its neighbour; what passes for the right one must refuse it.
TWINS = {
    "no correction": ("mopd_top_2", papers.top_2_reverse_kl),
    "the first teacher alone": ("deepseek_v4_opd", without_base),
    "no extrapolation": ("exopd", without_base),
    "no base": ("sdpo_trust_region", without_base),
    "no gate": ("opd2", rollouts.opd2_ungated),
    "no delta": ("opd2_ungated", without_base),
    "no clamp": ("slime_opsd", opd.estimator("full_vocab", "jsd")),
    "the joint mode of AReaL": ("kdrl", rollouts.areal_joint),
    "ratio forgotten": ("areal_distillation", rollouts.lightning_opd),
    "k2 for k1": ("areal_joint", k2_joint),
    "k3 for k1": ("areal_joint_penalty", papers.grpo_k3),
    "no mask": ("nemotron_mopd", rollouts.deepseek_v32_k3_stale),
    "cut of the token for that of the rollout": ("verl_sequence_mis", rollouts.verl_token_is),
    "token's ratio": ("gspo_ratio", rollouts.deepseek_v32_k3_stale),
    "with the ratio": ("lightning_opd", rollouts.deepseek_v32_k3_stale),
    "k3 without the ratio": ("deepseek_v32_k3_stale", papers.grpo_k3),
    "not cut": ("score_centred_truncated", rollouts.score_centred),
}


@pytest.mark.parametrize("twin", some(TWINS))
def test_the_same_assertions_refuse_a_false_twin(twin):
    function, loss = TWINS[twin]
    entry = ENTRY[function]
    found = opd.audit(loss, entry.objective, entry.granularity, details=False, **entry.settings)
    with pytest.raises(AssertionError):
        check(gallery.record(entry, found), function)


# The first is the formula of TRL's default penalty, of which the gallery's README says this.
RATIO_OF_A_TOKEN = {
    papers.grpo_k3_corrected: EXACT,
    rollouts.deepseek_v32_k3_stale: EXACT,
    rollouts.areal_distillation: SCALED,
}


@pytest.mark.parametrize(("histories", "cosine"), [("sampler", 1.0), ("student", 0.970)])
@pytest.mark.parametrize("loss", RATIO_OF_A_TOKEN)
def test_the_ratio_of_a_token_is_right_at_the_samplers_histories_only(loss, histories, cosine):
    found = opd.audit(loss, "reverse_kl", off_policy=0.3, histories=histories, details=False)
    assert found.verdict == (RATIO_OF_A_TOKEN[loss] if histories == "sampler" else BIASED)
    assert found.cosine == pytest.approx(cosine, abs=5e-4)


# What follows is the evidence: what is said of a loss beyond its verdict, derived by hand.


def random_rows(count: int, vocab_size: int, seed: int, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(count, vocab_size, generator=generator, dtype=torch.float64)).softmax(-1)


def one_step(row: torch.Tensor) -> opd.TabularPolicy:
    return opd.TabularPolicy([row.log().unsqueeze(0)])


def gradient(
    loss: Callable[[opd.Rollouts], torch.Tensor],
    p: torch.Tensor,
    q: torch.Tensor,
    behavior: torch.Tensor | None = None,
) -> torch.Tensor:
    sampler = None if behavior is None else one_step(behavior)
    return opd.expected_gradient(loss, one_step(p), one_step(q), behavior=sampler)[0][0]


def with_extras(
    loss: Callable[[opd.Rollouts], torch.Tensor],
    p: torch.Tensor,
    q: torch.Tensor,
    base: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
) -> torch.Tensor:
    """The expected gradient in the logits of one step, summed over the tokens here, for losses that use extras."""
    logits = p.log().clone().requires_grad_()

    def scored(row: torch.Tensor, token: int) -> Scored:
        return Scored(row.log().reshape(1, 1, -1), row.log()[token].reshape(1, 1))

    total = torch.zeros((), dtype=torch.float64)
    for token in range(len(p)):
        r = opd.Rollouts.from_logits(torch.tensor([[token]]), logits.reshape(1, 1, -1), q.log().reshape(1, 1, -1))
        extras = Extras(
            teachers=() if second is None else (scored(second, token),),
            base=None if base is None else scored(base, token),
        )
        total = total + p[token] * loss(opd.Rollouts.unchecked(**vars(r), extras=extras))
    (found,) = torch.autograd.grad(total, logits)
    return found


def derivative(value: Callable[[torch.Tensor], torch.Tensor], p: torch.Tensor) -> torch.Tensor:
    logits = p.log().clone().requires_grad_()
    (found,) = torch.autograd.grad(value(logits.softmax(-1)), logits)
    return found


def ascent(p: torch.Tensor, measure: torch.Tensor) -> torch.Tensor:
    """The gradient in the logits of p of a sampled-token loss whose tokens' scores get `measure` in expectation."""
    return -(measure - p * measure.sum())


def normalised(log_weights: torch.Tensor) -> torch.Tensor:
    return log_weights.softmax(-1)


def test_mopds_correction_makes_the_teacher_stationary_and_leaves_the_tail_free():
    p, q = random_rows(2, 5, seed=0)
    top = q.topk(2).indices

    def value(row: torch.Tensor, corrected: bool = True) -> torch.Tensor:
        kept, theirs = row[top], q[top]
        return (kept * (kept / theirs).log() + (theirs - kept if corrected else 0.0)).sum()

    assert gradient(rollouts.mopd_top_2, p, q) == pytest.approx(derivative(value, p), abs=ALGEBRA)
    bare = derivative(functools.partial(value, corrected=False), p)
    assert gradient(papers.top_2_reverse_kl, p, q) == pytest.approx(bare, abs=ALGEBRA)
    rest = torch.ones(5, dtype=torch.bool).index_fill(0, top, False).nonzero().squeeze(-1)
    spread = q.clone()
    spread[rest] = q[rest].flip(0)
    for at_rest in (q, spread):
        assert float(gradient(rollouts.mopd_top_2, at_rest, q).norm()) < ALGEBRA
        assert float(value(at_rest)) == pytest.approx(0.0, abs=ALGEBRA)
    assert float(value(p)) > 1e-3
    assert float(gradient(papers.top_2_reverse_kl, q, q).norm()) > 1e-2


def test_several_teachers_and_a_base_meet_in_geometric_mixtures():
    q, other, p = random_rows(3, 4, seed=1)
    mixture = normalised(0.7 * q.log() + 0.3 * other.log())
    beyond = normalised(1.25 * q.log() - 0.25 * other.log())
    near_base = normalised(0.05 * q.log() + 0.95 * other.log())

    def reverse_kl(target: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda row: (row * (row / target).log()).sum()

    cases = {"second": (rollouts.deepseek_v4_opd, mixture), "base": (rollouts.exopd, beyond)}
    for extra, (loss, target) in cases.items():
        field = functools.partial(with_extras, loss, q=q, **{extra: other})
        assert field(p=p) == pytest.approx(derivative(reverse_kl(target), p), abs=ALGEBRA)
        assert float(field(p=target).norm()) < ALGEBRA < 1e-2 < float(field(p=q).norm())
    field = functools.partial(with_extras, rollouts.sdpo_trust_region, q=q, base=other)
    assert field(p=p) == pytest.approx(derivative(reverse_kl(near_base), p), abs=ALGEBRA)
    assert float(field(p=near_base).norm()) < ALGEBRA < 1e-2 < float(field(p=q).norm())


def test_ungated_delta_is_linear_in_the_student():
    p, q, base = random_rows(3, 4, seed=2)

    def value(row: torch.Tensor) -> torch.Tensor:
        return (row * (base / q).log()).sum()

    assert with_extras(rollouts.opd2_ungated, p, q, base=base) == pytest.approx(derivative(value, p), abs=ALGEBRA)
    assert float(with_extras(rollouts.opd2_ungated, q, q, base=base).norm()) > 1e-2
    best = int((q / base).argmax())
    logits = p.log()
    for _ in range(2000):
        logits = logits - 0.5 * derivative(value, logits.softmax(-1))
    assert float(logits.softmax(-1)[best]) > 0.99


@pytest.mark.parametrize("factor", [1 + 1e-6, 1.1, 1.25, 2.0])
def test_opd2_rests_at_every_extrapolated_teacher(factor):
    q, base, _ = random_rows(3, 4, seed=3)
    p = normalised(factor * q.log() + (1 - factor) * base.log())
    assert float(with_extras(rollouts.opd2, p, q, base=base).norm()) < ALGEBRA
    assert float(with_extras(rollouts.opd2_ungated, p, q, base=base).norm()) > 1e-2


@pytest.mark.parametrize("factor", [0.0, 0.5, 1 - 1e-6])
def test_opd2_is_the_delta_itself_between_base_and_teacher(factor):
    q, base, _ = random_rows(3, 4, seed=3)
    p = normalised(factor * q.log() + (1 - factor) * base.log())
    ungated = with_extras(rollouts.opd2_ungated, p, q, base=base)
    assert with_extras(rollouts.opd2, p, q, base=base) == pytest.approx(ungated, abs=ALGEBRA)
    assert float(ungated.norm()) > 1e-2


def test_the_exact_flow_of_opd2_stops_short_of_the_teacher():
    # Explicit Euler steps of the exact gradient, until no token passes the gate.
    p, q, base = random_rows(3, 4, seed=3)
    logits, other = p.log(), p.log()
    for _ in range(4000):
        logits = logits - 0.02 * with_opd2_field(logits.softmax(-1), q, base)
        other = other - 0.2 * derivative(lambda row: (row * (row / q).log()).sum(), other.softmax(-1))
    at_rest = logits.softmax(-1)
    assert float(with_extras(rollouts.opd2, at_rest, q, base=base).norm()) < ALGEBRA
    assert float((at_rest * (at_rest / q).log()).sum()) > 0.1
    assert float((other.softmax(-1) * (other.softmax(-1) / q).log()).sum()) < ALGEBRA


def with_opd2_field(p: torch.Tensor, q: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    delta, imitation = (q / base).log(), (q / p).log()
    delta, imitation = delta - (p * delta).sum(), imitation - (p * imitation).sum()
    return ascent(p, p * torch.where(delta * imitation > 0, delta, 0.0))


def test_the_closed_form_of_opd2_is_the_losss():
    p, q, base = random_rows(3, 4, seed=4)
    assert with_extras(rollouts.opd2, p, q, base=base) == pytest.approx(with_opd2_field(p, q, base), abs=ALGEBRA)


def jsd(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    m = (p + q) / 2
    return ((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2


def test_a_clamped_jsd_corrects_only_students_near_the_teacher():
    p, q = random_rows(2, 4, seed=5, scale=1.5)
    assert float(jsd(p, q)) > 0.05
    assert float(gradient(rollouts.slime_opsd, p, q).norm()) == 0.0
    near = 0.9 * q + 0.1 * p
    assert 1e-4 < float(jsd(near, q)) < 0.05
    derived = derivative(lambda row: jsd(row, q), near)
    assert gradient(rollouts.slime_opsd, near, q) == pytest.approx(derived, abs=ALGEBRA)
    assert float(derivative(lambda row: jsd(row, q), p).norm()) > 1e-2


def test_areals_joint_penalty_does_not_see_the_teacher():
    p, q, other, stale = random_rows(4, 4, seed=6)
    assert float(gradient(rollouts.areal_joint_penalty, p, q).norm()) < ALGEBRA
    away = gradient(rollouts.areal_joint_penalty, p, q, behavior=stale)
    assert away == pytest.approx(stale - p, abs=ALGEBRA)
    assert away == pytest.approx(gradient(rollouts.areal_joint_penalty, p, other, behavior=stale), abs=ALGEBRA)
    assert away == pytest.approx(-derivative(lambda row: (stale * (stale / row).log()).sum(), p), abs=ALGEBRA)
    # A step of descent takes the student away from its sampler; k2 in its place comes nearer to the teacher.
    after = (p.log() - 1e-3 * away).softmax(-1)
    assert float((stale * (p / after).log()).sum()) > 1e-5
    k2 = gradient(lambda r: r.token_sum(r.log_u**2 / 2), p, q)
    assert k2 == pytest.approx(derivative(lambda row: (row * (row / q).log()).sum(), p), abs=ALGEBRA)


def test_with_a_token_mean_areals_penalty_moves_the_length_instead():
    # Two steps, token 0 ends the rollout: the expectation of 1/N is (1 + P(end first)) / 2.
    student, teacher = (opd.TabularPolicy.random(vocab_size=3, horizon=2, eos=0, seed=seed) for seed in (0, 1))
    found = opd.expected_gradient(rollouts.areal_joint_penalty, student, teacher)
    first = student.logits[0].softmax(-1)[0]
    derived = derivative(lambda row: row[0] / 2, first)
    assert found[0][0] == pytest.approx(derived, abs=ENUMERATION)
    assert float(found[1].norm()) < ENUMERATION < 1e-2 < float(derived.norm())


# What each puts on the score of a token, from the student, the teacher and the sampler, in one step.
MEASURES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "nemotron_mopd": lambda p, q, mu: p * (q / p).log() * ((p / mu >= 0.5) & (p / mu <= 2)),
    "verl_token_is": lambda p, q, mu: torch.minimum(p, 2 * mu) * (q / p).log(),
    "verl_sequence_is": lambda p, q, mu: torch.minimum(p, 2 * mu) * (q / p).log(),
    "verl_sequence_mis": lambda p, q, mu: p * (q / p).log() * (p / mu <= 2),
    "gspo_ratio": lambda p, q, mu: p * (q / p).log(),
    "lightning_opd": lambda p, q, mu: mu * (q / p).log(),
    "prime_rl_reference_kl": lambda p, q, mu: p * (q / p).log() * (p - mu >= -0.2),
    "deepseek_v32_k3_stale": lambda p, q, mu: p * (q / p).log(),
    "areal_distillation": lambda p, q, mu: p * (q / p).log(),
    "opd_plus_truncated": lambda p, q, mu: torch.minimum(p, 2 * mu) * (q / p),
    "opd_plus_truncated_centred": lambda p, q, mu: torch.minimum(p, 2 * mu) * (q / p - 1),
}

# A sampler that two tokens leave by more than a factor of two, one of them by more than 0.2.
STUDENT = torch.tensor([0.45, 0.30, 0.05, 0.20], dtype=torch.float64)
SAMPLER = torch.tensor([0.10, 0.62, 0.14, 0.14], dtype=torch.float64)
TEACHER = torch.tensor([0.20, 0.25, 0.40, 0.15], dtype=torch.float64)
SAME_IN_ONE_STEP = [
    {"verl_token_is", "verl_sequence_is"},
    {"gspo_ratio", "deepseek_v32_k3_stale", "areal_distillation"},
]


@pytest.mark.parametrize("function", MEASURES)
def test_off_policy_each_weighs_a_token_as_said(function):
    found = gradient(getattr(rollouts, function), STUDENT, TEACHER, behavior=SAMPLER)
    for name, measure in MEASURES.items():
        derived = ascent(STUDENT, measure(STUDENT, TEACHER, SAMPLER))
        same = name == function or any({name, function} <= group for group in SAME_IN_ONE_STEP)
        assert (float((found - derived).norm()) < ALGEBRA) is same, name


def test_only_the_weight_without_a_gauge_moves_a_student_at_the_teacher():
    for function in MEASURES:
        drift = gradient(getattr(rollouts, function), TEACHER, TEACHER, behavior=SAMPLER)
        if function == "opd_plus_truncated":
            assert drift == pytest.approx(ascent(TEACHER, torch.minimum(TEACHER, 2 * SAMPLER)), abs=ALGEBRA)
            assert float(drift.norm()) > 1e-2
        else:
            assert float(drift.norm()) < ALGEBRA


def flat(levels: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([level.flatten() for level in levels])


# Where a sampler is close enough, no ratio leaves a bound.
@pytest.mark.parametrize("function", ["nemotron_mopd", "verl_token_is", "prime_rl_reference_kl"])
def test_bounds_of_a_token_cost_nothing_until_they_bite_at_the_samplers_histories(function):
    student, teacher = opd.random_pair(3, 3, seed=0)
    near, far = student.perturbed(0.01, seed=1), student.perturbed(1.5, seed=1)
    for sampler, holds in ((near, True), (far, False)):
        exact = flat(local_gradient(student, teacher, "reverse_kl", histories=sampler))
        found = flat(opd.expected_gradient(getattr(rollouts, function), student, teacher, behavior=sampler))
        assert (float((found - exact).norm()) < ENUMERATION) is holds


@pytest.mark.parametrize(("function", "times"), [("deepseek_v32_k3_stale", 1.0), ("areal_distillation", 1 / 3)])
def test_the_ratio_of_a_token_is_exact_at_the_samplers_histories(function, times):
    student, teacher = opd.random_pair(3, 3, seed=0)
    sampler = student.perturbed(0.5, seed=1)
    found = flat(opd.expected_gradient(getattr(rollouts, function), student, teacher, behavior=sampler))
    at_sampler = flat(local_gradient(student, teacher, "reverse_kl", histories=sampler))
    assert found == pytest.approx(times * at_sampler, abs=ENUMERATION)
    at_student = flat(opd.exact_gradient(student, teacher, "reverse_kl"))
    assert float(torch.cosine_similarity(found, at_student, dim=0)) < 0.999


@pytest.mark.parametrize("function", ["verl_sequence_is", "verl_sequence_mis"])
def test_bounds_of_a_rollout_cost_nothing_until_they_bite_at_the_students_histories(function):
    student, teacher = opd.random_pair(3, 3, seed=0)
    exact = flat(opd.exact_gradient(student, teacher, "reverse_kl"))
    for noise, holds in ((0.01, True), (1.5, False)):
        sampler = student.perturbed(noise, seed=1)
        found = flat(opd.expected_gradient(getattr(rollouts, function), student, teacher, behavior=sampler))
        assert (float((found - exact).norm()) < ENUMERATION) is holds


@pytest.mark.parametrize(("function", "order"), [("gspo_ratio", 1), ("lightning_opd", 1), ("verl_token_is", None)])
def test_the_bias_of_a_wrong_ratio_is_of_first_order_in_the_mismatch(function, order):
    student, teacher = opd.random_pair(3, 3, seed=0)
    direction = student.perturbed(1.0, seed=1)

    def bias(step: float) -> float:
        moved = [a + step * (b - a) for a, b in zip(student.logits, direction.logits, strict=True)]
        sampler = opd.TabularPolicy(moved)
        found = flat(opd.expected_gradient(getattr(rollouts, function), student, teacher, behavior=sampler))
        exact = flat(local_gradient(student, teacher, "reverse_kl", histories=sampler))
        return float((found - exact).norm())

    if order is None:
        assert bias(1e-3) < ENUMERATION
    else:
        assert bias(1e-3) / bias(1e-4) == pytest.approx(10.0**order, rel=1e-2)


def tempered(p: torch.Tensor) -> torch.Tensor:
    return normalised(p.log() / rollouts.SAMPLING_TEMPERATURE)


def test_score_centering_leaves_the_covariance_under_the_sampler():
    p, q = random_rows(2, 4, seed=7)
    mu, log_u = tempered(p), (q / p).log()

    def covariance(weight: torch.Tensor) -> torch.Tensor:
        # The scores are one-hot less p, and their weighted mean under the sampler is taken off.
        return ascent(p, mu * weight * log_u) - (mu * log_u).sum() * ascent(p, mu * weight)

    ones, cut = torch.ones_like(p), (p / mu).clamp(max=1.2)
    assert gradient(rollouts.score_centred, p, q, behavior=mu) == pytest.approx(covariance(ones), abs=ALGEBRA)
    truncated = gradient(rollouts.score_centred_truncated, p, q, behavior=mu)
    assert truncated == pytest.approx(covariance(cut), abs=ALGEBRA)
    assert float((covariance(ones) - covariance(cut)).norm()) > 1e-3
    # Uncut, the correction has mean zero, and the token's ratio alone is exact.
    exact = derivative(lambda row: (row * (row / q).log()).sum(), p)
    assert covariance(p / mu) == pytest.approx(exact, abs=ALGEBRA)


@pytest.mark.parametrize("cap", [None, 1.2])
def test_a_baseline_cancels_if_and_only_if_the_score_is_centred(cap):
    p, q = random_rows(2, 4, seed=8)

    def centred(constant: float) -> torch.Tensor:
        def loss(r: opd.Rollouts) -> torch.Tensor:
            return r.token_sum(-(r.log_u.detach() + constant) * rollouts._centred_score(r, cap))

        return gradient(loss, p, q, behavior=tempered(p))

    def plain(constant: float) -> torch.Tensor:
        weight = {None: lambda r: 1.0, 1.2: lambda r: rollouts._log_ratio(r).exp().clamp(max=1.2)}[cap]

        def loss(r: opd.Rollouts) -> torch.Tensor:
            return r.token_sum(rollouts._policy_gradient(r, r.log_u + constant, weight(r)))

        return gradient(loss, p, q, behavior=tempered(p))

    assert centred(3.0) == pytest.approx(centred(0.0), abs=ALGEBRA)
    assert float((plain(3.0) - plain(0.0)).norm()) > 1e-2


def test_a_finite_difference_confirms_the_direction_of_kdrl():
    # The reward is a number per token here; the objective is E_p[reward] - KL/2, by central differences.
    p, q, reward = random_rows(3, 4, seed=9)
    logits = p.log()

    def objective(z: torch.Tensor) -> float:
        row = z.softmax(-1)
        return float(-(row * reward).sum() + (row * (row / q).log()).sum() / 2)

    step = 1e-5
    differences = [objective(logits + step * e) - objective(logits - step * e) for e in torch.eye(4).double()]
    total = torch.zeros(4, dtype=torch.float64)
    for token in range(4):
        z = logits.clone().requires_grad_()
        r = opd.Rollouts.from_logits(torch.tensor([[token]]), z.reshape(1, 1, -1), q.log().reshape(1, 1, -1))
        r = opd.Rollouts.unchecked(**vars(r), extras=Extras(rewards=reward[token].reshape(1)))
        total += p[token] * torch.autograd.grad(rollouts.kdrl(r), z)[0]
    assert total == pytest.approx(torch.tensor(differences, dtype=torch.float64) / (2 * step), abs=FINITE_DIFFERENCE)
