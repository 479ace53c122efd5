"""A loss given as a black box, its name hidden and its scale changed, is named as its own claim says.

What is expected comes from the estimator's claim and from its definition, never from a table of answers.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory import divergences
from opdtheory.auditing import Audit, quick_verdict
from opdtheory.auditing.effects.dependence import dependence
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.naming.identify import ExactGradients, best_match
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.naming.weight_form import WeightForm, describe
from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import Divergence
from opdtheory.estimators import Claim, Estimator, estimator, estimator_names
from opdtheory.estimators.claims import local_weight
from opdtheory.estimators.sampled import Differentiated, PowerAdvantage, RatioAdvantage, ReturnToGo, ScoreFunction
from opdtheory.estimators.vocabulary import VocabularyLoss
from opdtheory.exact import exact_gradient, gradient_moments, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.testing.assertions import claim_settings
from opdtheory.verification.verify import shipped_estimators
from tests.sparse import some

Loss = Callable[[Rollouts], Tensor]
DRAWN = 5
DECOYS = ("total_variation", "neyman_chi2", "chi2", "le_cam")


PARAMETERS = {
    "skew_jsd": ("beta", 0.05, 0.95),
    "alpha": ("alpha", -1.5, 2.5),
    "skew_forward_kl": ("lam", 0.05, 0.9),
    "skew_reverse_kl": ("lam", 0.05, 0.9),
}


def catalogue(seed: int) -> list[Estimator]:
    """Every divergence, families at a random parameter, at every granularity."""
    draw = random.Random(seed)
    subjects = []
    for name in divergences.names():
        parameter = {}
        if name in PARAMETERS:
            key, low, high = PARAMETERS[name]
            parameter = {key: round(draw.uniform(low, high), 3)}
        divergence = divergences.divergence(name, **parameter)
        subjects += [
            estimator("opd_plus", divergence),
            estimator("return_to_go", divergence, gamma=1.0),
            estimator("sequence_opd_plus", divergence),
        ]
    return subjects


def subjects(seed: int) -> list[Estimator]:
    return [*shipped_estimators(), *catalogue(seed)]


@dataclasses.dataclass(frozen=True)
class Blind:
    """What is found of a loss whose name is hidden."""

    loss: Loss
    report: Audit
    weight: RecoveredWeight
    form: WeightForm


def blindly(subject: Estimator, seed: int) -> Blind:
    draw = random.Random(seed)
    scale = draw.uniform(0.2, 5.0)
    settings = {**claim_settings(subject.claim), "gamma": 1.0}
    truth = [subject.claim.divergence.label, subject.claim.descends]
    decoy = draw.choice([name for name in DECOYS if name not in truth])
    loss = lambda r: scale * subject(r)  # noqa: E731
    report = opd.audit(loss, decoy, **settings)
    fields = {field.name for field in dataclasses.fields(RecoveredWeight)}
    weight = RecoveredWeight(**{key: value for key, value in report.weight.items() if key in fields})
    return Blind(loss, report, weight, describe(weight, report.tolerance))


def check_named(found: Blind, subject: Estimator, claim: Claim) -> None:
    """Raise unless the findings say what the claim does."""
    if claim.verdict == "zero":
        assert found.report.verdict == "zero" and found.form.kind == "zero"
    elif claim.verdict == "biased":
        assert found.report.verdict == "biased" and found.report.descends is None
        check_unnamed(found, subject)
    else:
        divergence = divergences.divergence(claim.descends) if claim.verdict == "other_objective" else claim.divergence  # type: ignore[arg-type]
        check_objective(found, claim, divergence)
    check_formula(found, subject)


def check_objective(found: Blind, claim: Claim, divergence: Divergence) -> None:
    """The objective found has, on a pair not seen by the audit, the gradient of the one that the claim names."""
    settings = claim_settings(claim)
    if claim.granularity == "token_return" and claim.gamma < 1:
        cases = Scenario(settings["batch_size"], settings["eos"], settings["off_policy"]).pairs()
        moments = [gradient_moments(found.loss, c.student, c.teacher, 1, c.behavior) for c in cases]
        match = best_match([flat(m.mean) for m in moments], ExactGradients(cases), found.weight, "token_local", 1e-9)
        assert match is not None and match.fit.worst_error <= 1e-9
        named = match.objective
    else:
        assert found.report.verdict == "other_objective" and found.report.identified is not None
        named = found.report.identified.read()
    student, teacher = random_pair(4, 2, scale=0.7, distance=1.1, seed=4321)
    expected = flat(exact_gradient(student, teacher, divergence, claim.granularity, gamma=claim.gamma))
    actual = flat(exact_gradient(student, teacher, named.divergence, named.granularity, gamma=named.gamma))
    assert fit_scale([actual], [expected]).worst_error < 1e-6
    if len(found.weight.log_u) >= 7 and found.weight.depends_on_ratio_only:
        # On one step all granularities have this weight, which must be named too.
        assert found.form.kind == "catalogue"
        grid = found.weight.log_u
        assert same_up_to_affine(named.divergence.weight(grid), divergence.weight(grid))


def check_unnamed(found: Blind, subject: Estimator) -> None:
    """A loss that descends no catalogue objective is described by what its weight depends on, or by its formula."""
    loss, scenario = subject.token_loss, Scenario(claim_settings(subject.claim)["batch_size"])
    advantage = loss.advantage if isinstance(loss, ScoreFunction) else None
    if found.weight.depends_on_ratio_only and not isinstance(advantage, ReturnToGo):
        return
    on = dependence(found.loss, found.weight, scenario)
    if isinstance(loss, VocabularyLoss):
        assert loss.top is not None and on.top_k == loss.top.k
        assert any(f"the {loss.top.support}'s" in text for text in on.words)
    elif isinstance(advantage, PowerAdvantage):
        assert on.student_and_teacher == f"density-power divergence, alpha={advantage.alpha:g}"
    elif isinstance(advantage, ReturnToGo):
        assert on.other_tokens and f"counts {advantage.gamma:g} times" in " ".join(on.words)
    else:
        assert isinstance(loss, ScoreFunction) and loss.zscore
        assert on.batch and "z-score with divisor G-1" in " ".join(on.words)


def check_formula(found: Blind, subject: Estimator) -> None:
    """The formula has the values of the advantage that the estimator is made of."""
    loss = subject.token_loss
    function: Callable[[Tensor], Tensor] | None = None
    if isinstance(loss, ScoreFunction) and isinstance(loss.advantage, RatioAdvantage) and not loss.zscore:
        low, high = loss.clip_weight or (-torch.inf, torch.inf)
        inner = loss.advantage.of_log_u
        function = lambda t: inner(t).clamp(low, high)  # noqa: E731
    elif isinstance(loss, Differentiated):
        inner_loss = loss.function
        function = lambda t: local_weight(inner_loss, t)  # noqa: E731
    if function is None or found.form.kind == "zero":
        return
    assert found.form.kind != "numeric" and found.form.expr is not None
    import sympy

    u = divergences.symbol()
    t = torch.linspace(-3.9, 3.9, 41, dtype=torch.float64)
    formula = sympy.lambdify(u, sympy.sympify(found.form.expr, locals={"u": u}), ["scipy", "numpy"])
    values = torch.from_numpy(np.asarray(formula(t.exp().numpy()), dtype=np.float64))
    assert same_up_to_affine(values, function(t))


def same_up_to_affine(a: Tensor, b: Tensor) -> bool:
    """Whether one is a positive multiple of the other plus a constant."""
    a, b = a - a.mean(), b - b.mean()
    multiple = float(a @ b / (b @ b))
    return multiple > 0 and float((a - multiple * b).norm()) <= 1e-6 * float(a.norm())


def test_every_estimator_is_among_the_subjects() -> None:
    assert {subject.name for subject in subjects(0)} >= set(estimator_names())


@pytest.mark.parametrize("draw", some(range(DRAWN), DRAWN))
def test_drawn_at_random(draw: int) -> None:
    seed = 20_000 + draw
    pool = [s for s in subjects(seed) if claim_settings(s.claim)["batch_size"] <= 2]
    subject = random.Random(seed).choice(pool)
    check_named(blindly(subject, seed), subject, subject.claim)


@pytest.mark.slow
@pytest.mark.parametrize("index", range(len(subjects(0))))
def test_all(index: int) -> None:
    subject = subjects(7)[index]
    check_named(blindly(subject, 30_000 + index), subject, subject.claim)


def coupled(draw: random.Random) -> tuple[Estimator, Estimator]:
    """A loss whose rollouts enter each other's gradient, and the same with a z-score, which descends nothing (T7e)."""
    name = draw.choice([name for name in divergences.names() if name != "total_variation"])
    parameter = {}
    if name in PARAMETERS:
        key, low, high = PARAMETERS[name]
        parameter = {key: round(draw.uniform(low, high), 3)}
    divergence = divergences.divergence(name, **parameter)
    kind, options = draw.choice([("opd_plus", {}), ("return_to_go", {"gamma": 1.0}), ("sequence_opd_plus", {})])
    baseline = draw.choice(["leave_one_out", "group_mean"])
    return (
        estimator(kind, divergence, **options, baseline=baseline),
        estimator(kind, divergence, **options, zscore=True),
    )


