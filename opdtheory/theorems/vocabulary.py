r"""T12: losses of the whole next-token distribution, and the generalised JSD with its two ends."""

from __future__ import annotations

import functools
from collections.abc import Callable
from fractions import Fraction
from typing import Any, Literal

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import exact_gradient, exact_value, expected_gradient
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import (
    Distribution,
    Pair,
    at_atoms,
    catalogue,
    interval,
    pairs,
    rational_cases,
    rational_distributions,
)
from opdtheory.theorems.instances.one_sample import in_logits, intervals, kl, mean_gradient, weight_of
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, furthest, holds, overlap, same

__all__ = ["theorems"]

Detached = Literal["nothing", "outer p", "ratio"]
End = Literal[0, 1]


def theorems() -> list[Theorem]:
    """T12 and T12b."""
    u = divergences.symbol()
    forward, reverse, pearson, neyman = u * sympy.log(u), -sympy.log(u), (u - 1) ** 2, (u - 1) ** 2 / u
    factors: dict[str, Detached] = {"outer p detached": "outer p", "ratio detached (stop-gradient)": "ratio"}
    return [
        Theorem(
            number="T12",
            name="whole-vocabulary losses",
            meaning=(
                "A loss that sums $p f(q/p)$ over the whole vocabulary at each position has exactly the gradient of"
                r" the objective `token_local`, which is $J_{\mathrm{local}}$ here: the divergence of the next-token"
                " distributions, at histories of the student that are not differentiated. It needs the student's"
                " probability in both places, as the factor in front and in the ratio; if one of them is detached,"
                " half of the product rule is lost."
            ),
            statement=(
                r"J_{\mathrm{local}} = \sum_n \mathrm{sg}\big[E_{h_n}\big] \sum_a p_a f(q_a/p_a);\quad \nabla"
                r" J_{\mathrm{local}} = -E_p\Big[\sum_n w_f(u_n)\, s_n\Big]"
            ),
            hypotheses=(
                r"histories $h_n$ are drawn from the student, and $\mathrm{sg}$ says that their distribution is not"
                " differentiated",
                "autograd differentiates the outer $p$ and the ratio",
            ),
            source="derived here; GKD, arXiv 2306.13649",
            advice=(
                "If you have both models' logits, sum $p f(q/p)$ over the vocabulary; detach no term of the student."
            ),
            derivation=(
                Step(
                    r"\frac{\partial}{\partial P}[P f(q/p)] + \frac{\partial}{\partial p}[P f(q/p)] = -w_f(u) "
                    r"\text{ at } P = p",
                    "write $P$ for the outer probability and $p$ for the one in the ratio, and apply the product"
                    " rule; this holds for any $f$, because sympy treats it as an undefined function. The first part"
                    " alone, with the ratio detached, is $f(u)$; the second alone, with the outer factor detached, is"
                    " $-u f'(u)$. Both together, times the gradient $p_a s_a$ of a token's probability and summed"
                    " over the tokens, are the claim",
                    _product_rule,
                ),
            ),
            identities=(
                Identity(
                    "factor by factor, in fractions",
                    r"p_a(\partial_a - E_p \partial) = -p_a (w_a - E_p w)",
                    _check_vocabulary_in_fractions,
                    "nothing",
                    factors,
                    "exact",
                ),
                Identity(
                    "backpropagation is token_local",
                    r"E_p\Big[\nabla \sum_n \sum_a p_a f(q_a/p_a)\Big] = \nabla J_{\mathrm{local}}",
                    _check_vocabulary,
                    "nothing",
                    factors,
                ),
            ),
        ),
        Theorem(
            number="T12b",
            name="generalised JSD",
            meaning=(
                r"The generalised Jensen-Shannon divergence $D_\beta$ tends to zero at both ends of its range, $\beta"
                r" \to 0$ and $\beta \to 1$. Only divided by the distance to the end does it tend to a KL, with a"
                r" known slope: $D_\beta/\beta$ to the forward KL and $D_\beta/(1-\beta)$ to the reverse KL. A loss"
                r" that is a KL at the end itself and $D_\beta$ next to it therefore jumps there."
            ),
            statement=(
                r"D_\beta = \beta\,\mathrm{KL}(q\|m) + (1-\beta)\,\mathrm{KL}(p\|m) = \beta\,\mathrm{KL}(q\|p) -"
                r" \mathrm{KL}(m\|p);\quad \frac{D_\beta}{\beta} = \mathrm{KL}(q\|p) - \tfrac{\beta}{2} \chi^2(q\|p) +"
                r" O(\beta^2);\quad \frac{D_\beta}{1-\beta} = \mathrm{KL}(p\|q) - \tfrac{1-\beta}{2} \chi^2(p\|q) +"
                r" O((1-\beta)^2)"
            ),
            hypotheses=(
                r"$m = \beta q + (1-\beta) p$ and $0 < \beta < 1$",
                "$p$ and $q$ are positive on the same tokens",
            ),
            source="GKD, arXiv 2306.13649; the expansion derived here",
            advice=(
                r"Near the ends scale the learning rate by $1/\beta$ or $1/(1-\beta)$; do not sweep $\beta$ up to a"
                " special-cased 0 or 1, where the loss jumps from almost nothing to a KL."
            ),
            derivation=(
                Step(
                    r"f_\beta = \beta u \log u - M \log M,\ M = \beta u + 1 - \beta;\quad f''_\beta ="
                    r" \beta(1-\beta)/(u M) > 0",
                    "divide the terms of both KLs to the mixture by $p$ and write them in the ratio $u = q/p$: their"
                    r" sum is this generator, and it is convex. Sympy confirms the sum here at $\beta = 1/3$, and a"
                    r" check below does so for every $\beta$",
                    _perspective,
                ),
                Step(
                    r"\beta\,\mathrm{KL}(q\|p) = D_\beta + \mathrm{KL}(m\|p)",
                    "this is the compensation identity. Sympy confirms it token by token, with the mixture's"
                    r" probability written out as $\beta q + (1-\beta) p$ where it stands before a logarithm",
                    _compensation,
                ),
                Step(
                    r"f_\beta/\beta = u\log u - (u-1) - \tfrac{\beta}{2}(u-1)^2 + O(\beta^2)",
                    r"sympy computes the limit of $f_\beta/\beta$ as $\beta \to 0$ and the slope there. The term $u -"
                    " 1$ is a gauge, which no divergence sees",
                    functools.partial(_series, 0),
                ),
                Step(
                    r"\frac{d^3}{dx^3} (1+x)\log(1+x) = -(1+x)^{-2};\quad \big|(1+x)\log(1+x) - x -"
                    r" \tfrac{x^2}{2}\big| \le \frac{|x|^3}{6 \min(1, 1+x)^2},\ x = \beta(u-1)",
                    "what the expansion leaves is bounded by Taylor's remainder. The third derivative falls in size"
                    r" as $x$ grows, so between 0 and $x$ it is at most $\min(1, 1+x)^{-2}$ in size",
                    _third_derivative,
                ),
                Step(
                    r"f_\beta/(1-\beta) = -\log u + (u-1) - \tfrac{1-\beta}{2}\tfrac{(u-1)^2}{u} + O((1-\beta)^2)",
                    r"sympy computes the limit of $f_\beta/(1-\beta)$ as $\beta \to 1$ and the slope there. The term"
                    " $u - 1$ is a gauge again",
                    functools.partial(_series, 1),
                ),
            ),
            identities=(
                Identity(
                    "generator",
                    r"p f_\beta(q/p) = \beta q \log(q/m) + (1-\beta) p \log(p/m)",
                    _check_generator,
                    _jsd_beta,
                    {
                        "beta exchanged": lambda x, beta: _jsd_beta(x, 1 - beta),
                        "mixture's term dropped": lambda x, beta: beta * x * sympy.log(x),
                    },
                    "symbolic",
                ),
                Identity(
                    "series at 0",
                    r"f_\beta/\beta = u \log u - \tfrac{\beta}{2} (u-1)^2 + \dots \text{ up to gauge}",
                    functools.partial(_check_ends, 0),
                    lambda small: forward - small * pearson / 2,
                    {
                        "the reverse KL": lambda small: reverse - small * pearson / 2,
                        "sign of the slope flipped": lambda small: forward + small * pearson / 2,
                        "no slope": lambda small: forward + 0 * small,
                    },
                    "symbolic",
                ),
                Identity(
                    "series at 1",
                    r"f_\beta/(1-\beta) = -\log u - \tfrac{1-\beta}{2} (u-1)^2/u + \dots \text{ up to gauge}",
                    functools.partial(_check_ends, 1),
                    lambda small: reverse - small * neyman / 2,
                    {
                        "the forward KL": lambda small: forward - small * neyman / 2,
                        "Pearson's chi2": lambda small: reverse - small * pearson / 2,
                    },
                    "symbolic",
                ),
                Identity(
                    "by how much a KL exceeds it",
                    r"\beta\,\mathrm{KL}(q\|p) - D_\beta = \mathrm{KL}(m\|p);\quad (1-\beta)\,\mathrm{KL}(p\|q) -"
                    r" D_\beta = \mathrm{KL}(m\|q)",
                    _check_deficit,
                    lambda ps, qs, mixture, end: kl(mixture, ps if end == 0 else qs),
                    {
                        "nothing": lambda ps, qs, mixture, end: interval(0),
                        "arguments exchanged": lambda ps, qs, mixture, end: kl(ps if end == 0 else qs, mixture),
                    },
                    "rigorous",
                    1e-40,
                ),
                Identity(
                    "special-cased ends jump",
                    r"0 < D_\beta < \beta\,\mathrm{KL}(q\|p) \text{ and } \mathrm{KL}(q\|p) - D_\beta > 0.99\,"
                    r" \mathrm{KL}(q\|p): \text{ certified, and so at the other end}",
                    _check_jump,
                    False,
                    {"the loss is continuous at the ends": True},
                    "rigorous",
                ),
                Identity(
                    "remainder at the ends, certified",
                    r"\big|D_\beta/\beta - \mathrm{KL}(q\|p) + \tfrac{\beta}{2}\chi^2\big| \le \tfrac{\beta^2}{6}\,"
                    r" E_p\,\frac{|u-1|^3}{\min(1, \beta u + 1 - \beta)^2}, \text{ and so at the other end}",
                    _check_remainder,
                    _remainder,
                    {
                        "the third moment alone": lambda p, q, b: _remainder(p, q, b, power=0),
                        "half of it": lambda p, q, b: _remainder(p, q, b) / 2,
                    },
                    "rigorous",
                ),
                Identity(
                    "rate at the ends",
                    r"\big|D_\beta/\beta - \mathrm{KL}(q\|p) + \tfrac{\beta}{2}\chi^2\big| \le \tfrac{\beta^2}{6}\,"
                    r" E_p\,\frac{|u-1|^3}{\min(1, \beta u + 1 - \beta)^2}",
                    _check_rate,
                    (-0.5, "chi2", "neyman_chi2"),
                    {
                        "sign flipped": (0.5, "chi2", "neyman_chi2"),
                        "no slope": (0.0, "chi2", "neyman_chi2"),
                        "chi2s exchanged": (-0.5, "neyman_chi2", "chi2"),
                    },
                ),
                Identity(
                    "gradients at the ends",
                    r"\nabla D_\beta \to 0, \quad \nabla D_\beta/\beta \to \nabla \mathrm{KL}(q\|p), \quad \nabla"
                    r" D_\beta/(1-\beta) \to \nabla \mathrm{KL}(p\|q)",
                    _check_gradient_jump,
                    ("forward_kl", "reverse_kl"),
                    {"KLs exchanged": ("reverse_kl", "forward_kl")},
                ),
            ),
        ),
    ]


