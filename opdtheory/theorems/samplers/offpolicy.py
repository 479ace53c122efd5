"""T8 and T8b: rollouts of another policy: importance weights, the bias without them, and the k2 loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import sympy
from mpmath import iv
from torch import Tensor

from opdtheory.exact import TabularPolicy, exact_gradient
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    autograd_gradient,
    distribution,
    rational_distributions,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    in_logits,
    intervals,
    mean_gradient,
    minus,
    ratios,
    row_gradient,
    score,
    simplex,
    three_atoms,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.samplers.behaviors import behaviors, one_step
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

OfAtom = Callable[[Any, Any, Any, Any], Any]


def theorems() -> list[Theorem]:
    """T8 and T8b."""
    return [_importance_weights(), _fixed_point()]


def _importance_weights() -> Theorem:
    return Theorem(
        number="T8",
        name="rollouts of another policy",
        meaning=(
            r"Rollouts often come from another policy $\mu$: an older student, or an inference engine whose"
            r" probabilities differ. The factor $p/\mu$ brings back the exact gradient, and without it the bias is"
            r" known. Putting $\mu$ for $p$ inside the weight instead, without the factor, works for the forward KL"
            r" alone, in the sense that the hypotheses spell out."
        ),
        statement=(
            r"-E_\mu\big[\tfrac{p}{\mu}\,w(q/p)\,s\big] = \nabla D_f;\quad"
            r" -E_\mu[w(q/p)\,s] - \nabla D_f = -E_p\big[(\tfrac{\mu}{p} - 1)\,w\,s\big];\quad"
            r" E_\mu[w(q/\mu)\,s] = E_p[w(q/p)\,s] \text{ for the forward KL alone}"
        ),
        hypotheses=(
            "there is one step; over several steps the ratio is the product of the ratios up to and including the"
            " token, for the objective `token_local`",
            r"$\mu > 0$ where $p$ is",
            r"'alone' is meant up to scale, with the weight $u$ itself and no importance weight, for all $q$ and"
            r" $\mu$; with $u + c$ the two sides differ by $c\,E_\mu[s]$, which is not zero off-policy",
            "this 'alone' holds under each $p$ on three tokens or more, and on two tokens under each $p$ but the"
            " uniform one, where $|u - 1|$ needs no ratio either",
        ),
        source="importance sampling; the biases derived here",
        advice=(
            r"Weight by the ratio $p/\mu$ of the prefix; for the forward KL on one step $q/\mu$ needs no other ratio."
        ),
        derivation=(
            Step(
                r"\mu \cdot \tfrac{p}{\mu} = p",
                r"token by token, the ratio turns an expectation under $\mu$ into one under $p$, whatever the weights"
                r" and the scores are. The gradient under $p$ is T1",
                _importance,
            ),
            Step(
                r"-E_\mu[w\,s] + E_p[w\,s] = -E_p[(\tfrac{\mu}{p} - 1)\,w\,s]",
                "collect the terms of each token. The sign is that of the gradient of a loss",
                _bias,
            ),
            Step(
                r"\mu\,w(q/\mu) = p\,w(q/p) + d\,p \text{ at every token, for all } \mu \iff w = c\,u",
                r"in the logits, $\sum_a m_a s_a$ is the same for two sets of masses $m_a$ exactly if they differ by"
                r" a multiple of $p$; $d$ is that multiple, the same at every token. With three tokens or more, move"
                r" $\mu$ between two of them: a third one's equation fixes $d$, so the slope in $\mu$, which is"
                r" $w - u w'$, vanishes, and this leaves the multiples of $u$. Conversely, for $w = u$ both sides are"
                r" $q$",
                _linear_needs_no_ratio,
                in_words=True,
            ),
            Step(
                r"V = 2:\ \partial_{\mu_1}\big(p_2\,\mu_1 w(u_1) - p_1\,\mu_2 w(u_2)\big) = p_2\,g(u_1) +"
                r" p_1\,g(u_2),\ g = w - u w',\ u = q/\mu",
                r"with two tokens, $d$ may depend on $\mu$. Eliminating it leaves one condition: this slope vanishes"
                r" for all $u_1 < 1 < u_2$. With the two ratios exchanged, $p_2\,g(u_2) + p_1\,g(u_1)$ vanishes too."
                r" So $g = 0$ unless $p_1 = p_2$, where $g(u_1) = -g(u_2)$ remains, as for $|u - 1|$",
                _two_tokens,
                in_words=True,
            ),
            Step(
                r"p\log\tfrac{q}{\mu} = p\log\tfrac{q}{p} + p\log\tfrac{p}{\mu}",
                r"the logarithm splits in two. For the reverse KL, $q/\mu$ in place of $q/p$, under the ratio"
                r" $p/\mu$, thus descends $\mathrm{KL}(p\|q) - \mathrm{KL}(p\|\mu)$",
                _reverse_with_mu,
            ),
        ),
        identities=(
            Identity(
                "importance weight in fractions",
                r"E_\mu[\tfrac{p}{\mu} w s] = E_p[w s]",
                _check_one_step,
                lambda p, q, mu, w: p / mu * w,
                {
                    "no ratio": lambda p, q, mu, w: w,
                    "ratio inverted": lambda p, q, mu, w: mu / p * w,
                    "teacher's ratio": lambda p, q, mu, w: q / mu * w,
                },
                "exact",
            ),
            Identity(
                "bias without the ratio",
                r"-E_\mu[w s] + E_p[w s] = -E_p[(\tfrac{\mu}{p} - 1) w s]",
                _check_bias,
                lambda p, q, mu, w: (mu / p - 1) * w,
                {
                    "sign flipped": lambda p, q, mu, w: (1 - mu / p) * w,
                    "ratio inverted": lambda p, q, mu, w: (p / mu - 1) * w,
                    "-1 dropped": lambda p, q, mu, w: mu / p * w,
                    "unbiased": lambda p, q, mu, w: 0 * w,
                },
                "exact",
            ),
            Identity(
                "library, stale student and perturbed engine",
                r"E_\mu[\textstyle\prod_{m\le n}\rho_m\, w_n s_n] = E_p[w_n s_n]",
                _check_library,
                "prefix",
                {"no ratio": None, "the token's ratio alone": "token"},
            ),
            Identity(
                "the whole rollout's ratio",
                r"E_\mu[\textstyle\prod_m \rho_m\, w_n s_n] = E_p[w_n s_n]",
                _check_library,
                "sequence",
                {"no ratio": None},
            ),
            Identity(
                "q/mu without a ratio",
                r"E_\mu[w(q/\mu) s] = E_p[w(q/p) s]",
                _check_other_ratio,
                {"forward_kl": True, "chi2": False, "neyman_chi2": False, "le_cam": False},
                {
                    "chi2 as well": {"chi2": True},
                    "Le Cam as well": {"le_cam": True},
                    "not the forward KL": {"forward_kl": False},
                },
                "exact",
            ),
            Identity(
                "q/mu without a ratio, |u - 1|",
                r"E_\mu[|q/\mu - 1|\, s] = E_p[|q/p - 1|\, s]\ \forall q, \mu \iff p = (\tfrac12, \tfrac12)",
                _check_absolute,
                lambda p: len(p) == 2 and p[0] == p[1],
                {
                    "under no student": lambda p: False,
                    "under every student of two tokens": lambda p: len(p) == 2,
                    "under every uniform student": lambda p: len(set(p)) == 1,
                },
                "exact",
            ),
            Identity(
                "a constant in the weight counts",
                r"E_\mu[(q/\mu + c) s] - E_p[(q/p + c) s] = c\,(\mu - p)",
                _check_constant,
                lambda c, apart: [c * x for x in apart],
                {
                    "any gauge will do": lambda c, apart: [0 * x for x in apart],
                    "sign flipped": lambda c, apart: [-c * x for x in apart],
                },
                "exact",
            ),
            Identity(
                "q/mu under the ratio, reverse KL",
                r"-E_\mu[\tfrac{p}{\mu}\log\tfrac{q}{\mu}\,s] = \nabla \mathrm{KL}(p\|q) - \nabla \mathrm{KL}(p\|\mu)",
                _check_reverse_with_mu,
                minus,
                {
                    "the same as q/p": lambda to_teacher, to_mu: to_teacher,
                    "sign flipped": lambda to_teacher, to_mu: [a + b for a, b in zip(to_teacher, to_mu, strict=True)],
                },
                "rigorous",
                1e-40,
            ),
        ),
    )


def _fixed_point() -> Theorem:
    return Theorem(
        number="T8b",
        name="the gauge matters off-policy",
        meaning=(
            r"On-policy a constant in the weight changes nothing but the variance. Off-policy and without a ratio it"
            r" moves the student even where it equals the teacher, unless the weight is centred, $w_f(1) = 0$. The k2"
            r" loss, $\tfrac12\log^2 u$, has the centred weight $\log u$; its gradient misses that of the reverse KL"
            r" by a known bias."
        ),
        statement=(
            r"p = q:\ -E_\mu[w_f(u)\,s] = -w_f(1)\,(\mu - q);\quad"
            r" \nabla E_\mu[\tfrac12\log^2 u] = -E_\mu[\log u\,s] = \nabla \mathrm{KL}(p\|q) -"
            r" E_p\big[(\tfrac{\mu}{p} - 1)\log u\,s\big]"
        ),
        hypotheses=("there is one softmax row", "no importance weight is used", r"$\mu$ is held fixed"),
        source="derived here",
        advice=(
            r"Where you have no ratios, centre the weight: the teacher then stays a fixed point off-policy, which it"
            r" is not under the reverse KL's $\log u - 1$ or the forward KL's $u$."
        ),
        derivation=(
            Step(
                r"E_\mu[s] = \mu - p",
                "a constant is a baseline under $p$ only, because under any other policy the score of a softmax row"
                " has another mean. At $p = q$ the weight is the constant $w_f(1) = f'(1)$, which gives the first"
                " claim",
                _score_under_mu,
            ),
            Step(
                r"\partial_{\log p}\,\tfrac12(\log q - \log p)^2 = -\log u",
                r"the slope of one token's term shows that the k2 loss has the reverse KL's centred weight. The loss"
                r" is smallest where $p = q$ on the support of $\mu$. Its bias is that of T8 with $w = \log u$",
                _k2_slope,
            ),
        ),
        identities=(
            Identity(
                "drift at the teacher",
                r"p = q:\ -E_\mu[w_f(u) s] = -w_f(1)(\mu - q)",
                _check_at_teacher,
                lambda at_one, apart: -at_one * apart,
                {"sign flipped": lambda at_one, apart: at_one * apart, "none": lambda at_one, apart: 0 * apart},
                "rigorous",
                1e-40,
            ),
            Identity(
                "k2 loss off-policy",
                r"\nabla E_\mu[\tfrac12\log^2 u] - \nabla \mathrm{KL}(p\|q) = -E_p[(\tfrac{\mu}{p} - 1)\log u\; s]",
                _check_k2,
                lambda p, mu: mu / p - 1,
                {"unbiased": lambda p, mu: 0 * p, "sign flipped": lambda p, mu: 1 - mu / p},
            ),
            Identity(
                "what it descends",
                r"E_\mu[\tfrac12\log^2(q/p)],\ \mu \text{ fixed}",
                _check_k2_objective,
                lambda log_p, log_q, log_mu: (log_mu.exp() * (log_q - log_p).square()).sum() / 2,
                {
                    "the reverse KL": lambda log_p, log_q, log_mu: (log_p.exp() * (log_p - log_q)).sum(),
                    "under p": lambda log_p, log_q, log_mu: (log_p.exp() * (log_q - log_p).square()).sum() / 2,
                },
            ),
        ),
    )


# In fractions: a third distribution samples.


def _triples() -> Iterator[tuple[Distribution, Distribution, Distribution]]:
    """Student, teacher and sampler: the student's probabilities reversed, and other distributions of that size."""
    distributions = rational_distributions()
    for p, q in distributions:
        if p != p[::-1]:
            yield p, q, p[::-1]
        yield from ((p, q, mu) for mu, _ in distributions if len(mu) == len(p) and mu != p)


