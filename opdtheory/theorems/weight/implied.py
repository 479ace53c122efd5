"""T4: the divergence that a local estimator minimises, whatever its weight is."""

from __future__ import annotations

import sympy

from opdtheory.theorems.theorem import Step, Theorem
from opdtheory.theorems.weight import checks
from opdtheory.theorems.weight.corollaries import convex, implied, rows

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T4."""
    return [
        Theorem(
            number="T4",
            name="implied divergence",
            statement=(
                r"V[w](u) = u\int_1^u w(t)\,t^{-2}dt:\quad w_{V[w]} = w,\quad V[w_f] = f \text{ up to gauge},\quad"
                r" V[w]'' = w'/u;\quad V[w] \text{ is a genuine f-divergence} \iff w \text{ is non-decreasing}"
            ),
            hypotheses=(
                "the estimator descends -E_p[w(u) s] with a weight of the ratio alone, locally bounded on (0, ∞)",
                "where w jumps, V has a kink, and any value between the two sides will do",
            ),
            source="derived here",
            advice="Plot the local weight over log u: where it falls as u grows, no divergence is being minimised.",
            derivation=(
                Step(r"u V' - V = w", "differentiate the integral, with w an undefined function", _inverse),
                Step(
                    r"V[k] = k\,(u - 1)", "a constant weight is a gauge: neither moves the gradient", _constant_is_gauge
                ),
                Step(
                    r"\int_1^u w_f(t)\,t^{-2}dt = f(u)/u - f(1) \implies V[w_f] = f",
                    "f/t is the primitive, with f an undefined function, and f(1) = 0",
                    _primitive,
                ),
                Step(r"V[w]'' = w'/u", "differentiate twice, with w an undefined function", _second_derivative),
                Step(
                    r"V'(b) - V'(a) = \int_a^b \frac{dw(t)}{t}\ \ge\ \frac{w(b) - w(a)}{b}",
                    "by parts; with jumps, a Stieltjes integral to which a jump j at t adds j/t. So V' never falls if "
                    "and only if w never does, differentiable or not",
                    _monotone_is_convex,
                    in_words=True,
                ),
                Step(
                    r"\nabla_\theta\,\kappa(\log u) = -\kappa'(\log u)\,s",
                    "differentiating a loss of log u makes its slope the weight of the score; kappa is undefined",
                    _loss_weight,
                ),
                Step(
                    r"V[-f]'' = -f'/u",
                    "stop-gradient descends a genuine divergence exactly if f never rises",
                    _stop_gradient,
                ),
                Step(
                    r"w \text{ non-decreasing} \implies \mathrm{clamp}(w, a, b),\ w(\mathrm{clamp}(\log u, -C, C))"
                    r" \text{ non-decreasing}",
                    "a clamp is non-decreasing, and so is a composition of non-decreasing maps",
                    _clips,
                    in_words=True,
                ),
            ),
            identities=checks.identities(),
        ),
    ]


# The derivation, with weight and generator undefined functions.


def _inverse() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    w = sympy.Function("w")
    v = u * sympy.Integral(w(t) / t**2, (t, 1, u))
    return sympy.simplify(sympy.expand(u * v.diff(u) - v - w(u))) == 0


def _second_derivative() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    w = sympy.Function("w")
    v = u * sympy.Integral(w(t) / t**2, (t, 1, u))
    return sympy.simplify(sympy.expand(v.diff(u, 2) - w(u).diff(u) / u)) == 0


def _primitive() -> bool:
    r"""$(f(t)/t)' = w_f(t)/t^2$."""
    t = sympy.Symbol("t", positive=True)
    f = sympy.Function("f")
    w = t * f(t).diff(t) - f(t)
    return sympy.simplify(sympy.diff(f(t) / t, t) - w / t**2) == 0


def _constant_is_gauge() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    k = sympy.Symbol("k")
    return sympy.simplify(u * sympy.integrate(k / t**2, (t, 1, u)) - k * (u - 1)) == 0


def _monotone_is_convex() -> bool:
    r"""$V'$ gains the integral of $dw/t$, and a jump of $w$ by $j$ at $c$ gains $j/c$."""
    u, t, c, j = sympy.symbols("u t c j", positive=True)
    w = sympy.Function("w")
    slope = sympy.Integral(w(t) / t**2, (t, 1, u)) + w(u) / u
    smooth = sympy.simplify(sympy.expand(slope.diff(u) - w(u).diff(u) / u)) == 0
    # A step at c: V = 0 below it, and above it u times the integral of j/t^2 from c.
    above = u * sympy.integrate(j / t**2, (t, c, u))
    jump = sympy.simplify(above.diff(u).subs(u, c) - j / c) == 0 and sympy.simplify(above.diff(u, 2)) == 0
    return bool(smooth and jump)


def _loss_weight() -> bool:
    r"""$\partial_\theta \kappa(\log q - \log p) = -\kappa'(\log u)\,\partial_\theta\log p$."""
    t, q, x = sympy.symbols("theta q x", positive=True)
    kappa, p = sympy.Function("kappa"), sympy.Function("p", positive=True)
    log_u = sympy.log(q) - sympy.log(p(t))
    left = sympy.diff(kappa(log_u), t).doit()
    right = -sympy.diff(kappa(x), x).subs(x, log_u).doit() * sympy.diff(sympy.log(p(t)), t)
    return sympy.simplify(left - right) == 0


def _stop_gradient() -> bool:
    u, t = sympy.symbols("u t", positive=True)
    f = sympy.Function("f")
    v = u * sympy.Integral(-f(t) / t**2, (t, 1, u))
    return sympy.simplify(sympy.expand(v.diff(u, 2) + f(u).diff(u) / u)) == 0


def _clips() -> bool:
    """A clip is `min` and `max` with constants, whose differences keep the sign; the table's clipped rows."""
    clipped = [row for name, row in rows().items() if "clipped" in name]
    return len(clipped) == 2 and all(checks.never_falls(row) and convex(implied(row.weight)) for row in clipped)