# Backpropagation over the vocabulary.


def _summed(divergence: Divergence, detached: Detached) -> Callable[[Rollouts], Tensor]:
    """The loss as a trainer would write it, with one factor detached or none."""
    if detached == "nothing":
        return estimator("full_vocab", divergence)

    def loss(rollouts: Rollouts) -> Tensor:
        log_p = rollouts.student_logits.log_softmax(-1)
        log_u = rollouts.teacher_logits.log_softmax(-1) - log_p
        outer, inner = (log_p.detach(), log_u) if detached == "outer p" else (log_p, log_u.detach())
        return rollouts.token_sum((outer.exp() * divergence.generator(inner)).sum(-1))

    return loss


def _check_vocabulary(detached: Detached) -> Cases:
    pair = pairs()[2]
    for divergence in catalogue():
        summed = expected_gradient(_summed(divergence, detached), *pair)
        yield close(summed, exact_gradient(*pair, divergence), divergence, pair)


def _check_vocabulary_in_fractions(detached: Detached) -> Cases:
    r"""Each factor of $p f(q/p)$ differentiated in turn, against $-p_a (w_a - E_p w)$."""
    u = divergences.symbol()
    outer, inner, q = sympy.symbols("P p q", positive=True)
    for divergence, student, teacher in rational_cases():
        term = outer * divergence.expr.subs(u, q / inner)
        parts = {"outer p": sympy.diff(term, inner), "ratio": sympy.diff(term, outer)}
        slope = sum(part.subs(outer, inner) for factor, part in parts.items() if detached in ("nothing", factor))
        weights = at_atoms(weight_of(divergence.name), student, teacher)
        claimed = mean_gradient(student, weights)
        yield same(in_logits(student, at_atoms(slope, student, teacher)), claimed, divergence, student, teacher)


