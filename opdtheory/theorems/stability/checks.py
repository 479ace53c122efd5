"""The checks of T5: Jacobians and spectra in fractions, certified pulls, autograd and simulated flows."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import TabularPolicy, enumerated_value
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    at_atoms,
    interval,
    kinked,
    pairs,
    rational_distributions,
    smooth_catalogue,
)
from opdtheory.theorems.instances.flows import (
    TEACHER,
    distance,
    drift,
    far_students,
    flow,
    jacobian_at_teacher,
    softmax_slope,
)
from opdtheory.theorems.instances.one_sample import covariance, in_logits, intervals, ratios
from opdtheory.theorems.theorem import Cases, Identity, close, holds, same

__all__ = ["AT_TEACHER", "identities", "local_weight", "symbolic_weight"]

NumericSlope = Callable[[str, Divergence], float]
_ESTIMATORS = ("opd", "opd_plus")
AT_TEACHER = torch.zeros(1, dtype=torch.float64)  # log u there


def identities() -> tuple[Identity, ...]:
    """The claims of T5 that are checked."""
    # Which of five students approach, the nearest first.
    far = {
        ("forward_kl", "opd_plus"): "+++++",
        ("jsd", "opd_plus"): "+++++",
        ("chi2", "opd_plus"): "+++++",
        ("reverse_kl", "opd"): "+++++",
        ("forward_kl", "opd"): "-----",
        ("jsd", "opd"): "++---",
        ("chi2", "opd"): "+----",
        ("u log u - 2(u - 1)", "opd"): "++---",
    }
    return (
        Identity(
            "Jacobian in fractions",
            r"J = -w'(1)(\mathrm{diag}\,q - qq^\top)",
            _check_jacobian,
            jacobian_at_teacher,
            {
                "sign flipped": lambda q, s: jacobian_at_teacher(q, -s),
                "q q^T dropped": lambda q, s: -s * sympy.diag(*q),
                "without w'(1)": lambda q, s: jacobian_at_teacher(q, sympy.Integer(1)),
            },
            "exact",
        ),
        Identity(
            "spectrum in fractions",
            r"\det(x - J) = x\,(x^2 + w'(1)(1 - \textstyle\sum q^2)x + 3w'(1)^2 q_1q_2q_3)",
            _check_spectrum,
            1,
            {"sign flipped": -1},
            "exact",
        ),
        Identity(
            "distance falls or grows, certified",
            r"\mathrm{sign}\ \tfrac{d}{dt}\lVert z - \log q\rVert = -\mathrm{sign}\ w'(1)",
            _check_distance,
            _symbolic_slope,
            {
                "sign flipped": lambda name, f, u: -_symbolic_slope(name, f, u),
                "f''(1) for stop-gradient too": lambda name, f, u: _symbolic_slope("opd_plus", f, u),
                "same for both": lambda name, f, u: _symbolic_slope("opd", f, u),
            },
            "rigorous",
        ),
        Identity(
            "attracting only near, certified",
            r"-(u\log u - 2(u-1)) < 0 \text{ for } u \ge 5:\ \text{an underrated token loses further}",
            _check_collapse,
            {Fraction(1, 10): 7, Fraction(1, 2): 6, Fraction(99, 100): 5},
            {
                "everywhere": dict.fromkeys((Fraction(1, 10), Fraction(1, 2), Fraction(99, 100)), 1000),
                "up to e only": dict.fromkeys((Fraction(1, 10), Fraction(1, 2), Fraction(99, 100)), 3),
            },
            "rigorous",
        ),
        Identity(
            "Jacobian by autograd",
            r"J = -w'(1)(\mathrm{diag}\,q - qq^\top)",
            _check_autograd,
            _slope,
            _FALSE_SLOPES,
        ),
        Identity(
            "Hessian of the objective",
            r"\nabla^2 D_f(q\|p)|_{p=q} = f''(1)\,(\mathrm{diag}\,q - qq^\top)",
            _check_hessian,
            _slope,
            {
                "sign flipped": lambda name, d: -_slope(name, d),
                "f''(1) + f'(1)": lambda name, d: _slope("opd_plus", d) - _slope("opd", d),
            },
        ),
        Identity(
            "simulated rates",
            r"\lVert z - \log q \rVert \propto e^{-w'(1)\lambda t}",
            _check_rates,
            _slope,
            _FALSE_SLOPES,
        ),
        Identity(
            "no first-order force",
            r"\pm(u-1)^m \text{ attracts from every side iff } m \text{ is odd and the sign is } +",
            _check_first_order,
            lambda order, sign: sign > 0 and order % 2 == 1,
            {
                "iff w'(1) > 0": lambda order, sign: sign > 0 and order == 1,
                "iff w'(1) >= 0": lambda order, sign: sign > 0 or order > 1,
                "any order": lambda order, sign: sign > 0,
            },
        ),
        Identity(
            "simulated from far",
            r"\text{OPD+ approaches from everywhere; OPD's forward KL from nowhere, its JSD and } \chi^2"
            r"\text{ from one side}",
            _check_far,
            far,
            {
                "OPD's forward KL approaches": {**far, ("forward_kl", "opd"): "+++++"},
                "OPD's JSD approaches from everywhere": {**far, ("jsd", "opd"): "+++++"},
                "OPD's JSD approaches from nowhere": {**far, ("jsd", "opd"): "-----"},
                "the slope at the teacher decides from far": {**far, ("u log u - 2(u - 1)", "opd"): "+++++"},
            },
        ),
    )


def symbolic_weight(name: str, f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    r"""$-f$ of stop-gradient or $u f' - f$ of OPD+."""
    return -f if name == "opd" else u * sympy.diff(f, u) - f


