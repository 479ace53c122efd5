"""T16c: divergences of distributions at a temperature, and rollouts at another one."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction

import sympy
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import TabularPolicy, expected_gradient, local_gradient, random_pair
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import Pair, autograd_gradient
from opdtheory.theorems.instances.one_sample import SMOOTH, in_logits, mean_gradient, simplex, weight_of
from opdtheory.theorems.teachers.mixtures import beside, descent, raised
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap

__all__ = ["theorems"]

_TAUS = ((2.0, 2.0), (0.5, 1.5), (3.0, 1.0), (1.0, 2.0))


def theorems() -> list[Theorem]:
    """T16c."""
    return [_tempered()]


def _tempered() -> Theorem:
    return Theorem(
        number="T16c",
        name="temperatures",
        meaning=(
            r"A temperature $\tau$ on the student's logits and $\sigma$ on the teacher's leave T1 as it is, for the"
            r" softened distributions, with a factor $1/\tau$ from the chain rule. At one high temperature $\tau$ on"
            r" both, the gradient is close to $1/\tau^2$ times a difference of centred logits, which is why a factor"
            r" $\tau^2$ is customary. Rollouts drawn at another temperature than that of the scores give the score a"
            " mean, and a constant weight is then no baseline."
        ),
        statement=(
            r"\nabla_z D_f(q_\sigma\|p_\tau) = -\tfrac1\tau E_{p_\tau}[w_f(q_\sigma/p_\tau)\,s_\tau];\quad p_\tau ="
            r" \mathrm{softmax}(z/\tau),\ s_\tau = e_a - p_\tau;\quad E_{p_\tau}[s] = p_\tau - p \ne 0;\quad"
            r" \tau\to\infty:\ \tau^2\nabla_z D_f(q_\tau\|p_\tau) \to \tfrac{f''(1)}{V}\big((z - \bar z) - (z_q -"
            r" \bar z_q)\big)"
        ),
        hypotheses=(
            "there is one softmax row of $V$ tokens with logits $z$, and the teacher's logits are $z_q$; $e_a$ is the"
            " unit vector of the sampled token, and a bar is the mean over tokens",
            r"for the mean of the score $s = e_a - p$, $\tau \ne 1$ and the logits $z$ are not all equal",
            "for the limit, $f''$ is continuous at one",
        ),
        source=r"Hinton et al., arXiv 1503.02531, for the factor $\tau^2$; the rest derived here",
        advice=(
            "A temperature on both sides is the divergence of the softened distributions, and its gradient carries"
            r" $1/\tau$; the customary $\tau^2$ is a convention that keeps its size. On the teacher alone the student"
            " learns the softened teacher. Draw rollouts at the temperature of the scores, or the score has a mean."
        ),
        derivation=(
            Step(
                r"\partial_{z_b}\log p_\tau(a) = \tfrac1\tau(1_{a=b} - p_\tau(b))",
                r"apply the chain rule through $z/\tau$; the factor $1/\tau$ is all that a temperature changes in T1",
                _tempered_score,
            ),
            Step(
                r"E_{p_\tau}[e_a - p] = p_\tau - p",
                "the score $e_a - p$ has mean zero under $p$ only (T10)",
                _score_elsewhere,
            ),
            Step(
                r"w_f(1 + x) - w_f(1) = f''(1)\,x + o(x);\quad q_\tau/p_\tau - 1 = \tfrac1\tau\big((z_q - \bar z_q)"
                r" - (z - \bar z)\big) + O(\tau^{-2})",
                "the slope of the weight is $w_f' = u f''(u)$. To first order a softmax of small logits is affine,"
                " and its rows tend to $1/V$; inserted in the gradient, the two expansions give the limit",
                _hot,
            ),
        ),
        identities=(
            Identity(
                "gradient in the logits",
                r"\nabla_z D_f(q_\sigma\|p_\tau) = -\tfrac1\tau E_{p_\tau}[w_f s_\tau]",
                _check_tempered,
                lambda tau, sigma: (1 / tau, tau, sigma),
                {
                    "1/τ left out": lambda tau, sigma: (1.0, tau, sigma),
                    "1/τ squared": lambda tau, sigma: (1 / tau**2, tau, sigma),
                    "the temperatures exchanged": lambda tau, sigma: (1 / tau, sigma, tau),
                    "the student at one": lambda tau, sigma: (1 / tau, 1.0, sigma),
                },
            ),
            Identity(
                "on the teacher alone",
                r"\sigma > 0:\quad \nabla E_p[\log p - \tfrac1\sigma\log q] = \nabla\,\mathrm{KL}(p\|q^{1/\sigma}/Z)",
                _check_teacher_alone,
                lambda sigma: 1 / sigma,
                {"q itself": lambda sigma: Fraction(1), "the power inverted": lambda sigma: sigma},
                "rigorous",
                1e-40,
            ),
            Identity(
                "black box over several steps",
                r"E_p[\nabla\textstyle\sum_n D_f(q_\sigma\|p_\tau)] = \text{the exact oracle's gradient at } \tau"
                r" \text{ and } \sigma",
                _check_black_box,
                lambda tau, sigma: (tau, sigma),
                {
                    "no temperature": lambda tau, sigma: (1.0, 1.0),
                    "exchanged": lambda tau, sigma: (sigma, tau),
                    "on the teacher alone": lambda tau, sigma: (1.0, sigma),
                },
            ),
            Identity(
                "scores at another temperature than the rollouts'",
                r"-E_{p_\tau}[c\,s] = c\,(p - p_\tau)",
                _check_other_sampler,
                1.0,
                {"a constant is a baseline": 0.0, "sign flipped": -1.0},
            ),
            Identity(
                "why τ² is customary",
                r"\lim_{\tau\to\infty} \tau^2\nabla_z D_f(q_\tau\|p_\tau) = \tfrac{f''(1)}{V}\big((z - \bar z) - (z_q"
                r" - \bar z_q)\big)",
                _check_hot,
                lambda curvature, size: curvature / size,
                {
                    "f''(1) left out": lambda curvature, size: sympy.Rational(1, size),
                    "V left out": lambda curvature, size: curvature,
                    "sign flipped": lambda curvature, size: -curvature / size,
                },
                "symbolic",
            ),
        ),
    )


@functools.cache
def _one_step() -> tuple[Pair, ...]:
    return tuple(random_pair(size, 1, distance=1.0, seed=seed) for size, seed in ((3, 1), (5, 2)))


@functools.cache
def _steps() -> tuple[Pair, ...]:
    return (random_pair(3, 2, seed=3), random_pair(3, 3, eos=0, seed=4))


def _softened_value(student: TabularPolicy, teacher: TabularPolicy, name: str, tau: float, sigma: float) -> Tensor:
    """The divergence of the first rows at two temperatures, by definition."""
    log_p, log_q = (z[0] / t for z, t in ((student.logits[0], tau), (teacher.logits[0], sigma)))
    log_p, log_q = log_p.log_softmax(-1), log_q.log_softmax(-1)
    return (log_p.exp() * divergences.divergence(name).generator(log_q - log_p)).sum()


def _check_tempered(form: Callable[[float, float], tuple[float, float, float]]) -> Cases:
    """The closed form, times a factor and at two temperatures, against autograd of the definition."""
    for name in SMOOTH:
        divergence = divergences.divergence(name)
        for pair in _one_step():
            for tau, sigma in _TAUS:
                factor, ours, theirs = form(tau, sigma)
                log_p = (pair[0].logits[0] / ours).log_softmax(-1)
                weight = divergence.weight((pair[1].logits[0] / theirs).log_softmax(-1) - log_p)
                p = log_p.exp()
                claimed = -factor * p * (weight - (p * weight).sum(-1, keepdim=True))
                slope = autograd_gradient(pair, _softened_value, pair[1], name, tau, sigma)[0]
                yield close(claimed, slope, name, pair, f"tau {tau:g}, sigma {sigma:g}")


def _check_teacher_alone(power: Callable[[Fraction], Fraction]) -> Cases:
    r"""$\log p - \log q/\sigma$ as a sampled weight, without a normaliser, against the reverse KL to a power of q."""
    for label, p, q, _ in beside():
        for sigma in (Fraction(1, 2), Fraction(3, 2), Fraction(3)):
            inverse = iv.mpf(sigma.denominator) / sigma.numerator
            found = mean_gradient(p, [inverse * iv.log(y) - iv.log(x) for x, y in zip(p, q, strict=True)])
            powers = [raised(y, power(sigma)) for y in q]
            z = sum(powers, iv.mpf(0))
            claimed = descent("reverse_kl", p, [x / z for x in powers])
            for k, (left, right) in enumerate(zip(found, claimed, strict=True)):
                yield overlap(left, right, label, f"sigma {sigma}", f"logit {k}")


@functools.cache
def _softened_gradient(name: str, pair: Pair, tau: float, sigma: float) -> list[Tensor]:
    """Expected gradient of a loss over softened rows at the student's own histories, as a black box."""
    divergence = divergences.divergence(name)

    def loss(r: Rollouts) -> Tensor:
        log_p, log_q = (r.student_logits / tau).log_softmax(-1), (r.teacher_logits / sigma).log_softmax(-1)
        return r.token_sum((log_p.exp() * divergence.generator(log_q - log_p)).sum(-1))

    return expected_gradient(loss, *pair)