# The generalised JSD.


def _jsd_beta(u: sympy.Expr, beta: sympy.Expr) -> sympy.Expr:
    mixture = beta * u + 1 - beta
    return beta * u * sympy.log(u) - mixture * sympy.log(mixture)


def _check_generator(claim: Callable[[Any, Any], Any]) -> Cases:
    r"""$p f_\beta(q/p)$ against $\beta q \log(q/m) + (1-\beta) p \log(p/m)$, and the catalogue's entry against both."""
    p, q, beta, u = sympy.symbols("p q beta u", positive=True)
    mixture = beta * q + (1 - beta) * p
    mixed = beta * q * sympy.log(q / mixture) + (1 - beta) * p * sympy.log(p / mixture)
    gap = (p * claim(u, beta).subs(u, q / p) - mixed).subs({p: sympy.exp(sympy.Symbol("x", real=True)) * q})
    yield holds(sympy.simplify(sympy.expand_log(gap, force=True)) == 0, "every beta")
    for value in ("0.1", "0.5", "0.9"):
        entry = divergences.divergence("skew_jsd", beta=float(value))
        rest = entry.expr - claim(divergences.symbol(), sympy.Rational(value))
        yield holds(sympy.simplify(sympy.expand_log(rest, force=True)) == 0, f"beta {value} of the catalogue")


