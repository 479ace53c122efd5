r"""T10b: rollouts drawn by temperature, top-p or top-k, which is another distribution than the student's."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Literal

import sympy
import torch
from torch import Tensor

from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, exact_gradient, expected_gradient
from opdtheory.exact.tree import Tree
from opdtheory.theorems.instances.cases import RATIONAL, Distribution, catalogue, pairs, rational_distributions
from opdtheory.theorems.instances.one_sample import in_logits, weights
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, same

__all__ = ["theorems"]

Missing = Callable[[Distribution, Distribution, list[Fraction]], list[Fraction]]
_Importance = Literal["token", "prefix"] | None


def theorems() -> list[Theorem]:
    """T10b."""
    return [
        Theorem(
            number="T10b",
            name="truncated sampling",
            statement=(
                r"E_\mu[(p/\mu)\, A s] = E_p[A s] - \sum_{\mu_a = 0} p_a A_a s_a, \qquad "
                r"E_\mu[A s] = E_p[A s] + \sum_a (\mu_a - p_a) A_a s_a"
            ),
            hypotheses=("rollouts drawn from mu: the student at a temperature, or its top-p or top-k tokens",),
            source="derived here",
            advice=(
                "Roll out at temperature 1 without top-p or top-k; weight a temperature away by prefix ratios; under "
                "top-p use opd_plus_centred, whose fixed point is still the teacher."
            ),
            derivation=(
                Step(
                    r"\sum_{\mu_a > 0} \mu_a \tfrac{p_a}{\mu_a} A_a s_a = "
                    r"\sum_a p_a A_a s_a - \sum_{\mu_a = 0} p_a A_a s_a",
                    "change of distribution; a token never drawn has no ratio that could bring it back",
                    _change_of_distribution,
                ),
                Step(
                    r"\sum_{a \in S} p_a c\, s_a = -c \sum_{a \notin S} p_a s_a \ne 0",
                    "the score has mean zero under p only: under top-p a constant baseline moves the mean",
                    _baseline_counts,
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
                    {"unbiased": _nothing, "only what is never drawn": _never_drawn},
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
                    "the teacher under top-k sampling, centred",
                    r"p = q:\ E_\mu[(w_f(u) - w_f(1)) s] = 0",
                    _check_at_teacher,
                    ("opd_plus_centred", lambda slope: 0.0),
                    {"uncentred": ("opd_plus", lambda slope: 0.0)},
                ),
            ),
        ),
    ]


def _samplers(distribution: Distribution) -> Iterator[Distribution]:
    """Temperature one half, and the top k tokens renormalised (each is also a top-p distribution)."""
    yield tuple(a * a / sum(b * b for b in distribution) for a in distribution)
    order = sorted(range(len(distribution)), key=distribution.__getitem__, reverse=True)
    for k in range(1, len(distribution)):
        inside = sum((distribution[a] for a in order[:k]), Fraction(0))
        yield tuple(distribution[a] / inside if a in order[:k] else Fraction(0) for a in range(len(distribution)))


def _check_sampler(weighted: bool, missing: Missing) -> Cases:
    r"""$E_\mu[(p/\mu) w s]$, or without the ratio, plus the claimed missing part against $E_p[w s]$, in fractions."""
    for name in RATIONAL:
        for student, teacher in rational_distributions():
            w = weights(name, student, teacher)
            exact = in_logits(student, w)
            for sampler in _samplers(student):
                rho = [a / m if weighted and m else Fraction(1) for a, m in zip(student, sampler, strict=True)]
                mean = _scored(student, [m * r * x for m, r, x in zip(sampler, rho, w, strict=True)])
                gap = missing(student, sampler, w)
                yield same([a + b for a, b in zip(mean, gap, strict=True)], exact, name, student, teacher, sampler)


def _scored(distribution: Distribution, masses: list[Fraction]) -> list[Fraction]:
    r"""$\sum_a m_a s_a$ in the logits: $m_b - p_b \sum_a m_a$."""
    total = sum(masses, Fraction(0))
    return [m - p * total for m, p in zip(masses, distribution, strict=True)]


def _never_drawn(distribution: Distribution, sampler: Distribution, weights: list[Fraction]) -> list[Fraction]:
    return _scored(
        distribution, [p * w if m == 0 else Fraction(0) for p, m, w in zip(distribution, sampler, weights, strict=True)]
    )


def _difference(distribution: Distribution, sampler: Distribution, weights: list[Fraction]) -> list[Fraction]:
    return _scored(distribution, [(p - m) * w for p, m, w in zip(distribution, sampler, weights, strict=True)])


def _nothing(distribution: Distribution, sampler: Distribution, weights: list[Fraction]) -> list[Fraction]:
    return [Fraction(0)] * len(distribution)


def _truncated(student: TabularPolicy, k: int) -> TabularPolicy:
    kept = [level.scatter(-1, level.topk(k, dim=-1).indices, 0.0) == 0.0 for level in student.logits]
    cut = [level.masked_fill(~on, -torch.inf) for level, on in zip(student.logits, kept, strict=True)]
    return TabularPolicy(cut, eos=student.eos)


def _tempered(student: TabularPolicy, temperature: float) -> TabularPolicy:
    return TabularPolicy([level / temperature for level in student.logits], eos=student.eos)


def _check_tempered(importance: _Importance) -> Cases:
    """Rollouts at temperature 0.7 over several steps: prefix weights give the exact gradient."""
    for divergence in catalogue()[:4]:
        loss = estimator("opd_plus", divergence, importance=importance)
        for pair in pairs()[1:3]:
            gradient = expected_gradient(loss, *pair, behavior=_tempered(pair[0], 0.7))
            yield close(gradient, exact_gradient(*pair, divergence), divergence, pair)


def _check_top_k(seen: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """Rollouts of the top two tokens with prefix weights: the sum over the histories and tokens that can be drawn."""
    for divergence in catalogue()[:4]:
        loss = estimator("opd_plus", divergence, importance="prefix")
        for student, teacher in pairs()[:3]:
            sampler = _truncated(student, 2)
            tree, drawn, levels = Tree.build(student, teacher), Tree.build(sampler, teacher), []
            for n in range(tree.horizon):
                p = tree.log_p[n].exp()
                terms = p * divergence.weight(tree.log_q[n] - tree.log_p[n])
                terms = torch.where(seen(tree.log_p[n], drawn.log_p[n]), terms, 0.0)
                reach = torch.where(drawn.reach(n) > 0, tree.reach(n), 0.0).unsqueeze(-1)
                levels.append(-reach * (terms - p * terms.sum(-1, keepdim=True)))
            yield close(
                expected_gradient(loss, student, teacher, behavior=sampler), levels, divergence, student, teacher
            )


def _check_at_teacher(claim: tuple[str, Callable[[float], float]]) -> Cases:
    r"""Student equal to teacher, top two tokens drawn: the mean update is $-w_f(1)\, E_\mu[s]$."""
    name, pull = claim
    distribution = torch.tensor([[0.4, 0.3, 0.2, 0.1]], dtype=torch.float64)
    policy = TabularPolicy([distribution.log()])
    sampler = _truncated(policy, 2)
    drawn = sampler.logits[0].softmax(-1)
    for divergence in catalogue():
        slope = float(divergence.log_slope(torch.zeros(1, dtype=torch.float64)))
        gradient = expected_gradient(estimator(name, divergence), policy, policy, behavior=sampler)
        yield close(gradient, [-pull(slope) * (drawn - distribution)], divergence)


# The derivation.


def _change_of_distribution() -> bool:
    """Three tokens, the last never drawn: what is left out of the weighted mean is its own term."""
    p, m, a, s = (sympy.symbols(f"{name}0:3", positive=True) for name in "pmas")
    weighted = sum(m[i] * (p[i] / m[i]) * a[i] * s[i] for i in range(2))
    plain = sum(m[i] * a[i] * s[i] for i in range(3))
    full = sum(p[i] * a[i] * s[i] for i in range(3))
    bias = sum((m[i] - p[i]) * a[i] * s[i] for i in range(3))
    return sympy.simplify(full - weighted - p[2] * a[2] * s[2]) == 0 and sympy.expand(plain - full - bias) == 0


def _baseline_counts() -> bool:
    """A constant added to the advantage moves the mean over S by minus its mean over the rest: no free baseline."""
    z = sympy.symbols("z0:3", real=True)
    c = sympy.Symbol("c", real=True)
    total = sum(sympy.exp(x) for x in z)
    p = [sympy.exp(x) / total for x in z]
    scores = [sympy.diff(sympy.log(distribution), z[0]) for distribution in p]
    drawn, rest = c * (p[0] * scores[0] + p[1] * scores[1]), c * p[2] * scores[2]
    return sympy.simplify(drawn + rest) == 0 and sympy.simplify(drawn) != 0
