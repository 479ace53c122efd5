r"""Second derivatives: the Hessian of a divergence in the student's logits, times a vector.

With the weight $w$, the curvature $\kappa = u^2 f''(u) = \mathrm{d}w/\mathrm{d}\log u$ and means under $p$,

$$(H v)_a = p_a (r_a - E_p r), \qquad r = (v - E_p v)(\kappa - w + E_p w)$$

which is the derivative of $-p_a (w_a - E_p w)$ along $v$.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.kernels.distributions import Buffers, default_rows, distributions_of
from opdtheory.kernels.pieces import matrices
from opdtheory.kernels.reference import log_distributions, under_student, weight_masses
from opdtheory.kernels.sweep import runs

__all__ = ["hessian_product"]


def hessian_product(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    weights: Tensor,
    vectors: Tensor,
    scale: float,
    chunk: int | None,
) -> Tensor:
    r"""The product $m_n H_n v_n$ at each position, evaluated in float64, in the dtype of the student.

    Args:
        divergence: the generator.
        student: logits, `(..., V)`.
        teacher: logits of the same shape.
        weights: $m$, `(...)`.
        vectors: $v$, `(..., V)`.
        scale: the inverse temperature.
        chunk: the number of positions at a time.
    """
    out = torch.empty(student.shape, dtype=student.dtype, device=student.device)
    rows = chunk or default_rows(student.shape[-1], student.device)
    for wide, narrow in matrices([student, teacher, vectors, out], [weights.double()]):
        ours, theirs, vector, product = wide
        for part, weighed in runs(narrow[0], ours.shape[0], rows):
            if weighed:
                result = _chunk(divergence, ours[part], theirs[part], vector[part].double(), scale)
                product[part] = (narrow[0][part].unsqueeze(-1) * result).to(out.dtype)
            else:
                product[part] = 0.0
    return out


def _chunk(divergence: Divergence, student: Tensor, teacher: Tensor, vector: Tensor, scale: float) -> Tensor:
    buffers = Buffers.allocate(student.shape, torch.float64, student.device)
    logs = log_distributions(distributions_of(student, teacher, scale, buffers))
    p = logs.log_p.exp()
    mass = weight_masses(divergence, logs)
    bend = under_student(divergence.curvature(logs.log_u), logs)
    centred = vector - (p * vector).sum(-1, keepdim=True)
    r = centred * (bend - mass + p * mass.sum(-1, keepdim=True))
    return scale**2 * (r - p * r.sum(-1, keepdim=True))
