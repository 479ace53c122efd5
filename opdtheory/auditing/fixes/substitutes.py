"""Estimators to use instead of a loss, or another use of its value (T1, T4, T7e, T9)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from opdtheory.auditing.fixes import changes
from opdtheory.auditing.fixes.facts import Candidate, Facts, alike
from opdtheory.auditing.fixes.topk import TopKForm, recognise, tail_bucket
from opdtheory.auditing.fixes.trial import attempt
from opdtheory.auditing.naming.bandits import bandits
from opdtheory.auditing.scenario import Scenario
from opdtheory.estimators import estimator
from opdtheory.estimators.sampled import k2, k3
from opdtheory.exact import Enumeration

__all__ = [
    "backpropagated",
    "bucket_added",
    "last_resort",
    "topk_form",
    "unstandardised",
    "value_as_reward",
    "whole_vocabulary",
]

# By claimed divergence: the estimator of Schulman's that is exact as a loss, its formula and value, and why (T4).
_AS_LOSS = {
    "reverse_kl": ("k2_loss", "k2 = log(u)^2 / 2", k2, "its gradient weighs the score by log(u)"),
    "forward_kl": ("k3_loss", "k3 = u - 1 - log(u)", k3, "its gradient weighs the score by u"),
}

_LEFT_OUT = {
    "topk_truncated": "truncated, so that it is not at rest at the teacher (T9a, T9b)",
    "topk_renormalised": (
        "renormalised, so that it is at rest wherever the student has the teacher's conditional distribution on them, "
        "whatever the mass of the others (T9c)"
    ),
    "topk_tail": "with one bucket for the rest it is the divergence of a coarser distribution (T9d)",
}


def last_resort(facts: Facts) -> Candidate:
    """The library's own estimator of the claimed gradient, instead of the loss."""
    options: dict[str, Any] = {"baseline": "leave_one_out"} if facts.scenario.coupled else {}
    name, theorem = "opd_plus", "T1"
    if facts.claim.granularity == "token_return":
        name, theorem = "return_to_go", "T6"
        gamma = facts.claim.gamma
        options |= {"gamma": gamma, "discounted": gamma < 1.0}
    elif facts.claim.granularity == "sequence":
        name, theorem = "sequence_opd_plus", "T6"
    if facts.off_policy:
        options["importance"] = "prefix" if facts.token_local else "sequence"
    loss = estimator(name, facts.claim.divergence, **options)
    return Candidate("replace", f"Use opdtheory.{loss!r} instead, whose expected gradient is exact ({theorem}).", loss)


def value_as_reward(facts: Facts) -> Iterator[Candidate]:
    """The detached value of a loss as a reward, if that reward is the right one."""
    if not facts.token_local or facts.off_policy:
        return
    read = _values_on_grid(facts)
    near = alike(facts.trial.tolerance)
    if read is not None and _multiple(-read[1], facts.claim.divergence.weight(read[0]), near):
        # Otherwise the loss has terms that no single token shows, such as a reward relative to the others'.
        reduction = attempt(lambda: changes.reduction_of_values(facts.original, facts.trial.batches(), near))
        if reduction is None:
            return
        text = (
            "Detach the loss's value of each token and use it as a reward, sg(v_n) * log p(y_n|h_n), in place of "
            "backpropagating through the value (T4)."
        )
        cause = "The loss is backpropagated through a value that is right as a detached reward only (T4)."
        yield Candidate("detach", text, changes.value_as_reward(facts.loss, reduction), cause)


def _values_on_grid(facts: Facts) -> tuple[Tensor, Tensor] | None:
    """The loss's value of one token as a function of the log-ratio; None if it fails on single rollouts."""
    log_u = torch.linspace(-3.0, 3.0, 13, dtype=torch.float64)
    case = bandits(log_u, Scenario())[1]
    rollouts = Enumeration.build(case.student, case.teacher).rollouts()
    values = attempt(lambda: changes.token_values(facts.loss, rollouts).flatten())
    return None if values is None else (log_u, values)


def backpropagated(facts: Facts) -> Iterator[Candidate]:
    """The one of Schulman's estimators that is right as a loss, if another one or another use of it is wrong."""
    if facts.claim.divergence.name not in _AS_LOSS or not facts.token_local or facts.curve is None:
        return
    log_u, weight, near = facts.curve.log_u, facts.curve.weight, facts.curve.alike
    name, formula, value, why = _AS_LOSS[facts.claim.divergence.name]
    right = estimator(name, importance="prefix" if facts.off_policy else None)
    if _multiple(weight, -value(log_u), near):
        text = f"Backpropagate through {formula} instead of detaching it: {why} (T4)."
        yield Candidate("differentiate", text, right)
    elif name == "k2_loss" and (
        float(weight.abs().max()) < near
        or _multiple(weight, torch.expm1(log_u), near)
        or _multiple(weight, -k3(log_u), near)
        or _is_cut_off(weight, log_u, near)
    ):
        text = f"Use {formula}, unclipped, as the loss in place of this one: of k1, k2 and k3, backpropagated, it alone"
        yield Candidate("k2", f"{text} follows the reverse KL (T4).", right)