def _check_ends(end: End, claim: Callable[[sympy.Expr], sympy.Expr]) -> Cases:
    r"""The series of $f_\beta/\beta$ at 0, or of $f_\beta/(1-\beta)$ at 1, to first order, up to a gauge."""
    u, small, c = sympy.symbols("u epsilon c", positive=True)
    beta = small if end == 0 else 1 - small
    scaled = _jsd_beta(u, beta) / small
    constant = sympy.limit(scaled, small, 0, "+")
    first = sympy.limit((scaled - constant) / small, small, 0, "+")
    claimed = claim(small)
    for order, found in enumerate((constant, first)):
        wanted = claimed.coeff(small, order).subs(divergences.symbol(), u)
        rest = sympy.simplify(sympy.expand_log(found - wanted, force=True))
        # What remains may be a multiple of u - 1: the gauge, which no divergence sees.
        yield holds(sympy.simplify(sympy.diff(rest, u, 2)) == 0 and rest.subs(u, 1) == 0, f"order {order}")
    yield holds(sympy.limit(_jsd_beta(u, beta), small, 0, "+") == 0, "undivided")


def _mixed(ps: list[Any], qs: list[Any], beta: Fraction) -> tuple[list[Any], Any]:
    r"""The mixture $m$ and $D_\beta$, in intervals."""
    b, c = interval(beta), interval(1 - beta)
    mixture = [b * y + c * x for x, y in zip(ps, qs, strict=True)]
    return mixture, b * kl(qs, mixture) + c * kl(ps, mixture)


