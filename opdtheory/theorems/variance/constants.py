"""T7a: constant baselines."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
from torch import Tensor

from opdtheory import divergences
from opdtheory.theorems.instances.cases import pairs, rational_distributions, sampled_variance
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    OfPair,
    expectation,
    first_rows,
    intervals,
    kl,
    log_rows,
    mean_gradient,
    optimal_baseline,
    second_moment,
    simplex,
    square,
    three_atoms,
    vanishes,
    weighted,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T7a."""
    half = Fraction(1, 2)
    theorem = Theorem(
        number="T7a",
        name="constant baselines",
        meaning=(
            "A number that is subtracted from every weight leaves the mean of the sampled gradient as it is and"
            " changes only its variance. One such number, $b^*$, is the best, and any other adds variance in"
            " proportion to the square of its distance from $b^*$. Subtracting $w_f(1)$, so that the weight vanishes"
            " where student and teacher agree, is only another gauge of the same divergence."
        ),
        statement=(
            r"E_p[(w-b)\,s] = E_p[w\,s];\quad"
            r" \mathrm{Var}(b) = \mathrm{Var}(b^*) + (b-b^*)^2\,E_p|s|^2;\quad"
            r" b^* = \frac{E_p[w|s|^2]}{E_p|s|^2};\quad"
            r" w_f - w_f(1) = w_{f - f'(1)(u-1)}"
        ),
        hypotheses=(
            r"one token is sampled from $p$, and the gradient is $g = -(w(u) - b)\,s$, where $s$ is the token's"
            r" score; $\mathrm{Var}(b)$ is the trace of the covariance of $g$",
            "the baseline $b$ does not depend on the sample",
            "$f(1) = 0$",
        ),
        source="OPD+, arXiv 2606.01039; the optimal constant by Greensmith, Bartlett & Baxter (2004); derived here",
        advice=(
            "Use `opd_plus_centred`: no constant changes the mean, and this one drops the $-1$ of the reverse KL and"
            " the $1$ of the forward KL, which are noise near the teacher."
        ),
        derivation=(
            Step(
                r"E_p[b\,s] = b\,\partial_\theta \textstyle\sum_a p_a = 0",
                r"the probabilities sum to one at every parameter $\theta$, so the score has mean zero, and so has a"
                r" constant times the score. Sympy confirms it for three tokens, whose probabilities are undefined"
                r" functions of $\theta$",
                _score_has_no_mean,
            ),
            Step(
                r"E_p[(w-b)^2|s|^2] = E_p[(w-b^*)^2|s|^2] + (b-b^*)^2\,E_p|s|^2",
                "complete the square in $b$. The mean of the gradient is the same for every $b$, so the variance"
                " changes by as much as this second moment. Only the lengths of the scores enter, so it holds for any"
                " family of distributions",
                _parabola,
            ),
            Step(
                r"E_p[(\log u - 1)^2] = E_p[\log^2 u] + 2\,\mathrm{KL}(p\|q) + 1",
                r"expand the square and insert $E_p[-\log u] = \mathrm{KL}(p\|q)$. This is what the $-1$ in the"
                r" reverse KL's weight adds to the mean square of the weight",
                _adds_two_kl_plus_one,
            ),
            Step(
                r"w_f(1) = f'(1);\quad w_{f - c(u-1)} = w_f - c",
                "the first holds because $f(1) = 0$. The second is the gauge of T3, which leaves the divergence as it"
                " is; with $c = f'(1)$ it centres the weight",
                _centring_is_a_gauge,
            ),
        ),
        identities=(
            Identity(
                "any constant keeps the mean",
                r"E_p[(w - b) s] = E_p[w s]",
                _check_any_constant,
                lambda p, w: [Fraction(7, 3)] * len(p),
                {
                    "a baseline that depends on the token": lambda p, w: list(p),
                    "half of the weight itself": lambda p, w: [half * x for x in w],
                },
                "exact",
            ),
            Identity(
                "the optimal constant",
                r"b^* = E_p[w|s|^2] / E_p[|s|^2]",
                _check_optimal,
                optimal_baseline,
                {
                    "the mean of the weight": lambda p, w: expectation(p, w),
                    "zero": lambda p, w: Fraction(0),
                    "not divided by the score's square": lambda p, w: optimal_baseline(p, w) * (1 - square(p)),
                },
                "exact",
            ),
            Identity(
                "what another constant costs",
                r"\mathrm{Var}(b) - \mathrm{Var}(b^*) = (b - b^*)^2 E_p|s|^2",
                _check_excess,
                lambda shift, p, norms: shift**2 * (p * norms).sum(),
                {
                    "score's square dropped": lambda shift, p, norms: shift**2 + 0 * p.sum(),
                    "no cost": lambda shift, p, norms: 0 * p.sum(),
                },
            ),
            Identity(
                "the -1 of the reverse KL",
                r"E_p[(\log u - 1)^2] - E_p[\log^2 u] = 2\,\mathrm{KL}(p\|q) + 1",
                _check_minus_one,
                lambda reverse, forward: 2 * reverse + 1,
                {
                    "sign of the KL flipped": lambda reverse, forward: 1 - 2 * reverse,
                    "+1 dropped": lambda reverse, forward: 2 * reverse,
                    "forward KL": lambda reverse, forward: 2 * forward + 1,
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "centred weights",
                r"w_f(u) - w_f(1):\ \log u,\ u - 1,\ \tfrac12\log\tfrac{1+u}{2}",
                _check_centred,
                {
                    "reverse_kl": sympy.log,
                    "forward_kl": lambda u: u - 1,
                    "jsd": lambda u: sympy.log((1 + u) / 2) / 2,
                },
                {
                    "reverse KL with its -1": {"reverse_kl": lambda u: sympy.log(u) - 1},
                    "forward KL not centred": {"forward_kl": lambda u: u},
                    "JSD moved": {"jsd": lambda u: sympy.log((1 + u) / 2) / 2 + sympy.log(2) / 2},
                },
                "symbolic",
            ),
            Identity(
                "forward KL has a known mean",
                r"E_p[u - 1] = 0",
                _check_known_mean,
                Fraction(0),
                {"mean one": Fraction(1), "mean minus one": Fraction(-1)},
                "exact",
            ),
        ),
    )
    return [theorem]


def _check_any_constant(baseline: OfPair) -> Cases:
    r"""$E_p[(w - b) s] = E_p[w s]$ in fractions; a baseline gives one value per token."""
    for name, p, q, w in weighted():
        shifted = [x - b for x, b in zip(w, baseline(p, w), strict=True)]
        yield same(mean_gradient(p, shifted), mean_gradient(p, w), name, p, q)


def _check_optimal(best: OfPair) -> Cases:
    r"""The vertex of the parabola $b \mapsto E_p[(w-b)^2|s|^2]$, from its values at $-1, 0, 1$."""
    for name, p, q, w in weighted():
        low, middle, high = (second_moment(p, [x - b for x in w]) for b in (-1, 0, 1))
        yield same((low - high) / (2 * (low + high - 2 * middle)), best(p, w), name, p, q)


def _check_excess(excess: Callable[[float, Tensor, Tensor], Tensor]) -> Cases:
    r"""$\mathrm{Var}(b) - \mathrm{Var}(b^*)$ of the library's estimator as a black box."""
    for pair in pairs()[:3]:
        row = first_rows(pair)
        log_p, log_q = (logs[0] for logs in log_rows(*row))
        p = log_p.exp()
        for name in SMOOTH:
            best = float(optimal_baseline(list(p), list(divergences.divergence(name).weight(log_q - log_p))))
            least, *others = (
                sampled_variance("opd_plus", name, row, baseline="constant", baseline_value=b)
                for b in (best, -1.0, 0.5)
            )
            for b, value in zip((-1.0, 0.5), others, strict=True):
                predicted = excess(b - best, p, 1 - 2 * p + p.square().sum())
                yield close(value - least, predicted, pair, name, f"b {b}")


def _check_minus_one(added: OfPair) -> Cases:
    r"""$E_p[(\log u - 1)^2] - E_p[\log^2 u]$, both sides enclosed."""
    for student, teacher in rational_distributions():
        w = weights_enclosed("reverse_kl", student, teacher)
        p, q = intervals(student), intervals(teacher)
        moved = expectation(p, [x * x for x in w]) - expectation(p, [(x + 1) ** 2 for x in w])
        yield overlap(moved, added(kl(p, q), kl(q, p)), student, teacher)


def _check_centred(claimed: dict[str, Callable[[Any], Any]]) -> Cases:
    r"""$w_f(u) - w_f(1)$, and the weight of $f - f'(1)(u-1)$, from the catalogue's generators."""
    u = divergences.symbol()
    for name, form in claimed.items():
        f = divergences.divergence(name).expr
        gauged = f - sympy.diff(f, u).subs(u, 1) * (u - 1)
        w, own = (u * sympy.diff(g, u) - g for g in (f, gauged))
        yield holds(vanishes(w - w.subs(u, 1) - form(u)) and vanishes(w - w.subs(u, 1) - own), name)


def _check_known_mean(offset: Fraction) -> Cases:
    """The forward KL's centred weight has the same mean for every teacher."""
    for p, q in rational_distributions():
        yield same(expectation(p, weights("forward_kl", p, q)) - 1, offset, p, q)


# The derivation.


def _score_has_no_mean() -> bool:
    """Three atoms whose probabilities are undefined functions of a parameter and sum to one."""
    t, b = sympy.symbols("theta b", real=True)
    first = [sympy.Function(f"p{i}", positive=True)(t) for i in range(2)]
    p = [*first, 1 - first[0] - first[1]]
    return sum(p) == 1 and sympy.simplify(sum(a * b * sympy.diff(sympy.log(a), t) for a in p)) == 0


def _parabola() -> bool:
    """Any family, $|s_a|^2$ being any three positive numbers: how the square depends on the baseline."""
    p, w, _ = three_atoms()
    b, norms = sympy.Symbol("b", real=True), sympy.symbols("n0:3", positive=True)
    moment = sum(a * (x - b) ** 2 * n for a, x, n in zip(p, w, norms, strict=True))
    size = expectation(p, norms)
    best = sum(a * x * n for a, x, n in zip(p, w, norms, strict=True)) / size
    gap = moment - moment.subs(b, best) - (b - best) ** 2 * size
    return sympy.simplify(gap) == 0


def _adds_two_kl_plus_one() -> bool:
    p, log_u = simplex("p"), sympy.symbols("x0:3", real=True)
    added = expectation(p, [(x - 1) ** 2 - x**2 for x in log_u])
    return sympy.expand(added - 2 * -expectation(p, log_u) - 1) == 0


def _centring_is_a_gauge() -> bool:
    r"""$w_f(1) = f'(1)$ as $f(1) = 0$, and $f - f'(1)(u-1)$ has the weight $w_f - f'(1)$."""
    u, c = sympy.symbols("u c", positive=True)
    f = sympy.Function("f")
    gauged = f(u) - c * (u - 1)
    moved = (u * sympy.diff(gauged, u) - gauged) - (u * sympy.diff(f(u), u) - f(u))
    at_one = (u * sympy.diff(f(u), u) - f(u)).subs(u, 1).doit() - sympy.diff(f(u), u).subs(u, 1)
    return gauged.subs(u, 1) == f(1) and sympy.simplify(moved + c) == 0 and sympy.simplify(at_one.subs(f(1), 0)) == 0
