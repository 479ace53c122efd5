"""T5c: when the teacher is the only fixed point of a weight, clipped or not, and when it attracts from everywhere."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, exact_gradient, expected_gradient
from opdtheory.theorems.instances import one_sample
from opdtheory.theorems.instances.cases import (
    Distribution,
    catalogue,
    enclose,
    every_case,
    interval,
    rational_distributions,
    values_of,
)
from opdtheory.theorems.instances.flows import TEACHER, distance, drift, far_students, flow
from opdtheory.theorems.instances.one_sample import covariance, expectation, intervals, ratios
from opdtheory.theorems.stability.checks import local_weight
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

# Whether the teacher is the only fixed point under clamp(w, a, b), from a, b and w(1).
ClampRule = Callable[[Fraction, Fraction, Fraction], bool]
# The same under w(clamp(log u, log low, log high)).
RangeRule = Callable[[Fraction, Fraction], bool]

_BELOW = tuple(map(Fraction, ("1/50", "1/4", "1/2", "3/4", "19/20", "99/100")))
_ABOVE = tuple(map(Fraction, ("101/100", "21/20", "5/4", "3/2", "2", "4", "30")))

# Ends of clip intervals: at the weights that the teacher has below, or further from them than the ratios next to one.
_ENDS = tuple(map(Fraction, ("-4", "-3", "-11/4", "-1", "-1/2", "-1/5", "0", "1/5", "1/2", "1", "5/4", "2")))

# Students of one percent away from the teacher of `flows`.
_BESIDE = (0.404, 0.297, 0.202, 0.097)


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
                    "log u is minus the error up to a constant; any weights, three atoms",
                    _distance_distribution,
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
                    "initial distance, and w need be monotone only up to there",
                    _widest_ratio,
                ),
                Step(
                    r"\mathrm{clamp}(w, a, b)(u_1) = \mathrm{clamp}(w, a, b)(u_2),\ u_1 < 1 < u_2"
                    r" \iff w(1) < a \text{ or } w(1) > b",
                    "the flat pieces of a clamped increasing w are {w <= a} and {w >= b}; two ratios about 1 share one "
                    "iff it holds a neighbourhood of 1. Clamping log u puts the flat pieces at |log u| >= C",
                    _flat_pieces,
                    in_words=True,
                ),
            ),
            identities=(
                Identity(
                    "clamped weights in fractions",
                    r"\text{the teacher is the only fixed point of } \mathrm{clamp}(w, a, b) \iff a \le w(1) \le b",
                    _check_clamp,
                    lambda low, high, at_one: low <= at_one <= high,
                    {
                        "always": lambda low, high, at_one: True,
                        "the interval must hold w(1) inside": lambda low, high, at_one: low < at_one < high,
                        "the interval must hold 0": lambda low, high, at_one: low <= 0 <= high,
                    },
                    "exact",
                ),
                Identity(
                    "clamped ratios in fractions",
                    r"\text{the teacher is the only fixed point of } w(\mathrm{clamp}(u, a, b)) \iff a \le 1 \le b",
                    _check_range,
                    lambda low, high: low <= 1 <= high,
                    {"always": lambda low, high: True, "1 must be inside": lambda low, high: low < 1 < high},
                    "exact",
                ),
                Identity(
                    "who rests, in fractions",
                    r"\dot z = 0 \iff w(u_a) \text{ is the same on all tokens}",
                    _check_separation,
                    all,
                    {"never but at the teacher": lambda equal: False, "always": lambda equal: True},
                    "exact",
                ),
                Identity(
                    "a weight that falls, clipped",
                    r"-(u\log u - 2(u-1)) \text{ on } |\log u| \le C: \text{ only the teacher rests}"
                    r" \iff C \le 2(1 - e^{-C}), \text{ up to } C = 1.593\ldots",
                    _check_tilted_range,
                    lambda clip: clip <= Fraction(1593, 1000),
                    {
                        "only where it rises, C <= 1": lambda clip: clip <= 1,
                        "for every C": lambda clip: True,
                        "up to C = 2": lambda clip: clip <= 2,
                    },
                    "rigorous",
                ),
                Identity(
                    "the pull, certified",
                    r"\mathrm{Cov}_p(\log u, w_f) > 0 \text{ for } p \ne q",
                    _check_pull,
                    1,
                    {"sign flipped": -1},
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "slope of the distance",
                    r"\langle z - \log q, \nabla D_f\rangle = \mathrm{Cov}_p(\log u, w_f)",
                    _check_rate,
                    _covariance,
                    {
                        "sign flipped": lambda p, log_u, w: -_covariance(p, log_u, w),
                        "not centred": lambda p, log_u, w: (p * log_u * w).sum(),
                        "with u in place of log u": lambda p, log_u, w: _covariance(p, log_u.exp(), w),
                    },
                ),
                Identity(
                    "distances never grow",
                    r"\lVert z(t) - \log q\rVert \text{ is non-increasing for a non-decreasing weight, clipped or not}",
                    _check_never_grows,
                    _path,
                    {"for stop-gradient too": lambda name, label, centred: _stopped_path(name)},
                ),
                Identity(
                    "dead zones of sampled estimators",
                    r"E[\hat g] = 0 \text{ next to the teacher} \iff w(1) \notin [a, b]",
                    _check_dead_zone,
                    _is_dead,
                    {
                        "never": lambda d, options, centred: False,
                        "centred or not": lambda d, options, centred: _is_dead(d, options, True),
                        "any clip of the weight": lambda d, options, centred: "clip_weight" in options,
                    },
                ),
            ),
        )
    ]


def _increasing() -> dict[str, sympy.Expr]:
    """Strictly increasing weights that take fractions to fractions, with several values at the teacher."""
    u = divergences.symbol()
    rational = {name: divergences.divergence(name).expr for name in ("chi2", "neyman_chi2", "le_cam")}
    return {name: divergences.weight_of(f) for name, f in rational.items()} | {"forward KL": u}


def _clamp(value: Fraction, low: Fraction, high: Fraction) -> Fraction:
    return min(max(value, low), high)


def _two_tokens(below: Fraction, above: Fraction) -> Distribution:
    """The student whose two ratios are given, which is not the teacher."""
    first = (above - 1) / (above - below)
    return first, 1 - first


def _two_token_force(below: Fraction, above: Fraction, weights: tuple[Fraction, Fraction]) -> Fraction:
    """The velocity of its second logit."""
    first, second = _two_tokens(below, above)
    return second * (weights[1] - (first * weights[0] + second * weights[1]))


def _check_clamp(only: ClampRule) -> Cases:
    """Students of two tokens with any of the ratios on which the force vanishes, in fractions."""
    u = divergences.symbol()
    for w in _increasing().values():
        at = {r: values_of(w, {u: r}) for r in (*_BELOW, Fraction(1), *_ABOVE)}
        for low, high in itertools.combinations(_ENDS, 2):
            forces = [
                _two_token_force(below, above, (_clamp(at[below], low, high), _clamp(at[above], low, high)))
                for below in _BELOW
                for above in _ABOVE
            ]
            # A dead zone holds the ratios next to one, if any.
            yield holds(all(force != 0 for force in forces) == only(low, high, at[Fraction(1)]), w, low, high)


def _check_range(only: RangeRule) -> Cases:
    """The same with the ratio clamped before the weight."""
    u = divergences.symbol()
    ends = (("1/2", "2"), ("99/100", "101/100"), ("1", "2"), ("1/2", "1"), ("11/10", "3"), ("1/3", "9/10"))
    for w in _increasing().values():
        for low, high in ((Fraction(a), Fraction(b)) for a, b in ends):
            forces = [
                _two_token_force(
                    below,
                    above,
                    (
                        values_of(w, {u: _clamp(below, low, high)}),
                        values_of(w, {u: _clamp(above, low, high)}),
                    ),
                )
                for below in _BELOW
                for above in _ABOVE
            ]
            yield holds(all(force != 0 for force in forces) == only(low, high), w, low, high)


def _check_separation(separates: Callable[[list[bool]], bool]) -> Cases:
    """Full distributions in fractions: a student that is not the teacher rests iff all its weights are equal."""
    u = divergences.symbol()
    for below in _BELOW:
        mirrored = 2 - below
        for above in {*_ABOVE, mirrored}:
            distribution = _two_tokens(below, above)
            yield same(sum(a * u for a, u in zip(distribution, (below, above), strict=True)), 1, below, above)
            weights = ((below - 1) ** 2, (above - 1) ** 2)
            force = _two_token_force(below, above, weights)
            yield holds((force == 0) == separates([weights[0] == weights[1]]), below, above)
            yield holds((weights[0] == weights[1]) == (above == mirrored), below, above)
    for w in _increasing().values():
        for student, teacher in rational_distributions():
            values = [values_of(w, {u: b / a}) for a, b in zip(student, teacher, strict=True)]
            mean = sum((a * v for a, v in zip(student, values, strict=True)), Fraction(0))
            rests = all(v == mean for v in values)
            yield holds(rests == separates([v == values[0] for v in values[1:]]), w, student, teacher)


def _check_tilted_range(rule: Callable[[Fraction], bool]) -> Cases:
    r"""$w = -u\log u + 2(u-1)$ on $|\log u| \le C$: whether a second fixed point exists, certified."""

    def weight(t: Any) -> Any:
        return -t * iv.exp(t) + 2 * (iv.exp(t) - 1)

    for clip in map(Fraction, ("1/2", "1", "3/2", "159/100", "8/5", "2", "4")):
        top = weight(interval(clip))
        # Below 1 the weight is negative and comes as near to zero as one likes; above, it is least at C.
        yield holds(top.a > 0 or top.b < 0, clip)
        yield holds((top.a > 0) == rule(clip), clip)
        for k in range(1, 9):  # up to its maximum at log u = 1 the weight is positive
            yield holds(weight(interval(min(clip, Fraction(1)) * k / 8)).a > 0, clip, k)
            yield holds(weight(-interval(clip * k / 8)).b < 0, clip, k)


def _check_pull(sign: int) -> Cases:
    r"""$\mathrm{Cov}_p(\log u, w_f) > 0$, certified for every divergence and pair of distributions; it is the logits' pull."""
    u = divergences.symbol()
    for f in (d.expr for d in catalogue() if d.name != "total_variation"):
        w = sign * (u * sympy.diff(f, u) - f)
        for student, teacher in rational_distributions():
            p, at = intervals(student), [interval(r) for r in ratios(student, teacher)]
            logs, weights = [iv.log(r) for r in at], [enclose(w, {u: r}) for r in at]
            pull = covariance(p, logs, weights)
            yield holds(pull.a > 0, f, student, teacher)
            yield overlap(
                pull,
                expectation(p, [t * v for t, v in zip(logs, one_sample.centred(p, weights), strict=True)]),
                f,
                student,
                teacher,
            )