def audited(subject: Estimator, batch_size: int, seed: int, **how: Any) -> tuple[Audit, float]:
    """The audit of a loss, scaled and nameless, under a claim that is not its own; and the scale."""
    draw = random.Random(seed)
    scale = draw.uniform(0.2, 5.0)
    decoy = draw.choice([name for name in DECOYS if name != subject.claim.divergence.label])
    return opd.audit(lambda r: scale * subject(r), decoy, batch_size=batch_size, details=False, **how), scale


def check_coupled(report: Audit, claim: Claim, batch_size: int, scale: float) -> None:
    """Raise unless the audit names the loss as the claim says."""
    if claim.verdict == "biased":
        assert report.verdict == "biased" and report.descends is None
        return
    assert report.verdict == "other_objective" and report.identified is not None
    found = report.identified
    named = divergences.divergence(found["objective"], **found["parameters"])
    student, teacher = random_pair(4, 2, scale=0.7, distance=1.1, seed=4321)
    expected, actual = (
        flat(exact_gradient(student, teacher, divergence, where))
        for divergence, where in ((claim.divergence, claim.granularity), (named, found["granularity"]))
    )
    assert fit_scale([actual], [expected]).worst_error < 1e-6
    # Of leave-one-out the scale is the loss's own, of the group's mean (G-1)/G of it (T7e).
    share = 1.0 if claim.verdict == "exact" else (batch_size - 1) / batch_size
    assert found["scale"] * float(actual.norm() / expected.norm()) == pytest.approx(scale * share, rel=1e-5)