def _check_black_box(temperatures: Callable[[float, float], tuple[float, float]]) -> Cases:
    for name in SMOOTH:
        for pair in _steps():
            for tau, sigma in _TAUS[:3]:
                ours, theirs = temperatures(tau, sigma)
                exact = local_gradient(*pair, name, student_temperature=ours, teacher_temperature=theirs)
                where = f"tau {tau:g}, sigma {sigma:g}"
                yield close(_softened_gradient(name, pair, tau, sigma), exact, name, pair, where)


def _check_other_sampler(sign: float) -> Cases:
    """A constant weight on rollouts of the student at another temperature, as a black box."""
    for student, teacher in _one_step():
        for tau in (0.5, 2.0):
            softened = TabularPolicy([z / tau for z in student.logits])
            found = expected_gradient(lambda r: r.token_sum(-0.7 * r.student_logprobs), student, teacher, 1, softened)
            p, at_tau = (policy.logits[0].softmax(-1) for policy in (student, softened))
            yield close(found[0], sign * 0.7 * (p - at_tau), (student, teacher), f"tau {tau:g}")


def _check_hot(factor: Callable[[sympy.Expr, int], sympy.Expr]) -> Cases:
    r"""The slope at $x = 1/\tau = 0$ of $-p_a (w_a - E_p w)$, which is zero there; x times it is the gradient."""
    x, u = sympy.Symbol("x", positive=True), divergences.symbol()
    for name in (*SMOOTH, "hellinger"):
        curvature = sympy.diff(divergences.divergence(name).expr, u, 2).subs(u, 1)
        for ours, theirs in (((0, 1, 3), (2, -1, 0)), ((1, 0, -2, 1), (0, 0, 1, 5))):
            p, q = ([sympy.exp(x * z) / sum(sympy.exp(x * b) for b in row) for z in row] for row in (ours, theirs))
            w = [weight_of(name).subs(u, b / a) for a, b in zip(p, q, strict=True)]
            slopes = [sympy.simplify(sympy.diff(entry, x).subs(x, 0)) for entry in in_logits(p, [-y for y in w])]
            gaps = [sympy.Integer(a - b) for a, b in zip(ours, theirs, strict=True)]
            mean = sum(gaps) / len(gaps)
            claimed = [factor(curvature, len(gaps)) * (gap - mean) for gap in gaps]
            equal = all(sympy.simplify(a - b) == 0 for a, b in zip(slopes, claimed, strict=True))
            yield holds(equal, name, f"{len(gaps)} tokens")


