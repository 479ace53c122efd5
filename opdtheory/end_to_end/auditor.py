"""`audit_trainer` and `audit_update`: what a whole trainer descends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from opdtheory.choices import HISTORIES, Histories, Verdict
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.end_to_end.claims import claimed_gradient, share_by_kind
from opdtheory.end_to_end.descent import Descent, Distance, descent, distance
from opdtheory.end_to_end.pair import TrainerPair, trainer_pair
from opdtheory.end_to_end.played import BUDGET, Played, Update, play_trainer, play_update
from opdtheory.end_to_end.readings import PLAIN, Denominator, Reading, gradient_of
from opdtheory.end_to_end.report import TrainerAudit, Variant
from opdtheory.end_to_end.sampler import sampler_of
from opdtheory.end_to_end.scales import Factor, cause_of, facts_of
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError, check_between
from opdtheory.objective import Objective

if TYPE_CHECKING:
    from transformers import Trainer

__all__ = ["TOLERANCE", "audit_trainer", "audit_update"]

# Relative error that counts as rounding: samplers and losses work in float32.
TOLERANCE = 1e-6

# A gradient this much shorter than the claimed one is zero.
_ZERO = 1e-9

# The denominators that a claimed reduction allows.
_REDUCTIONS: dict[str, tuple[Denominator, ...]] = {
    "token_sum": (),
    "token_mean": ("tokens",),
    "sequence_mean": ("own length",),
    "any": ("tokens", "own length"),
}


def audit_trainer(
    build: Callable[[TrainerPair], Trainer],
    objective: str | Divergence = "reverse_kl",
    granularity: str = "token_local",
    *,
    batch_size: int = 2,
    accumulate: int = 1,
    prompts: Sequence[str] = ("a", "ba"),
    horizon: int = 2,
    reduction: str = "token_sum",
    histories: Histories = "student",
    variants: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    name: str | None = None,
    limit: int = BUDGET,
) -> TrainerAudit:
    r"""Find out what a whole trainer descends, by playing every outcome of its own sampling.

    The trainer generates, collates, masks, accumulates and steps as it always does, at a learning rate of 0, with a
    student and a teacher whose next-token logits are tables. Only `torch.multinomial` inside `generate` is replaced, by
    a walk over all its outcomes, and shuffling keeps the order of the dataset. The gradient that lands in the student's
    table is weighted with each outcome's probability, and the sum is compared with the exact gradient.

    Args:
        build: `build(pair)` returns a `transformers.Trainer`, unstarted, that trains `pair.student` with
            `pair.teacher` on `pair.dataset`; pass `**pair.arguments` to its configuration, and `pair.horizon` as the
            largest number of new tokens. A trainer that keeps a reference model from the student's path gets the teacher.
        objective: the divergence that it claims to minimise.
        granularity: `token_local`, `token_return` or `sequence`.
        batch_size: rollouts that are scored at once.
        accumulate: such batches in one step.
        prompts: prompts in the letters a and b; of unequal length, they make the trainer pad.
        horizon: the largest length of an answer.
        reduction: the claimed reduction (T11): `token_sum`, `token_mean`, `sequence_mean`, or `any`.
        histories: whether the claim is about the `student`'s own histories or those of its `sampler` (T15).
        variants: whether to ask other settings too: accumulation, equal prompts, padding that is the end of the
            sequence, longer reference answers.
        tolerance: relative error that counts as rounding.
        seed: seed of the tables.
        name: name in the report (default: that of `build`).
        limit: the largest number of outcomes of one setting.

    Returns:
        A `TrainerAudit`; `print` it, or take `.verdict`, `.passes`, `.where`, `.variants` and `.words`.

    Raises:
        InvalidArgumentError: an argument is out of range, or `build` returns something else than such a trainer.
        LossError: the trainer does not sample in this process, does not step once a step, changes the table or does
            not replay; the message says what to use instead.
        BudgetExceededError: its sampling has too many outcomes.
    """
    return _audited(
        lambda pair: play_trainer(build, pair, limit),
        name or getattr(build, "__name__", type(build).__name__),
        _Asked(
            Objective.of(as_divergence(objective), granularity, reduction=reduction),
            histories,
            variants,
            tolerance,
            {
                "batch_size": batch_size,
                "accumulate": accumulate,
                "prompts": tuple(prompts),
                "horizon": horizon,
                "seed": seed,
            },
        ),
    )


def audit_update(
    update: Update,
    objective: str | Divergence = "reverse_kl",
    granularity: str = "token_local",
    *,
    batch_size: int = 2,
    accumulate: int = 1,
    prompts: Sequence[str] = ("a", "ba"),
    horizon: int = 2,
    reduction: str = "token_sum",
    variants: bool = True,
    tolerance: float = TOLERANCE,
    seed: int = 0,
    name: str | None = None,
    limit: int = BUDGET,
) -> TrainerAudit:
    """Find out what an update descends that is no `transformers.Trainer`: a loop of one's own, or another engine's.

    As `audit_trainer`, but the audit itself samples from the student, and hands over what it sampled.

    Args:
        update: `update(pair, prompts, answers)` leaves the gradient of one step in `pair.student`; prompts and answers
            are lists of tokens, one list a rollout, answers up to and including the end of the sequence.
        objective: as in `audit_trainer`, and so are the others.
        granularity: see there.
        batch_size: see there.
        accumulate: see there; the update gets the rollouts of the whole step.
        prompts: see there.
        horizon: see there.
        reduction: see there.
        variants: see there.
        tolerance: see there.
        seed: see there.
        name: see there.
        limit: see there.

    Raises:
        InvalidArgumentError: an argument is out of range.
        LossError: the update leaves no gradient, changes the student, or leaves a gradient of the step before.
        BudgetExceededError: there are too many outcomes.

    Example:
        >>> import torch, opdtheory as opd
        >>> def update(pair, prompts, answers):
        ...     for prompt, answer in zip(prompts, answers):
        ...         ids = torch.tensor([prompt + answer])
        ...         p, q = (model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in (pair.student, pair.teacher))
        ...         ((p.exp() * (p - q)).sum() / len(prompts)).backward()
        >>> opd.audit_update(update, "reverse_kl", variants=False).verdict
        'exact'
    """
    return _audited(
        lambda pair: play_update(update, pair, limit),
        name or getattr(update, "__name__", type(update).__name__),
        _Asked(
            Objective.of(as_divergence(objective), granularity, reduction=reduction),
            "student",
            variants,
            tolerance,
            {
                "batch_size": batch_size,
                "accumulate": accumulate,
                "prompts": tuple(prompts),
                "horizon": horizon,
                "seed": seed,
            },
        ),
    )


@dataclass(frozen=True)
class _Asked:
    """The claim, and how it is asked."""

    claim: Objective
    histories: Histories
    variants: bool
    tolerance: float
    settings: dict[str, Any]

    def __post_init__(self) -> None:
        check_between("tolerance", self.tolerance, 0.0, 1.0)
        if self.histories not in HISTORIES:
            raise InvalidArgumentError("histories", f"must be one of {', '.join(HISTORIES)}, got {self.histories!r}")


_Player = Callable[[TrainerPair], Played]


def _audited(play: _Player, name: str, asked: _Asked) -> TrainerAudit:
    start = time.perf_counter()
    main = play(trainer_pair(**asked.settings))
    gradient, exact = main.gradient, _claimed(main, asked, PLAIN)
    found = descent(main, asked.claim, asked.tolerance)
    if found is not None and not found.matches(asked.tolerance):
        followed, nearest = None, found
    else:
        followed, nearest = found, None
    against = distance(gradient, exact)
    if followed is not None and _allowed(asked, followed):
        against = distance(gradient, _claimed(main, asked, followed.reading))
    verdict = _verdict(against, gradient, exact, followed, asked)
    others = _variants(play, main, followed, asked) if asked.variants and verdict != "zero" else ()
    scale = followed.distance.scale if followed is not None else against.scale
    cause = "" if followed is None else _scale_cause(play, main, followed, scale, asked)
    report = TrainerAudit(
        name=name,
        claim=asked.claim,
        histories=asked.histories,
        verdict=verdict,
        scale=against.scale,
        scale_cause=cause,
        relative_bias=against.relative_bias,
        error=against.error,
        cosine=against.cosine,
        tolerance=asked.tolerance,
        descends=None if followed is None or verdict == "zero" else str(followed.objective),
        nearest=None if nearest is None else str(nearest.objective),
        reading=() if followed is None else followed.reading.words(followed.objective.divergence),
        where=share_by_kind(main.pair, gradient),
        words=(),
        variants=others,
        variance=main.variance / float(exact.square().sum()),
        outcomes=len(main.leaves),
        settings={**asked.settings, "tolerance": asked.tolerance},
    )
    words = _words(report, main, followed, nearest)
    return dataclasses.replace(report, words=words, seconds=time.perf_counter() - start)


def _claimed(played: Played, asked: _Asked, reading: Reading) -> Tensor:
    """The claimed gradient: by the oracle, or at the sampler's histories, or as the mean that is claimed."""
    divergence = asked.claim.divergence
    if asked.claim.granularity != "token_local" or (reading == PLAIN and asked.histories == "student"):
        return claimed_gradient(played.pair, divergence, asked.claim.granularity)
    return gradient_of(played, reading, divergence)


