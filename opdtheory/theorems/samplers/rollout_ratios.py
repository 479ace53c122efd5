"""T14b: one importance factor for a whole rollout, truncated, masked or a geometric mean (GSPO)."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, expected_gradient
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import (
    autograd_gradient,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
)
from opdtheory.theorems.samplers.behaviors import CAP, HIGH, LOW, Triple, log_ratios, near_and_far
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T14b."""
    return [_rollouts()]


def _rollouts() -> Theorem:
    return Theorem(
        number="T14b",
        name="one factor for the whole rollout",
        meaning=(
            "Truncation, a mask or the geometric mean of the ratios may act on a rollout as a whole, as one factor"
            r" $\Phi$ on all its tokens. In expectation each of the student's rollouts then counts $\Phi/R$ in place"
            " of one, where $R$ is the ratio of the whole rollout's probabilities. For the geometric mean $R^{1/L}$"
            " this is one only for rollouts of a single token, or where $R = 1$."
        ),
        statement=(
            r"E_\mu[\Phi\,\textstyle\sum_n w_n s_n] = E_p[\tfrac{\Phi}{R} \sum_n w_n s_n],\ R = \prod_n \rho_n;\quad"
            r" \Phi = \min(R, C),\ 1_{\alpha\le R\le\beta} R \text{ or } R^{1/L}"
        ),
        hypotheses=(
            r"rollouts are drawn from $\mu$ and have $L$ tokens, and $\mu > 0$ where $p$ is; $\rho_n$ is the ratio"
            r" $p/\mu$ of token $n$",
            r"$\Phi$ is detached: it is a number, without a gradient",
        ),
        source="GSPO, arXiv 2507.18071, for $R^{1/L}$; the algebra derived here",
        advice=(
            "A rollout's geometric mean of ratios is not an importance weight, however little it varies: it is exact"
            " for rollouts of one token only. Use it with a centred weight, and say that the gradient is biased."
        ),
        derivation=(
            Step(
                r"\mu(y)\,\Phi = p(y)\,\Phi/R(y)",
                "the product $R$ of the tokens' ratios is the ratio of the whole rollout's probabilities,"
                r" $p(y)/\mu(y)$",
                _per_rollout,
            ),
            Step(
                r"R^{1/L}/R = R^{-(L-1)/L} = 1 \iff L = 1 \text{ or } R = 1",
                "the exponents add up. A power of a positive number is one only if the number is one or the exponent"
                " is zero",
                _geometric_mean,
            ),
        ),
        identities=(
            Identity(
                "what each factor leaves",
                r"E_\mu[\Phi \textstyle\sum_n w_n s_n] = E_p[\tfrac{\Phi}{R}\sum_n w_n s_n]",
                _check_rollouts,
                lambda phi, ratio: phi / ratio,
                {
                    "unbiased": lambda phi, ratio: torch.ones_like(ratio),
                    "the factor itself": lambda phi, ratio: phi,
                    "the whole ratio": lambda phi, ratio: ratio,
                },
            ),
            Identity(
                "the geometric mean over one token",
                r"L = 1:\ E_\mu[R^{1/L} w s] = E_p[w s]",
                _check_geometric,
                1,
                {"over two tokens as well": 2, "over variable lengths as well": 3},
            ),
            Identity(
                "the teacher is a fixed point of centred weights",
                r"p = q:\ E_\mu[\Phi \textstyle\sum_n (w_f(u_n) - w_f(1))\,s_n] = 0",
                _check_fixed_point,
                True,
                {"of any weight": False},
            ),
        ),
    )


