"""The checks of T5c: who rests under which clip, in fractions, intervals, simulated flows and black boxes."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping
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
from opdtheory.exact.tree import Tree
from opdtheory.theorems.instances.cases import (
    Distribution,
    at_atoms,
    enclose,
    every_case,
    interval,
    rational_distributions,
    smooth_catalogue,
    values_of,
)
from opdtheory.theorems.instances.flows import TEACHER, distance, drift, far_students, flow
from opdtheory.theorems.instances.one_sample import (
    centred,
    covariance,
    expectation,
    in_logits,
    intervals,
    ratios,
)
from opdtheory.theorems.stability.checks import AT_TEACHER, local_weight
from opdtheory.theorems.theorem import Cases, Identity, close, holds, overlap, same

__all__ = ["ABOVE", "BELOW", "clamp", "identities"]

BELOW = tuple(map(Fraction, ("1/50", "1/4", "1/2", "3/4", "19/20", "99/100")))
ABOVE = tuple(map(Fraction, ("101/100", "21/20", "5/4", "3/2", "2", "4", "30")))

# Ends of clip intervals: each is the w(1) of a check, or further from it than the weights of the ratios next to one.
_ENDS = tuple(map(Fraction, ("-4", "-3", "-11/4", "-1", "-1/2", "-1/5", "0", "1/5", "1/2", "1", "5/4", "2")))

# A student one percent away from the teacher of `flows`.
_BESIDE = (0.404, 0.297, 0.202, 0.097)


def identities() -> tuple[Identity, ...]:
    """The claims of T5c that are checked."""
    return (
        Identity(
            "clamped weights in fractions",
            r"\text{the teacher is the only fixed point of } \mathrm{clamp}(w, a, b) \iff a \le w(1) \le b",
            _check_clamp,
            lambda low, high, at_one: low <= at_one <= high,
            {
                "always": lambda low, high, at_one: True,
                "w(1) must lie inside the interval": lambda low, high, at_one: low < at_one < high,
                "0 must lie in the interval": lambda low, high, at_one: low <= 0 <= high,
            },
            "exact",
        ),
        Identity(
            "clamped ratios in fractions",
            r"\text{the teacher is the only fixed point of } w(\mathrm{clamp}(u, a, b)) \iff a \le 1 \le b",
            _check_range,
            lambda low, high: low <= 1 <= high,
            {"always": lambda low, high: True, "1 must lie inside": lambda low, high: low < 1 < high},
            "exact",
        ),
        Identity(
            "who rests, in fractions",
            r"\dot z = 0 \iff w(u_a) \text{ is the same on all tokens}",
            _check_separation,
            all,
            {"only the teacher": lambda equal: False, "always": lambda equal: True},
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
            "slope of the distance at every history",
            r"\langle z_h - \log q_h, \nabla_{z_h} D_f\rangle = P(h)\,\mathrm{Cov}_p(\log u, w_f \mid h)",
            _check_rate,
            lambda reach, p, log_u, w: reach * _pull(p, log_u, w),
            {
                "every history at the rate of the first": lambda reach, p, log_u, w: _pull(p, log_u, w),
                "sign flipped": lambda reach, p, log_u, w: -reach * _pull(p, log_u, w),
                "not centred": lambda reach, p, log_u, w: reach * (p * log_u * w).sum(-1),
                "with u in place of log u": lambda reach, p, log_u, w: reach * _pull(p, log_u.exp(), w),
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
    )


def _increasing() -> dict[str, sympy.Expr]:
    """Strictly increasing weights that take fractions to fractions, with several values at the teacher."""
    u = divergences.symbol()
    rational = {name: divergences.divergence(name).expr for name in ("chi2", "neyman_chi2", "le_cam")}
    return {name: divergences.weight_of(f) for name, f in rational.items()} | {"forward KL": u}


def clamp(value: Fraction, low: Fraction, high: Fraction) -> Fraction:
    """The value, moved to the nearer end of the interval if it is outside."""
    return min(max(value, low), high)


def _two_tokens(below: Fraction, above: Fraction) -> Distribution:
    """The student whose two ratios are given, which is not the teacher."""
    first = (above - 1) / (above - below)
    return first, 1 - first


def _force(below: Fraction, above: Fraction, weights: Mapping[Fraction, Fraction]) -> Fraction:
    """The velocity of its second logit, under the weights of the two ratios."""
    return in_logits(_two_tokens(below, above), [weights[below], weights[above]])[1]


def _only_teacher_rests(weights: Mapping[Fraction, Fraction]) -> bool:
    """Whether the force vanishes on no student of two tokens with any of the ratios."""
    return all(_force(below, above, weights) != 0 for below in BELOW for above in ABOVE)


def _check_clamp(only: Callable[[Fraction, Fraction, Fraction], bool]) -> Cases:
    """Students of two tokens in fractions, under a weight clamped to an interval; its ends and w(1) decide."""
    u = divergences.symbol()
    for name, w in _increasing().items():
        at = {r: values_of(w, {u: r}) for r in (*BELOW, Fraction(1), *ABOVE)}
        for low, high in itertools.combinations(_ENDS, 2):
            # A dead zone holds the ratios next to one, if any.
            alone = _only_teacher_rests({r: clamp(value, low, high) for r, value in at.items()})
            yield holds(alone == only(low, high, at[Fraction(1)]), name, f"w in [{low}, {high}]")


def _check_range(only: Callable[[Fraction, Fraction], bool]) -> Cases:
    """The same with the ratio clamped before the weight; the ends of the interval decide."""
    u = divergences.symbol()
    ends = (("1/2", "2"), ("99/100", "101/100"), ("1", "2"), ("1/2", "1"), ("11/10", "3"), ("1/3", "9/10"))
    for name, w in _increasing().items():
        for low, high in (map(Fraction, pair) for pair in ends):
            alone = _only_teacher_rests({r: values_of(w, {u: clamp(r, low, high)}) for r in (*BELOW, *ABOVE)})
            yield holds(alone == only(low, high), name, f"u in [{low}, {high}]")


def _check_separation(separates: Callable[[list[bool]], bool]) -> Cases:
    """Distributions in fractions: a student that is not the teacher rests iff all its weights are equal."""
    for below in BELOW:
        mirrored = 2 - below
        for above in {*ABOVE, mirrored}:
            where = (f"u_1 {below}", f"u_2 {above}")
            yield same(expectation(_two_tokens(below, above), (below, above)), 1, *where, "mean ratio")
            weights = {r: (r - 1) ** 2 for r in (below, above)}
            equal = weights[below] == weights[above]
            yield holds((_force(below, above, weights) == 0) == separates([equal]), *where, "force")
            yield holds(equal == (above == mirrored), *where, "weights")
    for name, w in _increasing().items():
        for student, teacher in rational_distributions():
            values = at_atoms(w, student, teacher)
            rests = not any(centred(student, values))
            yield holds(rests == separates([v == values[0] for v in values[1:]]), name, student, teacher)


def _check_tilted_range(rule: Callable[[Fraction], bool]) -> Cases:
    r"""$w = -u\log u + 2(u-1)$ on $|\log u| \le C$: whether a second fixed point exists, certified."""

    def weight(t: Any) -> Any:
        return -t * iv.exp(t) + 2 * (iv.exp(t) - 1)

    for clip in map(Fraction, ("1/2", "1", "3/2", "159/100", "8/5", "2", "4")):
        top = weight(interval(clip))
        # Below 1 the weight is negative and comes as near to zero as one likes; above, it is least at C.
        yield holds(top.a > 0 or top.b < 0, f"C {clip}", "decided")
        yield holds((top.a > 0) == rule(clip), f"C {clip}", "positive")
        for k in range(1, 9):  # up to its maximum at log u = 1 the weight is positive
            yield holds(weight(interval(min(clip, Fraction(1)) * k / 8)).a > 0, f"C {clip}", f"rising side, {k}/8")
            yield holds(weight(-interval(clip * k / 8)).b < 0, f"C {clip}", f"falling side, {k}/8")


def _check_pull(sign: int) -> Cases:
    r"""$\mathrm{Cov}_p(\log u, w_f) > 0$, certified for every divergence and pair; it is the pull on the logits."""
    u = divergences.symbol()
    for divergence in smooth_catalogue():
        w = sign * (u * sympy.diff(divergence.expr, u) - divergence.expr)
        for student, teacher in rational_distributions():
            p, at = intervals(student), [interval(r) for r in ratios(student, teacher)]
            logs, weights = [iv.log(r) for r in at], [enclose(w, {u: r}) for r in at]
            by_covariance = covariance(p, logs, weights)
            by_logits = expectation(p, [t * v for t, v in zip(logs, centred(p, weights), strict=True)])
            yield holds(by_covariance.a > 0, divergence, student, teacher, "sign")
            yield overlap(by_covariance, by_logits, divergence, student, teacher, "value")


def _check_rate(form: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Cases:
    r"""The slope of $\frac12\lVert z - \log q\rVert^2$ along the oracle's descent, in the row of each history."""
    for divergence, pair in every_case():
        tree, gradient = Tree.build(*pair), exact_gradient(*pair, divergence)
        for n, rows in enumerate(gradient):
            log_p, log_q = tree.log_p[n], tree.log_q[n]
            slopes = ((log_p - log_q) * rows).sum(-1)
            claimed = form(tree.reach(n), log_p.exp(), log_q - log_p, divergence.weight(log_q - log_p))
            for history, (slope, claim) in enumerate(zip(slopes, claimed, strict=True)):
                yield close(slope, claim, divergence, pair, f"step {n + 1}", f"history {history}")


