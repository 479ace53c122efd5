"""Terms to add to an advantage: those by which a recovered weight differs from the claimed one (T1-T6)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.auditing.fixes.changes import PerToken
from opdtheory.divergences import Divergence
from opdtheory.exact import OBJECTIVES

__all__ = ["Correction", "Curve", "between_granularities", "clips", "gauge_shift", "missing_terms"]

# Relative difference of two curves below which a term is worth a trial; larger for a loss in float32.
_ALIKE = 1e-6

# A function of the log-ratio.
_Form = Callable[[Tensor], Tensor]

# A longer formula is not shown.
_LONGEST = 48


@dataclass(frozen=True)
class Curve:
    """A weight as a function of the log-ratio, 0 at `log_u = 0`, which the grid contains.

    Attributes:
        log_u: the grid.
        weight: the weight on it.
        alike: relative difference from a formula that counts as rounding.
    """

    log_u: Float[Tensor, " points"]
    weight: Float[Tensor, " points"]
    alike: float = _ALIKE

    def is_near(self, expected: Tensor, size: Tensor | None = None) -> bool:
        """Whether the weight is another one, to rounding relative to a size (default: the weight itself)."""
        relative_to = float((self.weight if size is None else size).abs().max())
        return float((self.weight - expected).abs().max()) <= self.alike * relative_to


@dataclass(frozen=True)
class Correction:
    """A term to add to the advantage, `(B, T)` of a batch, and the sentence that says so."""

    kind: str
    text: str
    advantage: PerToken


def missing_terms(curve: Curve, divergence: Divergence, granularity: str, gamma: float) -> Iterator[Correction]:
    r"""The first term $t$ for which $w + a\,t = s\,w_f$ with $s > 0$, up to a constant.

    Args:
        curve: the recovered weight $w$.
        divergence: the claimed divergence.
        granularity: the claimed granularity; for `sequence` the term is that of $U$, for `token_return` discounted.
        gamma: the discount.
    """
    terms: list[tuple[str, Callable[[], str], _Form]] = [
        ("slope", lambda: _slope_words(divergence), divergence.log_slope),
        (
            "advantage",
            lambda: "f(u): the score-function half of the product rule is missing (T1)",
            divergence.generator,
        ),
        ("advantage", lambda: "u - 1, a forward KL's weight (T4)", torch.expm1),
        ("advantage", lambda: "log(u), a reverse KL's weight (T4)", lambda log_u: log_u),
    ]
    for kind, words, term in terms:
        factor = _coefficient(curve, divergence.weight, term)
        if factor is not None:
            scaled = _scaled(term, factor[1], granularity, gamma)
            yield Correction(kind, _add(factor[1], words()), _of_log_u(scaled))
            return


def between_granularities(curve: Curve, divergence: Divergence, granularity: str, gamma: float) -> Iterator[Correction]:
    """The difference between the exact advantage of the claimed granularity and that of each other one (T6).

    On one step all three have the weight $w_f$; a loss with another recovered weight needs another cure.
    """
    expected = _centred(divergence.weight, curve.log_u)
    if not curve.is_near(expected, expected):
        return
    exact = {
        "token_local": lambda log_u: divergence.weight(log_u),
        "token_return": lambda log_u: _return_to_go(divergence, log_u, gamma if granularity == "token_return" else 1.0),
        "sequence": lambda log_u: divergence.weight(log_u.sum(-1, keepdim=True)).expand_as(log_u),
    }
    formula = {
        "token_local": "w(u_n)",
        "token_return": "w(u_n) - sum_{m>n} gamma^(m-n) f(u_m)",
        "sequence": "w(prod_m u_m) on every token",
    }
    for other in OBJECTIVES:
        if other != granularity:
            text = (
                f"Use the advantage {formula[granularity]} in place of {formula[other]}, with w(u) = u f'(u) - f(u): "
                f"the loss follows {other}, not {granularity} (T6)."
            )
            yield Correction("granularity", text, _of_log_u(_minus(exact[granularity], exact[other])))


def clips(curve: Curve, far: Callable[[], Curve | None], divergence: Divergence) -> Iterator[Correction]:
    r"""What a clamp of the log-ratio to $[a, b]$ removed, $w_f(u) - w(\mathrm{clamp}(\log u, a, b))$ (T4).

    The weight before the clamp may be $w_f$ or plain OPD's $-f$. A clamp of the weight is one of the log-ratio.

    Args:
        curve: the recovered weight on its grid.
        far: returns the weight at log-ratios of -12, -8, 0, 8 and 12.
        divergence: the claimed divergence.
    """
    forms: list[tuple[str, Callable[[], str], _Form]] = [
        ("clip", lambda: "Remove", divergence.weight),
        (
            "slope, clip",
            lambda: f"Add to the advantage {_slope_words(divergence)}, and remove",
            lambda log_u: -divergence.generator(log_u),
        ),
    ]
    beyond: Curve | None = None
    for kind, verb, form in forms:
        if not _agrees_in_the_middle(curve, form):
            continue
        beyond = beyond or far()
        bounds = None if beyond is None else _bounds(curve, beyond, form)
        if bounds is not None:
            span = ", ".join(f"{bound:.4g}" for bound in bounds)
            text = (
                f"{verb()} the clip that holds log(u) in [{span}], or widen it beyond the log-ratios met: a clipped "
                "weight descends another divergence (T4)."
            )
            yield Correction(kind, text, _of_log_u(_minus(divergence.weight, _clamped(form, bounds))))
            return


def gauge_shift(curve: Curve, divergence: Divergence) -> Correction | None:
    r"""The shift $f \to f + c(u-1)$, $c = -f'(\infty)$, if it makes a weight $w = -s f$ non-decreasing (T5b)."""
    generator, limit = divergence.generator(curve.log_u), divergence.slope_at_infinity
    size = float((curve.weight * -generator).sum() / generator.square().sum())
    if not (curve.is_near(-size * generator) and size > 0) or math.isinf(limit) or abs(limit) < _ALIKE:
        return None
    shifted = curve.weight + size * limit * torch.expm1(curve.log_u)
    if bool((shifted.diff() < -curve.alike * shifted.abs().max()).any()):
        return None
    text = (
        f"Shift the gauge, f to f {'-' if limit > 0 else '+'} {abs(limit):.6g} (u - 1): the weight then never falls, "
        "so the loss descends an f-divergence with its minimum at the teacher"
    )
    return Correction("gauge", text, _of_log_u(lambda log_u: size * limit * torch.expm1(log_u)))


