"""T5: whether the teacher attracts a student near it. T5b and T5c are in the modules beside this one."""

from __future__ import annotations

from typing import Any

import sympy

from opdtheory import divergences
from opdtheory.theorems.instances.flows import jacobian_at_teacher, softmax_slope
from opdtheory.theorems.instances.one_sample import covariance, expectation, in_logits, ratios, simplex
from opdtheory.theorems.stability import checks
from opdtheory.theorems.theorem import Step, Theorem

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T5."""
    return [
        Theorem(
            number="T5",
            name="stability at the teacher",
            meaning=(
                "Near the teacher, the slope $w'(1)$ of the weight at $u = 1$ decides whether training pulls the"
                " student the rest of the way or pushes it off, and how fast. For a loss that detaches the reward"
                " $-f(u)$ this slope is $-f'(1)$: positive for the reverse KL, zero for the JSD, negative for the"
                " forward KL in its usual form. For the exact weight it is $f''(1)$, whatever the gauge."
            ),
            statement=(
                r"J = \frac{\partial\dot z}{\partial z}\Big|_{p=q} = -w'(1)\,(\mathrm{diag}\,q - q q^\top);\quad"
                r" \text{the teacher attracts exponentially} \iff w'(1) > 0, \text{ and repels so} \iff w'(1) <"
                r" 0;\quad"
                r" w'(1) = -f'(1) \text{ for OPD},\ f''(1) \text{ for OPD+}"
            ),
            hypotheses=(
                "the student is a softmax of its logits $z$ and follows the expected gradient in small steps",
                "$w$ is differentiable at 1, and $q$ is positive",
                "if $w'(1) = 0$, the first derivative at 1 that is not zero decides: the teacher attracts iff that"
                " derivative is positive and of odd order",
            ),
            source="derived here; linear stability of a gradient flow",
            advice="Compute $w'(1)$ before training: if negative, or zero as for the JSD, no learning rate helps.",
            derivation=(
                Step(
                    r"\dot z_a = p_a (w(u_a) - E_p w) = 0 \text{ at } p = q",
                    "at the teacher every ratio is 1, so every weight equals the mean weight and nothing moves. Sympy"
                    " checks three tokens, with $w$ as an undefined function",
                    _fixed,
                ),
                Step(
                    r"\partial \dot z_a/\partial z_b\,|_{p=q} = -w'(1)\, q_a (\delta_{ab} - q_b)",
                    "differentiate the velocity through the softmax by the chain rule, for three tokens and an"
                    " undefined $w$",
                    _linearised,
                ),
                Step(
                    r"x^\top (\mathrm{diag}\,q - qq^\top) x = \mathrm{Var}_q(x)"
                    r" = \tfrac12 \textstyle\sum_{ab} q_a q_b (x_a - x_b)^2",
                    "the quadratic form of this matrix is a variance. So all eigenvalues of $J$ have the sign of"
                    " $-w'(1)$, except the one of constant vectors, which softmax ignores",
                    _variance_form,
                ),
                Step(
                    r"\det(x - J) = x\,(x^2 + w'(1)\,(1 - \textstyle\sum q^2)\,x + 3 w'(1)^2 q_1 q_2 q_3)",
                    "for three tokens this is the characteristic polynomial. Its other two roots are real, since the"
                    " discriminant is a sum of squares",
                    _eigenvalues,
                ),
                Step(
                    r"w'(1) = -f'(1) - c \text{ for } w = -(f + c(u-1));\quad w'(1) = f''(1) \text{ for OPD+}",
                    "differentiate both weights, with $f$ as an undefined function: the first slope depends on the"
                    " gauge $c$, the second does not",
                    _slopes,
                ),
                Step(
                    r"-f'(1) = -1 \text{ for } u\log u;\quad"
                    r" -f'(1) = 0 \text{ for the JSD and for } \chi^2;\quad"
                    r" -f'(1) = 1 \text{ for } -\log u \text{ and for } u\log u - 2(u-1)",
                    "sympy differentiates the generators in their usual form, and the forward KL in another gauge",
                    _catalogue_slopes,
                ),
                Step(
                    r"w'(1) = 0,\ p_a = q_a(1 - \varepsilon x_a):\quad"
                    r"\dot z_a = \tfrac12 w''(1)\, q_a (x_a^2 - E_q x^2)\, \varepsilon^2 + O(\varepsilon^3)",
                    r"if the slope is zero, expand the velocity to second order in the error $\varepsilon x$, where"
                    r" $E_q[x] = 0$; sympy does so for three tokens",
                    _second_order,
                ),
                Step(
                    r"-\tfrac12 \tfrac{d}{dt}\lVert z - \log q\rVert^2 = \mathrm{Cov}_p(\log u, w)"
                    r" = \tfrac{w^{(m)}(1)}{m!} E_q[x^{m+1}]\, \varepsilon^{m+1} + O(\varepsilon^{m+2})",
                    "let $m$ be the order of the first derivative of $w$ at 1 that is not zero. For odd $m$ the"
                    " leading term has the sign of that derivative for every $x$, so the distance falls or grows. For"
                    " even $m$ it changes sign with $x$, unless $q$ is uniform on two tokens; and a gradient flow is"
                    " not attracted to a point that is not a minimum",
                    _leading_order,
                    in_words=True,
                ),
            ),
            identities=checks.identities(),
        ),
    ]


# The derivation, with w and f undefined functions.


def _undefined(name: str) -> tuple[Any, Any]:
    """An undefined function and its derivative, which stays readable at a point."""
    prime = sympy.Function(f"{name}prime")

    class Undefined(sympy.Function):
        def fdiff(self, argindex: int = 1) -> sympy.Expr:
            return prime(self.args[0])

    return Undefined, prime


def _field() -> tuple[list[Any], list[Any], list[Any], Any]:
    """Probabilities, teacher, velocity of the logits, and `w'`, for three atoms."""
    w, prime = _undefined("w")
    p, q = list(sympy.symbols("p0:3", positive=True)), simplex("q")
    return p, q, in_logits(p, [w(u) for u in ratios(p, q)]), prime


def _fixed() -> bool:
    p, q, field, _ = _field()
    return all(sympy.simplify(v.subs(dict(zip(p, q, strict=True)))) == 0 for v in field)


def _linearised() -> bool:
    p, q, field, prime = _field()
    derived = softmax_slope(field, p, q)
    return (derived - jacobian_at_teacher(q, prime(sympy.Integer(1)))).applyfunc(sympy.simplify).is_zero_matrix is True


def _variance_form() -> bool:
    """The quadratic form of `diag q - q q^T` is half the mean squared difference, for any three atoms."""
    q, x = simplex("q"), sympy.Matrix(sympy.symbols("x0:3", real=True))
    form = (x.T * jacobian_at_teacher(q, sympy.Integer(-1)) * x)[0]
    half = sum(q[a] * q[b] * (x[a] - x[b]) ** 2 for a in range(3) for b in range(3)) / 2
    return sympy.expand(form - half) == 0


def _eigenvalues() -> bool:
    """The characteristic polynomial for three atoms, and a discriminant that is a sum of squares."""
    x, s, q = sympy.Symbol("x"), sympy.Symbol("s", real=True), simplex("q")
    spread, product = 1 - sum(b**2 for b in q), q[0] * q[1] * q[2]
    found = jacobian_at_teacher(q, s).charpoly(x).as_expr()
    discriminant = spread**2 - 12 * product
    ab, bc, ca = q[0] * q[1], q[1] * q[2], q[2] * q[0]
    squares = 2 * ((ab - bc) ** 2 + (bc - ca) ** 2 + (ca - ab) ** 2)
    return (
        sympy.expand(found - x * (x**2 + s * spread * x + 3 * s**2 * product)) == 0
        and sympy.expand(discriminant - squares) == 0
    )


def _slopes() -> bool:
    """`w'(1)` of stop-gradient in any gauge, and of OPD+ in any gauge."""
    u, c = sympy.Symbol("u", positive=True), sympy.Symbol("c", real=True)
    f = sympy.Function("f")
    gauged = f(u) + c * (u - 1)
    stopped = sympy.diff(-gauged, u)
    corrected = sympy.diff(u * sympy.diff(gauged, u) - gauged, u)
    return (
        gauged.subs(u, 1) == f(1)
        and sympy.simplify(stopped + sympy.diff(f(u), u) + c) == 0
        and sympy.simplify(corrected - u * sympy.diff(f(u), u, 2)) == 0
    )


def _catalogue_slopes() -> bool:
    """`-f'(1)` of the five generators that the statement names."""
    u = divergences.symbol()
    named = {name: divergences.divergence(name).expr for name in ("forward_kl", "jsd", "chi2", "reverse_kl")}
    named["tilted"] = named["forward_kl"] - 2 * (u - 1)
    found = {name: -sympy.diff(f, u).subs(u, 1) for name, f in named.items() if f.subs(u, 1) == 0}
    return found == {"forward_kl": -1, "jsd": 0, "chi2": 0, "reverse_kl": 1, "tilted": 1}


def _second_order() -> bool:
    r"""At $p_a = q_a(1 - \varepsilon x_a)$, $E_q x = 0$: the velocity's first order, and the second if $w'(1) = 0$."""
    e, (first, second) = sympy.Symbol("e"), sympy.symbols("r s", real=True)
    q, x = sympy.symbols("q0:3", positive=True), list(sympy.symbols("x0:2", real=True))
    x.append(-(q[0] * x[0] + q[1] * x[1]) / q[2])
    p = [b * (1 - e * y) for b, y in zip(q, x, strict=True)]
    # The constant w(1) drops out; u - 1 = e x + O(e^2).
    weights = [first * (u - 1) + second * (u - 1) ** 2 / 2 for u in ratios(p, q)]
    square = expectation(q, [y**2 for y in x])
    for b, y, velocity in zip(q, x, in_logits(p, weights), strict=True):
        orders = [sympy.diff(velocity, e, n).subs(e, 0) for n in (1, 2)]
        claimed = (first * b * y, second * b * (y**2 - square))
        if any(sympy.simplify(gap) != 0 for gap in (orders[0] - claimed[0], orders[1].subs(first, 0) - claimed[1])):
            return False
    return True


def _leading_order() -> bool:
    r"""$\mathrm{Cov}_p(\log u, (u-1)^m) = \varepsilon^{m+1} E_q[x^{m+1}] + O(\varepsilon^{m+2})$ for m = 1, 2, 3."""
    e, b, y = sympy.Symbol("e"), sympy.Symbol("b", positive=True), sympy.Symbol("y", real=True)
    q, x = [b, 1 - b], [y, -b * y / (1 - b)]
    for m in (1, 2, 3):
        p = [c * (1 - e * t) for c, t in zip(q, x, strict=True)]
        logs, weights = [-sympy.log(1 - e * t) for t in x], [(1 / (1 - e * t) - 1) ** m for t in x]
        pull = covariance(p, logs, weights)
        leading = expectation(q, [t ** (m + 1) for t in x])
        for n, claimed in enumerate([*(0 for _ in range(m)), 0, leading]):
            if sympy.simplify(sympy.diff(pull, e, n).subs(e, 0) / sympy.factorial(n) - claimed) != 0:
                return False
    return True
