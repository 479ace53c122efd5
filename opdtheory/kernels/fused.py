r"""The divergence of whole next-token distributions from logits, with its gradient from the forward pass (T1, T12)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.kernels import arguments
from opdtheory.kernels.values import Settings, differentiable_values

__all__ = ["fused_divergence"]


def fused_divergence(
    student_logits: Float[Tensor, "*batch V"],
    teacher_logits: Float[Tensor, "*batch V"],
    divergence: str | Divergence,
    mask: Shaped[Tensor, "*batch"] | None = None,
    temperature: float = 1.0,
    chunk_size: int | None = None,
) -> Float[Tensor, "*batch"]:
    r"""The divergence of whole next-token distributions at each position, times its weight, fast and in little memory.

    $$\ell_n = m_n \sum_a p_n(a)\, f\!\left(\frac{q_n(a)}{p_n(a)}\right), \qquad
    \frac{\partial \ell_n}{\partial z_a} = -\frac{m_n}{\tau}\, p_n(a)\,\bigl(w_f(u_a) - E_{p_n} w_f\bigr)$$

    with $p = \mathrm{softmax}(z/\tau)$, $q$ the same for the teacher, and $u = q/p$: T1 at every position, so that the
    sum is `token_local` (T12). In nats, to be minimised. The forward pass computes value and gradient together, a few
    rows at a time, and holds no more than the gradient, in the dtype of the student, and four buffers of one chunk.
    The teacher is detached. If all upstream gradients are one, the backward pass does nothing: weight positions with
    `mask` and call `.sum().backward()`.

    float64 logits are evaluated in float64 by the divergence's own methods. float32, bfloat16 and float16 logits are
    evaluated in float32, if the divergence has a form with fewer passes, and else in float64 too. Entries of the
    catalogue have one, with `beta` and `lam` at 0 or in [1/16, 15/16] and `alpha` between -4 and 4, except within 1/16
    of 0 and 1; a `Divergence` of your own has none. The form's values are off by a few $10^{-7}$ of the largest term,
    its gradients by a few $10^{-7}\,p_a$ of the largest weight, as measured in `docs/performance.md`; on a GPU $p_a$
    itself is off by about $10^{-7}$ for each nat between its logit and the largest. The gradient is rounded once to the
    dtype of the student, in float16 to 0 below $3 \cdot 10^{-8}$.

    Logits may be `-inf`, for a token of probability zero (T10): $p = 0 < q$ costs $f'(\infty)\,q$ and has no gradient,
    $p > 0 = q$ costs $p f(0)$. An infinite cost makes the value inf and has no gradient.

    Derivatives exist up to the second order, forward and reverse, with `torch.func` too. `torch.vmap`, `torch.compile`,
    autocast (which changes nothing) and inference mode are supported. On a GPU the call is made to be captured by a
    CUDA graph; there, a row that would else be infinite, refused or evaluated in float64 has NaN as value and gradient.

    Args:
        student_logits: $z$, with any leading shape and strides.
        teacher_logits: logits of the same shape and device, maybe of another dtype.
        divergence: an object or a catalogue name.
        mask: a weight for each position, usually 0 or 1, of any real dtype. Positions of weight zero are skipped: value
            and gradient are zero there whatever the logits hold.
        temperature: $\tau$, which divides both logits; the result is not multiplied by $\tau^2$.
        chunk_size: the number of positions at a time (default: as many as suit the cache).

    Returns:
        $\ell$, float64 if any logits are, else float32.

    Raises:
        InvalidArgumentError: a shape, dtype or number does not fit, or a row that is not skipped holds NaN, +inf or
            only `-inf`.

    References: T1 and T12 of the theory; generalised JSD in arXiv 2306.13649.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 1.0, 2.0]], requires_grad=True)
        >>> loss = fused_divergence(student, torch.tensor([[2.0, 1.0, 0.0]]), "forward_kl")
        >>> loss.sum().backward()
        >>> loss, student.grad
        (tensor([1.1504], grad_fn=...), tensor([[-0.5752,  0.0000,  0.5752]]))
    """
    arguments.check_logits("student_logits", student_logits)
    arguments.check_logits("teacher_logits", teacher_logits)
    arguments.check_matching("teacher_logits", teacher_logits, "student_logits", student_logits)
    _, weights = arguments.shared(student_logits, mask, temperature, chunk_size, student_logits, teacher_logits)
    if torch.compiler.is_compiling():
        from opdtheory.kernels.compiled import compiled_values

        return compiled_values(
            student_logits, teacher_logits.detach(), weights, divergence, float(temperature), chunk_size
        )
    settings = Settings(as_divergence(divergence), float(temperature), chunk_size)
    return differentiable_values(student_logits, teacher_logits.detach(), weights, settings)