def _coefficient(curve: Curve, weight: _Form, term: _Form) -> tuple[float, float] | None:
    """The least-squares `(s, a)` of `w = s w_f - a t`, near twelfths rounded; None if the fit is bad."""
    columns = torch.stack([_centred(weight, curve.log_u), -_centred(term, curve.log_u)], 1)
    sizes = columns.norm(dim=0)
    if float(sizes.min()) <= _ALIKE * float(sizes.max()):
        return None
    unit = columns / sizes
    if 1.0 - abs(float(unit[:, 0] @ unit[:, 1])) < _ALIKE:
        return None
    solution = torch.linalg.lstsq(unit, curve.weight.unsqueeze(1)).solution[:, 0] / sizes
    if not curve.is_near(columns @ solution):
        return None
    scale, factor = (_whole(float(x), curve.alike / 10) for x in solution)
    return (scale, factor) if scale > curve.alike and abs(factor) > curve.alike else None


def _centred(form: _Form, log_u: Tensor) -> Tensor:
    """A function of the log-ratio minus its value at 0."""
    return form(log_u) - form(torch.zeros(1, dtype=torch.float64))


def _whole(value: float, tolerance: float) -> float:
    """The nearest twelfth if it is within the tolerance, else the value."""
    return round(12 * value) / 12 if abs(12 * value - round(12 * value)) < 12 * tolerance else value


def _add(factor: float, words: str) -> str:
    if factor == 1.0:
        return f"Add to the advantage {words}."
    if factor == -1.0:
        return f"Subtract from the advantage {words}."
    return f"{'Add to' if factor > 0 else 'Subtract from'} the advantage {abs(factor):.6g} times {words}."


def _slope_words(divergence: Divergence) -> str:
    import sympy

    u = next(iter(divergence.expr.free_symbols), sympy.Symbol("u", positive=True))
    formula = str(sympy.expand(u * sympy.diff(divergence.expr, u)))
    shown = f" (here {formula})" if len(formula) <= _LONGEST else ""
    return f"u f'(u){shown}, which the stop-gradient leaves out (T2)"