def _allowed(asked: _Asked, followed: Descent) -> bool:
    """Whether a reading is one that the claim allows."""
    reading = dataclasses.replace(followed.reading, sampled=False, stopped=False, denominator="rollouts")
    own = followed.objective.divergence == asked.claim.divergence
    harmless = not followed.reading.stopped or asked.claim.divergence.name == "reverse_kl"
    allowed = followed.reading.denominator in _REDUCTIONS[asked.claim.reduction]
    return own and harmless and allowed and reading == PLAIN


def _verdict(
    against: Distance, gradient: Tensor, exact: Tensor, followed: Descent | None, asked: _Asked
) -> Verdict:
    if float(gradient.norm()) <= _ZERO * float(exact.norm()):
        return "zero"
    if against.relative_bias <= asked.tolerance:
        return "exact"
    if against.scale > 0 and against.error <= asked.tolerance:
        return "exact_up_to_scale"
    if followed is not None:
        same = followed.objective.terms == asked.claim.terms
        if not same or followed.objective.granularity != asked.claim.granularity:
            return "other_objective"
    return "biased"


def _variants(play: _Player, main: Played, followed: Descent | None, asked: _Asked) -> tuple[Variant, ...]:
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
        how = f"{split['accumulate']} micro-batches of {split['batch_size']}"
        found.append(_same_gradient(play, main, asked, how, split))
    found.append(_same_gradient(play, main, asked, "reference answers of two lengths", {"answers": longer}))
    found.append(_same_descent(play, main, followed, asked, "prompts of equal length", {"prompts": asked.settings["prompts"][:1]}))
    found.append(_same_descent(play, main, followed, asked, "padding is the end of the sequence", {"pad_is_eos": True}))
    return tuple(found)


