"""T7h: lower bounds on the variance of sampled forward-KL estimators."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv
from torch import Tensor

from opdtheory.theorems.instances.cases import distribution, interval, pairs, rational_distributions, sampled_variance
from opdtheory.theorems.instances.one_sample import (
    OfPair,
    centred,
    chi2,
    distance,
    dot,
    expectation,
    first_rows,
    minus,
    optimal_baseline,
    ratios,
    score,
    score_norms,
    second_moment,
    simplex,
    square,
    three_atoms,
    variance,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, furthest, holds, same

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T7h."""
    theorem = Theorem(
        number="T7h",
        name="how quiet a forward-KL estimator can be",
        meaning=(
            r"The variance of a sampled estimate of the forward KL's gradient cannot be made as small as one likes."
            r" No constant baseline brings it below a bound that grows with $\chi^2(q\|p)$. An unbiased estimator"
            r" that sees the teacher at the sampled token only may be quiet for one teacher, but its standard"
            r" deviations for the teacher $q$ and for a teacher that equals the student have a sum that is bounded"
            r" from below."
        ),
        statement=(
            r"\mathrm{Var}[-(u-b)\,s] \ge \chi^2(q\|p)\,(1+|p|^2) - 3|p-q|^2 - \tfrac{4(|p|^2 - p\cdot q)^2}{1-|p|^2}"
            r" \ge \tfrac{V}{V-1}(1-\max p)^2\,\chi^2(q\|p) - |p-q|^2;\quad"
            r" \mathrm{sd}_q(T) + \mathrm{sd}_p(T) \ge \sqrt{\chi^2(q\|p)\,(1-|r|^2) - |p-q|^2},\ r_a ="
            r" \tfrac{p_a(u_a-1)^2}{\chi^2(q\|p)}"
        ),
        hypotheses=(
            "there is one softmax row of $V$ tokens with positive probabilities, one token $y$ is sampled from $p$,"
            " and the gradient is in the logits",
            r"the first bound holds for every unbiased estimator $-A(y)\,s_y$, since $A = u - b$ is the only such form",
            r"the second bound is for an estimator $T(y, q_y)$ that sees the teacher at the sampled token only, is"
            r" unbiased for every teacher and differentiable in $q_y$, with $V \ge 3$; $\mathrm{sd}_q$ is its"
            r" standard deviation when the teacher is $q$, and $\mathrm{sd}_p$ when the teacher equals the student",
            r"for any other family, $\mathrm{tr}\,\mathrm{Var}_r(s) - |E_q s|^2/\chi^2(q\|p)$ replaces"
            r" $1 - |r|^2 - |p-q|^2/\chi^2(q\|p)$",
            "an estimator that sees the teacher's whole row may be constant, so that no bound holds for it",
        ),
        source="derived here; two teachers are compared as two parameters are by Hammersley, Chapman and Robbins",
        advice=(
            r"Where $\chi^2$ is large, no constant makes a sampled forward KL quiet: sum over the vocabulary, or take"
            r" another divergence. Of the estimators that are at rest at the teacher, $(u-1)(s - \kappa)$, with"
            r" $\kappa$ the mean score under $r$, is the quietest."
        ),
        derivation=(
            Step(
                r"\mathrm{Var}[-(u-1)\,s] = \chi^2\,(1+|p|^2) - 3|p-q|^2;\quad"
                r" b^* - 1 = \tfrac{2(|p|^2 - p\cdot q)}{1-|p|^2}",
                r"softmax scores have the norms $|s_a|^2 = 1 - 2p_a + |p|^2$, and $\chi^2$ is short for"
                r" $\chi^2(q\|p)$. The best constant $b^*$ saves T7a's excess $(b^* - 1)^2\,E_p|s|^2$, where"
                r" $E_p|s|^2 = 1 - |p|^2$, which gives the first bound",
                _centred_closed_form,
            ),
            Step(
                r"|s_a|^2 \ge \tfrac{V}{V-1}(1-p_a)^2;\quad E_p[(u-b)^2] \ge \chi^2",
                "the first follows from Cauchy-Schwarz on the other $V - 1$ probabilities; the machine confirms it"
                " for $V = 3$, where the gap is a square. The second follows from $E_p u = 1$. Together they bound"
                " the second moment of the gradient, and $|p-q|^2$ is the square of its mean",
                _norm_floor,
                in_words=True,
            ),
            Step(
                r"T(a, q_a) = -u_a (s_a - \kappa) + d_a/p_a,\quad \textstyle\sum_a d_a = -\kappa",
                r"an estimator that is unbiased for every $q$ has $\sum_a \phi_a(q_a) = 0$ on the simplex, where"
                r" $\phi_a = p_a T + q_a s_a$. Moving mass from $b$ to $a$ gives $\phi_a'(q_a) = \phi_b'(q_b)$; with"
                r" a third token both arguments are free, so $\phi_a'$ is one constant vector $\kappa$, and $d_a$ is"
                r" $\phi_a$ at zero. The machine confirms it for polynomials up to degree 4; two tokens leave more"
                r" freedom",
                _only_affine,
                in_words=True,
            ),
            Step(
                r"T_q - T_{q'} = -(u - u')(s - \kappa)",
                r"compare two teachers, $q$ and $q'$, under the same student: $d$ cancels. For $q' = p$ the"
                r" difference is $-(u-1)(s-\kappa)$, and its mean is $p - q$",
                _difference_of_teachers,
            ),
            Step(
                r"E_p[(u-1)^2|s-\kappa|^2] = \chi^2\,(\mathrm{tr}\,\mathrm{Var}_r(s) + |\kappa - E_r s|^2)",
                r"complete the square under $r$, for any scores. The smallest value is at the mean score,"
                r" $\kappa = E_r s$",
                _tilted_square,
            ),
            Step(
                r"\mathrm{tr}\,\mathrm{Var}_r(s) = 1 - |r|^2",
                "a softmax score is $s_a = e_a - p$, a unit vector less a constant, so that its spread is that of the"
                " unit vectors",
                _softmax_spread,
            ),
            Step(
                r"\mathrm{sd}(T_q - T_p) \le \mathrm{sd}(T_q) + \mathrm{sd}(T_p)",
                r"this is the triangle inequality in $L^2$; the machine checks it in two dimensions by Lagrange's"
                r" identity. By the three steps before it, the variance on the left is at least"
                r" $\chi^2\,(1-|r|^2) - |p-q|^2$, which proves the second bound",
                _triangle,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "variance of the centred estimator",
                r"\mathrm{Var}[-(u-1)s] = \chi^2(1+|p|^2) - 3|p-q|^2",
                _check_centred_variance,
                _centred_variance,
                {
                    "2 in place of 3": lambda p, q: chi2(p, q) * (1 + square(p)) - 2 * distance(p, q),
                    "|p|² dropped": lambda p, q: chi2(p, q) - 3 * distance(p, q),
                    "chi2(p||q)": lambda p, q: chi2(q, p) * (1 + square(p)) - 3 * distance(p, q),
                },
                "exact",
            ),
            Identity(
                "the library's estimator as a black box",
                r"\mathrm{Var}[-(u-1)s] = \chi^2(1+|p|^2) - 3|p-q|^2",
                _check_library,
                lambda p, q: _in_float64(p, q, 3),
                {"2 in place of 3": lambda p, q: _in_float64(p, q, 2)},
            ),
            Identity(
                "the least over constants",
                r"\min_b \mathrm{Var}[-(u-b)s] = \chi^2(1+|p|^2) - 3|p-q|^2 - 4(|p|^2 - p\cdot q)^2/(1-|p|^2)",
                _check_least,
                _least_variance,
                {
                    "centred is least": _centred_variance,
                    "4 in place of 1": lambda p, q: (
                        _centred_variance(p, q) - (square(p) - dot(p, q)) ** 2 / (1 - square(p))
                    ),
                },
                "exact",
            ),
            Identity(
                "bound for the score function",
                r"\min_b \mathrm{Var}[-(u-b)s] \ge \tfrac{V}{V-1}(1-\max p)^2\chi^2 - |p-q|^2",
                _check_score_bound,
                _score_bound,
                {
                    "|p-q|² dropped": lambda p, q: _score_bound(p, q) + distance(p, q),
                    "1 - max p dropped": lambda p, q: chi2(p, q) - distance(p, q),
                },
                "exact",
            ),
            Identity(
                "unbiased for every teacher",
                r"E_p[-u(s-\kappa) + d/p] = p - q \ \text{if}\ \textstyle\sum_a d_a = -\kappa",
                _check_family,
                Fraction(0),
                {"d summing to something else": Fraction(1, 7)},
                "exact",
            ),
            Identity(
                "there is no other",
                r"\dim\{(\phi_a): \textstyle\sum_a \phi_a(q_a) = 0\} = V \ (V \ge 3)",
                _check_dimension,
                lambda count, degree: count if count > 2 else degree + 1,
                {"two tokens as well": lambda count, degree: count, "one more": lambda count, degree: count + 1},
                "symbolic",
            ),
            Identity(
                "the least over vectors",
                r"\min_\kappa E_p[(u-1)^2|s-\kappa|^2] = \chi^2 (1 - |r|^2)",
                _check_least_over_vectors,
                _least_over_vectors,
                {
                    "|r|² dropped": chi2,
                    "κ = 0": lambda p, q: second_moment(p, [u - 1 for u in ratios(p, q)]),
                    "p in place of r": lambda p, q: chi2(p, q) * (1 - square(p)),
                },
                "exact",
            ),
            Identity(
                "bound for all unbiased estimators",
                r"(\mathrm{sd}_q + \mathrm{sd}_p)^2 \ge \chi^2(1-|r|^2) - |p-q|^2",
                _check_two_teachers,
                lambda p, q: _least_over_vectors(p, q) - distance(p, q),
                {
                    "|r|² dropped": lambda p, q: chi2(p, q) - distance(p, q),
                    "|p-q|² dropped": _least_over_vectors,
                },
                "rigorous",
            ),
        ),
    )
    return [theorem]


