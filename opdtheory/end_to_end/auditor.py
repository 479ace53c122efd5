"""`audit_trainer` and `audit_update`: what a whole trainer descends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from opdtheory.choices import Histories, Verdict
from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.end_to_end.asked import Asked, Player, claimed
from opdtheory.end_to_end.claims import share_by_kind
from opdtheory.end_to_end.descent import Descent, Distance, descent, distance, stopped
from opdtheory.end_to_end.odometer import Draws
from opdtheory.end_to_end.pair import TrainerPair, trainer_pair
from opdtheory.end_to_end.played import BUDGET, Played, Update, play_trainer, play_update
from opdtheory.end_to_end.readings import PLAIN, Denominator
from opdtheory.end_to_end.report import TrainerAudit
from opdtheory.end_to_end.sampling import STEPS, judge
from opdtheory.end_to_end.variants import scale_cause, variants_of
from opdtheory.end_to_end.wording import words_of
from opdtheory.errors import BudgetExceededError
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
    method: str = "auto",
    tolerance: float = TOLERANCE,
    seed: int = 0,
    name: str | None = None,
    limit: int = BUDGET,
    teacher_answers: bool = False,
) -> TrainerAudit:
    r"""Find out what a whole trainer descends, by playing every outcome of its own sampling.

    The trainer generates, collates, masks, accumulates and steps as it always does, at a learning rate of 0, with a
    student and a teacher whose next-token logits are tables. Only `torch.multinomial` inside `generate` is replaced, by
    a walk over all its outcomes, and shuffling keeps the order of the dataset. The gradient that lands in the student's
    table is weighted with each outcome's probability, and the sum is compared with the exact gradient.

    Args:
        build: `build(pair)` returns a `transformers.Trainer`, unstarted, that trains `pair.student` with
            `pair.teacher` on `pair.dataset`; pass `**pair.arguments` to its configuration, and `pair.horizon` as the
            largest number of new tokens. A trainer that loads a reference model from the student's path gets the
            teacher.
        objective: the divergence that it claims to minimise.
        granularity: `token_local`, `token_return` or `sequence`.
        batch_size: rollouts that are scored at once.
        accumulate: such batches in one step.
        prompts: prompts in the letters a and b; of unequal length, they make the trainer pad.
        horizon: the largest length of an answer.
        reduction: the claimed reduction (T11): `token_sum`, `token_mean`, `sequence_mean`, or `any`.
        histories: whether the claim is about the `student`'s own histories or those of its `sampler` (T15).
        variants: whether to ask other settings too: accumulation, equal prompts, padding that is the end of the
            sequence, longer reference answers, and those that tell what a scale is a function of.
        method: `exact`, `monte_carlo`, or `auto`: exact where the outcomes fit the limit; else 1,000 steps are sampled
            and the verdict carries an error rate.
        tolerance: relative error that counts as rounding.
        seed: seed of the tables.
        name: name in the report (default: that of `build`).
        limit: the largest number of outcomes of one setting.
        teacher_answers: for trainers that do not sample: the dataset holds the teacher's answers, each played with the
            probability that the teacher gives it, and the claim is usually `forward_kl` of the `sequence`.

    Returns:
        A `TrainerAudit`; `print` it, or take `.verdict`, `.passes`, `.where`, `.variants` and `.words`.

    Raises:
        InvalidArgumentError: an argument is out of range, or `build` returns something else than such a trainer.
        LossError: the trainer does not sample in this process, does not step once a step, changes the table or does
            not replay; the message says what to use instead.
        BudgetExceededError: its sampling has too many outcomes.
    """
    return _audited(
        lambda pair, draws: play_trainer(build, pair, limit, draws),
        name or _name_of(build),
        Asked(
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
                "teacher_answers": teacher_answers,
            },
            method,
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
    method: str = "auto",
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
        method: see there.
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
        ...         rows = slice(len(prompt) - 1, -1)
        ...         p, q = (m(ids).logits[0, rows].log_softmax(-1) for m in (pair.student, pair.teacher))
        ...         ((p.exp() * (p - q)).sum() / len(prompts)).backward()
        >>> opd.audit_update(update, "reverse_kl", variants=False).verdict
        'exact'
    """
    return _audited(
        lambda pair, draws: play_update(update, pair, limit, draws),
        name or _name_of(update),
        Asked(
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
            method,
        ),
    )


def _audited(play: Player, name: str, asked: Asked) -> TrainerAudit:
    start = time.perf_counter()
    main = _main(play, asked)
    gradient, exact = main.gradient, claimed(main, asked, PLAIN)
    found = None if main.sampled else descent(main, asked.claim, asked.tolerance)
    matched = found is not None and found.matches(asked.tolerance)
    followed, nearest = (found, None) if matched else (None, found)
    if followed is not None and _allowed(asked, followed):
        exact = claimed(main, asked, followed.reading)
    against = distance(gradient, exact)
    judged = judge(main, exact) if main.sampled else None
    verdict = _verdict(against, gradient, exact, followed, asked) if judged is None else judged.verdict
    alone = main.sampled or verdict == "zero" or not asked.variants
    report = TrainerAudit(
        name=name,
        claim=asked.claim,
        histories=asked.histories,
        verdict=verdict,
        scale=against.scale,
        scale_cause="" if followed is None or not asked.variants else scale_cause(play, main, followed, asked),
        relative_bias=against.relative_bias,
        error=against.error,
        cosine=against.cosine,
        tolerance=asked.tolerance,
        descends=None if followed is None or verdict == "zero" or stopped(followed) else str(followed.objective),
        nearest=None if nearest is None else str(nearest.objective),
        reading=() if followed is None else followed.reading.words(followed.objective),
        where=share_by_kind(main.pair, gradient),
        words=() if judged is None else (judged.words,),
        variants=() if alone else variants_of(play, main, followed, asked),
        variance=main.variance / float(exact.square().sum()),
        outcomes=len(main.leaves),
        settings={**asked.settings, "tolerance": asked.tolerance, "method": asked.method},
        monte_carlo=len(main.leaves) if main.sampled else None,
    )
    words = words_of(report, main, followed, nearest)
    return dataclasses.replace(report, words=words, seconds=time.perf_counter() - start)


def _name_of(given: object) -> str:
    return str(getattr(given, "__name__", type(given).__name__))


def _main(play: Player, asked: Asked) -> Played:
    """The main setting: all outcomes, or sampled steps if they are too many."""
    draws = Draws(STEPS, asked.settings["seed"])
    if asked.method == "monte_carlo":
        return play(trainer_pair(**asked.settings), draws)
    try:
        return play(trainer_pair(**asked.settings), None)
    except BudgetExceededError:
        if asked.method == "exact":
            raise
        return play(trainer_pair(**asked.settings), draws)


def _allowed(asked: Asked, followed: Descent) -> bool:
    """Whether a reading is one that the claim allows."""
    reading = dataclasses.replace(followed.reading, sampled=False, stopped=False, centred=False, denominator="rollouts")
    own = followed.objective.terms == asked.claim.terms
    allowed = followed.reading.denominator in _REDUCTIONS[asked.claim.reduction]
    return own and not stopped(followed) and allowed and reading == PLAIN


def _verdict(against: Distance, gradient: Tensor, exact: Tensor, followed: Descent | None, asked: Asked) -> Verdict:
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
