"""Changes that may cure a loss, the smallest first, each with its reason: guesses from the findings of an audit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction

import torch
from torch import Tensor

from opdtheory.auditing.fixes import changes
from opdtheory.auditing.fixes.causes import attached, clipped
from opdtheory.auditing.fixes.changes import PerToken
from opdtheory.auditing.fixes.corrections import (
    Correction,
    Curve,
    between_granularities,
    clips,
    gauge_shift,
    missing_terms,
)
from opdtheory.auditing.fixes.facts import Candidate, Facts, alike
from opdtheory.auditing.fixes.steps import steps
from opdtheory.auditing.fixes.substitutes import backpropagated, unstandardised, value_as_reward, whole_vocabulary
from opdtheory.auditing.fixes.temperatures import temperatures
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.naming.bandits import bandits
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.remembered import Remembered
from opdtheory.auditing.scenario import Case, Scenario
from opdtheory.estimators.offpolicy import importance_weight, prefix_weight
from opdtheory.exact import Loss, gradient_moments, random_pair
from opdtheory.rollouts import Rollouts

__all__ = ["SUMMED", "candidates", "gauge"]

_SUM = "Sum over tokens and divide by the number of rollouts, in place of"
SUMMED = f"{_SUM} the mean over the batch's tokens, which divides by a random length: loss * mask.sum() / B (T11)."

# Log-ratios beyond the grid of the recovered weight, to find a clip of up to 8 nats.
_FAR = (-12.0, -8.0, 0.0, 8.0, 12.0)


def candidates(facts: Facts) -> Iterator[Candidate]:
    """The changes worth a trial: single ones first, then two together."""
    corrections = list(_corrections(facts))
    # Neither a factor that varies nor a mask changes a gradient that is zero.
    reduced = [] if facts.verdict == "zero" else [*_reductions(facts), *_padding(facts)]
    yield from _constants(facts)
    # What is wrong by name: a detach, a temperature, a clamp, a step.
    named = [*attached(facts), *temperatures(facts), *clipped(facts)]
    # What else they may need is tried on the same batches.
    named = [replace(each, loss=Remembered(each.loss)) for each in named]
    yield from named
    # At fixed length, another reduction is a constant factor.
    if facts.variable or facts.scenario.coupled:
        yield from reduced
    yield from _importance(facts, facts.loss)
    yield from steps(facts)
    for correction in corrections:
        yield _added(correction, facts.loss)
    yield from value_as_reward(facts)
    yield from backpropagated(facts)
    yield from whole_vocabulary(facts)
    yield from unstandardised(facts)
    for cause in named:
        yield from _together(cause, _after(facts, cause.loss))
    yield from _pairs(facts, corrections, reduced)


def _after(facts: Facts, loss: Loss) -> Iterator[Candidate]:
    """What a loss may still need after a cause by name is gone."""
    if attempt(lambda: facts.trial.gradient(loss, 0)) is None:
        return
    weight = attempt(lambda: recover_weight(loss, replace(facts.scenario, off_policy=0.0), facts.trial.tolerance))
    curve = None
    if weight is not None and weight.depends_on_ratio_only:
        curve = Curve(weight.log_u, weight.weight, alike(facts.trial.tolerance))
    rest = replace(facts, loss=loss, curve=curve)
    yield from _constants(rest)
    yield from _importance(rest, loss)
    for correction in _corrections(rest):
        yield _added(correction, loss)
    if facts.variable or facts.scenario.coupled:
        yield from _reductions(rest)


def _pairs(facts: Facts, corrections: list[Correction], reduced: list[Candidate]) -> Iterator[Candidate]:
    for first in reduced:
        if facts.variable:
            yield from _together(first, _constants(replace(facts, loss=first.loss)))
        yield from _together(first, (_added(correction, first.loss) for correction in corrections))
        yield from _together(first, _importance(facts, first.loss))
    for correction in corrections:
        first = _added(correction, facts.loss)
        yield from _together(first, _importance(facts, first.loss))


def gauge(facts: Facts) -> Candidate | None:
    """A shift of the generator's gauge after which plain OPD descends some f-divergence (T5b), if there is one."""
    if facts.curve is None or not facts.token_local or facts.off_policy:
        return None
    shift = gauge_shift(facts.curve, facts.claim.divergence)
    return None if shift is None else _added(shift, facts.loss)


