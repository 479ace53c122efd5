"""T13: exact on k tokens, sampled on the rest."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import TabularPolicy, exact_gradient, expected_gradient, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import Distribution, Pair
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    dot,
    mean_gradient,
    minus,
    score,
    simplex,
    square,
    variance,
    weighted,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, same

__all__ = ["theorems"]

# Which tokens are summed exactly, given the number of tokens, k and the sampled one.
Chosen = Callable[[int, int, int], frozenset[int]]


class Split(NamedTuple):
    """An estimate of one token's gradient: the set, and what the weights of either part lose."""

    chosen: Chosen
    on_set: Fraction
    on_tail: Fraction
    everywhere: bool = False


_C = Fraction(3, 7)
_FIRST: Chosen = lambda size, k, taken: frozenset(range(k))  # noqa: E731


def theorems() -> list[Theorem]:
    """T13."""
    return [
        Theorem(
            number="T13",
            name="exact on k tokens, sampled on the rest",
            meaning=(
                "The gradient of one token can be summed exactly over a set $S$ of tokens and sampled on the rest $T$"
                " only. This is unbiased for every f-divergence, so the teacher's log-probabilities of its $k$"
                " likeliest tokens and of the sampled one are enough. The variance it saves against the sampled token"
                " alone has a closed form, and so has the best constant $c$."
            ),
            statement=(
                r"\hat g = -\textstyle\sum_{a\in S} p_a (w_a - c)\,s_a - 1[y\notin S]\,(w_y - c)\,s_y;\quad E_p[\hat"
                r" g] = \nabla D_f \text{ for every } f, c \text{ and } S;\quad \mathrm{tr}\,\mathrm{Var}[w_y s_y] -"
                r" \mathrm{tr}\,\mathrm{Var}[\hat g] = E_p[1_S w^2|s|^2] - |g_S|^2 - 2\,g_S\cdot g_T \text{ at } c ="
                r" 0;\quad c^* = \frac{E_p[1_T w|s|^2] - E_p[1_T w s]\cdot E_p[1_T s]}{E_p[1_T |s|^2] - |E_p[1_T"
                " s]|^2}"
            ),
            hypotheses=(
                "the set $S$ is chosen without looking at the sampled token $y$; $T$ is the rest and not empty",
                "the constant $c$ may depend on the history, but not on $y$",
                "$w_a = w_f(q_a/p_a)$; $g_S = -E_p[1_S w s]$ and $g_T = -E_p[1_T w s]$ are the parts of the gradient",
                r"off-policy, $\mu > 0$ where $p$ is",
            ),
            source="the split of a sum into a known and a sampled part is classical; the rest derived here",
            advice=(
                "One sampled token, the teacher's $k$ log-probabilities and its log-probability of the sampled token"
                " give an unbiased gradient of any f-divergence. Never put the sampled token into the set."
            ),
            derivation=(
                Step(
                    r"\textstyle\sum_{a\in S} p_a (w_a - c) s_a + E_p[1_T (w - c)\,s] = E_p[(w - c)\,s] = E_p[w s]",
                    "the exact part and the mean of the sampled part are two parts of one sum over all tokens, which"
                    " is minus the gradient by T1. A constant adds nothing, because $E_p[s] = 0$. Sympy confirms it"
                    " for three tokens with any weights, one of them in $S$",
                    _two_parts,
                ),
                Step(
                    r"\mathrm{tr}\,\mathrm{Var}[\hat g] = E_p[1_T (w - c)^2|s|^2] - |E_p[1_T (w - c)\,s]|^2",
                    "the exact part is the same whichever token is drawn, so only the sampled part varies",
                    _only_the_tail,
                ),
                Step(
                    r"\partial_c\,\mathrm{tr}\,\mathrm{Var}[\hat g] = 0 \iff c = c^*",
                    r"the variance is quadratic in $c$, and its leading coefficient $\mathrm{tr}\,\mathrm{Var}[1_T s]$"
                    " is positive, so the only zero of its slope is the minimum. Sympy compares the coefficients for"
                    " three tokens",
                    _best_constant,
                ),
            ),
            identities=(
                Identity(
                    "unbiased for every divergence, set and constant",
                    r"E_p[\hat g] = \nabla D_f",
                    _check_mean,
                    Split(_FIRST, _C, _C),
                    {
                        "the sampled token in the set": Split(
                            lambda size, k, taken: frozenset([*range(k - 1), taken]), _C, _C
                        ),
                        "the constant on the set alone": Split(_FIRST, _C, Fraction(0)),
                        "the constant on the tail alone": Split(_FIRST, Fraction(0), _C),
                        "the sampled token always": Split(_FIRST, _C, _C, True),
                    },
                    "exact",
                ),
                Identity(
                    "what the split saves",
                    r"\mathrm{tr}\,\mathrm{Var}[w_y s_y] - \mathrm{tr}\,\mathrm{Var}[\hat g] = E_p[1_S w^2|s|^2] -"
                    r" |g_S|^2 - 2\,g_S\cdot g_T",
                    _check_saving,
                    lambda moment, on_set, on_tail: moment - square(on_set) - 2 * dot(on_set, on_tail),
                    {
                        "the cross term dropped": lambda moment, on_set, on_tail: moment - square(on_set),
                        "the second moment": lambda moment, on_set, on_tail: moment,
                        "the cross term's sign flipped": lambda moment, on_set, on_tail: (
                            moment - square(on_set) + 2 * dot(on_set, on_tail)
                        ),
                    },
                    "exact",
                ),
                Identity(
                    "the best constant",
                    r"\mathrm{tr}\,\mathrm{Var}[\hat g](c^* + 1) = \mathrm{tr}\,\mathrm{Var}[\hat g](c^* - 1)",
                    _check_best,
                    lambda tail: (tail.w_norm - dot(tail.w_score, tail.score)) / (tail.norm - square(tail.score)),
                    {
                        "the mean's own term dropped": lambda tail: tail.w_norm / tail.norm,
                        "none": lambda tail: Fraction(0),
                        "the tail's mean weight": lambda tail: tail.w / tail.chance,
                    },
                    "exact",
                ),
                Identity(
                    "off-policy",
                    r"E_\mu\Big[\textstyle\sum_n R_{n-1}\big(g_S(h_n) - 1_T\,\rho_n w_n s_n\big)\Big] = \nabla D_f,\ "
                    r"R_{n-1} = \prod_{m<n}\rho_m",
                    _check_off_policy,
                    (True, True),
                    {
                        "no prefix ratio": (False, True),
                        "no token's ratio on the tail": (True, False),
                        "no ratio": (False, False),
                    },
                ),
                Identity(
                    "a black box on the teacher's k likeliest",
                    r"E_p[\textstyle\sum_n \hat g_n] = \nabla D_f",
                    _check_black_box,
                    "teacher",
                    {"and the sampled token": "sampled", "the tail left out": "no tail"},
                ),
            ),
        )
    ]


