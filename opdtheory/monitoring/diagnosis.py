r"""`diagnose`: what logged log-probabilities say of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as divergence_of
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.estimators import estimator as estimator_of
from opdtheory.monitoring.evidence import Evidence
from opdtheory.monitoring.report import Diagnosis
from opdtheory.monitoring.tokens import SampledTokens, words_of
from opdtheory.monitoring.weights import weight_of
from opdtheory.monitoring.zoo import beside

__all__ = ["diagnose", "loss_of"]


def diagnose(
    student_logprobs: Any,
    teacher_logprobs: Any,
    behavior_logprobs: Any = None,
    mask: Any = None,
    estimator: str | Estimator = "opd",
    divergence: str | Divergence | None = None,
    *,
    entropy: Any = None,
    student_logits: Tensor | None = None,
    teacher_logits: Tensor | None = None,
    together: int = 1,
    batch_tokens: float | None = None,
    **options: Any,
) -> Diagnosis:
    r"""What the log-probabilities of sampled tokens say of a run: where the estimator's weight falls, what follows.

    Args:
        student_logprobs: $\log p(y_n|h_n)$ in nats, `(B, T)`, or lists of rows of any lengths.
        teacher_logprobs: $\log q(y_n|h_n)$, likewise.
        behavior_logprobs: $\log\mu(y_n|h_n)$ of what sampled, if it is not the student: an engine, or a stale copy.
        mask: 1 on tokens that count; by default all do.
        estimator: the estimator in use, or its name.
        divergence: the divergence that it is for, where the name needs one; the reverse KL by default.
        entropy: the student's entropies, in nats, which tell whether the tokens are its own samples.
        student_logits: `(B, T, V)`, if logged.
        teacher_logits: likewise.
        together: the number of rollouts of one prompt, which stand next to each other.
        batch_tokens: tokens of one optimiser step; by default all that are given.
        **options: further options of `opdtheory.estimator`, such as `clip_log_ratio`.

    Raises:
        InvalidArgumentError: arrays do not fit together, no token is usable, or the estimator does not weigh a token
            by its own ratio.

    References:
        T4, T5 (where the weight falls), T7 (noise), T8 and T14 (other samplers), T11 (lengths), T13 (top tokens).

    Example:
        >>> import torch
        >>> student = torch.full((4, 8), -1.0)
        >>> diagnose(student, student + 0.1, estimator="k1_loss").verdict
        'no_signal'
    """
    loss = loss_of(estimator, divergence, options)
    tokens = SampledTokens.of(
        student_logprobs,
        teacher_logprobs,
        behavior_logprobs,
        mask,
        entropy=entropy,
        student_logits=student_logits,
        teacher_logits=teacher_logits,
    )
    evidence = Evidence(weight_of(loss), together, tuple(beside(loss)))
    evidence.add(tokens)
    if not evidence.tokens:
        raise InvalidArgumentError("student_logprobs", f"must hold a usable token; left out: {dict(evidence.left_out)}")
    size = float(evidence.tokens) if batch_tokens is None else float(batch_tokens)
    return Diagnosis(loss, evidence, size, left_out=words_of(evidence.left_out))


def loss_of(estimator: str | Estimator, divergence: str | Divergence | None, options: Mapping[str, Any]) -> Estimator:
    """The estimator in use, whose weight is a function of the token's own ratio.

    Raises:
        InvalidArgumentError: as for `opdtheory.estimator`, or its weight is no such function.
    """
    if isinstance(estimator, Estimator):
        if divergence is not None or options:
            raise InvalidArgumentError("estimator", "must be a name if a divergence or options are given")
        loss = estimator
    else:
        loss = _named(estimator, divergence, options)
    weight_of(loss)
    return loss


def _named(name: str, divergence: str | Divergence | None, options: Mapping[str, Any]) -> Estimator:
    """The estimator of a name; its only divergence may be named too, and where one is needed it is the reverse KL."""
    try:
        return estimator_of(name, divergence, **options)
    except InvalidArgumentError as error:
        if error.argument != "divergence":
            raise
        try:
            loss = estimator_of(name, "reverse_kl" if divergence is None else None, **options)
        except InvalidArgumentError:
            raise error from None
        if divergence is not None and loss.claim.divergence.label != divergence_of(divergence).label:
            raise
        return loss
