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

__all__ = ["TopKForm", "recognise", "tail_bucket"]

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


def recognise(loss: Loss, divergence: Divergence) -> TopKForm | None:
    """The form of a loss that is backpropagated through the k likeliest of five tokens; None if it is another loss."""
    pairs, gradients = [], []
    for pair in _ROWS:
        student, teacher = (TabularPolicy([torch.tensor([row], dtype=torch.float64)]) for row in pair)
        pairs.append(Enumeration.build(student, teacher))
        rows = [_gradient(loss, pairs[-1], token) for token in range(_VOCABULARY)]
        # Such a loss depends on the history only, not on the token drawn.
        if float(rows[0].norm()) == 0.0 or any(float((row - rows[0]).abs().max()) > 1e-12 for row in rows):
            return None
        gradients.append(rows[0])
    candidates = [TopKForm(form, k, support) for form in _FORMS for support in _SUPPORTS for k in range(1, _VOCABULARY)]
    for candidate in candidates:
        named = estimator(candidate.form, divergence, k=candidate.k, support=candidate.support)
        expected = [_gradient(named, everything, 0) for everything in pairs]
        if min(float(g.norm()) for g in expected) > 1e-12 and fit_scale(gradients, expected).worst_error < _ALIKE:
            return candidate
    return None


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
