"""What is left of an expected gradient in which the teacher is absent: a push on lengths, a reward, nothing (T18)."""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from opdtheory.auditing.fixes import changes
from opdtheory.auditing.fixes.facts import Candidate, Facts
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.naming.fit import fit_scale, flat
from opdtheory.auditing.scenario import Case
from opdtheory.exact import Loss
from opdtheory.rollouts import gather_logprobs

__all__ = ["length_push", "remainder"]

# Pairs on which another teacher is tried, and how far it is from the first one.
_PAIRS, _FAR = 2, 1.0


def length_push(reduction: str) -> Loss:
    r"""A loss whose expected gradient is $\nabla E[1/N]$, with N the tokens of a batch or of a rollout (T18)."""
    return lambda rollouts: getattr(rollouts, reduction)(rollouts.student_logprobs)


def remainder(facts: Facts) -> Candidate | None:
    """The cause, and what to do about it, if the teacher has no part in the expected gradient; else None."""
    cases = facts.trial.cases[-_PAIRS:] if facts.scenario.coupled else facts.trial.cases[:_PAIRS]
    if attempt(lambda: _ignores(facts)):
        zero = (
            ": the student is compared with a copy of itself"
            if facts.verdict == "zero"
            else ", neither value nor gradient"
        )
        return _reward_added(facts, f"The teacher does not enter the loss{zero} (T18).", "Compare with the teacher")
    if facts.verdict == "zero":
        return None
    if not attempt(lambda: all(_same_gradient(facts, case) for case in cases)):
        return None
    for reduction, words in (("token_mean", "of the batch"), ("sequence_mean", "of the rollout")):
        sign = attempt(functools.partial(_multiple, facts, reduction, cases))
        if sign:
            way = "longer" if sign > 0 else "shorter"
            cause = (
                "The teacher is absent from the expected gradient, since a backpropagated log p - log q has mean zero "
                f"(T4). What is left is a push on lengths, the gradient of E[1/N] with N the tokens {words}: rollouts "
                f"get {way} (T18)."
            )
            return _reward_added(facts, cause, "Sum over tokens, and use log q - log p as a detached reward")
    cause = (
        "The teacher is absent from the expected gradient: a backpropagated log p - log q has mean zero (T4). What is "
        "left is the policy gradient of something else, such as a reward set apart."
    )
    return _reward_added(facts, cause, "Add log q - log p, detached, to the reward that multiplies log p")


def _reward_added(facts: Facts, cause: str, text: str) -> Candidate:
    divergence = facts.claim.divergence
    loss = changes.advantage_added(facts.original, lambda r: divergence.weight(torch.where(r.mask > 0, r.log_u, 0.0)))
    words = "" if divergence.name == "reverse_kl" else f" (here w(u) of {divergence.label} in its place)"
    end = "." if facts.verdict == "zero" else "; what is left now comes on top of the claimed gradient."
    return Candidate("reward", f"{text}{words}{end}", loss, cause)


def _ignores(facts: Facts) -> bool:
    """Whether no value and no gradient of many batches changes with the teacher."""
    for rollouts in facts.trial.batches():
        noise = torch.randn(rollouts.teacher_logits.shape, generator=torch.Generator().manual_seed(1)).double()
        logits = torch.where(torch.isinf(rollouts.teacher_logits), 0.0, rollouts.teacher_logits) + noise
        other = replace(
            rollouts,
            teacher_logits=logits,
            teacher_logprobs=gather_logprobs(logits, rollouts.tokens, rollouts.mask),
        )
        found = []
        for each in (rollouts, other):
            value = facts.original(each)
            (gradient,) = torch.autograd.grad(value, rollouts.student_logits, retain_graph=True)
            found.append(torch.cat([value.detach().reshape(1), gradient.flatten()]))
        if float((found[0] - found[1]).abs().max()) > 1e-12 * max(float(found[0].abs().max()), 1e-300):
            return False
    return True


def _same_gradient(facts: Facts, case: Case) -> bool:
    """Whether the expected gradient is the same for another teacher."""
    other = replace(case, teacher=case.teacher.perturbed(_FAR, seed=1))
    one, two = (flat(facts.scenario.moments(facts.loss, each).mean) for each in (case, other))
    return float((one - two).norm()) <= facts.trial.tolerance * max(float(one.norm()), 1e-300)


def _multiple(facts: Facts, reduction: str, cases: list[Case]) -> float:
    """The multiple of a push on lengths that the expected gradient is, or 0 if it is none."""

    def gradients(loss: Loss) -> list[Tensor]:
        return [flat(facts.scenario.moments(loss, case).mean) for case in cases]

    actual, push = gradients(facts.loss), gradients(length_push(reduction))
    if min(float(g.norm()) for g in push) <= 1e-9:
        return 0.0
    for sign in (1.0, -1.0):
        if fit_scale(actual, [sign * g for g in push]).worst_error <= 1e-6:
            return sign
    return 0.0
