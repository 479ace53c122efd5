r"""Training without noise: the flow $\dot z_a = p_a (w(u_a) - E_p w)$ of softmax logits under a local weight."""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch import Tensor

__all__ = ["TEACHER", "distance", "drift", "far_students", "flow", "jacobian_at_teacher", "softmax_slope"]

LocalWeight = Callable[[Tensor], Tensor]

TEACHER = (0.4, 0.3, 0.2, 0.1)

# A ratio of e^10 is a collapsed token; beyond it a growing weight overflows.
_COLLAPSED = 10.0


def far_students() -> Tensor:
    """Logits of students from near the teacher to far from it, `(B, 4)`."""
    logits = [
        [0.5, 0.3, -0.2, -0.6],
        [0.0, 0.0, 0.0, 0.0],
        [-2.0, 1.0, 1.0, 1.0],
        [2.0, -1.0, 1.0, 0.0],
        [-1.0, 0.0, 1.0, 2.0],
    ]
    return torch.tensor(logits, dtype=torch.float64)


def drift(logits: Tensor, log_q: Tensor, weight: LocalWeight) -> Tensor:
    r"""The velocity $p_a (w(u_a) - E_p w)$: minus the expected gradient of an estimator with weight `w(log u)`."""
    log_p = torch.log_softmax(logits, -1)
    p, advantage = log_p.exp(), weight(log_q - log_p)
    return p * (advantage - (p * advantage).sum(-1, keepdim=True))


def flow(logits: Tensor, log_q: Tensor, weight: LocalWeight, time: float, steps: int) -> Tensor:
    """The logits along the flow, `(steps + 1, B, k)`, by the Runge-Kutta method; a collapsed student stays put.

    Speeds above one are reduced to one: the curve is the same, followed more slowly.
    """

    def velocity(z: Tensor) -> Tensor:
        v = drift(z, log_q, weight)
        return v / v.abs().amax(-1, keepdim=True).clamp(min=1.0)

    h, z = time / steps, logits
    path = [z]
    for _ in range(steps):
        a = velocity(z)
        b = velocity(z + h / 2 * a)
        c = velocity(z + h / 2 * b)
        d = velocity(z + h * c)
        collapsed = (log_q - torch.log_softmax(z, -1)).amax(-1, keepdim=True) > _COLLAPSED
        z = torch.where(collapsed, z, z + h / 6 * (a + 2 * b + 2 * c + d))
        path.append(z)
    return torch.stack(path)


def distance(logits: Tensor, log_q: Tensor) -> Tensor:
    r"""$\lVert z - \log q \rVert$ up to the constant that softmax ignores."""
    error = logits - log_q
    return (error - error.mean(-1, keepdim=True)).norm(dim=-1)


def softmax_slope(field: list[sympy.Expr], p: list[sympy.Symbol], at: list[sympy.Expr]) -> sympy.Matrix:
    r"""The Jacobian in the logits of a field of the probabilities, at given ones, through $p_c(\delta_{cb} - p_b)$."""
    point = dict(zip(p, at, strict=True))
    in_p = sympy.Matrix(len(field), len(p), lambda a, c: sympy.diff(field[a], p[c]).subs(point))
    return in_p * sympy.Matrix(len(p), len(p), lambda c, b: at[c] * (int(c == b) - at[b]))


def jacobian_at_teacher(q: list[sympy.Expr], slope: sympy.Expr) -> sympy.Matrix:
    r"""$-w'(1) (\mathrm{diag}\,q - q q^\top)$."""
    return -slope * (sympy.diag(*q) - sympy.Matrix(q) * sympy.Matrix(q).T)