def _check_deficit(claim: Callable[[Any, Any, Any, Any], Any]) -> Cases:
    r"""$\beta KL(q\|p) - D_\beta$, and at the other end $(1-\beta) KL(p\|q) - D_\beta$, in intervals."""
    for student, teacher in rational_distributions():
        ps, qs = intervals(student), intervals(teacher)
        for beta in (Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)):
            mixture, value = _mixed(ps, qs, beta)
            for end, scaled in enumerate((interval(beta) * kl(qs, ps), interval(1 - beta) * kl(ps, qs))):
                claimed = claim(ps, qs, mixture, end)
                yield overlap(scaled - value, claimed, student, teacher, f"beta {beta}", f"end {end}")


def _check_jump(continuous: bool) -> Cases:
    r"""At $\beta = 10^{-k}$ of either end $D_\beta < 10^{-k} KL$, so special-casing the end jumps by almost the KL."""
    for student, teacher in rational_distributions():
        ps, qs = intervals(student), intervals(teacher)
        for digits in (3, 6, 9):
            small = Fraction(1, 10**digits)
            for beta, at_end in ((small, kl(qs, ps)), (1 - small, kl(ps, qs))):
                _, value = _mixed(ps, qs, beta)
                jump = (interval(0) if continuous else at_end) - value
                where = (student, teacher, f"beta {beta}")
                yield holds((0.99 * at_end).b < jump.a and jump.b < at_end.a, *where, "jump")
                yield holds(0 < value.a and value.b < (interval(small) * at_end).a, *where, "value")


def _check_rate(claim: tuple[float, str, str]) -> Cases:
    r"""$|D_\beta/\beta - KL - c\,\beta\,\chi^2|$ against the bound of its remainder, at both ends, by `exact_value`."""
    coefficient, forward_term, reverse_term = claim
    for pair in pairs()[:3]:
        for small in (1e-2, 1e-3, 1e-4):
            for beta, end, term in ((small, "forward_kl", forward_term), (1 - small, "reverse_kl", reverse_term)):
                entry = divergences.divergence("skew_jsd", beta=beta)
                limit, slope = exact_value(*pair, end), exact_value(*pair, term)
                gap = float(exact_value(*pair, entry)) / small - float(limit) - coefficient * small * float(slope)
                bound = _third_moment(pair, end == "reverse_kl", small)
                # Rounding of a divergence of order `small` that is divided by it.
                yield holds(abs(gap) <= small**2 * bound / 6 + 1e-11, pair, f"beta {beta}")


def _third_moment(pair: Pair, flip: bool, small: float = 0.0) -> float:
    r"""$E_p|u - 1|^3 / \min(1, 1 + b(u - 1))^2$, or with the two exchanged, summed over the student's histories."""
    tree = Tree.build(*pair)
    total = 0.0
    for n in range(tree.horizon):
        first, second = (tree.log_q[n], tree.log_p[n]) if flip else (tree.log_p[n], tree.log_q[n])
        excess = torch.expm1(second - first)
        moment = (first.exp() * excess.abs() ** 3 / (1.0 + small * excess).clamp(max=1.0) ** 2).sum(-1)
        total += float((tree.reach(n) * moment).sum())
    return total


def _remainder(p: Distribution, q: Distribution, b: Fraction, power: int = 2) -> Any:
    r"""$\frac{b^2}{6} E_p |u - 1|^3 / \min(1, 1 + b(u - 1))^{\mathtt{power}}$, an interval."""
    terms = [
        x * abs(y / x - 1) ** 3 / min(Fraction(1), 1 + b * (y / x - 1)) ** power for x, y in zip(p, q, strict=True)
    ]
    return interval(b**2 * sum(terms) / 6)


def _check_remainder(claim: Callable[[Distribution, Distribution, Fraction], Any]) -> Cases:
    r"""$|D_b/b - KL + \frac b2 \chi^2|$ lies below its bound, in intervals, also where the teacher all but excludes."""
    rare = (Fraction(1, 100), Fraction(99, 100)), (Fraction(1, 1000), Fraction(999, 1000))
    for student, teacher in (*rational_distributions(), rare):
        for b in (Fraction(1, 100), Fraction(1, 10), Fraction(1, 2), Fraction(9, 10)):
            for first, second in ((student, teacher), (teacher, student)):
                ps, qs = intervals(first), intervals(second)
                _, value = _mixed(ps, qs, b)
                slope = interval(sum((y - x) ** 2 / x for x, y in zip(first, second, strict=True)))
                gap = value / interval(b) - kl(qs, ps) + interval(b) * slope / 2
                bound = claim(first, second, b)
                yield holds(-bound.a <= gap.a and gap.b <= bound.a, first, second, f"beta {b}")