def _pull(p: Tensor, log_u: Tensor, weight: Tensor) -> Tensor:
    r"""$\mathrm{Cov}_p(\log u, w)$ of each row."""
    return (p * log_u * weight).sum(-1) - (p * log_u).sum(-1) * (p * weight).sum(-1)


_CLIPS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weight in [-1/2, 1/2]": {"clip_weight": (-0.5, 0.5)},
    "weight in [0, 2]": {"clip_weight": (0.0, 2.0)},
    "log u in [-1, 1]": {"clip_log_ratio": 1.0},
}


def _clipped(divergence: Divergence, label: str, centred: bool) -> Callable[[Tensor], Tensor]:
    """The weight of the library's estimator of that name, as a function of the log-ratio."""
    options = _CLIPS[label]
    shift = divergence.weight(AT_TEACHER) if centred else 0.0

    def weight(log_u: Tensor) -> Tensor:
        t = log_u.clamp(-options["clip_log_ratio"], options["clip_log_ratio"]) if "clip_log_ratio" in options else log_u
        values = divergence.weight(t) - shift
        return values.clamp(*options["clip_weight"]) if "clip_weight" in options else values

    return weight


_SIMULATED = ("reverse_kl", "forward_kl", "jsd")


@functools.cache
def _path(name: str, label: str, centred: bool) -> Tensor:
    """Distances to the teacher along the flow of OPD+ under one of the clips."""
    return _distances(_clipped(divergences.divergence(name), label, centred))