def _played(play: _Player, asked: _Asked, changes: dict[str, Any]) -> Played | str:
    """What is played in another setting, or why it cannot be."""
    try:
        return play(trainer_pair(**{**asked.settings, **changes}))
    except (InvalidArgumentError, BudgetExceededError) as error:
        return str(error)
    except LossError:
        raise
    except Exception as error:  # whatever a trainer objects to
        return f"the trainer refused it: {error}"


def _same_gradient(play: _Player, main: Played, asked: _Asked, name: str, changes: dict[str, Any]) -> Variant:
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
        by = f"by a factor of {against.scale:.4g}" if against.error <= asked.tolerance else f"by {_percent(against.error)} in direction"
        words = f"With {name} the gradient changes {by}."
    elif abs(against.scale - 1.0) > asked.tolerance:
        words = f"With {name} the scale changes by a factor of {against.scale:.4g}."
    return Variant(name, holds, against.error, against.scale, words)


def _same_descent(
    play: _Player, main: Played, followed: Descent | None, asked: _Asked, name: str, changes: dict[str, Any]
) -> Variant:
    """A setting with another exact gradient, of which the trainer's should be the same function."""
    other = _played(play, asked, changes)
    if isinstance(other, str):
        return Variant(name, None, words=other)
    if followed is None:
        against = distance(other.gradient, _claimed(other, asked, PLAIN))
        return Variant(name, None, against.error, against.scale, "the main setting already differs from the claim")
    against = distance(other.gradient, _follow(other, followed))
    holds = against.scale > 0 and against.error <= asked.tolerance
    words = "" if holds else f"With {name} it does something else, off by {_percent(against.error)}."
    scale = against.scale / followed.distance.scale
    return Variant(name, holds, against.error, scale, words)


