"""T8: rollouts of another policy: importance weights, what is biased without them, the k2 loss and PPO's clipping."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, exact_gradient, expected_gradient, random_pair
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    autograd_gradient,
    interval,
    rational_distributions,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    expectation,
    intervals,
    kl,
    mean_gradient,
    score,
    three_atoms,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

Triple = tuple[TabularPolicy, TabularPolicy, TabularPolicy]
OfAtom = Callable[[Any, Any, Any, Any], Any]


def theorems() -> list[Theorem]:
    """T8, T8b and T8c."""
    return [_importance_weights(), _fixed_point(), _clipping()]


def _importance_weights() -> Theorem:
    return Theorem(
        number="T8",
        name="rollouts of another policy",
        statement=r"-E_\mu\big[\tfrac{p}{\mu}\,w(q/p)\,s\big] = \nabla D_f; \quad "
        r"-E_\mu[w(q/p)\,s] - \nabla D_f = -E_p\big[(\tfrac{\mu}{p} - 1)\,w\,s\big]; \quad "
        r"E_\mu[w(q/\mu)\,s] = E_p[w(q/p)\,s] \text{ for the forward KL alone}",
        hypotheses=(
            "one step; over several steps the product of the ratios up to and including the token, for token_local",
            "mu > 0 where p is",
            "'alone': up to scale and gauge of f, with no importance weight, for all p, q and mu",
        ),
        source="importance sampling; the biases derived here",
        advice="Weight by the prefix's ratio p/mu; for the forward KL on one step q/mu needs no other ratio.",
        derivation=(
            Step(r"\mu \cdot \tfrac{p}{\mu} = p", "atom by atom, any scores", _importance),
            Step(
                r"-E_\mu[w s] + E_p[w s] = -E_p[(\tfrac{\mu}{p} - 1) w s]",
                "atom by atom; the sign is that of the loss gradient",
                _bias,
            ),
            Step(
                r"\mu\,w(q/\mu) = p\,w(q/p) + c\,\mu + d\,p \text{ for all } \mu, p \iff w \text{ affine}",
                "the slope in mu is w - u w', whose own slope -u w'' vanishes only for affine w; for w = u both are q",
                _affine_needs_no_ratio,
                in_words=True,
            ),
            Step(
                r"p\log\tfrac{q}{\mu} = p\log\tfrac{q}{p} + p\log\tfrac{p}{\mu}",
                "so q/mu in place of q/p under the ratio descends KL(p||q) - KL(p||mu) for the reverse KL",
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
                "q/mu under the ratio, reverse KL",
                r"-E_\mu[\tfrac{p}{\mu}\log\tfrac{q}{\mu}\,s] = \nabla KL(p\|q) - \nabla KL(p\|\mu)",
                _check_reverse_with_mu,
                lambda to_teacher, to_mu: [a - b for a, b in zip(to_teacher, to_mu, strict=True)],
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
        statement=r"p = q:\ -E_\mu[w_f(u)\,s] = -w_f(1)\,(\mu - q); \quad "
        r"\nabla E_\mu[\tfrac12\log^2 u] = -E_\mu[\log u\; s] = "
        r"\nabla KL(p\|q) - E_p\big[(\tfrac{\mu}{p} - 1)\log u\; s\big]",
        hypotheses=("one softmax row", "no importance weight", "mu held fixed"),
        source="derived here",
        advice="Where ratios are not at hand, centre the weight: it keeps the teacher a fixed point off-policy, which "
        "the reverse KL's log u - 1 and the forward KL's u do not.",
        derivation=(
            Step(
                r"E_\mu[s] = \mu - p",
                "a constant is a baseline under p only; at p = q all of w is the constant w_f(1) = f'(1)",
                _score_under_mu,
            ),
            Step(
                r"\partial_{\log p}\,\tfrac12(\log q - \log p)^2 = -\log u",
                "so the k2 loss has the reverse KL's centred weight, and is least where p = q on the support of mu",
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
                r"\nabla E_\mu[\tfrac12\log^2 u] - \nabla KL(p\|q) = -E_p[(\tfrac{\mu}{p} - 1)\log u\; s]",
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


def _clipping() -> Theorem:
    return Theorem(
        number="T8c",
        name="PPO's clipping",
        statement=r"E_\mu[\nabla \ell_{\mathrm{PPO}}] = -E_p[1_{\mathrm{kept}}\,A\,s],\quad "
        r"\mathrm{dropped} = (A > 0, \rho > 1+\epsilon) \text{ or } (A < 0, \rho < 1-\epsilon),\ \rho = p/\mu",
        hypotheses=("one step", "mu > 0 where p is"),
        source="PPO, arXiv 1707.06347; derived here",
        advice="PPO's surrogate is unbiased while every ratio lies inside the clip range; outside, the bias is the "
        "dropped part, which depends on the advantage's sign and so on its baseline.",
        derivation=(
            Step(
                r"\min(\rho A, \mathrm{clip}(\rho) A) = \mathrm{const} \iff \text{dropped}",
                "beyond an end of the interval the clipped branch is constant, and is the smaller one iff A pulls "
                "further out; else the gradient is A ρ s, and E_mu[ρ A s] = E_p[A s]",
                _ppo_branches,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "which tokens are dropped",
                r"E_\mu[\nabla \ell_{\mathrm{PPO}}] = -E_p[1_{\mathrm{kept}} A s]",
                _check_ppo,
                lambda rho, a: 1.0 - (((a > 0) & (rho > 1.2)) | ((a < 0) & (rho < 0.8))).double(),
                {
                    "all outside the interval": lambda rho, a: ((rho <= 1.2) & (rho >= 0.8)).double(),
                    "none": lambda rho, a: torch.ones_like(rho),
                    "signs exchanged": lambda rho, a: (
                        1.0 - (((a < 0) & (rho > 1.2)) | ((a > 0) & (rho < 0.8))).double()
                    ),
                },
            ),
            Identity(
                "unbiased inside the interval",
                r"\max|\rho - 1| < \epsilon \Rightarrow E_\mu[\nabla \ell_{\mathrm{PPO}}] = \nabla D_f,"
                r"\ \text{also for } \mu \ne p",
                _check_ppo_unbiased,
                False,
                {"outside as well": True},
            ),
        ),
    )


# In fractions: a third distribution samples.


def _triples() -> Iterator[tuple[Distribution, Distribution, Distribution]]:
    """Student, teacher and a sampling distribution: the student's probabilities backwards, and others of that many tokens."""
    distributions = rational_distributions()
    for p, q in distributions:
        if p != p[::-1]:
            yield p, q, p[::-1]
        yield from ((p, q, mu) for mu, _ in distributions if len(mu) == len(p) and mu != p)