def _is_cut_off(weight: Tensor, log_u: Tensor, near: float) -> bool:
    """Whether the weight is the log-ratio up to some point and zero beyond, as of a backpropagated clamp."""
    inside = weight.abs() > near
    return not bool(inside[log_u != 0].all()) and _multiple(weight, torch.where(inside, log_u, 0.0), near)


def _multiple(curve: Tensor, target: Tensor, near: float) -> bool:
    """Whether a curve is a positive multiple of another one, up to a constant."""
    curve, target = curve - curve.mean(), target - target.mean()
    factor = float((curve * target).sum() / target.square().sum().clamp_min(1e-300))
    return factor > near and float((curve - factor * target).abs().max()) <= near * float(curve.abs().max())


def whole_vocabulary(facts: Facts) -> Iterator[Candidate]:
    """What a loss of the k likeliest tokens leaves out, and the divergence over the whole vocabulary (T9, T12)."""
    if not facts.token_local or facts.scenario.coupled:
        return
    whole = estimator("full_vocab", facts.claim.divergence, importance="prefix" if facts.off_policy else None)
    found = topk_form(facts)
    if found is not None:
        if found.form == "topk_truncated":
            yield bucket_added(facts, found)
        text = f"Sum p f(q/p) over the whole vocabulary in place of the {found.support}'s {found.k} likeliest tokens"
        cause = f"The loss sees the {found.support}'s {found.k} likeliest tokens only: {_LEFT_OUT[found.form]}."
        yield Candidate("vocabulary", f"{text} (T12).", whole, cause)
    elif facts.verdict == "zero":
        text = "Backpropagate the divergence over the whole vocabulary, sum_a p_a f(q_a / p_a), through p: the expected"
        yield Candidate("vocabulary", f"{text} gradient of this loss is zero (T9e, T12).", whole)


def topk_form(facts: Facts) -> TopKForm | None:
    """The form of a loss of the k likeliest tokens, or None if it is another loss."""
    if (facts.curve is not None and facts.top_k is None) or not facts.token_local or facts.scenario.coupled:
        return None
    return attempt(lambda: recognise(facts.loss, facts.claim.divergence, facts.top_k))


def bucket_added(facts: Facts, found: TopKForm) -> Candidate:
    """A truncated loss with one bucket for the rest (T9d)."""
    text = (
        f"Add the tail: one bucket for the tokens outside the {found.support}'s {found.k} likeliest, with the mass of "
        "both distributions there, P f(Q/P) (T9d)."
    )
    return Candidate("tail", text, tail_bucket(facts.loss, facts.claim.divergence, found))


def unstandardised(facts: Facts) -> Iterator[Candidate]:
    """The leave-one-out mean instead of a z-score (T7e)."""
    if facts.scenario.coupled and attempt(lambda: _standardised(facts)):
        text = (
            "Do not divide by the group's standard deviation; subtract the leave-one-out mean from the advantage "
            "w(u) = u f'(u) - f(u) (T1, T7e)."
        )
        yield Candidate("baseline", text, last_resort(facts).loss)


def _standardised(facts: Facts) -> bool:
    """Whether the advantages of the first tokens have the same sum of squares in every batch."""
    case, size = facts.trial.cases[-1], facts.scenario.batch_size
    everything = Enumeration.build(case.student, case.teacher, case.behavior)
    generator = torch.Generator().manual_seed(0)
    squares: list[float] = []
    while len(squares) < 8:
        batch = torch.randint(len(everything), (size,), generator=generator)
        token = everything.tokens[batch, :1]
        if len(token.unique()) == 1:  # a standard deviation of zero
            continue
        logits = everything.gather_logits(everything.student_tables, batch).detach().requires_grad_()
        (slope,) = torch.autograd.grad(facts.loss(everything.rollouts(batch, logits)), logits)
        score = 1.0 - torch.softmax(logits.detach()[:, 0], -1).gather(-1, token)
        squares.append(float((slope[:, 0].gather(-1, token) / score).square().sum()))
    # The epsilon that is added to the standard deviation changes the sum a little.
    return max(squares) - min(squares) <= 0.05 * max(squares)
