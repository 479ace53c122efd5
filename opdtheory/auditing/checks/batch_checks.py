"""Checks of the loss of one batch and of its gradient in the student's logits."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from opdtheory.auditing.checks.backward import BackwardReport, backward_report
from opdtheory.auditing.checks.subject import Finding, Subject, ratio
from opdtheory.exact import Enumeration, TabularPolicy, random_pair
from opdtheory.rollouts import Rollouts

__all__ = ["BATCH_CHECKS", "PADDING_CHECKS"]

_RARE = math.log(1e-30)

# Log-ratios at padding: finite, but their exponential overflows float64.
_EXTREME = 2000.0


def padding_gradient(s: Subject) -> Finding:
    """No logit after the end of a rollout, or where an environment writes, receives gradient."""
    gradient = s.padded_base[1]
    padding = s.padded.mask[s.everyone(s.padded)] == 0
    value = ratio(gradient[padding].abs().max(), gradient.abs().max())
    return s.held(
        value,
        "After the end of a rollout no logit receives gradient.",
        f"Logits after the end of a rollout receive gradient, up to {value:.2g} of the largest: the mask is ignored.",
    )


def padding_values(s: Subject) -> Finding:
    """Other tokens and logits at masked positions change nothing."""
    generator = torch.Generator().manual_seed(s.scenario.seed + 7)
    logits = s.rows(s.padded, s.everyone(s.padded))
    padding = s.padded.mask == 0
    changed = replace(
        s.padded,
        tokens=torch.where(padding, (s.padded.tokens + 1) % logits.shape[-1], s.padded.tokens),
        teacher_tables=_noisy_at_padding(s.padded, generator),
    )
    noise = 3.0 * torch.randn(logits.shape, generator=generator, dtype=logits.dtype)
    return _padding(s, changed, noise, "other tokens and logits")


def padding_extremes(s: Subject) -> Finding:
    r"""Log-ratios of $\pm 2000$ at masked positions, whose exponentials overflow, change nothing."""
    everyone = s.everyone(s.padded)
    tokens = s.padded.tokens[everyone].unsqueeze(-1)
    sign = torch.where(torch.arange(len(everyone)) % 2 == 0, -1.0, 1.0).double().view(-1, 1, 1)
    push = torch.zeros_like(s.rows(s.padded, everyone)).scatter(-1, tokens, _EXTREME)
    return _padding(s, s.padded, sign * push, f"log-ratios of {_EXTREME:g}")


def rows_sum(s: Subject) -> Finding:
    r"""The gradient of each row of logits sums to zero, $\sum_a \partial L/\partial z_a = 0$."""
    value = ratio(s.base[1].sum(-1).abs().max(), s.base[1].abs().max())
    return s.held(
        value,
        "The gradient of each row of logits sums to zero, as a softmax's.",
        f"The gradient of a row of logits sums to {value:.2g} of its largest entry: the loss depends on the logits "
        "themselves, not only on their probabilities.",
    )


def shift(s: Subject) -> Finding:
    """A constant added to a row of logits, the student's or the teacher's, changes nothing."""
    index = s.everyone(s.live)
    generator = torch.Generator().manual_seed(s.scenario.seed + 8)

    def shifted(table: Tensor) -> Tensor:
        return table + torch.randn(*table.shape[:-1], 1, generator=generator, dtype=table.dtype)

    changed = replace(s.live, teacher_tables=[shifted(t) for t in s.live.teacher_tables])
    moved = s.moved(s.base, s.evaluate(changed, index, shifted(s.rows(s.live, index))))
    return s.held(
        moved,
        "A constant added to a row of the student's or the teacher's logits moves neither value nor gradient.",
        f"Constants added to rows of logits, which change no probability, move the loss or gradient by {moved:.2g}.",
    )


def backward(s: Subject) -> Finding:
    """The gradient is the derivative of the value, unless the value is a surrogate."""
    index = s.some()
    # The student itself sampled, but the sampling policy must not vary with the differences.
    sampled = s.live.rollouts(index).behavior_logprobs.detach()

    def rollouts_of(logits: Tensor) -> Rollouts:
        return replace(s.live.rollouts(index, logits), behavior_logprobs=sampled)

    report = backward_report(s.loss, rollouts_of, s.rows(s.live, index), s.scenario.seed)
    passed, detail = _backward_words(report)
    return passed, report.error, report.limit, detail


def order(s: Subject) -> Finding:
    """The order of the rollouts in a batch does not matter."""
    index = s.some()
    turned = torch.arange(len(index)).flip(0).roll(1)
    value, gradient = s.evaluate(s.live, index)
    moved = s.moved((value, gradient[turned]), s.evaluate(s.live, index[turned]))
    return s.held(
        moved,
        "The order of the rollouts in a batch does not matter.",
        f"Rollouts in another order move the loss or its gradient by {moved:.2g} of itself.",
    )


def batch_mean(s: Subject) -> Finding:
    """Repeating every rollout leaves the gradient of a mean over rollouts unchanged."""
    index = s.some()
    gradient = s.evaluate(s.live, index)[1]
    twice = s.evaluate(s.live, torch.cat([index, index]))[1]
    both = twice[: len(index)] + twice[len(index) :]
    moved = s.gradient_moved(gradient, both)
    factor = ratio((both * gradient).sum(), gradient.square().sum())
    # Baselines and standard deviations of the batch rescale the gradient too, but never by two.
    doubled = abs(factor - 2.0) <= s.tolerance and s.gradient_moved(2.0 * gradient, both) <= s.tolerance
    return s.held(
        moved,
        "Repeating every rollout leaves the gradient unchanged.",
        "Repeating every rollout doubles the gradient: it is a sum over rollouts, not a mean."
        if doubled
        else f"Repeating every rollout moves the gradient by {moved:.2g} of itself: the batch couples its rollouts.",
        failed=False if doubled else None,
    )


def reproducible(s: Subject) -> Finding:
    """Two identical calls agree to the last bit."""
    first, second = (s.evaluate(s.live, s.some()) for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    moved = s.moved(first, second)
    detail = "Two identical calls agree to the last bit." if same else f"Two identical calls differ by {moved:.2g}."
    return same, moved, 0.0, detail


def rare(s: Subject) -> Finding:
    """The gradient is finite when student or teacher gives a sampled token a probability of 1e-30."""
    student, teacher = _two_levels(s)
    for level in student.logits:
        level[:, -1] = _RARE
    for level in teacher.logits:
        level[:, 0] = _RARE
    return _finite(s, Enumeration.build(student, teacher), "sampled tokens to which student or teacher gives 1e-30")


def excluded(s: Subject) -> Finding:
    """The gradient is finite when the teacher gives zero to tokens that were not sampled."""
    student, teacher = _two_levels(s)
    for level in teacher.logits:
        level[:, -1] = -torch.inf
    everything = Enumeration.build(student, teacher)
    kept = (everything.tokens != student.vocab_size - 1).all(-1)
    sampled = replace(
        everything,
        **{field: getattr(everything, field)[kept] for field in ("tokens", "mask", "rows", "probability")},
        world_logprobs=everything.world_logprobs[kept],
    )
    what = "teacher logits of -inf at tokens that were not sampled"
    infinite = s.objective is not None and any(math.isinf(d.at_zero) for _, d in s.objective.terms)
    return _finite(s, sampled, what, infinite)


def _padding(s: Subject, changed: Enumeration, push: Tensor, what: str) -> Finding:
    everyone = s.everyone(s.padded)
    live = (s.padded.mask[everyone] > 0).unsqueeze(-1)
    logits = s.rows(s.padded, everyone)
    value, gradient = s.evaluate(changed, everyone, torch.where(live, logits, logits + push))
    before = s.padded_base[0], torch.where(live, s.padded_base[1], 0.0)
    moved = s.moved(before, (value, torch.where(live, gradient, 0.0)))
    where = f"With {what} at masked positions"
    if not math.isfinite(moved):
        return False, None, s.tolerance, f"{where} the loss or its gradient is no longer finite."
    fails = f"{where} the loss or its gradient moves by {moved:.2g} of itself."
    return s.held(moved, f"{where} nothing moves.", fails)


def _noisy_at_padding(everything: Enumeration, generator: torch.Generator) -> list[Tensor]:
    """The teacher's tables with noise on the rows of padded positions, which no other position reads."""
    tables = []
    for n, table in enumerate(everything.teacher_tables):
        padded = everything.rows[everything.mask[:, n] == 0, n].unique()
        table = table.detach().clone()
        table[padded] += 3.0 * torch.randn(len(padded), table.shape[-1], generator=generator, dtype=table.dtype)
        tables.append(table)
    return tables


