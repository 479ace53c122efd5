"""Why a trainer's gradient is a multiple of the exact one: what that multiple is a function of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

from opdtheory.end_to_end.pair import TrainerPair

__all__ = ["Factor", "cause_of", "facts_of"]

_NEAR = 1e-4

# What a scale may be proportional to, with the words for it and for its inverse.
_FACTS: dict[str, tuple[str, str]] = {
    "rollouts": (
        "it sums over the rollouts of a step where the claim averages",
        "it divides by the rollouts of a step once more than the claim does",
    ),
    "micro-batches": (
        "the gradients of a step's micro-batches are added up, not averaged",
        "it divides by the number of micro-batches once more than the claim does",
    ),
    "horizon": (
        "it grows with the horizon",
        "it divides by the horizon, the largest length of an answer, whatever the answers' own",
    ),
    "reference tokens": (
        "it grows with the tokens of the dataset's reference answers, which the rollouts do not have (T17)",
        "it divides by the tokens of the dataset's reference answers, which the rollouts do not have (T17)",
    ),
}


@dataclass(frozen=True)
class Factor:
    """A setting's numbers, and the scale that was found there."""

    facts: Mapping[str, float]
    scale: float


def facts_of(pair: TrainerPair) -> dict[str, float]:
    """The numbers of a setting that a scale may depend on."""
    answers = [len(answer) for answer in pair.answer_tokens]
    return {
        "rollouts": float(pair.batch_size * pair.accumulate),
        "micro-batches": float(pair.accumulate),
        "horizon": float(pair.horizon),
        "reference tokens": sum(answers) / len(answers),
    }


def cause_of(main: Factor, others: Mapping[str, Factor]) -> str:
    """The scale as a sentence: which facts it is a power of, and the constant that is left.

    Args:
        main: the main setting.
        others: settings that differ from one another in one fact each, by the name of that fact, and one named `base`.
    """
    if abs(main.scale - 1.0) < _NEAR:
        return ""
    constant, reasons = main.scale, []
    base = others.get("base", main)
    for fact, (grows, falls) in _FACTS.items():
        other = others.get(fact)
        if other is None or other.facts[fact] == base.facts[fact] or other.scale <= 0 or base.scale <= 0:
            continue
        change = other.facts[fact] / base.facts[fact]
        for power, words in ((1, grows), (-1, falls)):
            if abs(other.scale / base.scale - change**power) < _NEAR:
                constant /= main.facts[fact] ** power
                reasons.append(words)
    size = _number(main.scale)
    if not reasons:
        return f"The scale {size} depends on none of rollouts, horizon and reference answers: a constant factor."
    rest = "" if abs(constant - 1.0) < _NEAR else f", and a constant factor {_number(constant)} is left"
    return f"The scale is {size}: {' and '.join(reasons)}{rest}."


def _number(value: float) -> str:
    simple = Fraction(value).limit_denominator(24)
    return str(simple) if abs(float(simple) - value) < _NEAR * abs(value) else f"{value:.6g}"