def _weighted() -> Iterator[tuple[str, Distribution, Distribution, Distribution, list[Fraction]]]:
    for name in RATIONAL:
        for p, q, mu in _triples():
            yield name, p, q, mu, weights(name, p, q)


def _check_one_step(factor: OfAtom) -> Cases:
    r"""$E_\mu[\rho\, w s] = E_p[w s]$; the factor is a function of p, q, mu and w."""
    for name, p, q, mu, w in _weighted():
        values = [factor(*each) for each in zip(p, q, mu, w, strict=True)]
        yield same(mean_gradient(p, values, mu), mean_gradient(p, w), name, p, q, mu)


def _check_bias(factor: OfAtom) -> Cases:
    r"""Loss gradient from $\mu$ without a ratio, minus the exact one, is $-E_p[(\mu/p - 1) w s]$."""
    for name, p, q, mu, w in _weighted():
        values = [factor(*each) for each in zip(p, q, mu, w, strict=True)]
        yield same(minus(mean_gradient(p, w, mu), mean_gradient(p, w)), mean_gradient(p, values), name, p, q, mu)


def _check_other_ratio(agrees: dict[str, bool]) -> Cases:
    r"""Whether $E_\mu[w(q/\mu) s] = E_p[w(q/p) s]$ for every triple, without any importance weight, in fractions."""
    for name, expected in agrees.items():
        equal = [
            mean_gradient(p, weights(name, mu, q), mu) == mean_gradient(p, weights(name, p, q))
            for p, q, mu in _triples()
        ]
        yield holds(all(equal) == expected, name)