def _follow(played: Played, followed: Descent) -> Tensor:
    """The gradient of what was found, in another setting."""
    divergence = followed.objective.divergence
    if followed.objective.granularity != "token_local":
        return claimed_gradient(played.pair, divergence, followed.objective.granularity)
    return gradient_of(played, followed.reading, divergence)


def _scale_cause(play: _Player, main: Played, followed: Descent, scale: float, asked: _Asked) -> str:
    """What the scale is, from settings of one token that differ in one number each."""
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


def _words(report: TrainerAudit, main: Played, followed: Descent | None, nearest: Descent | None) -> tuple[str, ...]:
    claim = f"{report.claim.label} ({report.claim.granularity})"
    found = []
    if report.verdict == "exact":
        found.append(f"Its expected gradient is exactly that of {claim}.")
    elif report.verdict == "exact_up_to_scale":
        found.append(f"Its expected gradient is exactly that of {claim}, times {report.scale:.6g}.")
    elif report.verdict == "zero":
        found.append("Its expected gradient is zero.")
    else:
        uphill = " It points uphill." if report.cosine < 0 else ""
        found.append(
            f"Its expected gradient is not that of {claim}: at the best scale it is off by {_percent(report.error)}, with "
            f"a cosine of {report.cosine:.4f}.{uphill}"
        )
        if followed is not None and followed.objective.terms != report.claim.terms:
            found.append(f"It descends {followed.objective}.")
        elif followed is not None and str(followed.objective) != str(report.claim):
            found.append(f"It descends {followed.objective}.")
        elif nearest is not None and report.cosine > 0:
            found.append(f"The nearest catalogue objective is {nearest.objective}, off by {_percent(nearest.distance.error)}.")
    found += report.reading
    found += [report.scale_cause] if report.scale_cause else []
    found += _leaks(report)
    law = sampler_of(main).words
    found += [law] if law else []
    found += _modes(main)
    found += [each.words for each in report.variants if each.words and each.holds is not None]
    return tuple(found)


def _leaks(report: TrainerAudit) -> list[str]:
    """Where the gradient should not be."""
    said = {
        "inside a prompt": "The prompt's tokens carry {share} of the squared gradient: the loss reads labels inside the prompt.",
        "after EOS": "Positions after the end of the sequence carry {share} of the squared gradient: they are not masked.",
        "past the horizon": "Positions past the last token carry {share} of the squared gradient: labels are one token late.",
        "padding read as text": "{share} of the squared gradient is at prefixes that hold padding: the attention mask or the "
        "positions are wrong.",
        "not a prefix of these prompts": "{share} of the squared gradient is at prefixes of no prompt: prompts are cut, "
        "doubled or templated differently.",
        "longer than prompt and response": "{share} of the squared gradient is at prefixes longer than prompt and answer.",
    }
    # Squares of rounding are not a leak.
    return [
        said[kind].format(share=_percent(share))
        for kind, share in report.where.items()
        if kind in said and share > report.tolerance**2
    ]


def _modes(main: Played) -> list[str]:
    ours, theirs = main.modes
    found = []
    if ours and True not in ours:
        found.append("The loss was computed in eval mode: dropout would be off.")
    if True in theirs:
        found.append("The teacher was scored in train mode, with a gradient: dropout would be on.")
    return found


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