def _corrections(facts: Facts) -> Iterator[Correction]:
    if facts.curve is None:
        return
    claim = facts.claim
    yield from missing_terms(facts.curve, claim.divergence, claim.granularity, claim.gamma)
    if facts.scenario.batch_size <= 2:
        yield from clips(facts.curve, lambda: attempt(lambda: _far_curve(facts)), claim.divergence)
    yield from between_granularities(facts.curve, claim.divergence, claim.granularity, claim.gamma)


def _far_curve(facts: Facts) -> Curve:
    log_u = torch.tensor(_FAR, dtype=torch.float64)
    case = bandits(log_u, Scenario())[0]
    gradient = gradient_moments(facts.loss, case.student, case.teacher, facts.scenario.batch_size, thorough=False).mean[
        0
    ][0]
    weight = -gradient / torch.softmax(case.student.logits[0][0], -1)
    return Curve(log_u, weight - weight[len(_FAR) // 2])


def _added(correction: Correction, loss: Loss) -> Candidate:
    return Candidate(correction.kind, correction.text, changes.advantage_added(loss, correction.advantage))


def _together(first: Candidate, then: Iterator[Candidate]) -> Iterator[Candidate]:
    for second in then:
        cause = " ".join(each.cause for each in (first, second) if each.cause)
        yield Candidate(f"{first.kind}, {second.kind}", f"{first.text} {second.text}", second.loss, cause)


def _constants(facts: Facts) -> Iterator[Candidate]:
    """One factor for the loss, or one for each position, if nothing else is wrong on the first pair."""
    factors = _level_factors(facts)
    near = alike(facts.trial.tolerance)
    if factors is None or any(abs(factor) < near for factor in factors):
        return
    if max(factors) - min(factors) <= near * abs(factors[0]):
        factor = 1.0 / factors[0]
        if abs(factor - 1.0) > facts.trial.tolerance:
            padded = None if facts.scenario.coupled else _padded(facts, factor)
            yield from [] if padded is None else [padded]
            yield _constant(facts, factor)
        return
    table = torch.tensor(factors, dtype=torch.float64)
    shown = ", ".join(f"{float(factor):.4g}" for factor in table)
    gamma = facts.claim.gamma
    if facts.claim.granularity == "token_return" and gamma < 1.0:
        text = (
            f"Multiply the loss of token n by gamma^(n-1), gamma = {gamma:g}: a discounted return-to-go without it is "
            "the gradient of no objective (T6)."
        )
    else:
        text = f"Weight all positions alike: divide the losses of tokens 1, 2, ... by {shown} (T6)."

    def weight(rollouts: Rollouts) -> Tensor:
        column = torch.arange(rollouts.mask.shape[1]).clamp(max=len(table) - 1)
        return (1.0 / table[column]).to(rollouts.mask).expand_as(rollouts.mask)

    yield Candidate("position", text, changes.weighted_tokens(facts.loss, weight))


def _constant(facts: Facts, factor: float) -> Candidate:
    group, simple = facts.scenario.batch_size, Fraction(factor).limit_denominator(64)
    if abs(float(simple) - factor) <= max(10 * facts.trial.tolerance, 1e-12) * abs(factor):
        factor = float(simple)
    shown = str(simple) if float(simple) == factor else f"{factor:.6g}"
    changed = changes.scaled(facts.loss, factor)
    if factor == -1.0:
        return Candidate("sign", "Flip the sign of the loss: it ascends what it should descend.", changed)
    if factor < 0:
        return Candidate("sign", f"Multiply the loss by {shown}: it ascends what it should descend.", changed)
    if group > 1 and simple == Fraction(group, group - 1):
        text = (
            f"Subtract the leave-one-out mean in place of the group mean, or multiply by G/(G-1) = {shown}: a mean "
            "that includes the sample itself shrinks the gradient by (G-1)/G (T7e)."
        )
        return Candidate("baseline", text, changed)
    return Candidate("scale", f"Multiply the loss by {shown}: its direction is right.", changed)


def _padded(facts: Facts, factor: float) -> Candidate | None:
    """The division by the padded length, if that is what a constant factor is."""
    case = facts.trial.cases[0]
    length = case.student.horizon
    if length < 2 or abs(factor - length) > facts.trial.tolerance * length:
        return None
    loss, eos = changes.times_padded(facts.loss), facts.scenario.eos
    student, teacher = random_pair(case.student.vocab_size, length - 1, eos=eos, seed=7)
    shorter = Case(student, teacher, facts.scenario.behavior(student, 8), "shorter")
    found = attempt(lambda: flat(facts.scenario.moments(loss, shorter).mean))
    if found is None or fit_scale([found], [flat(shorter.exact(facts.claim))]).relative_bias[0] > facts.trial.tolerance:
        return None
    text = (
        "Sum over tokens and divide by the number of rollouts, in place of the padded length too: loss * mask.shape[1]"
    )
    cause = "The loss divides by the padded length: its scale changes with the padding of the batch (T17)."
    return Candidate("reduction", f"{text} (T17).", loss, cause)


def _level_factors(facts: Facts) -> list[float] | None:
    """The factor between the loss's gradient and the exact one at each position of the first pair, or None.

    Where an environment writes, both gradients are zero, and the factor of the position before is used.
    """
    factors: list[float] = []
    near = alike(facts.trial.tolerance)
    for actual, exact in zip(facts.trial.gradient(facts.loss, 0), facts.trial.exact(0), strict=True):
        size = float(exact.square().sum())
        factor = float((actual * exact).sum()) / size if size > 0 else (factors[-1] if factors else float("nan"))
        if float((actual - (factor if size > 0 else 0.0) * exact).norm()) > near * float(actual.norm()):
            return None
        factors.append(factor)
    known = [factor for factor in factors if factor == factor]
    return [factor if factor == factor else known[0] for factor in factors] if known else None


def _reductions(facts: Facts) -> Iterator[Candidate]:
    kinds = [
        (
            SUMMED,
            "The loss is a mean over the batch's tokens: rollouts weigh by 1/N, N the tokens of their batch (T11)",
            changes.averaged_over_rollouts(facts.loss),
        ),
        (
            f"{_SUM} the mean over each rollout's tokens, which weights short rollouts more (T11).",
            "The loss is a mean over each rollout's tokens: rollouts weigh by the inverse of their own length (T11)",
            changes.weighted_tokens(facts.loss, changes.rollout_lengths),
        ),
        (
            f"{_SUM} a division by the longest rollout of the batch: loss * mask.sum(-1).max() (T17).",
            "The loss divides by the length of the batch's longest rollout, which the samples decide (T17)",
            changes.times_longest(facts.loss),
        ),
    ]
    for text, cause, loss in kinds:
        yield Candidate("reduction", text, loss, f"{cause}.")


def _padding(facts: Facts) -> Iterator[Candidate]:
    if facts.variable:
        text = "Mask what the student did not write: padding and an environment's tokens carry no score and no reward"
        yield Candidate("padding", f"{text} (T6e, T6f).", changes.padding_hidden(facts.loss))


def _importance(facts: Facts, loss: Loss) -> Iterator[Candidate]:
    if not facts.off_policy:
        return
    whole: tuple[str, PerToken] = ("the product of p/mu over the rollout", lambda r: importance_weight(r, "sequence"))
    ratios: list[tuple[str, PerToken]] = [whole]
    if facts.token_local:
        ratios = [
            ("the product of p/mu over the tokens before n", prefix_weight),
            ("the product of p/mu over the tokens up to n", lambda r: importance_weight(r, "prefix")),
        ]
    why = "the rollouts were not drawn from the student (T8)"
    renewed = "Form every ratio with the current student, clip none, and multiply"
    for start, changed in (("Multiply", loss), (renewed, changes.on_policy_view(loss))):
        for words, ratio in ratios:
            text = f"{start} the loss of token n by {words}, detached: {why}."
            yield Candidate("importance", text, changes.weighted_tokens(changed, ratio))
