r"""An unbiased loss of any divergence from what a teacher server sends: k tokens exactly, a sampled one for the rest.

The gradient in a row of logits, with $g_a = p_a (w_f(u_a) - c)$ on $S$, $G = \sum_S g_a$ and
$\kappa = 1[y \notin S]\,(w_f(u_y) - c)$, is $p_j (G + \kappa) - 1[j\in S]\,g_j - \kappa\,1[j = y]$ (T13).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import arguments
from opdtheory.kernels.attached import attached, outside_graphs
from opdtheory.kernels.few import Split, runs_as_program, sampled_tail_by_programs
from opdtheory.kernels.payload import (
    check_payload_entries,
    check_payload_shapes,
    check_sampled_entries,
    check_sampled_shapes,
)
from opdtheory.kernels.top_k import highest_logits, row_by_row

__all__ = ["fused_sampled_tail"]


@outside_graphs
def fused_sampled_tail(
    student_logits: Float[Tensor, "*batch V"],
    teacher_ids: Int64[Tensor, "*batch k"],
    teacher_logprobs: Float[Tensor, "*batch k"],
    tokens: Int64[Tensor, "*batch"],
    token_logprobs: Float[Tensor, "*batch"],
    divergence: str | Divergence,
    mask: Shaped[Tensor, "*batch"] | None = None,
    constant: float | Literal["rest"] = 0.0,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""The teacher's `k` tokens exactly, and the sampled token for all others, at each position (T13).

    $$\ell_n = m_n \Bigl[\sum_{a \in S_n} p(a) f\!\left(\tfrac{q(a)}{p(a)}\right) + c\,p(S_n)
    - 1[y_n \notin S_n]\,\mathrm{sg}(w_f(u_n) - c) \log p(y_n)\Bigr]$$

    For tokens that the student sampled, the expected gradient is that of the whole divergence, for every f, S and c,
    as long as $S$ was chosen without looking at the sampled token; the value is a surrogate. To be minimised. All terms
    are evaluated in float64, the student's normaliser in float32 (float64 for float64 logits). First derivatives only;
    the backward pass and `mask` are as in `fused_divergence`.

    Args:
        student_logits: $z$, with any leading shape.
        teacher_ids: $S$, distinct tokens.
        teacher_logprobs: $\log q$ on $S$ in nats, `-inf` allowed; detached.
        tokens: the sampled token $y$ of each position; -100 for none, as at padding.
        token_logprobs: $\log q(y)$ in nats; detached, and not read where $y$ is in $S$ or is none.
        divergence: an object or a catalogue name.
        mask: a weight for each position, as in `fused_divergence`.
        constant: $c$, in the unit of the weight, or `rest` for $c_n = w_f(q(T_n)/p(T_n))$ with $T_n$ the tokens outside
            $S_n$, the weight of all of them as one, which as a rule leaves less to chance (T19b).
        temperature: divides the student's logits; the rollouts must be of that temperature too (T16c).
        chunk_size: the number of positions at a time.

    Returns:
        $\ell$, float64 if the logits are, else float32.

    Raises:
        InvalidArgumentError: a shape, dtype or number does not fit, a token of $S$ is repeated or not in the
            vocabulary, a log-probability is NaN, or a row of logits holds NaN, +inf or only `-inf`.

    References: T13 of the theory.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> ids, logprobs = torch.tensor([[0]]), torch.tensor([[0.5]]).log()
        >>> sampled, its_logprob = torch.tensor([2]), torch.tensor([0.3]).log()
        >>> fused_sampled_tail(student, ids, logprobs, sampled, its_logprob, "forward_kl")
        tensor([1.0410], grad_fn=...)
    """
    arguments.check_logits("student_logits", student_logits)
    dtype, weights = arguments.shared(student_logits, mask, temperature, chunk_size, student_logits)
    check_payload_shapes(student_logits, teacher_ids, teacher_logprobs)
    programs = runs_as_program(student_logits, teacher_ids.shape[-1])
    if not programs:
        check_payload_entries(student_logits, teacher_ids, teacher_logprobs)
    check_sampled_shapes(student_logits, tokens, token_logprobs)
    if not programs:
        check_sampled_entries(student_logits.shape[-1], tokens, token_logprobs)
    if constant != "rest" and not (isinstance(constant, int | float) and math.isfinite(constant)):
        raise InvalidArgumentError("constant", f"must be a finite number or 'rest', got {constant!r}")
    chosen = as_divergence(divergence)
    wanted = student_logits.requires_grad and torch.is_grad_enabled()
    if programs:
        payload = teacher_ids, teacher_logprobs, tokens, token_logprobs
        with torch.no_grad():
            values, gradient = sampled_tail_by_programs(
                student_logits, payload, chosen, constant, weights, 1.0 / temperature, wanted
            )
        return attached("fused_sampled_tail", student_logits, values, gradient)
    arguments.check_weights(weights)

    def evaluate(logits: Tensor, drawn: Tensor, log_q: Tensor, factor: Tensor | float, out: Tensor | None) -> Tensor:
        split = _Rows(logits, drawn, log_q, dtype, 1.0 / temperature)
        c = split.rest_weight(chosen) if constant == "rest" else constant
        masses = split.masses(chosen, c)
        value = factor * split.value(chosen, c, masses)
        if out is not None:
            split.write_gradient(factor * masses / temperature, out)
        return value

    with torch.no_grad():
        ids = torch.cat([teacher_ids, tokens.unsqueeze(-1)], -1)
        log_q = torch.cat([teacher_logprobs.detach(), token_logprobs.detach().unsqueeze(-1)], -1).double()
        values, gradient = row_by_row(evaluate, student_logits, ids, log_q, weights, chunk_size, wanted)
    return attached("fused_sampled_tail", student_logits, values.to(dtype), gradient)


class _Rows(Split):
    """That of a chunk of rows, with the student's distribution."""

    def __init__(self, logits: Tensor, drawn: Tensor, log_q: Tensor, dtype: torch.dtype, scale: float) -> None:
        scaled = logits.to(dtype) * scale
        peak = highest_logits(scaled)
        self._ids = torch.where(drawn >= 0, drawn, 0)
        kept = (scaled.gather(-1, self._ids) - peak).double()
        self._rows = scaled.sub_(peak).exp_()
        total = self._rows.sum(-1, keepdim=True)
        self._rows.div_(total)
        super().__init__(kept - total.double().log(), log_q, drawn)

    def write_gradient(self, masses: Tensor, out: Tensor) -> None:
        """Write the gradient from the masses, times whatever they were multiplied by."""
        narrow = self._rows.dtype
        full = self._rows.mul_(masses.sum(-1, keepdim=True).to(narrow))
        # The sampled token may be one of S, where its mass is zero, so that the sums do not collide.
        full.scatter_add_(-1, self._ids, -masses.to(narrow))
        out.copy_(full)
