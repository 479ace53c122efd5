"""T5c: when the teacher is the only fixed point of a weight, clipped or not, and when it attracts from everywhere."""

from __future__ import annotations

import itertools
from fractions import Fraction

import sympy

from opdtheory.theorems.instances.one_sample import covariance, expectation, in_logits, simplex
from opdtheory.theorems.stability import fixed_point_checks as checks
from opdtheory.theorems.theorem import Step, Theorem

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T5c."""
    return [
        Theorem(
            number="T5c",
            name="the only fixed point, and clipping",
            statement=(
                r"\text{The teacher rests under every } w(u).\ \text{It alone does, whatever } q, \text{ iff }"
                r" w(u_1) \ne w(u_2) \text{ for all } u_1 < 1 < u_2;\ \text{a non-decreasing such } w"
                r"\ \text{attracts from everywhere, } \tfrac{d}{dt}\lVert z - \log q\rVert^2"
                r" = -2\,\mathrm{Cov}_p(\log u, w) \le 0.\ \text{For increasing } w:"
                r"\ \mathrm{clamp}(w, a, b),\ a < b, \text{ keeps this iff } a \le w(1) \le b;"
                r"\ w(\mathrm{clamp}(\log u, -C, C)) \text{ for every } C > 0"
            ),
            hypotheses=(
                "fixed points with every probability positive",
                "one row of logits; with a row for each history h the rate carries the factor P(h), the student's "
                "probability of reaching h, which stays away from zero as no distance grows",
                "w continuous; strictly increasing before it is clipped",
                "inside (a, b) the rate of T5 is kept too; at w(1) = a or b the pull is one-sided",
            ),
            source="derived here; Chebyshev's association inequality",
            advice=(
                "Centre the weight before you clip it, or clip log u: an interval that leaves w(1) out stops the "
                "training before it arrives."
            ),
            derivation=(
                Step(
                    r"\dot z_2 = p_1 p_2 (w(u_2) - w(u_1)), \quad p_1 = \frac{u_2 - 1}{u_2 - u_1}",
                    "a fixed point has equal weights on all tokens. A student other than the teacher has a ratio below "
                    "and one above 1, as they average to 1, so distinct values exclude it; equal values at "
                    "u_1 < 1 < u_2 make these two tokens a fixed point",
                    _ratios_on_both_sides,
                ),
                Step(
                    r"\tfrac{d}{dt}\tfrac12\lVert z - \log q\rVert^2 = -\mathrm{Cov}_p(\log u, w)",
                    "log u is minus the error, up to a constant; three atoms with any weights",
                    _slope_of_distance,
                ),
                Step(
                    r"\mathrm{Cov}_p(x, w) = \tfrac12\textstyle\sum_{ab} p_a p_b (x_a - x_b)(w_a - w_b)",
                    "no term is negative for a non-decreasing weight, and all vanish only at a fixed point: the "
                    "distance is a Lyapunov function, it bounds the logits up to constants, and LaSalle applies",
                    _association,
                ),
                Step(
                    r"\log u_b - \log u_a = (z_a - \log q_a) - (z_b - \log q_b)",
                    "1 lies between the smallest and the largest ratio, so |log u| never exceeds sqrt(2) times the "
                    "initial distance, and w need only be monotone up to there",
                    _widest_ratio,
                ),
                Step(
                    r"\mathrm{clamp}(w, a, b)(u_1) = \mathrm{clamp}(w, a, b)(u_2),\ u_1 < 1 < u_2"
                    r" \iff w(1) < a \text{ or } w(1) > b",
                    "the flat pieces of a clamped increasing w are {w <= a} and {w >= b}; ratios on either side of 1 "
                    "share one iff it contains a neighbourhood of 1. Clamping log u puts flat pieces at |log u| >= C",
                    _flat_pieces,
                    in_words=True,
                ),
            ),
            identities=checks.identities(),
        )
    ]


# The derivation.


def _ratios_on_both_sides() -> bool:
    """Any `u_1 < 1 < u_2` are the ratios of some pair on two atoms, where the force is `p_1 p_2 (w_2 - w_1)`."""
    a, b = sympy.symbols("a b", positive=True)  # u_1 = 1/(1+a), u_2 = 1+b
    w = sympy.symbols("w1 w2", real=True)
    low, high = 1 / (1 + a), 1 + b
    p = [(high - 1) / (high - low), (1 - low) / (high - low)]
    force = in_logits(p, w)[1]
    return (
        sympy.simplify(p[0] + p[1] - 1) == 0
        and sympy.simplify(expectation(p, (low, high)) - 1) == 0
        and all(sympy.simplify(x).is_positive is True for x in p)
        and sympy.simplify(force - p[0] * p[1] * (w[1] - w[0])) == 0
    )


def _slope_of_distance() -> bool:
    """The slope of half the squared distance along the flow, three atoms with any weights."""
    z, q = sympy.symbols("z0:3", real=True), sympy.symbols("q0:3", positive=True)
    p, w = simplex("p"), sympy.symbols("w0:3", real=True)
    velocity = in_logits(p, w)
    # The velocities add up to zero, so a constant added to the error makes no difference.
    half = sum((x - sympy.log(b)) ** 2 for x, b in zip(z, q, strict=True)) / 2
    slope = sum(sympy.diff(half, x) * v for x, v in zip(z, velocity, strict=True))
    log_u = [sympy.log(b) - x for x, b in zip(z, q, strict=True)]  # up to the normaliser of all
    return sympy.expand(sum(velocity)) == 0 and sympy.expand(slope + covariance(p, log_u, w)) == 0


def _association() -> bool:
    """Chebyshev's association: a covariance is half the mean product of differences."""
    x, w = sympy.symbols("x0:3", real=True), sympy.symbols("w0:3", real=True)
    p = simplex("p")
    differences = sum(p[i] * p[j] * (x[i] - x[j]) * (w[i] - w[j]) for i in range(3) for j in range(3))
    return sympy.expand(covariance(p, x, w) - differences / 2) == 0


def _widest_ratio() -> bool:
    r"""Two atoms' errors differ by their log-ratios, $(z_a - \log q_a) - (z_b - \log q_b) = \log u_b - \log u_a$."""
    z, q = sympy.symbols("z0:3", real=True), sympy.symbols("q0:3", positive=True)
    log_u = [sympy.log(b) - x for x, b in zip(z, q, strict=True)]  # up to the normaliser of all
    return sympy.expand((z[0] - sympy.log(q[0])) - (z[1] - sympy.log(q[1])) - (log_u[1] - log_u[0])) == 0


def _flat_pieces() -> bool:
    """`clamp(u, a, b)` takes one value at some `u_1 < 1 < u_2` iff 1 is outside `[a, b]`, on a rational grid."""
    ends = map(Fraction, ("1/2", "11/20", "9/10", "19/20", "1", "21/20", "11/10", "13/10", "3"))
    return all(
        any(checks.clamp(a, low, high) == checks.clamp(b, low, high) for a in checks.BELOW for b in checks.ABOVE)
        != (low <= 1 <= high)
        for low, high in itertools.combinations(ends, 2)
    )