def _per_rollout_factors(log_rho: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Each factor of a rollout, from the log-ratios of its tokens."""
    log_r = (mask * log_rho).sum(-1)
    ratio = log_r.exp()
    return {
        "truncated": ratio.clamp(max=float(CAP)),
        "masked": ratio * ((ratio >= float(LOW)) & (ratio <= float(HIGH))),
        "geometric mean": (log_r / mask.sum(-1)).exp(),
    }


@functools.cache
def _rollout_gradient(factor: str, name: str, triple: Triple, centred: bool = False) -> list[Tensor]:
    """Expected gradient of a loss with one factor a rollout, as a black box; cached, since every twin needs it."""
    divergence = divergences.divergence(name)

    def loss(r: Rollouts) -> Tensor:
        ratio = _per_rollout_factors(log_ratios(r), r.mask)[factor].unsqueeze(-1)
        weight = (divergence.centred_weight if centred else divergence.weight)(r.log_u).detach()
        return r.token_sum(-ratio * weight * r.student_logprobs)

    return expected_gradient(loss, *triple.pair, behavior=triple.behavior)


FACTORS = ("truncated", "masked", "geometric mean")


def _check_rollouts(left: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """One factor a rollout under the sampler, against the student's own sequences, differentiated by autograd."""
    for name in ("reverse_kl", "chi2"):
        divergence = divergences.divergence(name)
        for triple in near_and_far():
            for factor in FACTORS:

                def value(
                    student: TabularPolicy, teacher: TabularPolicy, of: Divergence, behavior: TabularPolicy, factor: str
                ) -> Tensor:
                    r = Enumeration.build(student, teacher).rollouts()
                    sampler = Enumeration.build(behavior, teacher).rollouts().student_logprobs
                    found = (r.mask * (r.student_logprobs - sampler)).detach()
                    phi = _per_rollout_factors(found, r.mask)[factor]
                    chance = (r.mask * r.student_logprobs).sum(-1).exp().detach()
                    kept = chance * left(phi, found.sum(-1).exp())
                    return -(kept.unsqueeze(-1) * r.mask * of.weight(r.log_u).detach() * r.student_logprobs).sum()

                slope = autograd_gradient(triple.pair, value, triple.teacher, divergence, triple.behavior, factor)
                yield close(_rollout_gradient(factor, name, triple), slope, triple, name, factor)


@functools.cache
def _policies(tokens: int, seed: int) -> Triple:
    """Three unrelated policies; with three tokens, rollouts that may end early."""
    eos, horizon = (0, 2) if tokens == 3 else (None, tokens)
    student, teacher, mu = (TabularPolicy.random(3, horizon, eos=eos, seed=seed + 10 * k) for k in range(3))
    return Triple(student, teacher, mu, f"seed {seed}")


def _check_geometric(tokens: int) -> Cases:
    """The geometric mean against the exact gradient; three stands for rollouts that may end early."""
    for seed in (1, 2):
        triple = _policies(tokens, seed)
        for name in SMOOTH:
            found = _rollout_gradient("geometric mean", name, triple)
            yield close(found, exact_gradient(*triple.pair, name), triple, name)


def _check_fixed_point(centred: bool) -> Cases:
    """At the teacher, every factor with the weight as it is or centred, for every sampler."""
    for name in SMOOTH:
        for triple in near_and_far():
            at_teacher = triple._replace(teacher=triple.student)
            for factor in FACTORS:
                found = _rollout_gradient(factor, name, at_teacher, centred)
                yield close(found, [torch.zeros_like(g) for g in found], triple, name, factor)


# The derivation.


def _per_rollout() -> bool:
    mu, first, second, phi = sympy.symbols("mu rho1 rho2 Phi", positive=True)
    probability = mu * first * second  # the student's, of a rollout of two tokens
    return sympy.simplify(mu * phi - probability * phi / (first * second)) == 0


def _geometric_mean() -> bool:
    log_ratio = sympy.Symbol("x", real=True)
    length = sympy.Symbol("L", positive=True)
    ratio = sympy.exp(log_ratio)
    power = sympy.powsimp(sympy.exp(log_ratio / length) / ratio)
    exponent = sympy.log(power).expand(force=True)
    return (
        sympy.simplify(exponent + log_ratio * (length - 1) / length) == 0
        and set(sympy.solve(exponent, length)) == {1}
        and set(sympy.solve(exponent, log_ratio)) == {0}
    )