def _check_absolute(needs_no_ratio: Callable[[Distribution], bool]) -> Cases:
    r"""Under which students q/mu needs no ratio for $|u - 1|$, alone or with the forward KL's weight, in fractions."""
    uniform = [distribution(*[1] * size) for size in (2, 3, 4)]
    others = [p for pair in rational_distributions() for p in pair]
    for p in (*uniform, *others):
        matching = [each for each in others if len(each) == len(p)]
        for slope in (0, 3):

            def mean(mu: Distribution, q: Distribution, p: Distribution = p, slope: int = slope) -> list[Fraction]:
                return mean_gradient(p, [abs(u - 1) + slope * u for u in ratios(mu, q)], mu)

            agrees = all(mean(mu, q) == mean(p, q) for q in matching for mu in matching)
            yield holds(agrees == needs_no_ratio(p), p, f"|u - 1| + {slope} u")


def _check_constant(claim: Callable[[Fraction, list[Fraction]], list[Fraction]]) -> Cases:
    r"""The forward KL's weight in another gauge, with q/mu and without an importance weight, in fractions."""
    for p, q, mu in _triples():
        apart = [m - x for m, x in zip(mu, p, strict=True)]
        for c in (Fraction(-1), Fraction(1, 2)):
            other = mean_gradient(p, [y / m + c for y, m in zip(q, mu, strict=True)], mu)
            own = mean_gradient(p, [y / x + c for y, x in zip(q, p, strict=True)])
            # `mean_gradient` is that of the loss, minus the expectation of weight times score.
            yield same([-x for x in minus(other, own)], claim(c, apart), p, q, mu, f"c {c}")