def _symbolic_slope(name: str, f: sympy.Expr, u: sympy.Symbol) -> sympy.Expr:
    """The slope `w'(1)` of that weight."""
    return sympy.simplify(sympy.diff(symbolic_weight(name, f, u), u).subs(u, 1))


def local_weight(name: str, divergence: Divergence) -> Callable[[Tensor], Tensor]:
    r"""The weight as a function of $\log u$."""
    return divergence.weight if name == "opd_plus" else lambda log_u: -divergence.generator(log_u)


# In fractions.


@functools.cache
def _derived_jacobians() -> tuple[tuple[Any, ...], ...]:
    """Generators, estimators, rational teachers, the weight's slope at one, and the flow's Jacobian by sympy."""
    found: list[tuple[Any, ...]] = []
    u = divergences.symbol()
    for name in (n for n in RATIONAL if not kinked(divergences.divergence(n))):
        # A gauge other than the catalogue's, so that stop-gradient has a slope.
        f = divergences.divergence(name).expr - sympy.Rational(3, 7) * (u - 1)
        for estimator in _ESTIMATORS:
            w = sympy.factor(symbolic_weight(estimator, f, u))
            for q in _rational_teachers():
                p = list(sympy.symbols(f"p0:{len(q)}", positive=True))
                field = in_logits(p, [w.subs(u, r) for r in ratios(p, q)])
                found.append((name, estimator, q, sympy.diff(w, u).subs(u, 1), tuple(softmax_slope(field, p, q))))
    return tuple(found)


def _check_jacobian(form: Callable[[list[sympy.Expr], sympy.Expr], sympy.Matrix]) -> Cases:
    """The flow's Jacobian at rational teachers, differentiated by sympy, against the closed form."""
    for name, estimator, q, slope, derived in _derived_jacobians():
        yield same(derived, tuple(form(q, slope)), name, estimator, q)


def _rational_teachers() -> list[list[sympy.Expr]]:
    return [[sympy.Rational(b) for b in q] for _, q in rational_distributions()[1:4]]


def _check_spectrum(sign: int) -> Cases:
    """Characteristic polynomials of rational Jacobians, for weights of either slope."""
    x = sympy.Symbol("x")
    for slope in (sympy.Rational(-5, 3), sympy.Integer(0), sympy.Rational(7, 2)):
        for q in _rational_teachers():
            found = jacobian_at_teacher(q, slope).charpoly(x).as_expr()
            if len(q) == 2:
                claimed = x * (x + sign * 2 * slope * q[0] * q[1])
            else:
                pairs_of = 1 - sum(b**2 for b in q)
                claimed = x * (x**2 + sign * slope * pairs_of * x + 3 * slope**2 * q[0] * q[1] * q[2])
            yield same(sympy.expand(found - claimed), 0, f"slope {slope}", q)


# Enclosed.


def _check_distance(slope: Callable[[str, sympy.Expr, sympy.Symbol], sympy.Expr]) -> Cases:
    r"""The pull $\mathrm{Cov}_p(\log u, w) = -\frac12\frac{d}{dt}\lVert z - \log q\rVert^2$ has the sign of $w'(1)$.

    The students are a thousandth of the way from each teacher to another distribution.
    """
    u = divergences.symbol()
    for divergence in smooth_catalogue():
        f = divergence.expr
        for estimator in _ESTIMATORS:
            claimed = sympy.sign(slope(estimator, f, u))
            if claimed == 0:
                continue  # decided by the second order
            w = symbolic_weight(estimator, f, u)
            for other, teacher in rational_distributions():
                near = tuple((999 * b + a) / 1000 for a, b in zip(other, teacher, strict=True))
                ps, qs = intervals(near), intervals(teacher)
                pull = covariance(ps, [iv.log(r) for r in ratios(ps, qs)], at_atoms(w, ps, qs))
                yield holds(pull.a > 0 if claimed > 0 else pull.b < 0, divergence, estimator, teacher, "pull")
                yield holds(1 in sum(ps), divergence, estimator, teacher, "sum of p")


def _check_collapse(turns: dict[Fraction, int]) -> Cases:
    r"""The two-token drift under $-(u\log u - 2(u-1))$ from a student that underrates the second token by `u_2`.

    For each `u_1` the first `u_2` of a few from which on the token loses: close to `u_1 = 1`, where w falls below 0.
    """
    for below, turn in turns.items():
        for above in (Fraction(11, 10), *map(Fraction, (2, 3, 4, 5, 6, 7, 20, 200))):
            # Distributions with these ratios exist; the second token gains if its weight is the larger one.
            first, second = (2 * r - r * iv.log(r) for r in (interval(below), interval(above)))  # up to a constant
            yield holds(second.a > first.b if above < turn else second.b < first.a, f"u_1 {below}", f"u_2 {above}")