def _check_centred_variance(value: OfPair) -> Cases:
    for p, q in rational_distributions():
        yield same(variance(p, [u - 1 for u in ratios(p, q)]), value(p, q), p, q)


def _centred_variance(p: Sequence[Any], q: Sequence[Any]) -> Any:
    return chi2(p, q) * (1 + square(p)) - 3 * distance(p, q)


def _least_variance(p: Sequence[Any], q: Sequence[Any]) -> Any:
    return _centred_variance(p, q) - 4 * (square(p) - dot(p, q)) ** 2 / (1 - square(p))


def _in_float64(p: Tensor, q: Tensor, times: int) -> Tensor:
    """`_centred_variance` of tensors, with another factor in place of 3."""
    return ((q / p - 1).square() * p).sum() * (1 + p.square().sum()) - times * (p - q).square().sum()


def _check_library(value: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """The library's centred forward-KL estimator as a black box, one step."""
    for pair in pairs():
        row = first_rows(pair)
        p, q = (policy.logits[0][0].softmax(-1) for policy in row)
        yield close(sampled_variance("opd_plus_centred", "forward_kl", row), value(p, q), pair)


def _check_least(value: OfPair) -> Cases:
    for p, q in rational_distributions():
        u = ratios(p, q)
        best = optimal_baseline(p, u)
        yield same(variance(p, [x - best for x in u]), value(p, q), p, q)


def _check_score_bound(bound: OfPair) -> Cases:
    """No constant makes the score-function estimator quieter than the bound, which a uniform student attains."""
    for p, q in _near_and_far():
        yield holds(_least_variance(p, q) >= bound(p, q), p, q)
    for _, q in rational_distributions():
        uniform = distribution(*[1] * len(q))
        yield same(_least_variance(uniform, q), bound(uniform, q), "uniform student", q)


def _near_and_far() -> Iterator[tuple[Sequence[Fraction], Sequence[Fraction]]]:
    yield from rational_distributions()
    for rare in (Fraction(1, 100), Fraction(1, 10**6)):
        yield distribution(1 / rare, 1, 1), distribution(1, 1, 1)
        yield distribution(3 / rare, 1 / rare, 4), distribution(1, 1, 2)


def _score_bound(p: Sequence[Any], q: Sequence[Any]) -> Any:
    count = len(p)
    return Fraction(count, count - 1) * (1 - max(p)) ** 2 * chi2(p, q) - distance(p, q)


def _tilted(p: Sequence[Any], q: Sequence[Any]) -> list[Any]:
    r"""$r_a = p_a (u_a - 1)^2 / \chi^2$."""
    total = chi2(p, q)
    return [a * (u - 1) ** 2 / total for a, u in zip(p, ratios(p, q), strict=True)]


def _check_least_over_vectors(value: OfPair) -> Cases:
    r"""$\min_\kappa E_p[(u-1)^2 |s-\kappa|^2]$, each component's parabola through $-1, 0, 1$, in fractions."""
    for p, q in _near_and_far():
        u, least = ratios(p, q), Fraction(0)
        for k in range(len(p)):

            def moment(kappa: int, p: Any = p, u: Any = u, k: int = k) -> Any:
                return expectation(p, [(x - 1) ** 2 * (score(p, a)[k] - kappa) ** 2 for a, x in enumerate(u)])

            low, middle, high = moment(-1), moment(0), moment(1)
            least += middle - (high - low) ** 2 / (8 * (low + high - 2 * middle))
        yield same(least, value(p, q), p, q)


def _least_over_vectors(p: Sequence[Any], q: Sequence[Any]) -> Any:
    return chi2(p, q) * (1 - square(_tilted(p, q)))


def _members(p: Sequence[Fraction]) -> Iterator[tuple[list[Fraction], list[list[Fraction]], Sequence[Fraction], str]]:
    r"""Estimators $T_a = -u_a (s_a - \kappa) + d_a/p_a$ with $\sum_a d_a = -\kappa$: the vectors $\kappa$ and $d_a$.

    Each comes with the teacher for which it has no variance, the student itself or a uniform one, and a label.
    """
    for step in (0, 1, 3):
        kappa = [Fraction(step * k, 5) for k in range(len(p))]
        for name, quiet in (("student", p), ("uniform", distribution(*[1] * len(p)))):
            d = [[b * x for x in minus(score(p, i), kappa)] for i, b in enumerate(quiet)]
            rest = [sum(column) + c for column, c in zip(zip(*d, strict=True), kappa, strict=True)]
            d = [[x - a * r for x, r in zip(row, rest, strict=True)] for a, row in zip(p, d, strict=True)]
            yield kappa, d, quiet, f"kappa step {step}/5, quiet at {name}"


def _moments(
    p: Sequence[Fraction], q: Sequence[Fraction], kappa: list[Fraction], d: list[list[Fraction]]
) -> tuple[list[Fraction], Fraction]:
    """Mean and variance of an estimator when the teacher is q."""
    rows = [
        [-u * (s - c) + x / p[a] for s, c, x in zip(score(p, a), kappa, d[a], strict=True)]
        for a, u in enumerate(ratios(p, q))
    ]
    mean = [expectation(p, column) for column in zip(*rows, strict=True)]
    return mean, expectation(p, [square(row) for row in rows]) - square(mean)


def _check_family(offset: Fraction) -> Cases:
    """Each has the forward KL's gradient as its mean for every teacher, and no variance for one of them."""
    for p, q in rational_distributions():
        for kappa, d, quiet, label in _members(p):
            moved = [[x + offset for x in row] for row in d]
            for name, teacher in (("q", q), ("quiet teacher", quiet)):
                mean, spread = _moments(p, teacher, kappa, moved)
                yield same(mean, minus(p, teacher), p, q, label, f"mean under {name}")
            yield same(spread, 0, p, q, label, "variance")


def _check_dimension(value: Callable[[int, int], int]) -> Cases:
    r"""Polynomials $\phi_a(q_a)$ with $\sum_a \phi_a(q_a) = 0$ on the simplex: the dimension of their space."""
    for count, degree in itertools.product((2, 3, 4), (2, 4)):
        q = list(sympy.symbols(f"q0:{count - 1}"))
        q.append(1 - sum(q))
        rows = [sympy.symbols(f"c{a}_0:{degree + 1}") for a in range(count)]
        free = [c for row in rows for c in row]
        total = sum(c * x**j for x, row in zip(q, rows, strict=True) for j, c in enumerate(row))
        conditions = sympy.Poly(sympy.expand(total), *q[:-1]).coeffs()
        rank = sympy.Matrix([[sympy.diff(c, x) for x in free] for c in conditions]).rank()
        yield same(len(free) - rank, value(count, degree), f"{count} tokens", f"degree {degree}")


def _check_two_teachers(bound: OfPair) -> Cases:
    r"""$(\mathrm{sd}_q + \mathrm{sd}_p)^2$ of every member against the bound, enclosed."""
    for p, q in _near_and_far():
        for kappa, d, _, label in _members(p):
            (_, there), (_, here) = (_moments(p, teacher, kappa, d) for teacher in (q, p))
            spread = (iv.sqrt(interval(there)) + iv.sqrt(interval(here))) ** 2
            # Rounding outwards may leave equality undecided: only what is certainly below refutes.
            yield holds(not spread < interval(Fraction(bound(p, q))), p, q, label)
        # The estimator without variance at p and with the least at q attains the bound.
        kappa = [
            expectation(_tilted(p, q), column) for column in zip(*(score(p, a) for a in range(len(p))), strict=True)
        ]
        d = [[a * x for x in minus(score(p, i), kappa)] for i, a in enumerate(p)]
        mean, least = _moments(p, q, kappa, d)
        yield same(mean, minus(p, q), p, q, "mean of the quietest")
        yield same(least, bound(p, q), p, q, "variance of the quietest")


# The derivation.


def _centred_closed_form() -> bool:
    p, q = simplex("p"), simplex("q")
    u = ratios(p, q)
    best = optimal_baseline(p, u)
    shift = best - 1 - 2 * (square(p) - dot(p, q)) / (1 - square(p))
    gap = variance(p, [x - 1 for x in u]) - _centred_variance(p, q)
    return sympy.simplify(shift) == 0 and sympy.simplify(gap) == 0


def _norm_floor() -> bool:
    r"""$|s_a|^2 - \frac{K}{K-1}(1-p_a)^2$ is the spread of the other probabilities: a square, here K = 3."""
    b, c = sympy.symbols("b c", positive=True)
    p = [1 - b - c, b, c]
    gap = score_norms(p)[0] - sympy.Rational(3, 2) * (1 - p[0]) ** 2
    return sympy.expand(gap - (b - c) ** 2 / 2) == 0


def _only_affine() -> bool:
    return furthest(_check_dimension(lambda count, degree: count if count > 2 else degree + 1)) == 0


def _difference_of_teachers() -> bool:
    u, v, s, kappa, d, p = sympy.symbols("u v s kappa d p")
    return sympy.expand((-u * (s - kappa) + d / p) - (-v * (s - kappa) + d / p) + (u - v) * (s - kappa)) == 0


def _tilted_square() -> bool:
    """Three atoms, any scores: the square about κ splits into the spread under r and the distance to its mean."""
    p, _, s = three_atoms()
    m = sympy.symbols("m0:3", real=True)  # (u - 1)^2
    total = expectation(p, m)
    r = [a * x / total for a, x in zip(p, m, strict=True)]
    for k, kappa in enumerate(sympy.symbols("k0:2", real=True)):
        scores = [vector[k] for vector in s]
        centre = expectation(r, scores)
        left = expectation(p, [x * (value - kappa) ** 2 for x, value in zip(m, scores, strict=True)])
        spread = expectation(r, [(value - centre) ** 2 for value in scores])
        if sympy.simplify(left - total * (spread + (kappa - centre) ** 2)) != 0:
            return False
    return True


def _softmax_spread() -> bool:
    r"""$\mathrm{tr\,Var}_r(e_a - p) = 1 - |r|^2$."""
    r, p = simplex("r"), sympy.symbols("p0:3")
    columns = list(zip(*(score(p, a) for a in range(3)), strict=True))
    spread = sum(expectation(r, [x**2 for x in centred(r, column)]) for column in columns)
    return sympy.expand(spread - (1 - square(r))) == 0


def _triangle() -> bool:
    r"""$(a+b)^2 - |x-y|^2 = 2(ab + \langle x, y\rangle)$ for $|x| = a$, $|y| = b$, and Lagrange's identity."""
    x0, x1, y0, y1, a, b = sympy.symbols("x0 x1 y0 y1 a b", real=True)
    gap = (a + b) ** 2 - (x0 - y0) ** 2 - (x1 - y1) ** 2 - 2 * (a * b + x0 * y0 + x1 * y1)
    lagrange = (x0**2 + x1**2) * (y0**2 + y1**2) - (x0 * y0 + x1 * y1) ** 2 - (x0 * y1 - x1 * y0) ** 2
    return sympy.expand(gap - (a**2 - x0**2 - x1**2) - (b**2 - y0**2 - y1**2)) == 0 and sympy.expand(lagrange) == 0
