"""T3b: the gauge read as a control variate, its best constant, and Schulman's k1 and k3."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import gradient_moments, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import (
    catalogue,
    distribution,
    enclose,
    interval,
    irrational_cases,
    rational_distributions,
)
from opdtheory.theorems.instances.one_sample import centred, chi2, expectation, intervals, log_rows, ratios
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap

__all__ = ["Shift", "return_loss", "theorems"]

Shift = Callable[[Tensor], Tensor]


def theorems() -> list[Theorem]:
    """T3b."""
    return [
        Theorem(
            number="T3b",
            name="control variate",
            meaning=(
                r"Adding $c(u - 1)$ to a one-sample estimate of a divergence keeps its mean and changes its variance,"
                r" which is least at one value $c^*$. The estimators $k_1 = -\log u$ and $k_3 = u - 1 - \log u$ of the"
                r" reverse KL are the cases $c = 0$ and $c = 1$, so the one whose $c$ is nearer to $c^*$ has the"
                r" smaller variance."
            ),
            statement=(
                r"E_p[f(u) + c(u-1)] = D_f \text{ for every } c;\quad"
                r" \mathrm{Var}(f(u) + c(u-1)) \text{ is least at } c^* = -\mathrm{Cov}(f(u),"
                r" u-1)/\mathrm{Var}(u);\quad"
                r" \text{for } f = -\log u,\ k_1 \text{ has } c = 0 \text{ and } k_3 \text{ has } c = 1"
            ),
            hypotheses=(
                "$E_p[u] = 1$, which holds if $p$ is positive wherever $q$ is",
                r"$\mathrm{Var}(u)$ is finite and positive",
            ),
            source="Schulman, Approximating KL divergence (2020); derived here",
            advice=(
                "Report $k_3$ near the teacher, $k_1$ where the ratios spread so far that $c^*$ falls below one half."
            ),
            derivation=(
                Step(
                    r"\mathrm{Var}(f + c(u-1)) - \mathrm{Var}(f) = c\,(c - 2c^*)\,\mathrm{Var}(u);\quad"
                    r" c^* = -\mathrm{Cov}(f, u - 1)/\mathrm{Var}(u)",
                    "the variance is a parabola in $c$; sympy finds its lowest point and its value there",
                    _best_gauge,
                ),
                Step(
                    r"k_3 = k_1 + 1\cdot(u - 1);\quad"
                    r" c^* = \frac{\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p)}{\chi^2(q\|p)} \text{ for } f = -\log u",
                    r"going from $k_1$ to $k_3$ moves $c$ from 0 to 1. For the reverse KL, $-\mathrm{Cov}(k_1, u - 1)"
                    r" = E_p[(u - 1)\log u]$ is the sum of both KL divergences, and $\mathrm{Var}(u) = \chi^2(q\|p)$."
                    r" $k_3$ is convex in $u$ with its minimum, zero, at one, so no sample of it is negative",
                    _schulman,
                ),
            ),
            identities=(
                Identity(
                    "the optimum certified",
                    r"\mathrm{Var}(f + c(u-1)) = \mathrm{Var}(f + c^*(u-1)) + (c - c^*)^2\,\mathrm{Var}(u)",
                    _check_optimum,
                    _optimum,
                    {
                        "sign flipped": lambda p, f, control: -_optimum(p, f, control),
                        "no control variate": lambda p, f, control: 0 * p[0],
                        "divided by Var f": lambda p, f, control: (
                            _optimum(p, f, control) * _variance(p, control) / _variance(p, f)
                        ),
                    },
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "when k3 is quieter than k1",
                    r"\mathrm{Var}\,k_3 < \mathrm{Var}\,k_1 \iff"
                    r" \frac{\mathrm{KL}(p\|q) + \mathrm{KL}(q\|p)}{\chi^2(q\|p)} > \tfrac12",
                    _check_schulman,
                    Fraction(1, 2),
                    {"always": Fraction(0), "above one only": Fraction(1)},
                    "rigorous",
                ),
                Identity(
                    "the gauge moves the variance",
                    r"\mathrm{Var}\,\hat g_{\mathrm{return}} \text{ depends on } c \iff T > 1",
                    _check_return_variance,
                    lambda horizon: horizon > 1,
                    {"never": lambda horizon: False, "always": lambda horizon: True},
                ),
                Identity(
                    "optimal control variate",
                    r"c^* = -\mathrm{Cov}(f(u), u - 1)/\mathrm{Var}(u)",
                    _check_control_variate,
                    -1.0,
                    {"sign flipped": 1.0, "no control variate": 0.0},
                ),
            ),
        ),
    ]


def return_loss(divergence: Divergence, c: float, gamma: float, shift: Shift) -> Callable[[Rollouts], Tensor]:
    """The discounted `token_return` estimator of the generator `f + c shift`, its weight's constant left out."""

    def loss(r: Rollouts) -> Tensor:
        log_u = r.log_u.detach()
        steps = gamma ** torch.arange(log_u.shape[-1], dtype=log_u.dtype)
        reward = torch.where(r.mask > 0, steps * (divergence.generator(log_u) + c * shift(log_u)), 0.0)
        later = reward.flip(-1).cumsum(-1).flip(-1) - reward
        return r.token_sum(-(steps * divergence.weight(log_u) - later) * r.student_logprobs)

    return loss