def _check_rate(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Cases:
    r"""The slope of $\frac12\lVert z - \log q\rVert^2$ along the oracle's descent, level by level."""
    for divergence, (student, teacher) in every_case():
        gradient = exact_gradient(student, teacher, divergence)
        logits = [torch.log_softmax(z, -1) for z in student.logits]
        log_q = torch.log_softmax(teacher.logits[0], -1)
        # The first history has probability one.
        left = ((logits[0] - log_q) * gradient[0]).sum()
        yield close(
            left,
            form(logits[0].exp(), log_q - logits[0], divergence.weight(log_q - logits[0])),
            divergence,
            student,
            teacher,
        )


def _covariance(p: Tensor, log_u: Tensor, weight: Tensor) -> Tensor:
    return (p * log_u * weight).sum() - (p * log_u).sum() * (p * weight).sum()


_CLIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight in [-1/2, 1/2]": {"clip_weight": (-0.5, 0.5)},
    "weight in [0, 2]": {"clip_weight": (0.0, 2.0)},
    "log u in [-1, 1]": {"clip_log_ratio": 1.0},
}


def _clipped(divergence: Divergence, label: str, centred: bool) -> Callable[[Tensor], Tensor]:
    """The weight of the library's estimator of that name, as a function of the log-ratio."""
    options = _CLIPS[label]
    shift = divergence.weight(torch.zeros(1, dtype=torch.float64)) if centred else 0.0

    def weight(log_u: Tensor) -> Tensor:
        t = log_u.clamp(-options["clip_log_ratio"], options["clip_log_ratio"]) if "clip_log_ratio" in options else log_u
        values = divergence.weight(t) - shift
        return values.clamp(*options["clip_weight"]) if "clip_weight" in options else values

    return weight