# The derivation.


def _tempered_score() -> bool:
    z, tau = sympy.symbols("z0:3", real=True), sympy.Symbol("tau", positive=True)
    total = sum(sympy.exp(x / tau) for x in z)
    p = [sympy.exp(x / tau) / total for x in z]
    return all(
        sympy.simplify(sympy.diff(sympy.log(p[a]), z[b]) - ((1 if a == b else 0) - p[b]) / tau) == 0
        for a in range(3)
        for b in range(3)
    )


def _score_elsewhere() -> bool:
    hot, p = simplex("m"), sympy.symbols("p0:3")
    means = [sum(hot[a] * ((1 if a == b else 0) - p[b]) for a in range(3)) for b in range(3)]
    return all(sympy.expand(mean - hot[b] + p[b]) == 0 for b, mean in enumerate(means))


def _hot() -> bool:
    """The weight's slope at one, and the first-order ratio of two softmaxes of small logits."""
    x, u = sympy.symbols("x u", positive=True)
    f = sympy.Function("f")
    w = u * sympy.diff(f(u), u) - f(u)
    slope = sympy.simplify(sympy.diff(w, u) - u * sympy.diff(f(u), u, 2)) == 0
    z, y = sympy.symbols("z0:3", real=True), sympy.symbols("y0:3", real=True)

    def row(values: Sequence[sympy.Symbol]) -> list[sympy.Expr]:
        total = sum(sympy.exp(x * v) for v in values)
        return [sympy.exp(x * v) / total for v in values]

    gaps = [b - a for a, b in zip(z, y, strict=True)]
    mean = sum(gaps) / 3
    ratios = [b / a for a, b in zip(row(z), row(y), strict=True)]
    first = [sympy.diff(ratio, x).subs(x, 0) for ratio in ratios]
    return slope and all(sympy.simplify(value - (gap - mean)) == 0 for value, gap in zip(first, gaps, strict=True))
