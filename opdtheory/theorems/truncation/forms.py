r"""T9c to T9e: top-k divergences renormalised, with a bucket for the tail, and as a detached reward."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, expected_gradient
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    at_atoms,
    catalogue,
    descent_of_rows,
    interval,
    kept,
    kinked,
    pairs,
    rational_distributions,
    sampled_gradient,
    strictly_convex,
    values_of,
)
from opdtheory.theorems.instances.minimisers import TEACHER
from opdtheory.theorems.instances.one_sample import expectation, in_logits, intervals, kl, ratios, softmax
from opdtheory.theorems.instances.two_steps import weight_at
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

Form = Literal["truncated", "renormalised", "tail"]

# The first two tokens in the proportion of TEACHER; the four need not add up to one.
_OTHER_TAIL = (0.4, 0.25, 0.1, 0.02)


def theorems() -> list[Theorem]:
    """T9c, T9d and T9e."""
    return [
        Theorem(
            number="T9c",
            name="renormalised on S",
            meaning=(
                "If both models are renormalised on a set $S$ of tokens before they are compared, the loss is"
                " smallest where the student agrees with the teacher given $S$. It says nothing of the rest: neither"
                " the tail nor the mass $p(S)$ changes its value."
            ),
            statement=(
                r"D_f(q_S \| p_S),\ p_S = p/p(S), \text{ is minimal} \iff p_S = q_S;\quad"
                r" \text{it is flat along the tail and along } p(S)"
            ),
            hypotheses=("$S$ is fixed", "$p$ and $q$ are positive somewhere on $S$", "$f$ is strictly convex at 1"),
            source="derived here",
            advice="Renormalise only together with a term that controls $p(S)$, such as a tail bucket.",
            derivation=(
                Step(
                    r"(t p_a) / \textstyle\sum_S t p = p_a/p(S)",
                    "the distribution on $S$ is the same if all masses on $S$ are multiplied by $t$, and no mass of"
                    " the tail occurs in it",
                    _homogeneous,
                ),
                Step(
                    r"D_f(q_S \| p_S) \ge f(1) = 0",
                    "this is Jensen's inequality for the distributions on $S$, with equality exactly if the ratio is"
                    " constant on $S$, that is, if $p_S = q_S$. The machine confirms that the Jensen gap of two atoms"
                    " has a double zero at equal ratios",
                    _jensen,
                    in_words=True,
                ),
            ),
            identities=(
                Identity(
                    "flat directions in fractions",
                    r"\partial_{p_b} = 0 \text{ for } b \notin S,\quad \sum_S p_a \partial_{p_a} = 0",
                    _check_flat,
                    "renormalised",
                    {"truncated": "truncated", "one bucket": "tail"},
                    "exact",
                ),
                Identity(
                    "any tail is a fixed point",
                    r"p_S = q_S \Rightarrow \nabla D_f(q_S\|p_S) = 0",
                    _check_tail_free,
                    "topk_renormalised",
                    {"truncated": "topk_truncated", "one bucket": "topk_tail"},
                ),
            ),
        ),
        Theorem(
            number="T9d",
            name="one bucket for the tail",
            meaning=(
                "Merging all tokens outside $S$ into one bucket leaves a genuine divergence, between the merged"
                " distributions, which is at most the full one. Its gradient is that of T1, with the bucket's ratio"
                " on every token of the tail."
            ),
            statement=r"D_f(Kq\|Kp) \le D_f(q\|p);\quad \nabla D_f(Kq\|Kp) = -E_p[w_f(u_{K(a)})\,s_a]",
            hypotheses=(
                "$S$ is fixed; $K$ merges the tail, all tokens outside $S$, into one bucket; $u_{K(a)}$ is the ratio"
                " of token $a$, or that of the bucket if $a$ is in the tail",
                "$f$ is convex",
            ),
            source="data processing, Csiszar (1967); the gradient derived here",
            advice=(
                "Use this one of the top-k losses: it also controls $p(S)$, and misses only the distribution within"
                " the tail."
            ),
            derivation=(
                Step(
                    r"p_0 f(u_0) + p_1 f(u_1) \ge (p_0 + p_1)\,f\!\left(\tfrac{q_0 + q_1}{p_0 + p_1}\right)",
                    "this is Jensen's inequality in the tail, with equality exactly if its ratios agree, where $f$ is"
                    " strictly convex. The machine confirms that the gap of two atoms has a double zero at equal"
                    " ratios",
                    _jensen,
                    in_words=True,
                ),
                Step(
                    r"\partial_{p_0}\,[P f(Q/P)] = -w_f(Q/P),\quad P = p_0 + p_1",
                    "$P$ and $Q$ are the bucket's masses. This is T1 for the merged distribution: every tail token"
                    " carries the bucket's weight",
                    _bucket,
                ),
            ),
            identities=(
                Identity(
                    "data processing in fractions",
                    r"D_f(q\|p) - D_f(Kq\|Kp) \ge 0, \text{ zero iff the tail's ratios agree}",
                    _check_coarse,
                    1,
                    {"sign flipped": -1},
                    "exact",
                ),
                Identity(
                    "what the bucket loses",
                    r"\mathrm{KL}(p\|q) - \mathrm{KL}(Kp\|Kq) = p(S^c)\, \mathrm{KL}(p_{S^c}\|q_{S^c})",
                    _check_lost,
                    lambda p_tail, q_tail, name: p_tail if name == "reverse_kl" else q_tail,
                    {
                        "nothing": lambda p_tail, q_tail, name: interval(0),
                        "without the tail's mass": lambda p_tail, q_tail, name: interval(1),
                        "the other distribution's mass": lambda p_tail, q_tail, name: (
                            q_tail if name == "reverse_kl" else p_tail
                        ),
                    },
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "exact for the coarse objective only",
                    r"\nabla D_f(Kq\|Kp) = -E_p[w_f(u_{K(a)})\,s_a]",
                    _check_coarse_gradient,
                    _bucket_ratio,
                    {
                        "exact for the fine objective": lambda log_p, log_q, tail: log_q - log_p,
                        "no pull in the tail": lambda log_p, log_q, tail: (log_q - log_p).masked_fill(tail, 0.0),
                    },
                ),
            ),
        ),
        Theorem(
            number="T9e",
            name="detached top-k reward",
            meaning=(
                "A top-k divergence depends on the history alone: it is the same whichever token is sampled next. As"
                " a detached reward of that token it is therefore a baseline, and its expected gradient is zero for"
                " every student and teacher."
            ),
            statement=r"E_p[A(h_n)\,s_n \mid h_n] = 0 \text{ for an advantage } A(h_n) = -D_{\text{top-}k}(h_n)",
            hypotheses=("$A$ depends on the history before the token, not on the token", "$A$ is detached"),
            source="derived here; the score has mean zero",
            advice="Differentiate a top-k divergence: as a detached reward of its own token it is only noise.",
            derivation=(
                Step(
                    r"\sum_a p_a\,A\,\partial_z \log p_a = A\,\partial_z 1 = 0",
                    "given the history, $A$ is a constant, and the probabilities of the next token sum to one. Sympy"
                    " confirms it for a softmax of three tokens",
                    _score_mean,
                ),
            ),
            identities=(
                Identity(
                    "in fractions",
                    r"-p_b (A - E_p A) = 0 \text{ iff } A \text{ does not depend on the token}",
                    _check_reward_in_fractions,
                    False,
                    {"rewards of the histories that follow": True},
                    "exact",
                ),
                Identity(
                    "zero expected gradient",
                    r"E_p\Big[\sum_n A(h_n)\, s_n\Big] = 0",
                    _check_reward,
                    lambda divergence, k: estimator("topk_reward", divergence, k=k),
                    {
                        "summed over the rollout, on every token": _reward_to_come,
                        "minus the sampled token's term": lambda divergence, k: estimator("opd", divergence),
                    },
                ),
            ),
        ),
    ]


# Renormalised.


def _expression(form: Form, f: sympy.Expr, p: list[Any], q: list[Any], k: int) -> sympy.Expr:
    """The three forms of a top-k divergence as functions of unnormalised masses."""
    u = divergences.symbol()
    inside_p, inside_q = sum(p[:k]), sum(q[:k])
    ps, qs = p[:k], q[:k]
    if form == "renormalised":
        ps, qs = [a / inside_p for a in ps], [b / inside_q for b in qs]
    elif form == "tail":
        ps, qs = [*ps, sum(p[k:])], [*qs, sum(q[k:])]
    return sum(a * f.subs(u, b / a) for a, b in zip(ps, qs, strict=True))


def _check_flat(form: Form) -> Cases:
    """In fractions: no slope along any tail mass nor along the scale of S, and zero at the conditional distribution."""
    for divergence in map(divergences.divergence, RATIONAL):
        f = divergence.expr
        for student, teacher, k in kept():
            if len(student) != 3:
                continue
            ps, qs = (list(sympy.symbols(f"{letter}0:3", positive=True)) for letter in "pq")
            value = _expression(form, f, ps, qs, k)
            where = (divergence, student, teacher, f"k {k}")
            point = dict(zip((*ps, *qs), (*student, *teacher), strict=True))
            for tail in ps[k:]:
                yield same(values_of(sympy.diff(value, tail), point), Fraction(0), *where, f"slope in {tail}")
            if not kinked(divergence):  # at a kink, where a ratio may be, sympy has no slope
                along = sum(a * sympy.diff(value, a) for a in ps[:k])
                yield same(values_of(along, point), Fraction(0), *where, "slope along the scale")
            moved = (*(b / 2 for b in teacher[:k]), *student[k:], *teacher)
            yield same(values_of(value, dict(zip((*ps, *qs), moved, strict=True))), Fraction(0), *where, "value")


def _check_tail_free(name: str) -> Cases:
    """The library's loss at students with the teacher's conditional distribution on S and any tail has no gradient."""
    teacher, student = (
        TabularPolicy([torch.tensor([row], dtype=torch.float64).log()]) for row in (TEACHER, _OTHER_TAIL)
    )
    for divergence in catalogue()[:9]:
        if not kinked(divergence):  # at its kink the sign of a rounding error is a weight
            gradient = sampled_gradient(name, divergence, (student, teacher), k=2)
            yield close(gradient, list(map(torch.zeros_like, gradient)), divergence)


# One bucket for the tail.


def _check_coarse(sign: int) -> Cases:
    """In fractions: the coarse divergence lies below the fine one, strictly unless the tail's ratios are all equal."""
    for divergence in map(divergences.divergence, RATIONAL):
        f = divergence.expr

        def value(p: Any, q: Any, f: Any = f) -> Fraction:
            return sum((a * x for a, x in zip(p, at_atoms(f, p, q), strict=True)), Fraction(0))

        for student, teacher, k in kept():
            where = (divergence, student, teacher, f"k {k}")
            coarse = value((*student[:k], sum(student[k:])), (*teacher[:k], sum(teacher[k:])))
            gap = value(student, teacher) - coarse
            yield holds(sign * gap >= 0, *where, "not below")
            if strictly_convex(divergence):
                differ = len(set(ratios(student[k:], teacher[k:]))) > 1
                yield holds((sign * gap > 0) == differ, *where, "strictly")
            flat = [b * sum(student[k:]) / sum(teacher[k:]) for b in teacher[k:]]
            yield same(value((*student[:k], *flat), teacher), coarse, *where, "equal ratios")


