"""T7g: the optimal baseline of each divergence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy

from opdtheory import divergences
from opdtheory.theorems.instances.cases import interval, rational_distributions, values_of
from opdtheory.theorems.instances.one_sample import (
    OfPair,
    dot,
    expectation,
    intervals,
    optimal_baseline,
    ratios,
    score_norms,
    simplex,
    square,
    three_atoms,
    variance,
    weighted,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, holds, same

__all__ = ["theorems"]

SMOOTH_RATIONAL = ("forward_kl", "chi2", "neyman_chi2", "le_cam")


def theorems() -> list[Theorem]:
    """T7g."""
    theorem = Theorem(
        number="T7g",
        name="which baseline is optimal for which divergence",
        meaning=(
            "Near the teacher the best constant baseline is $f'(1)$, the one that centres the weight, up to a"
            " correction that shrinks with the distance. What the correction saves is, in the limit, the same share"
            " of the variance for every divergence. For the forward KL on one softmax row the best constant has a"
            " closed form at any distance."
        ),
        statement=(
            r"b^* = f'(1) + f''(1)\,\frac{E_p[(u-1)|s|^2]}{E_p|s|^2} + O(\epsilon^2);\quad"
            r" \frac{\mathrm{Var}(b^*)}{\mathrm{Var}(f'(1))} \to 1 -"
            r" \frac{(E_p[v|s|^2])^2}{E_p|s|^2\,\mathrm{Var}(v\,s)} \text{ as } \epsilon \to 0;\quad"
            r" b^*_{\text{forward KL}} = \frac{1 + |p|^2 - 2p\cdot q}{1 - |p|^2}"
        ),
        hypotheses=(
            r"$u = 1 + \epsilon v$ with $E_p[v] = 0$; $b^*$ and $\mathrm{Var}(b)$ are those of T7a",
            r"for the order $\epsilon^2$, $f''$ is Lipschitz at 1; for the share of the variance, $f''(1) > 0$",
            "the closed form is for one softmax row",
        ),
        source="derived here",
        advice=(
            "Centre the weight: every other fixed constant leaves noise at the teacher. Beyond that, the optimal"
            " constant saves the same share of the variance for all divergences."
        ),
        derivation=(
            Step(
                r"\frac{d}{d\epsilon} b^*\Big|_0 = f''(1)\,\frac{E_p[v|s|^2]}{E_p|s|^2};\quad b^*|_0 = w_f(1) = f'(1)",
                r"differentiate T7a's $b^*$ by the chain rule, with $w_f' = u f''$; sympy treats $f$ as an undefined"
                r" function. Centring is thus optimal to leading order. The rest of $b^*$ is of order $\epsilon$, and"
                r" so is the centred weight, so in the limit $b^*$ still saves a share: $(b^* - f'(1))^2\,E_p|s|^2$"
                r" of a variance that is $\epsilon^2 f''(1)^2\,\mathrm{Var}(v\,s)$ to leading order",
                _first_order,
            ),
            Step(
                r"b^*_{\text{forward KL}} = E_q|s|^2 / E_p|s|^2",
                r"the weight is $w = u$, and $p\,u = q$. The norms of softmax scores, $|s_a|^2 = 1 - 2p_a + |p|^2$,"
                r" give the closed form",
                _forward_norms,
            ),
            Step(
                r"V = 2:\ b^* = w_1 p_2 + w_2 p_1,\ (w_a - b^*)\,s_a \text{ is the same for both tokens}",
                "with a vocabulary of two tokens the optimal constant leaves no variance",
                _two_values,
            ),
            Step(
                r"E_p[w_f(u)] = w_f(1) \text{ for all pairs} \iff w_f \text{ is affine} \iff f = c\,u\log u +"
                r" \text{gauge}",
                "take two atoms with the ratios $1 - x$ and $1 + y$: differentiated twice in $y$, or in $x$, the"
                " condition says that $w'' = 0$. The converse is $E_p u = 1$. So centring minimises $E_p[w^2]$"
                " exactly for the forward KL alone",
                _affine_mean,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "two tokens, no variance",
                r"V = 2:\ \mathrm{Var}(b^*) = 0",
                _check_two_tokens,
                optimal_baseline,
                {
                    "the mean of the weight": expectation,
                    "no baseline": lambda p, w: Fraction(0),
                },
                "exact",
            ),
            Identity(
                "forward KL's optimum",
                r"b^* = (1 + |p|^2 - 2p\cdot q)/(1 - |p|^2)",
                _check_forward_optimum,
                lambda p, q: (1 + square(p) - 2 * dot(p, q)) / (1 - square(p)),
                {
                    "one (centred)": lambda p, q: Fraction(1),
                    "2 dropped": lambda p, q: (1 + square(p) - dot(p, q)) / (1 - square(p)),
                },
                "exact",
            ),
            Identity(
                "expansion near the teacher",
                r"|b^* - f'(1) - f''(1) E_p[(u-1)|s|^2]/E_p|s|^2| \le 100\,\epsilon^2",
                _check_expansion,
                lambda slope, bend, shift: slope + bend * shift,
                {
                    "first order dropped": lambda slope, bend, shift: slope,
                    "zeroth order dropped": lambda slope, bend, shift: bend * shift,
                    "f''(1) taken for 1": lambda slope, bend, shift: slope + shift,
                },
                "exact",
            ),
            Identity(
                "the same gain for every divergence",
                r"\mathrm{Var}(b^*)/\mathrm{Var}(f'(1)) \to 1 - (E_p[v|s|^2])^2/(E_p|s|^2\,\mathrm{Var}(vs))",
                _check_same_gain,
                lambda gained, total: 1 - gained / total,
                {
                    "centring is optimal": lambda gained, total: Fraction(1),
                    "gain counted twice": lambda gained, total: 1 - 2 * gained / total,
                },
                "exact",
            ),
            Identity(
                "what the hypotheses exclude",
                r"f'' = 1 + |u-1|^{1/2}: \text{ the remainder over } \epsilon^2 \text{ is unbounded};\quad "
                r"f = (u-1)^4: \text{ the share is that of } v^3",
                _check_hypotheses,
                (False, 3),
                {"f'' continuous is enough": (True, 3), "f''(1) = 0 is no exception": (False, 1)},
                "exact",
            ),
            Identity(
                "which weights have a known mean",
                r"E_p[w_f(u)] = w_f(1) \iff f = c\,u \log u + \text{gauge}",
                _check_known_mean,
                {"forward_kl": True, "reverse_kl": False, "jsd": False, "chi2": False, "hellinger": False},
                {
                    "the reverse KL's too": {"reverse_kl": True},
                    "the JSD's too": {"jsd": True},
                    "not the forward KL's": {"forward_kl": False},
                },
                "rigorous",
            ),
        ),
    )
    return [theorem]


def _check_two_tokens(baseline: OfPair) -> Cases:
    """Two tokens: the optimal constant leaves no variance."""
    for name, p, q, w in weighted(SMOOTH_RATIONAL, 2):
        best = baseline(p, w)
        yield same(variance(p, [x - best for x in w]), 0, name, p, q)


def _check_forward_optimum(value: OfPair) -> Cases:
    for p, q in rational_distributions():
        yield same(optimal_baseline(p, weights("forward_kl", p, q)), value(p, q), p, q)


def _near(p: Sequence[Fraction], q: Sequence[Fraction], size: Fraction) -> list[Fraction]:
    return [a + size * (b - a) for a, b in zip(p, q, strict=True)]


def _at_one(name: str, order: int) -> Fraction:
    """A derivative of the generator at u = 1."""
    u = divergences.symbol()
    return values_of(sympy.diff(divergences.divergence(name).expr, u, order).subs(u, 1), {})


def _check_expansion(value: Callable[[Fraction, Fraction, Fraction], Fraction]) -> Cases:
    r"""$b^*$ of a teacher at distance $\epsilon$, up to a remainder below $100 \epsilon^2$, in fractions."""
    for name in SMOOTH_RATIONAL:
        slope, bend = _at_one(name, 1), _at_one(name, 2)
        for p, far in rational_distributions():
            for size in (Fraction(1, 10**4), Fraction(1, 10**8)):
                q = tuple(_near(p, far, size))
                shift = optimal_baseline(p, [u - 1 for u in ratios(p, q)])
                best = optimal_baseline(p, weights(name, p, q))
                yield holds(abs(best - value(slope, bend, shift)) <= 100 * size**2, name, p, far, f"epsilon {size}")


def _check_hypotheses(claim: tuple[bool, int]) -> Cases:
    r"""Two generators near the teacher, as power series in $t = \epsilon^{1/2}$ with fractions as coefficients.

    Decided by their lowest terms: of $b^*$ less its first order, and of the share of the variance.
    """
    bounded, power = claim
    # The roots of |v| are rational, so that |u - 1|^(1/2) is.
    p, roots = (Fraction(1, 4), Fraction(13, 20), Fraction(1, 10)), (1, -1, 2)
    v = [root * abs(root) for root in roots]
    yield same(expectation(p, v), 0, "mean of v")
    p = tuple(sympy.Rational(a) for a in p)
    t, half = sympy.symbols("t half", positive=True)  # half is |u - 1|^(1/2)
    moved, weights = [t**2 * direction for direction in v], []
    for root in roots:
        x = half**2 * (1 if root > 0 else -1)
        # The slope of the weight is u f''(u), f'' = 1 + |u - 1|^(1/2).
        slope = (1 + x) * (1 + half) * sympy.diff(x, half)
        weights.append(sympy.integrate(sympy.expand(slope), (half, 0, t * abs(root))))
    remainder = sympy.Poly(optimal_baseline(p, weights) - optimal_baseline(p, moved), t)
    lowest = min(degree for (degree,) in remainder.monoms())
    yield holds((lowest >= 4) == bounded, "f'' = 1 + |u - 1|^(1/2)")

    def share(w: Sequence[sympy.Expr]) -> sympy.Expr:
        best = optimal_baseline(p, w)
        return variance(p, [x - best for x in w]) / variance(p, w)

    quartic = [x**3 * (4 + 3 * x) for x in moved]  # u f' - f of (u - 1)^4
    limit = sympy.cancel(share(quartic)).subs(t, 0)
    yield same(limit, share([sympy.Integer(x) ** power for x in v]), "f = (u - 1)^4")


def _check_same_gain(value: Callable[[Fraction, Fraction], Fraction]) -> Cases:
    r"""$\mathrm{Var}(b^*) / \mathrm{Var}(w_f(1))$ near the teacher is one number for all generators."""
    size = Fraction(1, 10**9)
    for name in SMOOTH_RATIONAL:
        slope = _at_one(name, 1)
        for p, far in (pair for pair in rational_distributions() if len(pair[0]) > 2):
            q = tuple(_near(p, far, size))
            w, v = weights(name, p, q), [u - 1 for u in ratios(p, far)]
            best = optimal_baseline(p, w)
            ratio = variance(p, [x - best for x in w]) / variance(p, [x - slope for x in w])
            gained = optimal_baseline(p, v) ** 2 * expectation(p, score_norms(p))
            yield holds(abs(ratio - value(gained, variance(p, v))) < Fraction(1, 10**6), name, p, far)


def _check_known_mean(known: dict[str, bool]) -> Cases:
    r"""Whether $E_p[w_f(u)] = w_f(1)$ for every pair: certified either way."""
    for name, expected in known.items():
        at_one = interval(_at_one(name, 1))
        gaps = [expectation(intervals(p), weights_enclosed(name, p, q)) - at_one for p, q in rational_distributions()]
        yield holds(all(0 in gap for gap in gaps) == expected, name)


# The derivation.


def _first_order() -> bool:
    """The slope in ε of b* on three atoms, any scores, f undefined."""
    size, u = sympy.Symbol("epsilon", real=True), sympy.Symbol("u", positive=True)
    f = sympy.Function("f")
    p, v, s = three_atoms()
    norms = [square(vector) for vector in s]
    w, bend = u * sympy.diff(f(u), u) - f(u), sympy.diff(f(u), u, 2)
    total = expectation(p, norms)
    slope = expectation(p, [n * (sympy.diff(w, u) * x) for n, x in zip(norms, v, strict=True)]) / total
    claimed = u * bend * expectation(p, [x * n for x, n in zip(v, norms, strict=True)]) / total
    near = 1 + size * v[0]
    chain = sympy.diff(w.subs(u, near).doit(), size).doit() - v[0] * near * bend.subs(u, near)
    return sympy.simplify(slope - claimed) == 0 and sympy.simplify(chain.doit()) == 0


def _forward_norms() -> bool:
    r"""$E_q|s|^2 = 1 + |p|^2 - 2 p\cdot q$ and $E_p|s|^2 = 1 - |p|^2$ for softmax scores."""
    p, q = simplex("p"), simplex("q")
    norms = score_norms(p)
    return (
        sympy.expand(expectation(q, norms) - (1 + square(p) - 2 * dot(p, q))) == 0
        and sympy.expand(expectation(p, norms) - (1 - square(p))) == 0
    )


def _two_values() -> bool:
    p, w1, w2 = sympy.symbols("p w1 w2")
    best = optimal_baseline([p, 1 - p], [w1, w2])
    gap = (w1 - best) * (1 - p) + (w2 - best) * p
    return sympy.simplify(gap) == 0 and sympy.simplify(best - (w1 * (1 - p) + w2 * p)) == 0


def _affine_mean() -> bool:
    r"""$E_p w = w(1)$ on two atoms at $1-x$ and $1+y$, twice differentiated in y at 0, leaves w''."""
    x, y = sympy.symbols("x y", positive=True)
    w, u = sympy.Function("w"), sympy.Symbol("u", positive=True)
    # The atoms have probabilities y/(x+y) and x/(x+y); multiplied by x + y:
    condition = y * w(1 - x) + x * w(1 + y) - (x + y) * w(1)
    second = sympy.diff(condition, y, 2).doit() / x
    bends = sympy.simplify(second - sympy.diff(w(u), u, 2).subs(u, 1 + y).doit()) == 0
    return bends and sympy.expand(condition.replace(w, lambda at: 3 * at + 5)) == 0
