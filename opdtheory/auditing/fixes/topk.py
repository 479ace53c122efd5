"""A black-box loss recognised as one of the k likeliest tokens, and the term that it leaves out (T9)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from opdtheory.auditing.fixes import changes
from opdtheory.auditing.naming.fit import fit_scale
from opdtheory.choices import Support
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.estimators.vocabulary import perspective
from opdtheory.exact import Enumeration, Loss, TabularPolicy
from opdtheory.rollouts import Rollouts

__all__ = ["TopKForm", "recognise", "tail_bucket", "wide_pair"]

_FORMS = ("topk_truncated", "topk_renormalised", "topk_tail")
_SUPPORTS: tuple[Support, ...] = ("teacher", "student")
# Two pairs of logits of student and teacher. The k likeliest tokens of the first differ for every k; in the second, the
# student's likeliest are not those that the teacher likes less.
_ROWS = (
    ((1.3, 0.9, 0.2, -0.5, -0.7), (-1.1, -0.2, 0.1, 0.6, 1.4)),
    ((0.5, -0.4, 1.1, 0.2, -1.0), (0.9, 1.2, -0.3, 0.1, -0.6)),
)
_VOCABULARY = 5
_ALIKE = 1e-6

# Tokens beyond a known k.
_MORE = 4


@dataclass(frozen=True)
class TopKForm:
    """Which estimator of k tokens a loss is, up to a factor.

    Attributes:
        form: `topk_truncated`, `topk_renormalised` or `topk_tail`.
        k: number of tokens.
        support: whether the teacher or the student ranks them.
    """

    form: str
    k: int
    support: Support


def recognise(loss: Loss, divergence: Divergence, k: int | None = None) -> TopKForm | None:
    """The form of a loss that is backpropagated through the k likeliest tokens; None if it is another loss.

    Args:
        loss: the black box.
        divergence: the divergence that it sums over these tokens.
        k: their number, if it is known; otherwise less than five.
    """
    pairs = [Enumeration.build(student, teacher) for student, teacher in _pairs(k)]
    gradients = []
    for everything in pairs:
        rows = [_gradient(loss, everything, token) for token in range(_VOCABULARY)]
        # Such a loss depends on the history only, not on the token drawn.
        if float(rows[0].norm()) == 0.0 or any(float((row - rows[0]).abs().max()) > 1e-12 for row in rows):
            return None
        gradients.append(rows[0])
    sizes = range(1, _VOCABULARY) if k is None else (k,)
    for candidate in (TopKForm(form, size, support) for form in _FORMS for support in _SUPPORTS for size in sizes):
        named = estimator(candidate.form, divergence, k=candidate.k, support=candidate.support)
        expected = [_gradient(named, everything, 0) for everything in pairs]
        if min(float(g.norm()) for g in expected) > 1e-12 and fit_scale(gradients, expected).worst_error < _ALIKE:
            return candidate
    return None


def wide_pair(k: int) -> tuple[TabularPolicy, TabularPolicy]:
    """A student and a teacher of one step over more than k tokens, whose k likeliest differ."""
    return _pairs(k)[0]


def _pairs(k: int | None) -> list[tuple[TabularPolicy, TabularPolicy]]:
    rows = torch.tensor(_ROWS, dtype=torch.float64)
    if k is not None:
        generator = torch.Generator().manual_seed(k)
        rows = torch.randn(2, 2, max(k + _MORE, _VOCABULARY), generator=generator, dtype=torch.float64)
    return [(TabularPolicy([student[None]]), TabularPolicy([teacher[None]])) for student, teacher in rows]


def tail_bucket(loss: Loss, divergence: Divergence, found: TopKForm) -> Loss:
    r"""A truncated top-k loss plus the term of the other tokens, $P(S^c) f(Q(S^c)/P(S^c))$, with $S$ fixed (T9d)."""

    def bucket(rollouts: Rollouts) -> Tensor:
        log_p = torch.log_softmax(rollouts.student_logits, -1)
        log_q = torch.log_softmax(rollouts.teacher_logits, -1)
        kept = (log_q if found.support == "teacher" else log_p.detach()).topk(found.k, -1).indices
        rest_p, rest_q = (torch.logsumexp(row.scatter(-1, kept, -torch.inf), -1) for row in (log_p, log_q))
        return perspective(divergence, rest_p, rest_q)

    return changes.value_added(loss, bucket)


def _gradient(loss: Loss, everything: Enumeration, token: int) -> Tensor:
    logits = everything.gather_logits(everything.student_tables)[token : token + 1].detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(everything.rollouts(torch.tensor([token]), logits)), logits)
    return gradient.flatten()
