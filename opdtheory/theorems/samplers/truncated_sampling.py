"""T10b: rollouts sampled at a temperature, or with top-p or top-k, are not from the student's own distribution."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Literal

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import TabularPolicy, exact_gradient
from opdtheory.exact.tree import Tree
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    at_atoms,
    catalogue,
    distribution,
    pairs,
    rational_distributions,
    sampled_gradient,
    smooth_catalogue,
    values_of,
)
from opdtheory.theorems.instances.one_sample import expectation, in_logits, softmax, weight_of, weighted
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

Missing = Callable[[Distribution, Distribution, list[Fraction]], list[Fraction]]
_Importance = Literal["token", "prefix"] | None


def theorems() -> list[Theorem]:
    """T10b."""
    return [
        Theorem(
            number="T10b",
            name="truncated sampling",
            meaning=(
                r"A rollout sampled at a temperature, or with top-p or top-k, comes from another distribution $\mu$"
                r" than the student's. With the ratio $p/\mu$, only the tokens that $\mu$ never samples are missing"
                r" from the gradient; without it, every token counts with $\mu_a$ in place of $p_a$. The centred"
                r" weight keeps the teacher at rest all the same, but also every other student that agrees with the"
                r" teacher on the tokens that are sampled."
            ),
            statement=(
                r"E_\mu[(p/\mu)\,A\,s] = E_p[A\,s] - \sum_{\mu_a = 0} p_a A_a s_a;\quad"
                r" E_\mu[A\,s] = E_p[A\,s] + \sum_a (\mu_a - p_a)\,A_a s_a;\quad"
                r" E_\mu[(w_f(u) - w_f(1))\,s] = 0 \iff p_a = q_a \text{ wherever } \mu_a > 0"
            ),
            hypotheses=(
                r"rollouts are sampled from $\mu$: the student at a temperature, or its top-p or top-k tokens",
                r"for the third claim, there is one step, some token is never sampled, and $w_f(u) = w_f(1)$ at"
                r" $u = 1$ only; it holds with or without the ratio $p/\mu$",
            ),
            source="derived here",
            advice=(
                "Roll out at temperature 1 without top-p or top-k. Prefix ratios undo a temperature. Under top-p the"
                " teacher stays a fixed point of `opd_plus_centred`, but so is every student that differs from it"
                " only on tokens that are never sampled."
            ),
            derivation=(
                Step(
                    r"\sum_{\mu_a > 0} \mu_a\,\tfrac{p_a}{\mu_a}\,A_a s_a = \sum_a p_a A_a s_a - \sum_{\mu_a = 0} p_a"
                    r" A_a s_a",
                    r"this is the change of distribution of T8, but the sum runs over sampled tokens only: no ratio"
                    r" brings back a token that is never sampled. Without the ratio, each token's term has $\mu_a$ in"
                    r" place of $p_a$",
                    _change_of_distribution,
                ),
                Step(
                    r"\sum_{a \in S} p_a\,c\,s_a = -c \sum_{a \notin S} p_a s_a \ne 0",
                    "let $S$ be the tokens that are sampled. The score has mean zero under $p$ only, so under top-p a"
                    " constant baseline $c$ moves the mean",
                    _baseline_counts,
                ),
                Step(
                    r"\mu_b = 0 < p_b:\ \dot z_b = -p_b\,E_\mu[A] = 0 \implies \dot z_a = \mu_a A_a = 0 \text{ for"
                    r" every sampled } a",
                    r"$\dot z$ is the mean update of the logits, with the components"
                    r" $\dot z_a = \mu_a A_a - p_a\,E_\mu[A]$. A token that is never sampled rests only if the mean"
                    r" advantage is zero, and then a sampled one only if its own advantage is zero. With the centred"
                    r" weight as the advantage, this asks for $u = 1$ where $\mu > 0$ and for nothing elsewhere",
                    _rest_on_the_sampled,
                ),
            ),
            identities=(
                Identity(
                    "weighted, in fractions",
                    r"E_p[w s] - E_\mu[(p/\mu) w s] = \sum_{\mu_a = 0} p_a w_a s_a",
                    functools.partial(_check_sampler, True),
                    _never_drawn,
                    {
                        "nothing is lost": _nothing,
                        "as without the weight": _difference,
                        "sign flipped": lambda p, m, w: [-x for x in _never_drawn(p, m, w)],
                    },
                    "exact",
                ),
                Identity(
                    "unweighted, in fractions",
                    r"E_p[w s] - E_\mu[w s] = \sum_a (p_a - \mu_a) w_a s_a",
                    functools.partial(_check_sampler, False),
                    _difference,
                    {"unbiased": _nothing, "only what is never sampled": _never_drawn},
                    "exact",
                ),
                Identity(
                    "who rests, in fractions",
                    r"E_\mu[(w_f(u) - w_f(1))\, s] = 0 \iff p_a = q_a \text{ wherever } \mu_a > 0",
                    _check_rest,
                    _agree_where_sampled,
                    {
                        "the teacher alone": lambda p, q, mu: p == q,
                        "the teacher's proportions are enough": _proportional_where_sampled,
                        "the tail may only change places": lambda p, q, mu: (
                            _agree_where_sampled(p, q, mu) and sorted(p) == sorted(q)
                        ),
                        "always": lambda p, q, mu: True,
                    },
                    "exact",
                ),
                Identity(
                    "temperature, weighted by prefix",
                    r"E_\mu\Big[\sum_n \prod_{m \le n} \tfrac{p_m}{\mu_m}\, w_f(u_n) s_n\Big] = -\nabla D_f",
                    _check_tempered,
                    "prefix",
                    {"unweighted": None, "weighted by token": "token"},
                ),
                Identity(
                    "top-k, weighted by prefix",
                    r"\text{the sum runs over the histories and tokens with } \mu > 0 \text{ only}",
                    _check_top_k,
                    lambda log_p, log_mu: log_mu > -torch.inf,
                    {"the whole vocabulary": lambda log_p, log_mu: log_p > -torch.inf},
                ),
                Identity(
                    "the teacher under top-k sampling",
                    r"p = q:\ E_\mu[w_f(u) s] = f'(1)\, E_\mu[s] \ne 0 \text{ unless } f'(1) = 0",
                    _check_at_teacher,
                    ("opd_plus", lambda slope: slope),
                    {
                        "a fixed point of OPD+": ("opd_plus", lambda slope: 0.0),
                        "none of centred OPD+": ("opd_plus_centred", lambda slope: slope),
                    },
                ),
                Identity(
                    "any tail is at rest under top-k sampling",
                    r"p_a = q_a \text{ wherever } \mu_a > 0:\ E_\mu[(w_f(u) - w_f(1))\, s] = 0",
                    _check_tail_at_rest,
                    ("opd_plus_centred", True),
                    {"uncentred": ("opd_plus", True), "every token sampled": ("opd_plus_centred", False)},
                ),
                Identity(
                    "the teacher under top-k sampling, centred",
                    r"p = q:\ E_\mu[(w_f(u) - w_f(1)) s] = 0",
                    _check_at_teacher,
                    ("opd_plus_centred", lambda slope: 0.0),
                    {"uncentred": ("opd_plus", lambda slope: 0.0)},
                ),
            ),
        ),
    ]


def _samplers(p: Distribution) -> Iterator[Distribution]:
    """Temperature one half, and the top k tokens renormalised (each is also a top-p distribution)."""
    yield distribution(*(a * a for a in p))
    order = sorted(range(len(p)), key=p.__getitem__, reverse=True)
    for k in range(1, len(p)):
        yield distribution(*(p[a] if a in order[:k] else 0 for a in range(len(p))))


def _check_sampler(is_weighted: bool, missing: Missing) -> Cases:
    r"""$E_\mu[(p/\mu) w s]$, or without the ratio, plus the claimed missing part against $E_p[w s]$, in fractions."""
    for name, p, q, w in weighted():
        for mu in _samplers(p):
            rho = [a / m if is_weighted and m else Fraction(1) for a, m in zip(p, mu, strict=True)]
            mean = _scored(p, [m * r * x for m, r, x in zip(mu, rho, w, strict=True)])
            total = [a + b for a, b in zip(mean, missing(p, mu, w), strict=True)]
            yield same(total, in_logits(p, w), name, p, q, mu)


def _scored(p: Distribution, masses: list[Fraction]) -> list[Fraction]:
    r"""$\sum_a m_a s_a$ in the logits: $m_b - p_b \sum_a m_a$."""
    total = sum(masses, Fraction(0))
    return [m - a * total for m, a in zip(masses, p, strict=True)]


def _never_drawn(p: Distribution, mu: Distribution, w: list[Fraction]) -> list[Fraction]:
    return _scored(p, [a * x if m == 0 else Fraction(0) for a, m, x in zip(p, mu, w, strict=True)])


def _difference(p: Distribution, mu: Distribution, w: list[Fraction]) -> list[Fraction]:
    return _scored(p, [(a - m) * x for a, m, x in zip(p, mu, w, strict=True)])


def _nothing(p: Distribution, mu: Distribution, w: list[Fraction]) -> list[Fraction]:
    return [Fraction(0)] * len(p)


def _top(p: Distribution, k: int) -> list[int]:
    """The k likeliest tokens."""
    return sorted(range(len(p)), key=p.__getitem__, reverse=True)[:k]


def _students(q: Distribution, k: int) -> Iterator[Distribution]:
    """Students around a teacher: equal on its top k tokens, with that tail turned round or levelled; and others."""
    kept = _top(q, k)
    tail = [a for a in range(len(q)) if a not in kept]
    mass = sum((q[a] for a in tail), Fraction(0))
    turned, levelled, heavier = list(q), list(q), list(q)
    for a, other in zip(tail, reversed(tail), strict=True):
        turned[a], levelled[a] = q[other], mass / len(tail)
    for a in range(len(q)):  # the same proportions on the kept tokens, half of the tail's mass
        heavier[a] = q[a] / 2 if a in tail else q[a] * (1 + mass / (2 * (1 - mass)))
    others = (p for p, _ in rational_distributions() if len(p) == len(q))
    # A short tail may be its own turn.
    yield from dict.fromkeys((q, tuple(turned), tuple(levelled), tuple(heavier), *others))


def _check_rest(rests: Callable[[Distribution, Distribution, Distribution], bool]) -> Cases:
    """Students sampled with top-k, in fractions: who has no mean update under the centred weight, ratio or not."""
    for name in RATIONAL:
        w = weight_of(name)
        at_one = values_of(w, {divergences.symbol(): Fraction(1)})
        for _, q in rational_distributions():
            for k in range(1, len(q)):
                for p in _students(q, k):
                    kept = _top(p, k)
                    mu = distribution(*(p[a] if a in kept else 0 for a in range(len(p))))
                    weights = [value - at_one for value in at_atoms(w, p, q)]
                    for is_weighted in (False, True):
                        rho = [a / m if is_weighted and m else Fraction(1) for a, m in zip(p, mu, strict=True)]
                        update = _scored(p, [m * r * x for m, r, x in zip(mu, rho, weights, strict=True)])
                        where = (name, p, q, f"top {k}", "weighted" if is_weighted else "unweighted")
                        yield holds((not any(update)) == rests(p, q, mu), *where)


def _agree_where_sampled(p: Distribution, q: Distribution, mu: Distribution) -> bool:
    return all(a == b for a, b, m in zip(p, q, mu, strict=True) if m)


def _proportional_where_sampled(p: Distribution, q: Distribution, mu: Distribution) -> bool:
    return len({b / a for a, b, m in zip(p, q, mu, strict=True) if m}) == 1


def _truncated(student: TabularPolicy, k: int) -> TabularPolicy:
    kept = [level.scatter(-1, level.topk(k, dim=-1).indices, 0.0) == 0.0 for level in student.logits]
    cut = [level.masked_fill(~on, -torch.inf) for level, on in zip(student.logits, kept, strict=True)]
    return TabularPolicy(cut, eos=student.eos)


def _tempered(student: TabularPolicy, temperature: float) -> TabularPolicy:
    return TabularPolicy([level / temperature for level in student.logits], eos=student.eos)


def _check_tempered(importance: _Importance) -> Cases:
    """Rollouts at temperature 0.7 over several steps: prefix weights give the exact gradient."""
    for divergence in catalogue()[:4]:
        for pair in pairs()[1:3]:
            tempered = TabularPolicy([level / 0.7 for level in pair[0].logits], eos=pair[0].eos)
            gradient = sampled_gradient("opd_plus", divergence, pair, behavior=tempered, importance=importance)
            yield close(gradient, exact_gradient(*pair, divergence), divergence, pair)


def _check_top_k(seen: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """Rollouts of the top two tokens with prefix weights: the sum over the histories and tokens that can be sampled."""
    for divergence in catalogue()[:4]:
        for pair in pairs()[:3]:
            sampler = _truncated(pair[0], 2)
            tree, drawn, levels = Tree.build(*pair), Tree.build(sampler, pair[1]), []
            for n in range(tree.horizon):
                p = tree.log_p[n].exp()
                terms = p * divergence.weight(tree.log_q[n] - tree.log_p[n])
                terms = torch.where(seen(tree.log_p[n], drawn.log_p[n]), terms, 0.0)
                reach = torch.where(drawn.reach(n) > 0, tree.reach(n), 0.0).unsqueeze(-1)
                levels.append(-reach * (terms - p * terms.sum(-1, keepdim=True)))
            gradient = sampled_gradient("opd_plus", divergence, pair, behavior=sampler, importance="prefix")
            yield close(gradient, levels, divergence, pair)


def _check_at_teacher(claim: tuple[str, Callable[[float], float]]) -> Cases:
    r"""Student equal to teacher, top two tokens sampled: the mean update is $-w_f(1)\, E_\mu[s]$."""
    name, pull = claim
    p = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    policy = TabularPolicy([p.log()])
    sampler = _truncated(policy, 2)
    apart = sampler.logits[0].softmax(-1) - p
    for divergence in catalogue():
        slope = float(divergence.log_slope(torch.zeros(1, dtype=torch.float64)))
        gradient = sampled_gradient(name, divergence, (policy, policy), behavior=sampler)
        yield close(gradient, [-pull(slope) * apart], divergence)


def _other_tail(teacher: TabularPolicy, k: int) -> TabularPolicy:
    """The teacher with its tail levelled: the same probabilities of the top k tokens, and of all others together."""
    levels = []
    for level in teacher.logits:
        rows = level.log_softmax(-1)
        tail = torch.ones_like(rows).scatter(-1, rows.topk(k, dim=-1).indices, 0.0) > 0
        mean = torch.where(tail, rows.exp(), 0.0).sum(-1, keepdim=True) / tail.sum(-1, keepdim=True)
        levels.append(torch.where(tail, mean.log(), rows))
    return TabularPolicy(levels, eos=teacher.eos)


def _check_tail_at_rest(claim: tuple[str, bool]) -> Cases:
    """A student that differs from the teacher at every history, but only on tokens that are never sampled."""
    name, cut = claim
    for divergence in smooth_catalogue():  # at a kink the sign of a rounding error is a weight
        for (_, teacher), k in zip(pairs()[:3], (2, 1, 1), strict=True):  # each leaves a tail of two tokens
            student = _other_tail(teacher, k)
            sampler = _truncated(student, k) if cut else student
            gradient = sampled_gradient(name, divergence, (student, teacher), behavior=sampler)
            yield close(gradient, list(map(torch.zeros_like, gradient)), divergence, student)


# The derivation.


def _change_of_distribution() -> bool:
    """Three tokens, the last never sampled: the weighted mean lacks exactly its term."""
    p, m, a, s = (sympy.symbols(f"{name}0:3", positive=True) for name in "pmas")
    by_ratio = sum(m[i] * (p[i] / m[i]) * a[i] * s[i] for i in range(2))
    plain = sum(m[i] * a[i] * s[i] for i in range(3))
    full = sum(p[i] * a[i] * s[i] for i in range(3))
    bias = sum((m[i] - p[i]) * a[i] * s[i] for i in range(3))
    return sympy.simplify(full - by_ratio - p[2] * a[2] * s[2]) == 0 and sympy.expand(plain - full - bias) == 0


def _baseline_counts() -> bool:
    """A constant advantage has a mean over S, minus that over the rest: a constant baseline is not free."""
    z, p = softmax()
    c = sympy.Symbol("c", real=True)
    scores = [sympy.diff(sympy.log(a), z[0]) for a in p]
    drawn, rest = c * expectation(p[:2], scores[:2]), c * p[2] * scores[2]
    return sympy.simplify(drawn + rest) == 0 and sympy.simplify(drawn) != 0


def _rest_on_the_sampled() -> bool:
    """Three tokens, the last never sampled: with its velocity zero, each other's is its own advantage's."""
    p, m, a = (sympy.symbols(f"{name}0:3", positive=True) for name in "pma")
    mean = m[0] * a[0] + m[1] * a[1]
    velocity = [(m[b] * a[b] if b < 2 else 0) - p[b] * mean for b in range(3)]
    left = [sympy.simplify(velocity[b] - velocity[2] * p[b] / p[2] - m[b] * a[b]) for b in range(2)]
    return sympy.simplify(velocity[2] + p[2] * mean) == 0 and left == [0, 0]