def _check_reverse_with_mu(gradient: Callable[[list[Any], list[Any]], list[Any]]) -> Cases:
    r"""$-E_\mu[\frac p\mu \log\frac q\mu\, s]$ against gradients of $KL(p\|q)$ and $KL(p\|\mu)$, enclosed."""
    for student, teacher, behavior in _triples():
        p, q, mu = intervals(student), intervals(teacher), intervals(behavior)
        found = mean_gradient(p, [a / m * iv.log(b / m) for a, b, m in zip(p, q, mu, strict=True)], mu)
        slopes = [in_logits(p, [iv.log(a / b) for a, b in zip(p, other, strict=True)]) for other in (q, mu)]
        for k, (left, right) in enumerate(zip(found, gradient(*slopes), strict=True)):
            yield overlap(left, right, student, teacher, behavior, f"logit {k}")


def _check_at_teacher(value: Callable[[Any, Any], Any]) -> Cases:
    r"""$-E_\mu[w_f(u) s]$ at $p = q$, enclosed: where an off-policy loss without a ratio would move the teacher."""
    for name in SMOOTH:
        for _, q, mu in _triples():
            w = weights_enclosed(name, q, q)
            found = mean_gradient(intervals(q), w, intervals(mu))
            for k, (left, apart) in enumerate(zip(found, intervals(minus(mu, q)), strict=True)):
                yield overlap(left, value(w[0], apart), name, q, mu, f"logit {k}")


# As black boxes: a stale student and a perturbed inference engine.


def _check_library(importance: str | None) -> Cases:
    """The library's importance weights over one and several steps."""
    for name in ("reverse_kl", "forward_kl"):
        for triple in behaviors():
            yield close(triple.gradient("opd_plus", name, importance), exact_gradient(*triple.pair, name), name, triple)