def _sampled(p: Sequence[Any], mu: Sequence[Any], factors: Sequence[Any]) -> list[Any]:
    r"""$-E_\mu[A s]$ with the student's scores."""
    rows = [score(p, a) for a in range(len(p))]
    return [-expectation(mu, [x * row[k] for x, row in zip(factors, rows, strict=True)]) for k in range(len(p))]


def _check_one_step(factor: OfAtom) -> Cases:
    r"""$E_\mu[\rho\, w s] = E_p[w s]$; the factor is a function of p, q, mu and w."""
    for name in RATIONAL:
        for p, q, mu in _triples():
            values = [factor(*each) for each in zip(p, q, mu, weights(name, p, q), strict=True)]
            yield same(_sampled(p, mu, values), mean_gradient(p, weights(name, p, q)), name, p, q, mu)


def _check_bias(factor: OfAtom) -> Cases:
    r"""Loss gradient from $\mu$ without a ratio, minus the exact one, is $-E_p[(\mu/p - 1) w s]$."""
    for name in RATIONAL:
        for p, q, mu in _triples():
            w = weights(name, p, q)
            bias = [a - b for a, b in zip(_sampled(p, mu, w), mean_gradient(p, w), strict=True)]
            values = [factor(*each) for each in zip(p, q, mu, w, strict=True)]
            yield same(bias, mean_gradient(p, values), name, p, q, mu)


def _check_other_ratio(agrees: dict[str, bool]) -> Cases:
    r"""Whether $E_\mu[w(q/\mu) s] = E_p[w(q/p) s]$ for every triple, without any importance weight, in fractions."""
    for name, expected in agrees.items():
        equal = [
            _sampled(p, mu, weights(name, mu, q)) == mean_gradient(p, weights(name, p, q)) for p, q, mu in _triples()
        ]
        yield holds(all(equal) == expected, name, expected)


def _check_reverse_with_mu(gradient: Callable[[list[Any], list[Any]], list[Any]]) -> Cases:
    r"""$-E_\mu[\frac p\mu \log\frac q\mu\, s]$ against gradients of $KL(p\|q)$ and $KL(p\|\mu)$, enclosed."""
    for student, teacher, behavior in _triples():
        p, q, mu = intervals(student), intervals(teacher), intervals(behavior)
        values = [a / m * iv.log(b / m) for a, b, m in zip(p, q, mu, strict=True)]
        slopes = [[a * (iv.log(a / b) - kl(p, other)) for a, b in zip(p, other, strict=True)] for other in (q, mu)]
        for left, right in zip(_sampled(p, mu, values), gradient(*slopes), strict=True):
            yield overlap(left, right, student, teacher, behavior)