def check_wrong_claims(report: Audit, subject: Estimator, batch_size: int, scale: float) -> None:
    """Raise unless the same check refuses neighbours: another divergence, granularity, baseline, or none at all."""
    claim = subject.claim
    other = divergences.divergence("le_cam" if claim.divergence.name != "le_cam" else "hellinger")
    where = "sequence" if claim.granularity == "token_local" else "token_local"
    share = "exact" if claim.verdict == "exact_up_to_scale" else "exact_up_to_scale"
    for changed in ({"divergence": other}, {"granularity": where}, {"verdict": share}, {"verdict": "biased"}):
        if claim.divergence.name == "reverse_kl" and "granularity" in changed:
            continue
        with pytest.raises(AssertionError):
            check_coupled(report, dataclasses.replace(claim, **changed), batch_size, scale)


@pytest.mark.parametrize("batch_size", [2, *(pytest.param(size, marks=pytest.mark.slow) for size in (3, 4))])
def test_coupled_losses_drawn_at_random(batch_size: int) -> None:
    seed = 40_000 + batch_size
    subject, twin = coupled(random.Random(seed))
    report, scale = audited(subject, batch_size, seed)
    check_coupled(report, subject.claim, batch_size, scale)
    check_wrong_claims(report, subject, batch_size, scale)
    if batch_size == 3:
        report, scale = audited(twin, batch_size, seed)
        check_coupled(report, twin.claim, batch_size, scale)
        with pytest.raises(AssertionError):
            check_coupled(report, subject.claim, batch_size, scale)