def _check_return_variance(moves: Callable[[int], bool]) -> Cases:
    """The gauge moves the variance of the `token_return` estimator exactly where there are later tokens."""
    for horizon in (1, 2, 3):
        pair = random_pair(3, horizon, seed=horizon)
        for name in ("reverse_kl", "forward_kl", "jsd"):
            divergence = divergences.divergence(name)
            plain, gauged = (
                gradient_moments(return_loss(divergence, c, 1.0, torch.expm1), *pair).variance for c in (0.0, 1.0)
            )
            gap = abs(gauged - plain)
            yield holds((gap > 1e-6) == moves(horizon) and not 1e-12 < gap <= 1e-6, name, f"{horizon} steps")


def _check_control_variate(sign: float) -> Cases:
    r"""$c^* = -\mathrm{Cov}(f(u), u-1)/\mathrm{Var}(u)$ makes the variance of $f(u) + c(u-1)$ stationary."""
    for divergence in catalogue():
        for seed in range(3):
            log_p, log_q = (rows[0] for rows in log_rows(*random_pair(6, 1, seed=seed)))
            p, f, control = log_p.exp(), divergence.generator(log_q - log_p), torch.expm1(log_q - log_p)
            covariance = (p * f * control).sum()  # the control has mean zero
            best = (sign * covariance / (p * control.square()).sum()).requires_grad_()
            value = f + best * control
            variance = (p * (value - (p * value).sum()).square()).sum()
            (slope,) = torch.autograd.grad(variance, best)
            yield close(slope, torch.zeros_like(slope), divergence, f"seed {seed}")


# Rigorous forms.


def _variance(p: Sequence[Any], values: Sequence[Any]) -> Any:
    return expectation(p, [v**2 for v in centred(p, values)])


def _check_optimum(best: Callable[[Sequence[Any], Sequence[Any], Sequence[Any]], Any]) -> Cases:
    """The variance at any other constant is that at `c*` plus a square."""
    for divergence, student, teacher in irrational_cases():
        p, at = intervals(student), [interval(r) for r in ratios(student, teacher)]
        f = [enclose(divergence.expr, {divergences.symbol(): r}) for r in at]
        control = [r - 1 for r in at]
        c = best(p, f, control)
        least, *others = (_variance(p, [v + k * w for v, w in zip(f, control, strict=True)]) for k in (c, -1, 0, 3))
        for k, value in zip((-1, 0, 3), others, strict=True):
            predicted = least + (c - k) ** 2 * expectation(p, [w**2 for w in control])
            yield overlap(value, predicted, divergence, student, teacher, f"c {k}")


def _optimum(p: Sequence[Any], f: Sequence[Any], control: Sequence[Any]) -> Any:
    # The control has mean zero, so its covariance with f is a plain mean.
    return -expectation(p, [v * w for v, w in zip(f, control, strict=True)]) / expectation(p, [w**2 for w in control])


def _check_schulman(threshold: Fraction) -> Cases:
    r"""$\mathrm{Var}\,k_3 < \mathrm{Var}\,k_1$ exactly if $c^* = (KL(p\|q) + KL(q\|p))/\chi^2$ exceeds one half."""
    spread = (
        (distribution(99, 1), distribution(1, 99)),
        (distribution(1, 9), distribution(8, 2)),
        (distribution(1, 99), distribution(1, 999)),
        (distribution(5, 1), distribution(1, 2)),
    )
    for student, teacher in rational_distributions() + spread:
        p, q, at = intervals(student), intervals(teacher), [interval(r) for r in ratios(student, teacher)]
        k1 = [-iv.log(r) for r in at]
        k3 = [r - 1 + k for r, k in zip(at, k1, strict=True)]
        yield holds(0 in expectation(p, k3) - expectation(p, k1), student, teacher, "mean")
        jeffreys = expectation(p, k1) - expectation(q, k1)
        gain, margin = _variance(p, k1) - _variance(p, k3), jeffreys / chi2(p, q) - interval(threshold)
        decided = (gain.a > 0 and margin.a > 0) or (gain.b < 0 and margin.b < 0)
        yield holds(bool(decided), student, teacher, "variance")


# The derivation.


def _best_gauge() -> bool:
    r"""$\mathrm{Var}(f + c g) = V + 2 c K + c^2 G$ is least at $c^* = -K/G$, by $c(c - 2c^*)G$ from $V$."""
    v, k, c = sympy.symbols("V K c", real=True)
    g = sympy.Symbol("G", positive=True)
    variance = v + 2 * c * k + c**2 * g
    best = sympy.solve(variance.diff(c), c)
    least = len(best) == 1 and sympy.simplify(best[0] + k / g) == 0 and variance.diff(c, 2).is_positive
    gain = sympy.simplify(variance - v - c * g * (c - 2 * best[0])) == 0
    return bool(least and gain)


def _schulman() -> bool:
    r"""$k_3 = k_1 + (u - 1)$, and $-\mathrm{Cov}(k_1, u - 1) = E_p[(u - 1)\log u]$ is $KL(p\|q) + KL(q\|p)$."""
    p, q = sympy.symbols("p q", positive=True)
    u = q / p
    x = divergences.symbol()
    k3 = divergences.divergence("reverse_kl").expr + x - 1
    term = p * (u - 1) * sympy.log(u)
    both = p * sympy.log(p / q) + q * sympy.log(q / p)
    least = divergences.is_convex(k3) and k3.subs(x, 1) == 0 and sympy.diff(k3, x).subs(x, 1) == 0
    return bool(least and sympy.simplify(sympy.expand_log(term - both, force=True)) == 0)