def _backward_words(report: BackwardReport) -> tuple[bool | None, str]:
    if report.error <= report.limit:
        return True, "The gradient agrees with central differences of the loss."
    differs = f"The gradient differs from central differences by {report.error:.2g} of the largest slope"
    if report.wrong:
        which, by = max(report.wrong.items(), key=lambda item: item[1])
        return False, f"The hand-written backward {which} disagrees with its forward by {by:.2g} of the largest slope."
    if report.unseen:
        which = " or ".join(report.unseen)
        return None, f"{differs}: either a stop-gradient or the hand-written backward {which} makes it so."
    if report.stopped:
        return None, "The value is a surrogate (stop-gradient): its derivative is not the gradient, on purpose."
    return False, f"{differs}, although nothing is detached and no hand-written backward explains it."


def _two_levels(s: Subject) -> tuple[TabularPolicy, TabularPolicy]:
    return random_pair(s.case.student.vocab_size, 2, seed=1000 * s.scenario.seed + 904)


def _finite(s: Subject, everything: Enumeration, what: str, infinite: bool = False) -> Finding:
    """Whether the gradient is finite and the value is not NaN; `infinite`: the divergence itself is infinite there."""
    value, gradient = s.evaluate(everything, s.everyone(everything))
    bad = int((~torch.isfinite(gradient)).any(-1).sum())
    if bad == 0 and not bool(torch.isnan(value)):
        return True, 0.0, 0.0, f"With {what} the gradient is finite."
    total = gradient.shape[0] * gradient.shape[1]
    found = (
        f"the gradient of {bad} of {total} tokens is NaN or inf" if bad else "the loss is NaN, though not its gradient"
    )
    if infinite:
        return None, bad / total, 0.0, f"With {what} {found}; the claimed divergence is infinite there."
    return False, bad / total, 0.0, f"With {what} {found}."


PADDING_CHECKS = ("no gradient on padding", "padding values are ignored", "extreme padding is ignored")

BATCH_CHECKS = {
    "no gradient on padding": padding_gradient,
    "padding values are ignored": padding_values,
    "extreme padding is ignored": padding_extremes,
    "gradient rows sum to zero": rows_sum,
    "shifting logits changes nothing": shift,
    "backward is the derivative of the value": backward,
    "order of the batch": order,
    "mean over the batch": batch_mean,
    "reproducible": reproducible,
    "finite at probability 1e-30": rare,
    "finite where the teacher gives zero": excluded,
}