def _check_lost(claim: Callable[[Any, Any, str], Any]) -> Cases:
    r"""What one bucket loses of each KL, in intervals: the tail's mass times the KL of the distributions within it."""
    for student, teacher, k in kept():
        ps, qs = intervals(student), intervals(teacher)
        for name, first, second in (("reverse_kl", ps, qs), ("forward_kl", qs, ps)):
            rest, other = sum(first[k:]), sum(second[k:])
            within = kl([a / rest for a in first[k:]], [b / other for b in second[k:]])
            coarse = kl([*first[:k], rest], [*second[:k], other])
            found = coarse + claim(sum(ps[k:]), sum(qs[k:]), name) * within
            yield overlap(found, kl(first, second), student, teacher, f"k {k}", name)


def _check_coarse_gradient(ratios: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Cases:
    """The library's tail loss on enumerated policies against OPD+ with the bucket's ratio on every tail token."""
    for divergence in catalogue()[::2]:
        for pair in pairs()[2:3]:

            def advantage(log_p: Tensor, log_q: Tensor, d: Divergence = divergence) -> Tensor:
                tail = torch.ones_like(log_q).scatter(-1, log_q.topk(1, dim=-1).indices, 0.0) > 0
                return d.weight(ratios(log_p, log_q, tail))

            gradient = sampled_gradient("topk_tail", divergence, pair, k=1)
            yield close(gradient, descent_of_rows(pair, advantage), divergence, pair)


def _bucket_ratio(log_p: Tensor, log_q: Tensor, tail: Tensor) -> Tensor:
    p_tail, q_tail = (logs.masked_fill(~tail, -torch.inf).logsumexp(-1, keepdim=True) for logs in (log_p, log_q))
    return torch.where(tail, q_tail - p_tail, log_q - log_p)


# A detached reward.


def _reward_to_come(divergence: Divergence, k: int) -> Callable[[Rollouts], Tensor]:
    """The same rewards summed over the whole rollout and put on every token."""
    inner: Any = estimator("topk_reward", divergence, k=k).token_loss

    def loss(rollouts: Rollouts) -> Tensor:
        rewards = inner.advantage(rollouts) * rollouts.mask
        total = rewards.sum(-1, keepdim=True).expand_as(rewards).detach()
        return rollouts.token_sum(-total * rollouts.student_logprobs)

    return loss


def _check_reward(make: Callable[[Divergence, int], Callable[[Rollouts], Tensor]]) -> Cases:
    for divergence in map(divergences.divergence, ("forward_kl", "jsd")):
        for pair in pairs()[:3]:
            gradient = expected_gradient(make(divergence, 1), *pair)
            yield close(gradient, list(map(torch.zeros_like, gradient)), divergence, pair)


def _check_reward_in_fractions(later: bool) -> Cases:
    """A reward of the history before the first token moves nothing; one of the history after it does."""
    for student, rewards in rational_distributions():
        given = rewards if later else [rewards[0]] * len(student)
        yield same(in_logits(student, given), [Fraction(0)] * len(student), student, rewards)


# The derivations.


def _homogeneous() -> bool:
    """Scaling all masses on S leaves the conditional distribution alone, and no tail mass occurs in it."""
    p0, p1, scale = sympy.symbols("p0 p1 t", positive=True)
    conditional = [p / (p0 + p1) for p in (p0, p1)]
    scaled = [p.subs({p0: scale * p0, p1: scale * p1}, simultaneous=True) for p in conditional]
    return sympy.simplify(sum(conditional)) == 1 and all(
        sympy.simplify(a - b) == 0 for a, b in zip(scaled, conditional, strict=True)
    )


def _jensen() -> bool:
    r"""Two tail tokens: both sides agree at equal ratios, and the gap grows from there with f'' on either side."""
    p0, p1, u, x = sympy.symbols("p0 p1 u x", positive=True)
    f = sympy.Function("f")
    mean = (p0 * u + p1 * x) / (p0 + p1)
    gap = p0 * f(u) + p1 * f(x) - (p0 + p1) * f(mean)
    slope = sympy.diff(gap, u).subs(u, x).doit()
    second = sympy.diff(gap, u, 2).subs(u, x).doit() - p0 * p1 / (p0 + p1) * sympy.diff(f(x), x, 2)
    return all(sympy.simplify(value) == 0 for value in (gap.subs(u, x), slope, second.doit()))


def _bucket() -> bool:
    """The bucket's term differentiated in either tail mass gives the weight at the bucket's ratio."""
    p0, p1, q = sympy.symbols("p0 p1 q", positive=True)
    f = sympy.Function("f")
    term = (p0 + p1) * f(q / (p0 + p1))
    w = weight_at(f, q / (p0 + p1))
    return all(sympy.simplify((sympy.diff(term, p) + w).doit()) == 0 for p in (p0, p1))


def _score_mean() -> bool:
    z, p = softmax()
    advantage = sympy.Symbol("A", real=True)
    return all(sympy.simplify(expectation(p, [advantage * sympy.diff(sympy.log(a), x) for a in p])) == 0 for x in z)