_SIMULATED = ("reverse_kl", "forward_kl", "jsd")


@functools.cache
def _path(name: str, label: str, centred: bool) -> Tensor:
    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()
    weight = _clipped(divergences.divergence(name), label, centred)
    return distance(flow(far_students(), log_q, weight, 15.0, 75), log_q)


@functools.cache
def _stopped_path(name: str) -> Tensor:
    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()
    divergence = divergences.divergence(name)
    return distance(flow(far_students(), log_q, local_weight("opd", divergence), 15.0, 75), log_q)


def _check_never_grows(paths: Callable[[str, str, bool], Tensor]) -> Cases:
    """Distances to the teacher along simulated flows, from near and far."""
    for name in _SIMULATED:
        for label in _CLIPS:
            for centred in (True, False):
                yield holds(bool((paths(name, label, centred).diff(dim=0) <= 1e-12).all()), name, label, centred)


@functools.cache
def _force_beside(form: str, name: str, clip: str) -> Tensor:
    """A sampled estimator's expected gradient at a student one percent away from the teacher."""
    student, teacher = (
        TabularPolicy([torch.tensor([distribution], dtype=torch.float64).log()]) for distribution in (_BESIDE, TEACHER)
    )
    loss = estimator(form, divergences.divergence(name), **_CLIPS[clip])
    return expected_gradient(loss, student, teacher)[0]


