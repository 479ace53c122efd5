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
            meaning=(
                "Where can training stop? The teacher is the only point of rest, whatever the teacher is, exactly if"
                " no ratio below one has the weight of a ratio above one; if such a weight never falls, the student is"
                " drawn to the teacher from everywhere. Clipping the weight spoils this if the interval leaves out"
                " $w(1)$, while clipping the log-ratio never does."
            ),
            statement=(
                r"\text{the teacher is a fixed point of every } w(u);\quad"
                r" \text{it is the only one, whatever } q, \iff w(u_1) \ne w(u_2) \text{ for all } u_1 < 1 < u_2;\quad"
                r" \text{if such a } w \text{ is non-decreasing, the teacher attracts from everywhere: }"
                r" \tfrac{d}{dt}\lVert z - \log q\rVert^2 = -2\,\mathrm{Cov}_p(\log u, w) \le 0;\quad"
                r" \text{for increasing } w,\ \mathrm{clamp}(w, a, b) \text{ with } a < b \text{ keeps this} \iff a"
                r" \le w(1) \le b;\quad"
                r" \text{for increasing } w,\ w(\mathrm{clamp}(\log u, -C, C)) \text{ keeps this for every } C > 0"
            ),
            hypotheses=(
                "fixed points are those with every probability positive",
                "there is one row of logits $z$; with a row for each history $h$, the rate carries the factor $P(h)$,"
                " the student's probability of reaching $h$, which stays away from zero because no distance grows",
                "$w$ is continuous, and strictly increasing before it is clipped",
                "if $w(1)$ lies inside $(a, b)$, the rate of T5 is kept too; if $w(1)$ is $a$ or $b$, the pull is"
                " one-sided",
            ),
            source="derived here; Chebyshev's association inequality",
            advice=(
                r"Centre the weight before you clip it, or clip $\log u$: an interval that leaves $w(1)$ out stops the"
                r" training before it arrives."
            ),
            derivation=(
                Step(
                    r"\dot z_2 = p_1 p_2 (w(u_2) - w(u_1)), \quad p_1 = \frac{u_2 - 1}{u_2 - u_1}",
                    "at a fixed point all tokens have the same weight. The ratios average to 1, so a student other"
                    " than the teacher has a ratio below 1 and one above 1, and distinct weights at these exclude it."
                    " If instead $w(u_1) = w(u_2)$ for some $u_1 < 1 < u_2$, the two tokens with these ratios are"
                    " another fixed point",
                    _ratios_on_both_sides,
                ),
                Step(
                    r"\tfrac{d}{dt}\tfrac12\lVert z - \log q\rVert^2 = -\mathrm{Cov}_p(\log u, w)",
                    r"$\log u$ is minus the error $z - \log q$, up to a constant, which drops out since the velocities"
                    r" add up to zero. Sympy checks three tokens with any weights",
                    _slope_of_distance,
                ),
                Step(
                    r"\mathrm{Cov}_p(x, w) = \tfrac12\textstyle\sum_{ab} p_a p_b (x_a - x_b)(w_a - w_b)",
                    r"with $x = \log u$ and a non-decreasing weight, no term is negative, and all vanish only at a"
                    r" fixed point. The distance is therefore a Lyapunov function, which bounds the logits up to"
                    r" constants, and LaSalle's principle gives convergence",
                    _association,
                ),
                Step(
                    r"\log u_b - \log u_a = (z_a - \log q_a) - (z_b - \log q_b)",
                    r"the number 1 lies between the smallest and the largest ratio, so $|\log u|$ never exceeds"
                    r" $\sqrt2$ times the initial distance, and $w$ needs to be monotone only up to there",
                    _widest_ratio,
                ),
                Step(
                    r"\mathrm{clamp}(w, a, b)(u_1) = \mathrm{clamp}(w, a, b)(u_2) \text{ for some } u_1 < 1 < u_2 \iff"
                    r" w(1) < a \text{ or } w(1) > b",
                    r"a clamped increasing $w$ is flat where $w \le a$ and where $w \ge b$. Ratios on either side of 1"
                    r" share one of these pieces if and only if it contains a neighbourhood of 1. Clamping $\log u$"
                    r" puts the flat pieces at $|\log u| \ge C$, on which 1 does not lie",
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