# In fractions: one token.


class Tail(NamedTuple):
    """Sums over the tokens that are sampled: probability, w, |s|^2, w |s|^2, s and w s, times probabilities."""

    chance: Fraction
    w: Fraction
    norm: Fraction
    w_norm: Fraction
    score: list[Fraction]
    w_score: list[Fraction]


def _estimate(p: Sequence[Any], w: Sequence[Any], k: int, taken: int, split: Split) -> list[Any]:
    """The estimate's minus sign left out: the ascent direction, if one token was drawn."""
    chosen = split.chosen(len(p), k, taken)
    total = [0 * p[0]] * len(p)
    for a in chosen:
        total = [t + p[a] * (w[a] - split.on_set) * x for t, x in zip(total, score(p, a), strict=True)]
    if split.everywhere or taken not in chosen:
        total = [t + (w[taken] - split.on_tail) * x for t, x in zip(total, score(p, taken), strict=True)]
    return total


def _sizes(p: Distribution) -> range:
    return range(1, len(p))


def _check_mean(split: Split) -> Cases:
    """The estimate of every token, weighted by its chance, against the exact gradient."""
    for name, p, q, w in weighted():
        for k in _sizes(p):
            estimates = [_estimate(p, w, k, taken, split) for taken in range(len(p))]
            mean = [-dot(p, column) for column in zip(*estimates, strict=True)]
            yield same(mean, mean_gradient(p, w), name, p, q, f"k {k}")


