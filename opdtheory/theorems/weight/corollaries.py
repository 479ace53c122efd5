"""The corollary table of T4: what each local estimator descends, and the checks that run each of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences.transform import on_tensors
from opdtheory.estimators import Estimator, estimator
from opdtheory.exact import TabularPolicy, expected_gradient, random_pair
from opdtheory.theorems.instances.cases import Pair, autograd_gradient
from opdtheory.theorems.theorem import Cases, close, holds

__all__ = [
    "Row",
    "Table",
    "check_followed",
    "check_stated",
    "check_weights",
    "convex",
    "implied",
    "rows",
    "stated",
    "values_estimated",
]

Table = Callable[[], Mapping[str, "sympy.Expr"]]


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        loss: the estimator.
        weight: its local weight, in `u`.
        generator: the generator that it descends, up to gauge.
        genuine: whether the generator is convex.
    """

    loss: Estimator
    weight: sympy.Expr
    generator: sympy.Expr
    genuine: bool


@functools.cache
def rows() -> Mapping[str, Row]:
    """The table, by the estimators' names."""
    u = divergences.symbol()
    log_u, e, half = sympy.log(u), sympy.E, sympy.Rational(1, 2)
    reverse, forward = -log_u, u * log_u
    alpha = {order: divergences.divergence("alpha", alpha=order).expr for order in (-1.0, 0.5, 2.0)}
    # Beyond a clip the weight is constant, and the generator continues along its tangent.
    reverse_clipped = sympy.Piecewise((1 + u - e * u, u < 1 / e), (u - 1 - log_u, u < e), (u - 1 - u / e, sympy.true))
    forward_clipped = sympy.Piecewise(
        (half - u * sympy.log(2), u < half), (forward - u + 1, u < 2), (u * sympy.log(2) - 1, sympy.true)
    )
    return {
        "k1 as loss": Row(estimator("k1_loss"), sympy.Integer(-1), sympy.Integer(0), True),
        "k2 as loss": Row(estimator("k2_loss"), log_u, reverse, True),
        "k3 as loss": Row(estimator("k3_loss"), u - 1, forward, True),
        "k1 as reward": Row(estimator("k1_reward"), log_u, reverse, True),
        "k2 as reward": Row(estimator("k2_reward"), -(log_u**2) / 2, log_u**2 / 2 + log_u, False),
        "k3 as reward": Row(estimator("k3_reward"), log_u - u + 1, reverse - forward, False),
        "OPD forward KL": Row(estimator("opd", "forward_kl"), -forward, -u * log_u**2 / 2, False),
        "OPD chi2": Row(estimator("opd", "chi2"), -((u - 1) ** 2), 2 * forward - u**2 + 1, False),
        "Box-Cox -1": Row(estimator("box_cox", alpha=-1), 1 - 1 / u, alpha[-1.0], True),
        "Box-Cox 1/2": Row(estimator("box_cox", alpha=0.5), 2 * (sympy.sqrt(u) - 1), alpha[0.5], True),
        "Box-Cox 2": Row(estimator("box_cox", alpha=2), (u**2 - 1) / 2, alpha[2.0], True),
        "sign of log u": Row(estimator("sign"), sympy.sign(log_u), sympy.Abs(u - 1), True),
        "OPD+ reverse KL, log u clipped": Row(
            estimator("opd_plus", "reverse_kl", clip_log_ratio=1.0),
            sympy.Max(-1, sympy.Min(1, log_u)) - 1,
            reverse_clipped,
            True,
        ),
        "OPD+ forward KL, weight clipped": Row(
            estimator("opd_plus", "forward_kl", clip_weight=(0.5, 2.0)),
            sympy.Max(half, sympy.Min(2, u)),
            forward_clipped,
            True,
        ),
    }


@functools.cache
def implied(weight: sympy.Expr) -> sympy.Expr:
    """`implied_generator`, cached."""
    return divergences.implied_generator(weight)


@functools.cache
def convex(generator: sympy.Expr) -> bool:
    """`is_convex`, cached."""
    return divergences.is_convex(generator)


def stated() -> Mapping[str, sympy.Expr]:
    """The table's generators."""
    return {name: row.generator for name, row in rows().items()}


def values_estimated() -> Mapping[str, sympy.Expr]:
    """The table as it is often believed: each estimator descends the divergence that its name estimates."""
    reverse, forward, chi2 = (divergences.divergence(name).expr for name in ("reverse_kl", "forward_kl", "chi2"))
    named = {"forward KL": forward, "chi2": chi2}
    return {name: next((f for key, f in named.items() if key in name), reverse) for name in rows()}


def check_stated(table: Table) -> Cases:
    """Each stated generator is zero at one and is implied by the local weight, up to gauge; symbolically."""
    for name, generator in table().items():
        yield holds(generator.subs(divergences.symbol(), 1) == 0, name, "f(1)")
        yield holds(divergences.same_divergence(implied(rows()[name].weight), generator), name, "f")


def check_weights(constant: float) -> Cases:
    r"""Each loss on another policy's rollouts, where no constant is free: $-E_\mu[w(u)\,s]$ of its row's weight."""
    u = divergences.symbol()
    student, teacher = random_pair(4, 1, distance=0.7, seed=6)
    behavior = TabularPolicy.random(4, 1, seed=7)
    p, q, mu = (policy.logits[0].softmax(-1) for policy in (student, teacher, behavior))
    for name, row in rows().items():
        weights = [float(row.weight.subs(u, ratio)) + constant for ratio in (q / p)[0].tolist()]
        drawn = mu * torch.tensor(weights, dtype=torch.float64)
        yield close(expected_gradient(row.loss, student, teacher, behavior=behavior), [p * drawn.sum() - drawn], name)


def check_followed(table: Table) -> Cases:
    r"""Each loss, run as a black box, follows autograd of $\sum_h P(h)\,D_V(h)$ with $P$ held fixed."""
    for name, generator in table().items():
        function = on_tensors(divergences.symbol(), generator)
        yield close(_black_box(name), autograd_gradient(_pair(), _token_local, _pair()[1], function), name)


@functools.cache
def _pair() -> Pair:
    return random_pair(4, 2, distance=0.7, seed=5)


@functools.cache
def _black_box(name: str) -> list[Tensor]:
    return expected_gradient(rows()[name].loss, *_pair())


def _token_local(student: TabularPolicy, teacher: TabularPolicy, generator: Callable[[Tensor], Tensor]) -> Tensor:
    """The divergence of both tokens' rows; prefixes are drawn from the student but not differentiated."""
    total = torch.zeros((), dtype=torch.float64)
    reach = torch.ones(1, dtype=torch.float64)
    for levels in zip(student.logits, teacher.logits, strict=True):
        p, q = (torch.softmax(level, -1) for level in levels)
        u = q / p
        total = total + (reach.unsqueeze(-1) * p * generator(u) * torch.ones_like(u)).sum()
        reach = (reach.unsqueeze(-1) * p).detach().flatten()
    return total