def _check_at_teacher(value: Callable[[Any, Any], Any]) -> Cases:
    r"""$-E_\mu[w_f(u) s]$ at $p = q$, enclosed: where an off-policy loss without a ratio would move the teacher."""
    for name in SMOOTH:
        for _, q, mu in _triples():
            w = weights_enclosed(name, q, q)
            gradient = _sampled(intervals(q), intervals(mu), w)
            for found, b, m in zip(gradient, q, mu, strict=True):
                yield overlap(found, value(w[0], interval(m - b)), name, q, mu)


# As black boxes: a stale student and a perturbed inference engine.


@functools.cache
def behaviors() -> tuple[tuple[str, Triple], ...]:
    """Student, teacher and what sampled: the student of a step ago, a noisy engine, and logits rounded to bfloat16."""
    found = []
    for pair in (random_pair(3, 2, eos=0, seed=6), random_pair(5, 1, distance=1.5, seed=8)):
        student, teacher = pair
        step = exact_gradient(student, teacher, "reverse_kl")
        stale = TabularPolicy(list(map(functools.partial(torch.add, alpha=0.5), student.logits, step)), eos=student.eos)
        rounded = TabularPolicy([z.bfloat16().double() for z in student.logits], eos=student.eos)
        sampling = {"stale student": stale, "perturbed engine": student.perturbed(0.3, seed=3), "bfloat16": rounded}
        found += [(name, (student, teacher, mu)) for name, mu in sampling.items()]
    return tuple(found)


@functools.cache
def _expected(each: str, name: str | None, importance: str | None, triple: Triple) -> list[Tensor]:
    student, teacher, mu = triple
    loss = estimator(each, name, importance=importance)  # type: ignore[arg-type]
    return expected_gradient(loss, student, teacher, behavior=mu)


def _check_library(importance: str | None) -> Cases:
    """The library's importance weights over one and several steps."""
    for name in ("reverse_kl", "forward_kl"):
        for _, triple in behaviors():
            exact = exact_gradient(*triple[:2], name)
            yield close(_expected("opd_plus", name, importance, triple), exact, name, triple)


def _rows(triple: Triple) -> tuple[Tensor, Tensor, Tensor]:
    log_p, log_q, log_mu = (policy.logits[0].log_softmax(-1) for policy in triple)
    return log_p, log_q, log_mu


def _one_step() -> list[Triple]:
    return [triple for _, triple in behaviors() if triple[0].horizon == 1]


def _centred(p: Tensor, advantage: Tensor) -> Tensor:
    r"""$-E_p[A s]$ of one row."""
    return -p * (advantage - (p * advantage).sum(-1, keepdim=True))


