r"""The divergence on a teacher's likeliest tokens and one bucket for the rest, from what a teacher server sends."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import arguments
from opdtheory.kernels.attached import attached, outside_graphs
from opdtheory.kernels.distributions import default_rows
from opdtheory.kernels.few import coarse_slopes, runs_as_program, top_k_by_programs
from opdtheory.kernels.payload import check_payload_entries, check_payload_shapes, check_probabilities, with_tail
from opdtheory.kernels.pieces import matrices
from opdtheory.kernels.reference import paired, terms
from opdtheory.kernels.sweep import runs

__all__ = ["fused_top_k_divergence", "highest_logits", "row_by_row"]


@outside_graphs
def fused_top_k_divergence(
    student_logits: Float[Tensor, "*batch V"],
    teacher_ids: Int64[Tensor, "*batch k"],
    teacher_logprobs: Float[Tensor, "*batch k"],
    divergence: str | Divergence,
    mask: Shaped[Tensor, "*batch"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""The divergence at each position on the teacher's `k` tokens and one bucket for all others (T9d).

    $$\ell_n = m_n \Bigl[\sum_{a \in S_n} p(a) f\!\left(\tfrac{q(a)}{p(a)}\right)
    + p(\bar S_n)\, f\!\left(\tfrac{q(\bar S_n)}{p(\bar S_n)}\right)\Bigr]$$

    This coarse-graining is at most the whole divergence and zero at the teacher; the gradient is its exact gradient.
    In nats, to be minimised. Of the teacher, only $S$ and $\log q$ on it are needed. The rest of its probability is in
    the tail, which is empty if `k` is the whole vocabulary or if rounding leaves nothing; that makes the reverse KL
    infinite. The `k + 1` terms are evaluated in float64, the student's distribution in float32 (float64 for float64
    logits). First derivatives only; the backward pass and `mask` are as in `fused_divergence`.

    Args:
        student_logits: $z$, with any leading shape.
        teacher_ids: $S$, distinct tokens.
        teacher_logprobs: $\log q$ on $S$ in nats, `-inf` allowed, at the teacher's own temperature; detached.
        divergence: an object or a catalogue name.
        mask: a weight for each position, as in `fused_divergence`.
        temperature: divides the student's logits.
        chunk_size: the number of positions at a time.

    Returns:
        $\ell$, float64 if the logits are, else float32.

    Raises:
        InvalidArgumentError: a shape, dtype or number does not fit, a token is repeated or outside the vocabulary, the
            probabilities sum to more than one, or a row of logits holds NaN, +inf or only `-inf`.

    References: T9 of the theory.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> ids, logprobs = torch.tensor([[0]]), torch.tensor([[0.5]]).log()
        >>> fused_top_k_divergence(student, ids, logprobs, "forward_kl")
        tensor([0.5578], grad_fn=...)
    """
    arguments.check_logits("student_logits", student_logits)
    dtype, weights = arguments.shared(student_logits, mask, temperature, chunk_size, student_logits)
    check_payload_shapes(student_logits, teacher_ids, teacher_logprobs)
    wanted = student_logits.requires_grad and torch.is_grad_enabled()
    if runs_as_program(student_logits, teacher_ids.shape[-1]):
        chosen = as_divergence(divergence)
        with torch.no_grad():
            values, gradient = top_k_by_programs(
                student_logits, teacher_ids, teacher_logprobs, chosen, weights, 1.0 / temperature, wanted
            )
        return attached("fused_top_k_divergence", student_logits, values, gradient)
    check_payload_entries(student_logits, teacher_ids, teacher_logprobs)
    chosen = as_divergence(divergence)
    arguments.check_weights(weights)

    def evaluate(logits: Tensor, ids: Tensor, log_q: Tensor, factor: Tensor | float, out: Tensor | None) -> Tensor:
        distribution = _Coarse(logits, ids, log_q, dtype, 1.0 / temperature)
        value = factor * distribution.value(chosen)
        if out is not None:
            distribution.write_gradient(chosen, factor / temperature, out)
        return value

    with torch.no_grad():
        check_probabilities(teacher_logprobs)
        log_q = with_tail(teacher_logprobs, student_logits.shape[-1])
        values, gradient = row_by_row(evaluate, student_logits, teacher_ids, log_q, weights, chunk_size, wanted)
    return attached("fused_top_k_divergence", student_logits, values.to(dtype), gradient)