@functools.cache
def _stopped_path(name: str) -> Tensor:
    """Distances to the teacher along the flow of stop-gradient."""
    return _distances(local_weight("opd", divergences.divergence(name)))


def _distances(weight: Callable[[Tensor], Tensor]) -> Tensor:
    """Of each far student, along the flow under a weight."""
    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()
    return distance(flow(far_students(), log_q, weight, 15.0, 75), log_q)


def _check_never_grows(paths: Callable[[str, str, bool], Tensor]) -> Cases:
    """Distances to the teacher along simulated flows, from near and far."""
    for name in _SIMULATED:
        for label in _CLIPS:
            for form, shifted in (("centred", True), ("not centred", False)):
                falls = bool((paths(name, label, shifted).diff(dim=0) <= 1e-12).all())
                yield holds(falls, name, label, form)


@functools.cache
def _force_beside(form: str, name: str, clip: str) -> Tensor:
    """A sampled estimator's expected gradient at a student one percent away from the teacher."""
    student, teacher = (TabularPolicy([torch.tensor([p], dtype=torch.float64).log()]) for p in (_BESIDE, TEACHER))
    loss = estimator(form, divergences.divergence(name), **_CLIPS[clip])
    return expected_gradient(loss, student, teacher)[0]


def _check_dead_zone(dead: Callable[[Divergence, dict[str, Any], bool], bool]) -> Cases:
    """Sampled estimators with clips, run as black boxes: whether a student beside the teacher feels no force.

    Their forces are those of the weights that the simulated flows use.
    """
    log_p, log_q = (torch.tensor([p], dtype=torch.float64).log() for p in (_BESIDE, TEACHER))
    for name in _SIMULATED:
        divergence = divergences.divergence(name)
        for clip, options in _CLIPS.items():
            for form in ("opd_plus", "opd_plus_centred"):
                force, shifted = _force_beside(form, name, clip), form == "opd_plus_centred"
                rests = float(force.abs().max()) < 1e-15
                yield holds(rests == dead(divergence, options, shifted), form, name, clip, "dead or not")
                yield close(-drift(log_p, log_q, _clipped(divergence, clip, shifted)), force, form, name, clip, "force")


def _is_dead(divergence: Divergence, options: dict[str, Any], centred: bool) -> bool:
    """Whether the clip interval of the weight leaves out its value at the teacher."""
    if "clip_weight" not in options:
        return False
    low, high = options["clip_weight"]
    at_one = 0.0 if centred else float(divergence.weight(AT_TEACHER))
    return not low <= at_one <= high