# In float64.


def _slope(name: str, divergence: Divergence) -> float:
    """The slope `w'(1)`: `-f'(1)` of stop-gradient or `f''(1)` of OPD+."""
    return float(divergence.curvature(AT_TEACHER) if name == "opd_plus" else -divergence.log_slope(AT_TEACHER))


_FALSE_SLOPES: dict[str, NumericSlope] = {
    "sign flipped": lambda name, d: -_slope(name, d),
    "f''(1) for stop-gradient too": lambda name, d: _slope("opd_plus", d),
    "w(1) in place of w'(1)": lambda name, d: float(local_weight(name, d)(AT_TEACHER)),
}


def _check_autograd(claimed: NumericSlope) -> Cases:
    """Autograd through the flow against the closed form, on four tokens."""
    q = torch.tensor(TEACHER, dtype=torch.float64)
    for divergence in smooth_catalogue():
        for name in _ESTIMATORS:
            field = functools.partial(drift, log_q=q.log(), weight=local_weight(name, divergence))
            derived = torch.autograd.functional.jacobian(field, q.log())
            yield close(derived, -claimed(name, divergence) * (q.diag() - torch.outer(q, q)), divergence, name)


def _check_hessian(claimed: NumericSlope) -> Cases:
    """The Hessian of the enumerated objective at the teacher, row by row, which is minus the flow's Jacobian."""
    teacher = pairs()[1][1]
    first, rest = teacher.logits[0], list(teacher.logits[1:])
    q = torch.log_softmax(first[0], -1).exp()
    for divergence in smooth_catalogue():

        def value(z: Tensor, d: Divergence = divergence) -> Tensor:
            return enumerated_value(TabularPolicy([z, *rest], eos=teacher.eos), teacher, d)

        hessian = torch.autograd.functional.hessian(value, first).reshape(len(q), len(q))
        yield close(hessian, claimed("opd_plus", divergence) * (q.diag() - torch.outer(q, q)), divergence)


@functools.cache
def _modes() -> tuple[Tensor, Tensor, Tensor]:
    q = torch.tensor(TEACHER, dtype=torch.float64)
    rates, vectors = torch.linalg.eigh(q.diag() - torch.outer(q, q))
    return q.log(), rates[1:], vectors.T[1:]


@functools.cache
def _growth(name: str, divergence: Divergence) -> Tensor:
    """The logarithm of how much the distance to the teacher grows in eight units of time, in each mode."""
    log_q, _, vectors = _modes()
    path = flow(torch.add(log_q, vectors, alpha=1e-6), log_q, local_weight(name, divergence), 8.0, 20)
    return (distance(path[-1], log_q) / distance(path[0], log_q)).log()


def _check_rates(claimed: NumericSlope) -> Cases:
    r"""Simulated from a millionth away, each mode's distance grows by $e^{-w'(1)\lambda t}$."""
    _, rates, _ = _modes()
    for divergence in smooth_catalogue():
        for name in _ESTIMATORS:
            error = _growth(name, divergence) + claimed(name, divergence) * rates * 8.0
            yield holds(float(error.abs().max()) < 1e-3, divergence, name)


@functools.cache
def _all_approach(order: int, sign: int) -> bool:
    r"""Whether each of eight students around the teacher ends nearer to it than it began, under $\pm(u-1)^m$."""
    log_q, _, vectors = _modes()
    start = torch.add(log_q, torch.cat([vectors, -vectors]), alpha=0.2)
    path = distance(flow(start, log_q, lambda t: sign * torch.expm1(t) ** order, 200.0, 400), log_q)
    return bool((path[-1] < path[0]).all())


def _check_first_order(attracts: Callable[[int, int], bool]) -> Cases:
    r"""Which weights $\pm(u-1)^m$ attract from every side."""
    for order in (1, 2, 3):
        for sign in (1, -1):
            yield holds(_all_approach(order, sign) == attracts(order, sign), f"order {order}", f"sign {sign:+}")


@functools.cache
def _ends(name: str, estimator: str) -> str:
    """Which of the far students end nearer to the teacher than they began: a plus for each that does, else a minus."""
    if name == "u log u - 2(u - 1)":
        u = divergences.symbol()
        divergence = Divergence.from_expr(u * sympy.log(u) - 2 * (u - 1))
    else:
        divergence = divergences.divergence(name)
    log_q = _modes()[0]
    path = distance(flow(far_students(), log_q, local_weight(estimator, divergence), 30.0, 200), log_q)
    return "".join("+" if nearer else "-" for nearer in (path[-1] < path[0]).tolist())


def _check_far(every: dict[tuple[str, str], str]) -> Cases:
    """Which of the far students approach."""
    for (name, estimator), claimed in every.items():
        yield holds(_ends(name, estimator) == claimed, name, estimator)
