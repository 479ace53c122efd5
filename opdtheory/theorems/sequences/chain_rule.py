"""T6c and T6h: the divergence of whole sequences is a sum over tokens for the reverse KL, and for it only."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import sympy

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import MarkovPolicy, exact_gradient, exact_value
from opdtheory.theorems.instances.cases import Distribution, catalogue, interval, pairs, rational_distributions
from opdtheory.theorems.instances.one_sample import ratios
from opdtheory.theorems.instances.trees import Dual, History, Linear, RationalTree, gradient_of, total, trees
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

ONE = Fraction(1)
RATIOS = tuple(Fraction(*each) for each in ((1, 3), (1, 2), (4, 5), (2, 1), (5, 2), (7, 1)))

# Coefficients of the reverse KL, the forward KL, chi2 and the gauge u - 1.
_MADE = {
    "3 reverse KL": ("3", "0", "0", "0"),
    "k3": ("1", "0", "0", "1"),
    "reverse KL with gauge": ("2", "0", "0", "-5/3"),
    "forward KL with gauge": ("0", "1", "0", "-1"),
    "nearly reverse KL": ("1", "0", "1/1000", "0"),
}

Rule = Callable[[Divergence], bool]


def theorems() -> list[Theorem]:
    """T6c and T6h."""
    return [_chain_rule(), _only_reverse()]


def _chain_rule() -> Theorem:
    claim = ("reverse_kl", ONE)
    twins = {"forward KL": ("forward_kl", ONE), "JSD": ("jsd", ONE), "discounted": ("reverse_kl", Fraction(1, 2))}
    return Theorem(
        number="T6c",
        name="chain rule of the reverse KL",
        meaning=(
            r"The reverse KL between whole sequences is the mean, over the student's rollouts, of minus the sum of the"
            r" log-ratios. For the reverse KL, the sum over tokens without a discount, $J_{\mathrm{return}}$, and the"
            r" divergence of whole sequences, $J_{\mathrm{sequence}}$, are therefore the same objective, with the same"
            r" gradient."
        ),
        statement=(
            r"\mathrm{KL}(P\|Q) = -E_P\sum_n\log u_n;\quad"
            r" J_{\mathrm{return}} = J_{\mathrm{sequence}} \text{ at } \gamma = 1"
        ),
        hypotheses=(
            r"$f = -\log u$",
            r"$\gamma = 1$",
        ),
        source="the chain rule of the relative entropy",
        advice="For the reverse KL the undiscounted return-to-go trains the whole sequence's divergence.",
        derivation=(
            Step(
                r"w_f(U) - \Big[w_f(u_n) - \sum_{m>n}f(u_m)\Big] = \sum_{m<n}\log u_m",
                r"$\log U$ is the sum of the tokens' log-ratios, so the weights of the two objectives differ by the"
                r" log-ratios of earlier tokens. The history determines these, so the difference is a baseline (T6a,"
                r" first step)",
                _step_log,
            ),
        ),
        identities=(
            Identity(
                "values and gradients",
                r"J_{\mathrm{return}} = J_{\mathrm{sequence}}, \text{ and so are their gradients}",
                _check_chain_rule,
                claim,
                twins,
                "rigorous",
                1e-40,
            ),
            Identity(
                "sixty tokens",
                r"\text{the same by two dynamic programmes along a chain}",
                _check_long_chains,
                claim,
                {k: v for k, v in twins.items() if k != "JSD"},  # the JSD of a sequence does not factor
            ),
        ),
    )


def _only_reverse() -> Theorem:
    return Theorem(
        number="T6h",
        name="only the reverse KL adds up",
        meaning=(
            "For which generators is the divergence of whole sequences the sum of $f(u_n)$ over the tokens of the"
            " student's rollouts? Only for that of the reverse KL, up to scale and gauge. For any other there are a"
            " student and a teacher for which a sum over tokens is not the divergence of their sequences."
        ),
        statement=(
            r"D_f(Q\|P) = E_P\Big[\sum_n f(u_n)\Big] \text{ for all } P, Q \iff f = -c\log u + \kappa(u-1),\ c \ge 0"
        ),
        hypotheses=(
            "$f$ is convex and $f(1) = 0$; no derivative is needed",
            "there are at least two tokens",
        ),
        source="derived here; Cauchy's functional equation",
        advice=(
            "Use a return-to-go to optimise whole sequences for the reverse KL only; other generators need $w_f(U)$."
        ),
        derivation=(
            Step(
                r"P(x)\,E[f(xY) - f(x) - f(Y)] = 0 \;\Rightarrow\; f(xy) - f(x) - f(y) = k(x)(y-1)",
                "take models that differ in the first token, and after it in one row only, that of a first token of"
                " ratio $x$. The two sides of the claim then differ by the left side here. The ratio $Y$ in that row"
                " has mean 1 and is otherwise free, so it may take any two values $y_1 < 1 < y_2$, and this leaves"
                " only a multiple of $y - 1$",
                _step_two_points,
            ),
            Step(
                r"k(x)(y-1) = k(y)(x-1) \;\Rightarrow\; k(x) = \kappa(x-1)",
                "since $xy = yx$, the roles of $x$ and $y$ can be exchanged, so $k(x)/(x-1)$ does not depend on $x$",
                _step_exchange,
            ),
            Step(
                r"F(u) = f(u) - \kappa(u-1): \quad F(xy) = F(x) + F(y)",
                r"subtract $\kappa(u - 1)$ from $f$ and use $(x-1)(y-1) = (xy-1) - (x-1) - (y-1)$: the equation"
                r" becomes Cauchy's, and what remains of $\kappa$ is a gauge",
                _step_gauge,
            ),
            Step(
                r"F = -c\log u,\quad c \ge 0",
                r"a convex $F$ is continuous, and the continuous solutions of Cauchy's equation are the logarithms;"
                r" sympy finds them from the slope of the equation at $y = 1$. Convexity needs $c \ge 0$",
                _step_cauchy,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "one branch",
                r"D_f(Q\|P) - E_P\sum_n f(u_n) = P(x)\,E[f(xY) - f(x) - f(Y)],\ f \text{ free}",
                _check_one_branch,
                (1, 1),
                {"f(x) dropped": (0, 1), "f(Y) dropped": (1, 0)},
                "exact",
            ),
            Identity(
                "functional equation",
                r"f(xy) = f(x) + f(y) + \kappa(x-1)(y-1) \text{ for } f = -c\log u + \kappa(u-1)",
                _check_equation,
                (1, 0, -1),
                {"sign of κ flipped": (-1, 0, -1), "κ dropped": (0, 0, -1), "u log u in place of -log u": (1, 1, 1)},
                "rigorous",
                1e-40,
            ),
            Identity(
                "search over the catalogue",
                r"D_f(Q\|P) = E_P\sum_n f(u_n) \iff u^2 f''(u) \text{ is constant}",
                _check_coincide,
                _is_reverse,
                {
                    "every generator": lambda d: True,
                    "the reverse KL in one gauge": lambda d: d.name == "reverse_kl",
                    "both KL divergences": lambda d: d.name in ("reverse_kl", "forward_kl"),
                    "none": lambda d: False,
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "enumerated policies",
                r"J_{\mathrm{return}} = J_{\mathrm{sequence}} \text{ for } f = -c\log u + \kappa(u-1)",
                _check_enumerated,
                (0, -1),
                {"u log u in place of -log u": (1, 1)},
            ),
        ),
    )


# T6c: both objectives of the reverse KL.


def _both_objectives(tree: RationalTree, gamma: Fraction = ONE) -> Iterator[tuple[Linear, Linear, object]]:
    """The sum over tokens and the divergence of whole sequences: their values, then their slopes in each logit."""
    yield tree.value("token_return", gamma).value, tree.value("sequence").value, "value"
    yield from zip(gradient_of(tree, "token_return", gamma), gradient_of(tree, "sequence"), tree.logits, strict=True)


def _check_chain_rule(claim: tuple[str, Fraction]) -> Cases:
    """Values and gradients of both objectives, in intervals."""
    divergence = divergences.divergence(claim[0])
    for tree in trees():
        for summed, whole, entry in _both_objectives(tree, claim[1]):
            yield overlap(summed.enclosed(divergence), whole.enclosed(divergence), tree, entry)


def _check_long_chains(claim: tuple[str, Fraction]) -> Cases:
    """Both objectives at 60 tokens, by two dynamic programmes."""
    for eos in (None, 0):
        pair = MarkovPolicy.random(4, 60, eos=eos, seed=1), MarkovPolicy.random(4, 60, eos=eos, seed=2)
        for of in (exact_gradient, exact_value):
            summed: Any = of(*pair, claim[0], "token_return", float(claim[1]))
            yield close(summed, of(*pair, claim[0], "sequence"), f"eos {eos}", of.__name__)


# T6h: which generators add up.


def _is_reverse(divergence: Divergence) -> bool:
    r"""$f = -c\log u + k(u-1)$, that is $u^2 f''$ constant."""
    return not _curvature(divergence).free_symbols


@functools.cache
def _curvature(divergence: Divergence) -> Any:
    u = sympy.Symbol("u", positive=True)
    f = divergence.expr.subs(divergences.symbol(), u)
    return sympy.simplify(u**2 * sympy.diff(f, u, 2))


@functools.cache
def _everyone() -> tuple[Divergence, ...]:
    """The catalogue, and scales and gauges of both KL divergences."""
    u = divergences.symbol()
    basis = [divergences.divergence(name).expr for name in ("reverse_kl", "forward_kl", "chi2")] + [u - 1]
    made = {
        name: sympy.Add(*(sympy.Rational(c) * f for c, f in zip(of, basis, strict=True))) for name, of in _MADE.items()
    }
    return (*catalogue(), *(Divergence.from_expr(f, name) for name, f in made.items()))


@functools.cache
def _sides(divergence: Divergence) -> list[tuple[Any, Any, RationalTree, object]]:
    """Intervals around both objectives and around each entry of their gradients, with the tree and the entry."""
    return [
        (summed.enclosed(divergence), whole.enclosed(divergence), tree, entry)
        for tree in (trees()[0], trees()[3])
        for summed, whole, entry in _both_objectives(tree)
    ]


def _check_coincide(rule: Rule) -> Cases:
    """Where the rule says so, both sides agree to 1e-40 and are not all zero; elsewhere some entry differs for sure."""
    for divergence in _everyone():
        sides = _sides(divergence)
        if rule(divergence):
            yield holds(any(a.a > 0 or a.b < 0 for a, *_ in sides), divergence, "not all zero")
            for summed, whole, tree, entry in sides:
                yield overlap(summed, whole, divergence, tree, entry)
        else:
            yield holds(any(not a.a <= b.b or not b.a <= a.b for a, b, *_ in sides), divergence, "they differ")


def _check_one_branch(claim: tuple[int, int]) -> Cases:
    r"""$J_{sequence} - J_{return} = P(x)\,E[f(xY) - f(x) - f(Y)]$ if the models differ after one token, f free."""
    for (p, q), (start, goal) in itertools.product(rational_distributions(), repeat=2):
        size = len(start)
        if len(p) != size:
            continue
        student: dict[History, Distribution] = {(): start, **{(a,): p for a in range(size)}}
        teacher: dict[History, Distribution] = {(): goal, **{(a,): q if a == 0 else p for a in range(size)}}
        tree = RationalTree(student, teacher, {}, tuple(itertools.product(range(size), repeat=2)), 2, None)
        x = Dual(goal[0] / start[0])
        brackets = []
        for a, ratio in zip(p, ratios(p, q), strict=True):
            y = Dual(ratio)
            bracket = (x * y).f() - x.f().scaled(Fraction(claim[0])) - y.f().scaled(Fraction(claim[1]))
            brackets.append(bracket.scaled(start[0] * a))
        gap = tree.value("sequence").value - tree.value("token_return").value
        yield same(gap, total(brackets).value, p, q, start, goal)


def _combinations(sign: int, power: int) -> Iterator[tuple[int, Divergence]]:
    r"""Some $\kappa$ with the divergence of $\pm c\,u^a\log u + \kappa(u-1)$."""
    u = divergences.symbol()
    for c, kappa in ((1, 1), (3, -2)):
        f = sign * c * u**power * sympy.log(u) + kappa * (u - 1)
        yield kappa, Divergence.from_expr(f, f"c {c}, kappa {kappa}")


def _check_equation(claim: tuple[int, int, int]) -> Cases:
    r"""$f(xy) = f(x) + f(y) + \kappa(x-1)(y-1)$ for $f = -c\log u + \kappa(u-1)$, in intervals."""
    sign, power, leading = claim
    for kappa, f in _combinations(leading, power):
        for x, y in itertools.product(RATIOS, repeat=2):
            of_product, of_x, of_y = (Linear({(0, at): ONE}).enclosed(f) for at in (x * y, x, y))
            summed = of_x + of_y + interval(sign * kappa * (x - 1) * (y - 1))
            yield overlap(summed, of_product, f, f"x {x}", f"y {y}")


def _check_enumerated(claim: tuple[int, int]) -> Cases:
    r"""Values and gradients of both objectives for $-c\,u^a\log u + \kappa(u-1)$, in float64."""
    power, sign = claim
    for _, f in _combinations(sign, power):
        for pair in pairs():
            for of in (exact_value, exact_gradient):
                summed: Any = of(*pair, f, "token_return")
                yield close(summed, of(*pair, f, "sequence"), f, pair, of.__name__)


# The derivations.


def _step_log() -> bool:
    x, y = sympy.symbols("x y", positive=True)

    def f(u: sympy.Expr) -> sympy.Expr:
        return -sympy.log(u)

    def w(u: sympy.Expr) -> sympy.Expr:
        return -1 - f(u)

    # The weights agree on the first token and differ by log x on the second, whose history determines x.
    gaps = [sympy.expand_log(w(x * y) - each) for each in (w(x) - f(y), w(y))]
    return gaps == [0, sympy.log(x)]


def _step_two_points() -> bool:
    """For mean-one distributions on two points the equation makes the slopes from 1 equal: `g(y) = k (y - 1)`."""
    y1, y2, g1, g2 = sympy.symbols("y_1 y_2 g_1 g_2")
    chance = (y2 - 1) / (y2 - y1)
    has_mean_one = sympy.simplify(chance * y1 + (1 - chance) * y2 - 1) == 0
    solved = sympy.solve(chance * g1 + (1 - chance) * g2, g2)[0]
    return has_mean_one and sympy.simplify(solved / (y2 - 1) - g1 / (y1 - 1)) == 0


def _step_exchange() -> bool:
    """`k(x)(y-1) = k(y)(x-1)` is solved by `k(x) = κ(x-1)` only."""
    x, y, kappa = sympy.symbols("x y kappa")
    k = sympy.Function("k")
    fixed = sympy.solve(k(x) * (y - 1) - kappa * (y - 1) * (x - 1), k(x))[0]  # κ stands for k(y)/(y-1)
    return sympy.simplify(fixed - kappa * (x - 1)) == 0


def _step_gauge() -> bool:
    """Subtracting `κ(u-1)` turns the equation into Cauchy's."""
    x, y, kappa = sympy.symbols("x y kappa", positive=True)
    F = sympy.Function("F")

    def f(u: sympy.Expr) -> sympy.Expr:
        return F(u) + kappa * (u - 1)

    left = f(x * y) - f(x) - f(y) - kappa * (x - 1) * (y - 1)
    return sympy.expand(left - (F(x * y) - F(x) - F(y))) == 0


def _step_cauchy() -> bool:
    """The slope of Cauchy's equation at `y = 1` is `x F'(x) = F'(1)`, whose solution is a logarithm."""
    x, y, c = sympy.symbols("x y c", positive=True)
    F = sympy.Function("F")
    log_solves = sympy.expand(sympy.expand_log(sympy.log(x * y) - sympy.log(x) - sympy.log(y))) == 0
    found = sympy.dsolve(x * F(x).diff(x) + c, F(x), ics={F(1): 0})
    convex = sympy.diff(-c * sympy.log(x), x, 2).is_positive
    return log_solves and sympy.simplify(found.rhs + c * sympy.log(x)) == 0 and bool(convex)
