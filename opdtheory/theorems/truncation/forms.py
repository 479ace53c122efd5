r"""T9c to T9e: top-k divergences renormalised, with a bucket for the tail, and as a detached reward."""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, expected_gradient
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import RATIONAL, catalogue, interval, pairs, rational_distributions, sampled_gradient, values_of
from opdtheory.theorems.instances.kept_tokens import TEACHER, kept
from opdtheory.theorems.instances.one_sample import in_logits
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

Form = Literal["truncated", "renormalised", "tail"]

# The first two tokens in the proportion of TEACHER; these need not add up to one.
_OTHER_TAIL = (0.4, 0.25, 0.1, 0.02)


def theorems() -> list[Theorem]:
    """T9c, T9d and T9e."""
    return [
        Theorem(
            number="T9c",
            name="renormalised on S",
            statement=(
                r"D_f(q_S \| p_S),\ p_S = p/p(S): \text{ minimal iff } p_S = q_S; "
                r"\text{ flat along the tail and along } p(S)"
            ),
            hypotheses=("S fixed", "p and q positive somewhere on S", "f strictly convex at 1"),
            source="derived here",
            advice="Renormalise only with something else that holds p(S), such as a tail bucket: the loss does not.",
            derivation=(
                Step(
                    r"(t p_a) / \textstyle\sum_S t p = p_a/p(S)",
                    "homogeneous of degree zero in the masses on S, and no tail mass occurs",
                    _homogeneous,
                ),
                Step(
                    r"D_f(q_S \| p_S) \ge f(1) = 0",
                    "Jensen for the distributions on S, with equality iff the ratio is constant on S; the machine confirms that "
                    "the Jensen gap of two atoms has a double zero at equal ratios",
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
            statement=(
                r"D_f(Kq\|Kp) \le D_f(q\|p), \quad \nabla D_f(Kq\|Kp) = -E_p[w_f(u_{K(a)})\, s_a]"
                r", \quad K \text{ merges the tail}"
            ),
            hypotheses=("S fixed", "f convex"),
            source="data processing, Csiszar (1967); the gradient derived here",
            advice="Of the top-k losses use this one: it holds p(S) as well, and misses only the distribution within the tail.",
            derivation=(
                Step(
                    r"p_0 f(u_0) + p_1 f(u_1) \ge (p_0 + p_1) f\!\left(\tfrac{q_0 + q_1}{p_0 + p_1}\right)",
                    "Jensen in the tail, with equality iff its ratios agree (f strictly convex); the machine confirms "
                    "that the gap of two atoms has a double zero at equal ratios",
                    _jensen,
                    in_words=True,
                ),
                Step(
                    r"\partial_{p_0}\,[P f(Q/P)] = -w_f(Q/P),\quad P = p_0 + p_1",
                    "T1 for the merged distribution: every tail token carries the bucket's weight",
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
                    r"KL(p\|q) - KL(Kp\|Kq) = p(S^c)\, KL(p_{S^c}\|q_{S^c})",
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
            statement=r"E_p[A(h_n)\, s_n \mid h_n] = 0 \text{ for an advantage } A(h_n) = -D_{\mathrm{top}\,k}(h_n)",
            hypotheses=("A depends on the history before the token, not on the token", "A is detached"),
            source="derived here; the score has mean zero",
            advice="Differentiate a top-k divergence; as a detached reward of its own token it is only noise.",
            derivation=(
                Step(r"\sum_a p_a\, A\, \partial_z \log p_a = A\, \partial_z 1 = 0", "softmax of three", _score_mean),
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
    for name in RATIONAL:
        f = divergences.divergence(name).expr
        for student, teacher, k in kept():
            if len(student) != 3:
                continue
            ps = sympy.symbols(f"p0:{len(student)}", positive=True)
            qs = sympy.symbols(f"q0:{len(student)}", positive=True)
            value = _expression(form, f, list(ps), list(qs), k)
            point = dict(zip((*ps, *qs), (*student, *teacher), strict=True))
            for tail in ps[k:]:
                yield same(values_of(sympy.diff(value, tail), point), Fraction(0), name, student, teacher, k, tail)
            along = sum(a * sympy.diff(value, a) for a in ps[:k])
            # The total variation has no slope at u = 1 for sympy; it is met by the other three.
            if name != "total_variation":
                yield same(values_of(along, point), Fraction(0), name, student, teacher, k)
            moved = [*(b / 2 for b in teacher[:k]), *student[k:]]
            yield same(
                values_of(value, dict(zip((*ps, *qs), (*moved, *teacher), strict=True))),
                Fraction(0),
                name,
                student,
                teacher,
                k,
            )


def _check_tail_free(name: str) -> Cases:
    """The library's loss at students with the teacher's conditional distribution on S and any tail: no gradient at all."""
    q = torch.tensor(TEACHER, dtype=torch.float64)
    teacher = TabularPolicy([q.log().unsqueeze(0)])
    for divergence in catalogue()[:9]:
        if divergence.name == "total_variation":  # at its kink the sign of a rounding error is a weight
            continue
        student = TabularPolicy([torch.tensor([_OTHER_TAIL], dtype=torch.float64).log()])
        gradient = expected_gradient(estimator(name, divergence, k=2), student, teacher)
        yield close(gradient, [torch.zeros_like(level) for level in gradient], divergence)


# One bucket for the tail.


def _check_coarse(sign: int) -> Cases:
    """In fractions: the coarse divergence lies below the fine one, strictly unless the tail's ratios are all equal."""
    u = divergences.symbol()
    for name in RATIONAL:
        f = divergences.divergence(name).expr

        def value(p: Any, q: Any, f: Any = f) -> Fraction:
            return sum((a * values_of(f, {u: b / a}) for a, b in zip(p, q, strict=True)), Fraction(0))

        for student, teacher, k in kept():
            coarse = value((*student[:k], sum(student[k:])), (*teacher[:k], sum(teacher[k:])))
            gap = value(student, teacher) - coarse
            yield holds(sign * gap >= 0, name, student, teacher, k)
            ratios = {b / a for a, b in zip(student[k:], teacher[k:], strict=True)}
            if name != "total_variation":
                yield holds((sign * gap > 0) == (len(ratios) > 1), name, student, teacher, k)
            flat = [b * sum(student[k:]) / sum(teacher[k:]) for b in teacher[k:]]
            yield same(value((*student[:k], *flat), teacher), coarse, name, student, teacher, k)


def _check_lost(claim: Callable[[Any, Any, str], Any]) -> Cases:
    r"""What one bucket loses of each KL, in intervals: the tail's mass times the KL of the distributions within it."""

    def kl(p: list[Any], q: list[Any]) -> Any:
        return sum(a * iv.log(a / b) for a, b in zip(p, q, strict=True))

    for student, teacher, k in kept():
        ps, qs = [interval(a) for a in student], [interval(b) for b in teacher]
        for name, first, second in (("reverse_kl", ps, qs), ("forward_kl", qs, ps)):
            rest, other = sum(first[k:]), sum(second[k:])
            within = kl([a / rest for a in first[k:]], [b / other for b in second[k:]])
            coarse = kl([*first[:k], rest], [*second[:k], other])
            yield overlap(
                coarse + claim(sum(ps[k:]), sum(qs[k:]), name) * within,
                kl(first, second),
                student,
                teacher,
                k,
                name,
                first,
                second,
            )


def _check_coarse_gradient(ratios: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Cases:
    """The library's tail loss on enumerated policies against OPD+ with the bucket's ratio on every tail token."""
    for divergence in catalogue()[::2]:
        for pair in pairs()[2:3]:
            tree, levels = Tree.build(*pair), []
            for n in range(tree.horizon):
                log_p, log_q = tree.log_p[n], tree.log_q[n]
                tail = torch.ones_like(log_q).scatter(-1, log_q.topk(1, dim=-1).indices, 0.0) > 0
                weight = divergence.weight(ratios(log_p, log_q, tail))
                p = log_p.exp()
                centred = weight - (p * weight).sum(-1, keepdim=True)
                levels.append(-tree.reach(n).unsqueeze(-1) * p * centred)
            yield close(sampled_gradient("topk_tail", divergence, pair, k=1), levels, divergence, pair)


def _bucket_ratio(log_p: Tensor, log_q: Tensor, tail: Tensor) -> Tensor:
    def mass(log_distribution: Tensor) -> Tensor:
        return log_distribution.masked_fill(~tail, -torch.inf).logsumexp(-1, keepdim=True)

    return torch.where(tail, mass(log_q) - mass(log_p), log_q - log_p)


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
    for name in ("forward_kl", "jsd"):
        divergence = divergences.divergence(name)
        for pair in pairs()[:3]:
            gradient = expected_gradient(make(divergence, 1), *pair)
            yield close(gradient, [torch.zeros_like(level) for level in gradient], name, pair)


def _check_reward_in_fractions(later: bool) -> Cases:
    """A reward of the first history on the first token moves nothing; one of the second history does."""
    for student, rewards in rational_distributions():
        # The reward of the history that a token leads to, any number for each; or of the one before it.
        given = rewards if later else [rewards[0]] * len(student)
        yield same(in_logits(student, given), [Fraction(0)] * len(student), student, rewards)


# The derivations.


def _homogeneous() -> bool:
    """Scaling all masses on S leaves the conditional distribution alone, and no tail mass occurs in it."""
    p0, p1, scale = sympy.symbols("p0 p1 t", positive=True)
    distribution = [p / (p0 + p1) for p in (p0, p1)]
    scaled = [p.subs({p0: scale * p0, p1: scale * p1}, simultaneous=True) for p in distribution]
    return sympy.simplify(sum(distribution)) == 1 and all(
        sympy.simplify(a - b) == 0 for a, b in zip(scaled, distribution, strict=True)
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
    p0, p1, q, u = sympy.symbols("p0 p1 q u", positive=True)
    f = sympy.Function("f")
    term = (p0 + p1) * f(q / (p0 + p1))
    w = (u * sympy.diff(f(u), u) - f(u)).subs(u, q / (p0 + p1)).doit()
    return all(sympy.simplify(sympy.diff(term, p).doit() + w) == 0 for p in (p0, p1))


def _score_mean() -> bool:
    z = sympy.symbols("z0:3", real=True)
    advantage = sympy.Symbol("A", real=True)
    total = sum(sympy.exp(x) for x in z)
    distributions = [sympy.exp(x) / total for x in z]
    return all(sympy.simplify(sum(p * advantage * sympy.diff(sympy.log(p), x) for p in distributions)) == 0 for x in z)