def _spread(p: Sequence[Any], w: Sequence[Any], k: int, c: Any) -> Any:
    """The trace of the covariance of the estimate, from the estimates of every token."""
    estimates = [_estimate(p, w, k, taken, Split(_FIRST, c, c)) for taken in range(len(p))]
    mean = [dot(p, column) for column in zip(*estimates, strict=True)]
    return sum(a * square(minus(each, mean)) for a, each in zip(p, estimates, strict=True))


def _parts(p: Distribution, w: Sequence[Fraction], k: int) -> Iterator[list[Fraction]]:
    r"""$E_p[1_S w s]$ and $E_p[1_T w s]$."""
    for tokens in (range(k), range(k, len(p))):
        rows = [[p[a] * w[a] * x for x in score(p, a)] for a in tokens]
        yield [sum(column, Fraction(0)) for column in zip(*rows, strict=True)]


def _check_saving(claim: Callable[[Fraction, list[Fraction], list[Fraction]], Fraction]) -> Cases:
    for name, p, q, w in weighted():
        for k in _sizes(p):
            on_set, on_tail = _parts(p, w, k)
            moment = sum((p[a] * w[a] ** 2 * square(score(p, a)) for a in range(k)), Fraction(0))
            saved = variance(p, w) - _spread(p, w, k, Fraction(0))
            yield same(saved, claim(moment, on_set, on_tail), name, p, q, f"k {k}")


def _tail(p: Distribution, w: Sequence[Fraction], k: int) -> Tail:
    chance = of_w = norm = w_norm = Fraction(0)
    own, w_score = [Fraction(0)] * len(p), [Fraction(0)] * len(p)
    for a in range(k, len(p)):
        s = score(p, a)
        chance, of_w = chance + p[a], of_w + p[a] * w[a]
        norm, w_norm = norm + p[a] * square(s), w_norm + p[a] * w[a] * square(s)
        own = [x + p[a] * y for x, y in zip(own, s, strict=True)]
        w_score = [x + p[a] * w[a] * y for x, y in zip(w_score, s, strict=True)]
    return Tail(chance, of_w, norm, w_norm, own, w_score)


def _check_best(best: Callable[[Tail], Fraction]) -> Cases:
    """A parabola takes equal values on either side of its lowest point."""
    for name, p, q, w in weighted():
        for k in _sizes(p):
            c = best(_tail(p, w, k))
            yield same(_spread(p, w, k, c + 1), _spread(p, w, k, c - 1), name, p, q, f"k {k}")


# As black boxes.


@functools.cache
def _pairs() -> tuple[Pair, ...]:
    return (random_pair(5, 2, distance=1.0, seed=3), random_pair(4, 2, eos=0, distance=1.0, seed=4))


@functools.cache
def _samplers() -> tuple[TabularPolicy, ...]:
    return tuple(student.perturbed(0.5, seed=7) for student, _ in _pairs())


