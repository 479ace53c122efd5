"""What is wrong in a loss by name, each with the one-line change that undoes it: a detach, a clamp, a mask (T4, T8)."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace

from opdtheory.auditing.fixes import operations
from opdtheory.auditing.fixes.facts import Candidate, Facts
from opdtheory.auditing.fixes.operations import Rule
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.remembered import Remembered
from opdtheory.exact import Loss

__all__ = ["at_fault", "attached", "clipped"]

_REWARD = (
    "Detach the reward, for example (teacher_logprobs - student_logprobs).detach(), before it multiplies log p (T4).",
    "The reward is not detached: the gradient also flows through it, which adds log p times its derivative (T4).",
)
_RATIO = (
    "Detach the importance ratio, (student_logprobs - behavior_logprobs).exp().detach(), which multiplies log p (T8).",
    "The importance ratio is not detached although log p is differentiated beside it, which adds log p times its "
    "derivative (T8).",
)


def attached(facts: Facts) -> Iterator[Candidate]:
    """A missing detach of the reward or of the importance ratio: the loss with it in place."""
    reward = _rewritten(facts, operations.difference_detached)
    ratio = _rewritten(facts, operations.ratio_detached)
    either = _rewritten(facts, operations.reward_detached)
    named = [words for words, found in ((_REWARD, reward), (_RATIO, ratio)) if found is not None]
    tried = [(_REWARD, reward), (_RATIO, ratio), (tuple(map(" ".join, zip(*named or [_REWARD], strict=True))), either)]
    for (text, cause), found in tried:
        if found is not None:
            yield Candidate("detach", text, Remembered(found[0]), cause)


def clipped(facts: Facts) -> Iterator[Candidate]:
    """A clamp of what comes from the policies, or a mask by a comparison with it: the loss without it."""
    seen: list[list[str]] = []
    for rule in (operations.unclamped, operations.unmasked(True), operations.unmasked(False)):
        found = _rewritten(facts, rule)
        if found is None or found[1] in seen:
            continue
        seen += [found[1]] if rule is operations.unclamped else []
        what = " and ".join(found[1])
        kind = "mask" if "mask" in what else "clip"
        theorem = "T14" if "importance ratios" in what else "T4"
        text = f"Remove {what}, or widen it beyond the values met ({theorem})."
        cause = f"{what[0].upper()}{what[1:]} changes the gradient: beyond it a token gets another weight ({theorem})."
        yield Candidate(kind, text, Remembered(found[0]), cause)


def at_fault(facts: Facts) -> str:
    """A cause by name whose removal alone is no cure, since more is wrong; empty if there is none.

    It is the detach without which the weight is no function of the ratio, or a clamp or a mask of importance ratios
    that changes the gradient, or a clamp of anything else.
    """
    for candidate in attached(facts) if facts.curve is None else ():
        weight = attempt(functools.partial(recover_weight, candidate.loss, replace(facts.scenario, off_policy=0.0)))
        if weight is not None and weight.depends_on_ratio_only:
            return candidate.cause
    cuts = list(clipped(facts))
    ratios = [each.cause for each in cuts if "importance ratios" in each.text]
    return next(iter(ratios + [each.cause for each in cuts if each.kind == "clip"]), "")


def _rewritten(facts: Facts, rule: Rule) -> tuple[Loss, list[str]] | None:
    """The loss with its operations changed, if that changes something and the loss still runs."""
    return attempt(lambda: operations.rewritten(facts.original, rule, facts.trial.batches()))