def _check_gradient_jump(names: tuple[str, str]) -> Cases:
    r"""Towards either end the gradient, divided by the distance $d$, is that of a KL less $d/2$ times a $\chi^2$'s."""
    for pair in pairs():
        for small in (1e-3, 1e-4):
            for beta, end, term in ((small, names[0], "chi2"), (1 - small, names[1], "neyman_chi2")):
                entry = divergences.divergence("skew_jsd", beta=beta)
                third = max(_third_moment(pair, flip) for flip in (False, True))
                levels = zip(*(exact_gradient(*pair, d) for d in (entry, end, term)), strict=True)
                for n, (found, limit, slope) in enumerate(levels, start=1):
                    gap = float((found / small - (limit - small / 2 * slope)).abs().max())
                    yield holds(gap < 20 * small**2 * max(1.0, third), pair, f"beta {beta}", f"step {n}")
        for beta in (0.0, 1.0):
            ends = exact_gradient(*pair, divergences.divergence("skew_jsd", beta=beta))
            yield close(ends, [torch.zeros_like(level) for level in ends], pair, f"beta {beta}")


# The derivation.


def _product_rule() -> bool:
    """Detaching the outer p, or the ratio, leaves one half of the product rule; both halves are minus the weight."""
    outer, inner, q, u = sympy.symbols("P p q u", positive=True)
    f = sympy.Function("f")
    term = outer * f(q / inner)
    w = (u * sympy.diff(f(u), u) - f(u)).subs(u, q / inner).doit()
    both = (sympy.diff(term, outer) + sympy.diff(term, inner)).subs(outer, inner).doit()
    stopped = sympy.diff(term, inner).subs(outer, inner).doit() + w + f(q / inner)
    return sympy.simplify(both + w) == 0 and sympy.simplify(stopped) == 0


def _perspective() -> bool:
    p, q, beta, u = sympy.symbols("p q beta u", positive=True)
    mixture = beta * q + (1 - beta) * p
    mixed = beta * q * sympy.log(q / mixture) + (1 - beta) * p * sympy.log(p / mixture)
    gap = sympy.expand_log((mixed.subs(q, u * p) - p * _jsd_beta(u, beta)).subs(beta, sympy.Rational(1, 3)), force=True)
    return (
        sympy.simplify(gap) == 0
        and sympy.simplify(sympy.diff(_jsd_beta(u, beta), u, 2) - beta * (1 - beta) / (u * (beta * u + 1 - beta))) == 0
    )


def _compensation() -> bool:
    r"""Per atom $\beta q\log(q/p) - [\beta q\log(q/m) + (1-\beta) p\log(p/m)] = m \log(m/p)$, $m$ the mixture."""
    p, q, beta, m = sympy.symbols("p q beta m", positive=True)
    left = beta * q * sympy.log(q / p) - beta * q * sympy.log(q / m) - (1 - beta) * p * sympy.log(p / m)
    right = (beta * q + (1 - beta) * p) * sympy.log(m / p)
    return sympy.simplify(sympy.expand_log(sympy.expand(left - right), force=True)) == 0


def _third_derivative() -> bool:
    r"""The third derivative of $(1+x)\log(1+x)$, whose size falls as x grows."""
    x = sympy.Symbol("x", real=True)
    third = sympy.diff((1 + x) * sympy.log(1 + x), x, 3)
    return sympy.simplify(third + (1 + x) ** -2) == 0 and sympy.simplify(sympy.diff(-third, x) + 2 / (1 + x) ** 3) == 0


def _series(end: End) -> bool:
    u = divergences.symbol()
    one, other = (u * sympy.log(u), (u - 1) ** 2) if end == 0 else (-sympy.log(u), (u - 1) ** 2 / u)
    return furthest(_check_ends(end, lambda small: one - small * other / 2)) == 0.0