# Of rows of logits, tokens and log-probabilities, with a factor for each: writes the gradient, returns the values.
Evaluate = Callable[[Tensor, Tensor, Tensor, "Tensor | float", "Tensor | None"], Tensor]


def row_by_row(
    evaluate: Evaluate,
    logits: Tensor,
    ids: Tensor,
    log_q: Tensor,
    weights: Tensor | None,
    chunk_size: int | None,
    wanted: bool,
) -> tuple[Tensor, Tensor | None]:
    """The value of each position, float64, and the gradient in the logits if it is wanted, chunk by chunk."""
    values = logits.new_zeros(logits.shape[:-1], dtype=torch.float64)
    gradient = torch.zeros_like(logits, memory_format=torch.contiguous_format) if wanted else None
    wide = [logits, ids.contiguous(), log_q] + ([] if gradient is None else [gradient])
    narrow = [values] + ([] if weights is None else [weights.contiguous()])
    rows = chunk_size or default_rows(logits.shape[-1], logits.device)
    for (student, tokens, teacher, *grads), (found, *weight) in matrices(wide, narrow):
        for part, weighed in runs(weight[0] if weight else None, found.shape[0], rows):
            if weighed:
                factor = weight[0][part].double().unsqueeze(-1) if weight else 1.0
                out = grads[0][part] if grads else None
                found[part] = evaluate(student[part], tokens[part], teacher[part], factor, out).squeeze(-1)
    return values, gradient


def highest_logits(scaled: Tensor) -> Tensor:
    """The largest logit of each row, `(R, 1)`.

    Raises:
        InvalidArgumentError: a row holds NaN, +inf or only `-inf`.
    """
    peak = scaled.amax(-1, keepdim=True)
    bad = int((~torch.isfinite(peak)).sum())
    if bad:
        raise InvalidArgumentError(
            "student_logits", f"must be finite or -inf, and not all -inf; {bad} of {len(peak)} rows are not"
        )
    return peak


class _Coarse:
    """The distributions of a chunk of positions on `k` tokens and a bucket, and the student's within the bucket."""

    def __init__(self, logits: Tensor, ids: Tensor, log_q: Tensor, dtype: torch.dtype, scale: float) -> None:
        scaled = logits.to(dtype) * scale
        peak = highest_logits(scaled)
        kept = (scaled.gather(-1, ids) - peak).double()
        scaled.scatter_(-1, ids, -math.inf)
        # The bucket has its own maximum, as all of it may be far below the chosen tokens.
        highest = scaled.amax(-1, keepdim=True)
        highest = torch.where(torch.isneginf(highest), peak, highest)
        self._within = scaled.sub_(highest).exp_()
        mass = self._within.sum(-1, keepdim=True)
        rest = mass.double().log() + (highest - peak).double()
        self._ids = ids
        self._share = torch.where(mass > 0, 1 / mass, 0.0).double()
        self._distributions = paired(torch.log_softmax(torch.cat([kept, rest], dim=-1), dim=-1), log_q)

    def value(self, divergence: Divergence) -> Tensor:
        return terms(divergence, self._distributions).sum(-1, keepdim=True)

    def write_gradient(self, divergence: Divergence, factor: Tensor | float, out: Tensor) -> None:
        """Write the gradient, of which a token in the bucket has its share of the bucket's."""
        coarse = factor * coarse_slopes(divergence, self._distributions)
        out.copy_(self._within.mul_((coarse[:, -1:] * self._share).to(self._within.dtype)))
        out.scatter_(-1, self._ids, coarse[:, :-1].to(out.dtype))