def _check_dead_zone(dead: Callable[[Divergence, dict[str, Any], bool], bool]) -> Cases:
    """The sampled estimators with clips, run as black boxes: whether a student beside the teacher feels no force.

    Their forces are those of the weights that the simulated flows run on.
    """
    student, log_q = (torch.tensor([distribution], dtype=torch.float64).log() for distribution in (_BESIDE, TEACHER))
    for name in _SIMULATED:
        divergence = divergences.divergence(name)
        for clip, options in _CLIPS.items():
            for form in ("opd_plus", "opd_plus_centred"):
                centred = form == "opd_plus_centred"
                force = _force_beside(form, name, clip)
                yield holds(
                    (float(force.abs().max()) < 1e-15) == dead(divergence, options, centred), name, clip, options, form
                )
                yield close(
                    -drift(student, log_q, _clipped(divergence, clip, centred)), force, name, clip, options, form
                )


def _is_dead(divergence: Divergence, options: dict[str, Any], centred: bool) -> bool:
    """Whether the clip interval of the weight leaves out its value at the teacher."""
    if "clip_weight" not in options:
        return False
    low, high = options["clip_weight"]
    at_one = 0.0 if centred else float(divergence.weight(torch.zeros(1, dtype=torch.float64)))
    return not low <= at_one <= high


# The derivation.