def _scaled(term: _Form, factor: float, granularity: str, gamma: float) -> _Form:
    def scaled(log_u: Tensor) -> Tensor:
        if granularity == "sequence":
            return factor * term(log_u.sum(-1, keepdim=True)).expand_as(log_u)
        discount = gamma if granularity == "token_return" else 1.0
        return factor * discount ** torch.arange(log_u.shape[-1]).to(log_u) * term(log_u)

    return scaled


def _return_to_go(divergence: Divergence, log_u: Tensor, gamma: float) -> Tensor:
    """The exact advantage of `token_return`; masked log-ratios are zero and add nothing, since f(1) = 0."""
    penalties, to_come = divergence.generator(log_u), torch.zeros_like(log_u[:, 0])
    weight = divergence.weight(log_u)
    columns = []
    for n in reversed(range(log_u.shape[-1])):
        columns.append(gamma**n * (weight[:, n] - to_come))
        to_come = gamma * (penalties[:, n] + to_come)
    return torch.stack(columns[::-1], dim=-1)


def _minus(wanted: _Form, had: _Form) -> _Form:
    return lambda log_u: wanted(log_u) - had(log_u)


def _clamped(form: _Form, bounds: tuple[float, float]) -> _Form:
    return lambda log_u: form(log_u.clamp(*bounds))


def _of_log_u(advantage: _Form) -> PerToken:
    """The advantage of each token from its log-ratios, which are zero where masked."""
    return lambda r: advantage(torch.where(r.mask > 0, r.log_u.detach(), torch.zeros_like(r.mask)))


def _agrees_in_the_middle(curve: Curve, form: _Form) -> bool:
    middle = len(curve.log_u) // 2
    near = slice(middle - 1, middle + 2)
    exact = _centred(form, curve.log_u[near])
    return float((exact - curve.weight[near]).abs().max()) <= 10 * curve.alike * float(exact.abs().max())


def _bounds(curve: Curve, beyond: Curve, form: _Form) -> tuple[float, float] | None:
    """The log-ratios between which the weight follows a form, infinite at an end without a stop; None without any."""
    low = _stop(-curve.log_u.flip(0), curve.weight.flip(0), -beyond.log_u.flip(0), beyond.weight.flip(0), form, -1.0)
    high = _stop(curve.log_u, curve.weight, beyond.log_u, beyond.weight, form, 1.0)
    bounds = (-float("inf") if low is None else -low, float("inf") if high is None else high)
    if low is None and high is None:
        return None
    return bounds if curve.is_near(_centred(_clamped(form, bounds), curve.log_u)) else None


def _stop(log_u: Tensor, weight: Tensor, far_log_u: Tensor, far: Tensor, form: _Form, side: float) -> float | None:
    """Where a weight with a far plateau stops following a form, on the side of positive `log_u`."""

    def at(point: float) -> float:
        zero = torch.zeros((), dtype=torch.float64)
        return float(form(torch.tensor(side * point, dtype=torch.float64)) - form(zero))

    level = float(far[3])
    if abs(float(far[4]) - level) > 1e-7 * max(1.0, abs(level)):
        return None
    if abs(at(float(far_log_u[4])) - at(float(far_log_u[3]))) <= 1e-4 * max(1e-3, abs(at(float(far_log_u[3])))):
        return None
    points = [*log_u[log_u >= 0].tolist(), float(far_log_u[3])]
    values = [*weight[log_u >= 0].tolist(), level]
    follows = [abs(at(p) - v) <= _ALIKE * max(abs(v), abs(level)) for p, v in zip(points, values, strict=True)]
    last = follows.index(False) if False in follows else len(follows) - 1
    # A point just beyond the bound still agrees within the tolerance, so the root may lie one point earlier.
    return _root(lambda point: at(point) - level, points[max(last - 2, 0)], points[last])


def _root(gap: Callable[[float], float], low: float, high: float) -> float:
    """A root of the gap in a bracket, as a short decimal if one is as good."""
    rising = gap(high) > gap(low)
    left, right = low, high
    for _ in range(60):
        middle = (left + right) / 2
        left, right = (middle, right) if (gap(middle) < 0) == rising else (left, middle)
    short = round(left, 6)
    return short if abs(short - left) < 1e-7 else left
