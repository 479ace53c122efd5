"""The same trainer in other settings: which of them change its gradient, and what its scale is a function of."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from opdtheory.end_to_end.asked import Asked, Player, claimed
from opdtheory.end_to_end.claims import claimed_gradient
from opdtheory.end_to_end.descent import Descent, distance
from opdtheory.end_to_end.pair import trainer_pair
from opdtheory.end_to_end.played import Played
from opdtheory.end_to_end.readings import PLAIN, gradient_of
from opdtheory.end_to_end.report import Variant
from opdtheory.end_to_end.scales import Factor, cause_of, facts_of
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.rendering.text import percent

__all__ = ["scale_cause", "variants_of"]


def variants_of(play: Player, main: Played, followed: Descent | None, asked: Asked) -> tuple[Variant, ...]:
    """The trainer in other settings, each with what it does there."""
    batch, accumulate = main.pair.batch_size, main.pair.accumulate
    split: dict[str, Any] | None = None
    if batch % 2 == 0:
        split = {"batch_size": batch // 2, "accumulate": 2 * accumulate}
    elif accumulate > 1:
        split = {"batch_size": batch * accumulate, "accumulate": 1}
    longer = tuple(f"{answer}{answer}" if n % 2 else answer for n, answer in enumerate(main.pair.answers))
    found = []
    if split is not None:
        many = "one micro-batch" if split["accumulate"] == 1 else f"{split['accumulate']} micro-batches"
        how = f"{many} of {split['batch_size']}"
        found.append(_same_gradient(play, main, asked, how, split))
    if not main.pair.teacher_answers:
        found.append(_same_gradient(play, main, asked, "reference answers of two lengths", {"answers": longer}))
    others: dict[str, dict[str, Any]] = {
        "prompts of equal length": {"prompts": asked.settings["prompts"][:1]},
        "padding that is the end of the sequence": {"pad_is_eos": True},
    }
    return (*found, *(_same_descent(play, main, followed, asked, *each) for each in others.items()))


def _played(play: Player, asked: Asked, changes: dict[str, Any]) -> Played | str:
    """What is played in another setting, or why it cannot be."""
    try:
        return play(trainer_pair(**{**asked.settings, **changes}), None)
    except (InvalidArgumentError, BudgetExceededError) as error:
        return str(error)
    except LossError:
        raise
    except Exception as error:  # whatever a trainer objects to
        return f"the trainer refused it: {error}"


def _same_gradient(play: Player, main: Played, asked: Asked, name: str, changes: dict[str, Any]) -> Variant:
    """A setting in which the gradient should be the same vector, up to a scale that is reported."""
    other = _played(play, asked, changes)
    if isinstance(other, str):
        return Variant(name, None, words=other)
    rows = min(len(main.gradient), len(other.gradient)) - 1  # the last row is that of longer prefixes
    against = distance(other.gradient[:rows], main.gradient[:rows])
    rescaled = "accumulate" in changes and abs(against.scale - 1.0) > asked.tolerance
    holds = against.scale > 0 and against.error <= asked.tolerance and not rescaled
    words = ""
    if not holds:
        by = (
            f"by a factor of {against.scale:.4g}"
            if against.error <= asked.tolerance
            else f"by {percent(against.error)} in direction"
        )
        words = f"With {name} the gradient changes {by}."
    elif abs(against.scale - 1.0) > asked.tolerance:
        words = f"With {name} the scale changes by a factor of {against.scale:.4g}."
    return Variant(name, holds, against.error, against.scale, words)


def _same_descent(
    play: Player, main: Played, followed: Descent | None, asked: Asked, name: str, changes: dict[str, Any]
) -> Variant:
    """A setting with another exact gradient, of which the trainer's should be the same function."""
    other = _played(play, asked, changes)
    if isinstance(other, str):
        return Variant(name, None, words=other)
    if followed is None:
        against = distance(other.gradient, claimed(other, asked, PLAIN))
        return Variant(name, None, against.error, against.scale, "the main setting already differs from the claim")
    against = distance(other.gradient, _follow(other, followed))
    holds = against.scale > 0 and against.error <= asked.tolerance
    words = "" if holds else f"With {name} it does something else, off by {percent(against.error)}."
    scale = against.scale / followed.distance.scale
    return Variant(name, holds, against.error, scale, words)


def _follow(played: Played, followed: Descent) -> Tensor:
    """The gradient of what was found, in another setting."""
    objective = followed.objective
    if objective.granularity != "token_local" and followed.reading == PLAIN:
        return claimed_gradient(played.pair, objective.divergence, objective.granularity)
    return gradient_of(played, followed.reading, objective)


def scale_cause(play: Player, main: Played, followed: Descent, asked: Asked) -> str:
    """What the scale is, from settings of one token that differ in one number each."""
    scale = followed.distance.scale
    if abs(scale - 1.0) <= asked.tolerance * 10:
        return ""
    batch = main.pair.batch_size
    short = {**asked.settings, "horizon": 1}
    longer = tuple(answer * 2 for answer in main.pair.answers)
    probes: dict[str, dict[str, Any]] = {
        "base": short,
        "reference tokens": {**short, "answers": longer},
        "rollouts": {**short, "batch_size": 2 * batch},
        "micro-batches": {**short, "accumulate": 2 * main.pair.accumulate, "batch_size": max(1, batch // 2)},
    }
    found: dict[str, Factor] = {}
    for fact, settings in probes.items():
        other = _played(play, asked, settings)
        if not isinstance(other, str):
            against = distance(other.gradient, _follow(other, followed))
            found[fact] = Factor(facts_of(other.pair), against.scale)
    whole = Factor(facts_of(main.pair), scale)
    if "base" not in found:
        return f"The scale is {scale:.6g}."
    # Between the main setting and the shortest, only the horizon differs.
    return cause_of(whole, {**found, "horizon": whole})