def _check_k2(factor: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """Off-policy bias of the k2 loss as a black box; on-policy it has none."""
    for triple in one_step():
        log_p, log_q, log_mu = triple.rows
        p, exact = log_p.exp(), exact_gradient(*triple.pair, "reverse_kl")[0]
        on_policy = triple._replace(behavior=triple.student)
        yield close(on_policy.gradient("k2_loss")[0], exact, triple, "on-policy")
        bias = row_gradient(p, factor(p, log_mu.exp()) * (log_q - log_p))
        yield close(triple.gradient("k2_loss")[0] - exact, bias, triple, "bias")


def _check_k2_objective(value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Cases:
    """What the k2 loss descends off-policy, differentiated by autograd with the sampling distribution held fixed."""
    for triple in one_step():
        _, log_q, log_mu = triple.rows

        def objective(student: TabularPolicy, log_q: Tensor = log_q, log_mu: Tensor = log_mu) -> Tensor:
            return value(student.logits[0].log_softmax(-1), log_q, log_mu)

        yield close(triple.gradient("k2_loss"), autograd_gradient(triple.pair, objective), triple)


# The derivation.


def _importance() -> bool:
    (p, w, s), mu = three_atoms(), sympy.symbols("mu0:3", positive=True)
    gap = sum(m * (a / m) * x * v[0] - a * x * v[0] for a, x, v, m in zip(p, w, s, mu, strict=True))
    return sympy.simplify(gap) == 0


def _bias() -> bool:
    (p, w, s), mu = three_atoms(), sympy.symbols("mu0:3", positive=True)
    gap = sum(-m * x * v[0] + a * x * v[0] + a * (m / a - 1) * x * v[0] for a, x, v, m in zip(p, w, s, mu, strict=True))
    return sympy.simplify(gap) == 0


def _linear_needs_no_ratio() -> bool:
    r"""The slope of $\mu\,w(q/\mu)$ in $\mu$ is $w - u w'$: zero for $c u$, and the constant for $c u + d$."""
    q, mu, u = sympy.symbols("q mu u", positive=True)
    c, d = sympy.symbols("c d")
    w = sympy.Function("w")
    slope = sympy.diff(mu * w(q / mu), mu).doit() - (w(u) - u * sympy.diff(w(u), u)).subs(u, q / mu).doit()
    solutions = sympy.dsolve(w(u) - u * sympy.diff(w(u), u), w(u)).rhs
    affine = c * u + d
    return (
        sympy.simplify(slope) == 0
        and sympy.simplify(solutions / u).free_symbols.isdisjoint({u})
        and sympy.simplify(affine - u * sympy.diff(affine, u) - d) == 0
    )


def _two_tokens() -> bool:
    """The slope, that two exchanged ratios leave g = 0 for unequal probabilities, and that |u - 1| has opposite g."""
    p1, q1, m1, u = sympy.symbols("p1 q1 m1 u", positive=True)
    w = sympy.Function("w")

    def g(at: sympy.Expr) -> sympy.Expr:
        return (w(u) - u * sympy.diff(w(u), u)).subs(u, at).doit()

    p2, q2, m2 = 1 - p1, 1 - q1, 1 - m1
    slope = sympy.diff(p2 * m1 * w(q1 / m1) - p1 * m2 * w(q2 / m2), m1).doit()
    exchanged = sympy.Matrix([[p2, p1], [p1, p2]]).det()
    absolute = [x - u * sympy.diff(x, u) for x in (1 - u, u - 1)]
    return (
        sympy.simplify(slope - p2 * g(q1 / m1) - p1 * g(q2 / m2)) == 0
        and sympy.solve(exchanged, p1) == [sympy.Rational(1, 2)]
        and sympy.expand(sum(absolute)) == 0
    )


def _reverse_with_mu() -> bool:
    p, q, mu = sympy.symbols("p q mu", positive=True)
    gap = p * sympy.log(q / mu) - p * sympy.log(q / p) - p * sympy.log(p / mu)
    return sympy.simplify(sympy.expand_log(gap, force=True)) == 0


def _score_under_mu() -> bool:
    r"""$E_\mu[s_a] = \mu - p$ for softmax scores, which needs of $\mu$ only that it sums to one."""
    mu, p = simplex("m"), sympy.symbols("p0:3")
    return all(sympy.expand(sum(mu[a] * score(p, a)[k] for a in range(3)) - mu[k] + p[k]) == 0 for k in range(3))


def _k2_slope() -> bool:
    x, log_q = sympy.symbols("x y", real=True)
    return sympy.simplify(sympy.diff((log_q - x) ** 2 / 2, x) + (log_q - x)) == 0