def _split_values(r: Rollouts, divergence: Divergence, k: int, kind: str) -> tuple[Tensor, Tensor]:
    """The losses of the set and of the sampled tail at each position; the weights are detached."""
    log_p, log_q = r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)
    chosen = torch.zeros_like(log_q).scatter(-1, log_q.topk(k, -1).indices, 1.0)
    if kind == "sampled":
        chosen = chosen.scatter(-1, r.tokens.clamp(min=0).unsqueeze(-1), 1.0)
    weight = (divergence.weight(log_q - log_p) - 0.4).detach()
    on_set = -(chosen * log_p.exp().detach() * weight * log_p).sum(-1)
    inside = chosen.gather(-1, r.tokens.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    on_tail = -(1.0 - inside) * (divergence.weight(r.log_u) - 0.4).detach() * r.student_logprobs
    return on_set, on_tail * (kind != "no tail")


def _check_black_box(kind: str) -> Cases:
    for name in SMOOTH:
        divergence = divergences.divergence(name)
        for pair in _pairs():
            for k in (1, 2):

                def loss(r: Rollouts, divergence: Divergence = divergence, k: int = k) -> Tensor:
                    on_set, on_tail = _split_values(r, divergence, k, kind)
                    return r.token_sum(on_set + on_tail)

                yield close(expected_gradient(loss, *pair), exact_gradient(*pair, name), name, pair, f"k {k}")


def _check_off_policy(ratios: tuple[bool, bool]) -> Cases:
    """Whether both parts have the prefix's ratio, and the tail the token's own."""
    prefix, on_tail_too = ratios

    def loss(r: Rollouts, divergence: Divergence) -> Tensor:
        assert r.behavior_logprobs is not None
        log_rho = (r.mask * (r.student_logprobs - r.behavior_logprobs)).detach()
        before = (log_rho.cumsum(-1) - log_rho).exp() if prefix else torch.ones_like(log_rho)
        own = log_rho.exp()
        on_set, on_tail = _split_values(r, divergence, 2, "teacher")
        return r.token_sum(before * (on_set + on_tail * (own if on_tail_too else 1.0)))

    for name in SMOOTH:
        divergence = divergences.divergence(name)
        for pair, mu in zip(_pairs(), _samplers(), strict=True):
            found = expected_gradient(functools.partial(loss, divergence=divergence), *pair, behavior=mu)
            yield close(found, exact_gradient(*pair, name), name, pair)


# The derivation.


def _two_parts() -> bool:
    """Three tokens, the first in the set; scores of softmax, any weights and constant."""
    p, w, c = simplex("p"), sympy.symbols("w0:3"), sympy.Symbol("c")
    for k in range(3):
        split = p[0] * (w[0] - c) * score(p, 0)[k] + sum(p[a] * (w[a] - c) * score(p, a)[k] for a in (1, 2))
        whole = sum(p[a] * w[a] * score(p, a)[k] for a in range(3))
        if sympy.expand(split - whole) != 0:
            return False
    return True


def _only_the_tail() -> bool:
    """A constant vector beside a random one: the trace of the covariance does not see it."""
    p, w, c = simplex("p"), list(sympy.symbols("w0:3")), sympy.Symbol("c")
    spread = _spread(p, w, 1, c)
    tail = [[(w[a] - c) * x for x in score(p, a)] for a in (1, 2)]
    moment = sum(p[a] * square(tail[a - 1]) for a in (1, 2))
    mean = [p[1] * x + p[2] * y for x, y in zip(*tail, strict=True)]
    return sympy.expand(spread - moment + square(mean)) == 0


def _best_constant() -> bool:
    """The quadratic of three tokens in c: its coefficients, and the only zero of its slope."""
    p, w, c = simplex("p"), list(sympy.symbols("w0:3")), sympy.Symbol("c")
    leading, linear, _ = sympy.Poly(sympy.expand(_spread(p, w, 1, c)), c).all_coeffs()
    scores = {a: score(p, a) for a in (1, 2)}
    own = [sum(p[a] * scores[a][k] for a in scores) for k in range(3)]
    pushed = [sum(p[a] * w[a] * scores[a][k] for a in scores) for k in range(3)]
    bottom = sum(p[a] * square(scores[a]) for a in scores) - square(own)
    top = sum(p[a] * w[a] * square(scores[a]) for a in scores) - dot(pushed, own)
    return sympy.expand(leading - bottom) == 0 and sympy.expand(linear + 2 * top) == 0
