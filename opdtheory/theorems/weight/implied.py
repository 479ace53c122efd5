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
            meaning=(
                "Whatever weight $w(u)$ a loss puts on sampled tokens, its expected gradient is that of $E_p[V(u)]$"
                " for a function $V$ which the integral below gives. If the weight never falls as $u$ grows, $V$ is"
                " convex and some f-divergence is minimised, though perhaps not the intended one; if the weight falls"
                " anywhere, $V$ is not convex and no f-divergence is."
            ),
            statement=(
                r"V[w](u) = u\int_1^u w(t)\,t^{-2}\,dt;\quad"
                r" w_{V[w]} = w;\quad"
                r" V[w_f] = f \text{ up to gauge};\quad"
                r" V[w]'' = w'/u;\quad"
                r" V[w] \text{ is convex, a genuine f-divergence} \iff w \text{ is non-decreasing}"
            ),
            hypotheses=(
                r"the estimator descends $-E_p[w(u)\,s]$, where the weight depends on the ratio alone and is locally"
                r" bounded on $(0, \infty)$",
                "where $w$ jumps, $V$ has a kink, and any value of $w$ between the two sides will do",
            ),
            source="derived here",
            advice=(
                r"Plot the local weight over $\log u$: where it falls as $u$ grows, no divergence is being minimised."
            ),
            derivation=(
                Step(
                    r"u V' - V = w",
                    "differentiate the integral. By T1, $u V' - V$ is the weight of the generator $V$, so $V[w]$ has"
                    " the weight $w$. This holds for any $w$, because sympy treats it as an undefined function",
                    _inverse,
                ),
                Step(
                    r"V[k] = k\,(u - 1)",
                    "a constant weight implies a pure gauge term (T3); neither of them moves the gradient",
                    _constant_is_gauge,
                ),
                Step(
                    r"\int_1^u w_f(t)\,t^{-2}dt = f(u)/u - f(1) \implies V[w_f] = f",
                    "the integrand has the primitive $f(t)/t$, for any $f$, and $f(1) = 0$ removes its value at 1",
                    _primitive,
                ),
                Step(
                    r"V[w]'' = w'/u",
                    "differentiate the integral twice, with $w$ as an undefined function",
                    _second_derivative,
                ),
                Step(
                    r"V'(b) - V'(a) = \int_a^b \frac{dw(t)}{t}\ \ge\ \frac{w(b) - w(a)}{b}",
                    r"integrate by parts. Where $w$ jumps, this is a Stieltjes integral, to which a jump by $j$ at $t$"
                    r" adds $j/t$; the inequality is that of a $w$ that never falls, as $1/t \ge 1/b$. So $V'$ never"
                    r" falls if and only if $w$ never does, whether $w$ is differentiable or not",
                    _monotone_is_convex,
                    in_words=True,
                ),
                Step(
                    r"\nabla_\theta\,\kappa(\log u) = -\kappa'(\log u)\,s",
                    r"a loss $\kappa(\log u)$ that is differentiated without detaching anything puts its slope as a"
                    r" weight on the score, for any $\kappa$",
                    _loss_weight,
                ),
                Step(
                    r"V[-f]'' = -f'/u",
                    "stop-gradient has the weight $-f$, so it descends a genuine divergence exactly if $f$ never rises",
                    _stop_gradient,
                ),
                Step(
                    r"w \text{ non-decreasing} \implies \mathrm{clamp}(w, a, b),\ w(\mathrm{clamp}(\log u, -C, C))"
                    r" \text{ non-decreasing}",
                    "a clamp never falls, and neither does a composition of functions that never fall: clipping keeps"
                    " a divergence genuine, though it becomes another one",
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