def _check_k2(factor: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """Off-policy bias of the k2 loss as a black box; on-policy it has none."""
    for triple in _one_step():
        log_p, log_q, log_mu = _rows(triple)
        p, mu = log_p.exp(), log_mu.exp()
        exact = exact_gradient(*triple[:2], "reverse_kl")[0]
        yield close(_expected("k2_loss", None, None, (*triple[:2], triple[0]))[0], exact, triple)
        found = _expected("k2_loss", None, None, triple)[0] - exact
        yield close(found, _centred(p, factor(p, mu) * (log_q - log_p)), triple)


def _check_k2_objective(value: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Cases:
    """What the k2 loss descends off-policy, differentiated by autograd with the sampling distribution held fixed."""
    for triple in _one_step():
        _, log_q, log_mu = _rows(triple)

        def objective(student: TabularPolicy, log_q: Tensor = log_q, log_mu: Tensor = log_mu) -> Tensor:
            return value(student.logits[0].log_softmax(-1), log_q, log_mu)

        yield close(_expected("k2_loss", None, None, triple), autograd_gradient(triple[:2], objective), triple)


def _check_ppo(kept: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """PPO's clipped surrogate as a black box; `kept` says from the ratio and the advantage which tokens count."""
    for triple in _far():
        log_p, log_q, log_mu = _rows(triple)
        for name in SMOOTH:
            w = divergences.divergence(name).weight(log_q - log_p)
            rho = (log_p - log_mu).exp()
            yield close(
                _expected("opd_plus", name, "ppo", triple)[0], _centred(log_p.exp(), kept(rho, w) * w), triple, name
            )


@functools.cache
def _far() -> tuple[Triple, ...]:
    """One step, ratios far outside of PPO's interval on both sides."""
    return tuple((*random_pair(5, 1, seed=seed), TabularPolicy.random(5, 1, seed=10 * seed)) for seed in (4, 5, 6, 7))


def _check_ppo_unbiased(far: bool) -> Cases:
    """PPO against the exact gradient, with ratios inside of the interval although p is not mu, or outside."""
    for triple in _far() if far else _one_step():
        log_p, _, log_mu = _rows(triple)
        near = triple if far else (*triple[:2], _halfway(log_p, log_mu))
        log_mu = _rows(near)[2]
        inside = float(((log_p - log_mu).exp() - 1).abs().max())
        yield holds((0 < inside < 0.2) != far, triple)
        for name in SMOOTH:
            yield close(_expected("opd_plus", name, "ppo", near), exact_gradient(*triple[:2], name), triple, name)


@functools.cache
def _mixed(logits: tuple[float, ...]) -> TabularPolicy:
    return TabularPolicy([torch.tensor([logits], dtype=torch.float64)])


def _halfway(log_p: Tensor, log_mu: Tensor) -> TabularPolicy:
    """The sampling distribution drawn towards the student until every ratio lies within PPO's interval."""
    return _mixed(tuple(log_p.lerp(log_mu, 0.2)[0].tolist()))


# The derivation.


def _three_with_mu() -> tuple[Any, Any, Any, Any]:
    p, w, s = three_atoms()
    return p, w, s, sympy.symbols("mu0:3", positive=True)


def _importance() -> bool:
    p, w, s, mu = _three_with_mu()
    gap = sum(m * (a / m) * x * v[0] - a * x * v[0] for a, x, v, m in zip(p, w, s, mu, strict=True))
    return sympy.simplify(gap) == 0


def _bias() -> bool:
    p, w, s, mu = _three_with_mu()
    gap = sum(-m * x * v[0] + a * x * v[0] + a * (m / a - 1) * x * v[0] for a, x, v, m in zip(p, w, s, mu, strict=True))
    return sympy.simplify(gap) == 0


def _affine_needs_no_ratio() -> bool:
    r"""$\mu\,w(q/\mu)$ without $\mu$: its slope is $w - u w'$, which is constant only for affine w; and u works."""
    q, mu, u = sympy.symbols("q mu u", positive=True)
    w = sympy.Function("w")
    slope = sympy.diff(mu * w(q / mu), mu).doit() - (w(u) - u * sympy.diff(w(u), u)).subs(u, q / mu).doit()
    bend = sympy.diff(w(u) - u * sympy.diff(w(u), u), u) + u * sympy.diff(w(u), u, 2)
    return sympy.simplify(slope) == 0 and sympy.simplify(bend) == 0 and sympy.simplify(mu * (q / mu) - q) == 0


def _reverse_with_mu() -> bool:
    p, q, mu = sympy.symbols("p q mu", positive=True)
    gap = p * sympy.log(q / mu) - p * sympy.log(q / p) - p * sympy.log(p / mu)
    return sympy.simplify(sympy.expand_log(gap, force=True)) == 0


def _score_under_mu() -> bool:
    r"""$E_\mu[s_a] = \mu - p$ for softmax scores, which needs of $\mu$ only that it sums to one."""
    m0, m1 = sympy.symbols("m0 m1")
    mu, p = [m0, m1, 1 - m0 - m1], sympy.symbols("p0:3")
    return all(sympy.expand(sum(mu[a] * score(p, a)[k] for a in range(3)) - mu[k] + p[k]) == 0 for k in range(3))


def _k2_slope() -> bool:
    x, log_q = sympy.symbols("x y", real=True)
    return sympy.simplify(sympy.diff((log_q - x) ** 2 / 2, x) + (log_q - x)) == 0


def _ppo_branches() -> bool:
    r"""$\min(\rho A, \mathrm{clip}(\rho) A)$: which branch is the smaller beyond either end, for either sign."""
    a, gap, eps = sympy.symbols("A gap epsilon", positive=True)
    above, below = 1 + eps + gap, 1 - eps - gap
    # Beyond an end of the interval the clipped branch is constant; it is the smaller one iff A pulls further out.
    outward = (a * above - a * (1 + eps), (-a) * below - (-a) * (1 - eps))
    inward = ((-a) * (1 + eps) - (-a) * above, a * (1 - eps) - a * below)
    return all(sympy.expand(difference - a * gap) == 0 for difference in (*outward, *inward))