@pytest.mark.slow
def test_a_coupled_loss_drawn_at_random_is_named_from_samples() -> None:
    seed, batch_size = 40_013, 13
    subject, _ = coupled(random.Random(seed))
    report, scale = audited(subject, batch_size, seed, method="monte_carlo")
    check_coupled(report, subject.claim, batch_size, scale)
    check_wrong_claims(report, subject, batch_size, scale)
    assert report.monte_carlo is not None and report.identified is not None
    assert f"confirmed at batch size {batch_size}" in report.identified["evidence"]


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", [2, 3, 4, 14, 15, 16])
def test_many_coupled_losses(batch_size: int) -> None:
    for draw in range(8):
        seed = 50_000 + 100 * batch_size + draw
        subject, twin = coupled(random.Random(seed))
        how = {"method": "monte_carlo"} if batch_size > 4 else {}
        report, scale = audited(subject, batch_size, seed, **how)
        check_coupled(report, subject.claim, batch_size, scale)
        check_wrong_claims(report, subject, batch_size, scale)
        # In groups of two a z-score is a sign, whatever the advantage.
        if draw % 4 == 0 and batch_size > 2:
            report, scale = audited(twin, batch_size, seed, **how)
            check_coupled(report, twin.claim, batch_size, scale)


def test_a_wrong_name_is_refused() -> None:
    """The same assertions with another estimator's claim."""
    forward, reverse = estimator("opd_plus", "forward_kl"), estimator("opd_plus", "reverse_kl")
    found = blindly(forward, 1)
    check_named(found, forward, forward.claim)
    for wrong in (reverse, estimator("k1_loss"), estimator("opd", "jsd"), estimator("return_to_go", "chi2", gamma=1.0)):
        with pytest.raises(AssertionError):
            check_named(found, wrong, wrong.claim)
    granularity = estimator("sequence_opd_plus", "forward_kl").claim
    with pytest.raises(AssertionError):
        check_objective(found, granularity, granularity.divergence)
    with pytest.raises(AssertionError):
        check_formula(found, estimator("opd", "forward_kl"))


def smooth(draw: random.Random, inputs: Callable[[Rollouts], list[Tensor]]) -> Loss:
    """A random smooth function of some inputs times the score, as a loss."""
    waves = [[draw.gauss(0, 1) for _ in range(8)] for _ in range(4)]

    def loss(r: Rollouts) -> Tensor:
        total = torch.zeros_like(r.mask)
        for amplitude, phase, *rates in waves:
            angle = phase + sum(rate * x for rate, x in zip(rates, inputs(r), strict=False))
            total = total + amplitude * torch.cos(angle)
        return r.token_sum(-total * r.student_logprobs)

    return loss


def of_ratio(r: Rollouts) -> list[Tensor]:
    return [r.log_u.detach()]


def of_both(r: Rollouts) -> list[Tensor]:
    return [r.student_logprobs.detach(), r.teacher_logprobs]


def of_position(r: Rollouts) -> list[Tensor]:
    return [r.log_u.detach(), torch.arange(r.tokens.shape[1], dtype=torch.float64).expand_as(r.mask)]


@pytest.mark.parametrize("inputs", [of_ratio, of_both, of_position])
@pytest.mark.parametrize("draw", range(2))
def test_a_bias_of_a_millionth_flips_the_verdict(inputs: Callable[[Rollouts], list[Tensor]], draw: int) -> None:
    chance = random.Random(1000 * draw + len(inputs.__name__))
    exact = [s for s in subjects(draw) if s.claim.verdict == "exact" and claim_settings(s.claim)["batch_size"] == 1]
    subject, bias = chance.choice(exact), smooth(chance, inputs)
    settings = claim_settings(subject.claim)
    claim = subject.claim
    case = Scenario(1, settings["eos"], settings["off_policy"]).pairs()[2]
    sizes = [
        float(flat(gradient_moments(loss, case.student, case.teacher, 1, case.behavior).mean).norm())
        for loss in (subject, bias)
    ]

    def verdict(relative: float) -> str:
        size = relative * sizes[0] / sizes[1]
        return quick_verdict(lambda r: subject(r) + size * bias(r), claim.divergence, claim.granularity, **settings)

    assert verdict(1e-6) == "biased"
    # A bias below rounding is none: the flip is the bias's, not the wrapper's.
    assert verdict(1e-14) == "exact"