def _ratios_on_both_sides() -> bool:
    """Any `u_1 < 1 < u_2` are the ratios of two distributions on two atoms, and the force there is `p_1 p_2 (w_2 - w_1)`."""
    a, b = sympy.symbols("a b", positive=True)  # u_1 = 1/(1+a), u_2 = 1+b
    w = sympy.symbols("w1 w2", real=True)
    low, high = 1 / (1 + a), 1 + b
    p = [(high - 1) / (high - low), (1 - low) / (high - low)]
    force = p[1] * (w[1] - p[0] * w[0] - p[1] * w[1])
    return (
        sympy.simplify(p[0] + p[1] - 1) == 0
        and sympy.simplify(p[0] * low + p[1] * high - 1) == 0
        and all(sympy.simplify(x).is_positive is True for x in p)
        and sympy.simplify(force - p[0] * p[1] * (w[1] - w[0])) == 0
    )


def _distance_distribution() -> bool:
    """The slope of half the squared distance along the flow, three atoms with any weights."""
    z, q = sympy.symbols("z0:3", real=True), sympy.symbols("q0:3", positive=True)
    w, p = sympy.symbols("w0:3", real=True), list(sympy.symbols("p0:2", positive=True))
    p.append(1 - p[0] - p[1])
    mean = sum(a * v for a, v in zip(p, w, strict=True))
    velocity = [a * (v - mean) for a, v in zip(p, w, strict=True)]
    # The velocities add up to zero, so that a constant of the error makes no difference.
    half = sum((x - sympy.log(b)) ** 2 for x, b in zip(z, q, strict=True)) / 2
    slope = sum(sympy.diff(half, x) * v for x, v in zip(z, velocity, strict=True))
    log_u = [sympy.log(b) - x for x, b in zip(z, q, strict=True)]  # up to the normaliser of all
    covariance = sum(a * t * v for a, t, v in zip(p, log_u, w, strict=True)) - mean * sum(
        a * t for a, t in zip(p, log_u, strict=True)
    )
    return sympy.expand(sum(velocity)) == 0 and sympy.expand(slope + covariance) == 0


def _association() -> bool:
    """Chebyshev's association: a covariance is half the mean product of differences."""
    x, w = sympy.symbols("x0:3", real=True), sympy.symbols("w0:3", real=True)
    p = list(sympy.symbols("p0:2", positive=True))
    p.append(1 - p[0] - p[1])
    mean_x, mean_w = (sum(a * v for a, v in zip(p, values, strict=True)) for values in (x, w))
    left = sum(a * s * t for a, s, t in zip(p, x, w, strict=True)) - mean_x * mean_w
    right = sum(p[i] * p[j] * (x[i] - x[j]) * (w[i] - w[j]) for i in range(3) for j in range(3)) / 2
    return sympy.expand(left - right) == 0


def _widest_ratio() -> bool:
    r"""Two atoms' errors differ by their log-ratios, $(z_a - \log q_a) - (z_b - \log q_b) = \log u_b - \log u_a$."""
    z, q = sympy.symbols("z0:3", real=True), sympy.symbols("q0:3", positive=True)
    log_u = [sympy.log(b) - x for x, b in zip(z, q, strict=True)]  # up to the normaliser of all
    return sympy.expand((z[0] - sympy.log(q[0])) - (z[1] - sympy.log(q[1])) - (log_u[1] - log_u[0])) == 0


def _flat_pieces() -> bool:
    """`clamp(u, a, b)` takes one value at some `u_1 < 1 < u_2` iff 1 is outside `[a, b]`, on a rational grid."""
    ends = map(Fraction, ("1/2", "11/20", "9/10", "19/20", "1", "21/20", "11/10", "13/10", "3"))
    return all(
        any(_clamp(a, low, high) == _clamp(b, low, high) for a in _BELOW for b in _ABOVE) != (low <= 1 <= high)
        for low, high in itertools.combinations(ends, 2)
    )
