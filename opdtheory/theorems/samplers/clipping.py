"""T8c: PPO's clipped surrogate."""

from __future__ import annotations

import functools
from collections.abc import Callable

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import TabularPolicy, exact_gradient, random_pair
from opdtheory.theorems.instances.one_sample import SMOOTH, row_gradient
from opdtheory.theorems.samplers.behaviors import Triple, one_step
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds

__all__ = ["theorems"]


def theorems() -> list[Theorem]:
    """T8c."""
    theorem = Theorem(
        number="T8c",
        name="PPO's clipping",
        meaning=(
            r"PPO's clipped surrogate drops the gradient of a token whose ratio has left the interval on the side to"
            r" which its advantage pushes, and keeps every other token as importance sampling would. It is unbiased"
            r" while every ratio is inside; otherwise its bias is the part that it drops."
        ),
        statement=(
            r"E_\mu[\nabla \ell_{\mathrm{PPO}}] = -E_p[1_{\mathrm{kept}}\,A\,s],\ \rho = p/\mu;\quad"
            r" \text{a token is dropped, not kept} \iff (A > 0,\ \rho > 1+\epsilon) \text{ or } (A < 0,\ \rho <"
            r" 1-\epsilon)"
        ),
        hypotheses=(
            r"$\ell_{\mathrm{PPO}} = -\min(\rho A, \mathrm{clip}(\rho)\,A)$, where $\mathrm{clip}$ keeps the ratio"
            r" within $[1-\epsilon, 1+\epsilon]$ and $A$ is detached",
            "there is one step",
            r"$\mu > 0$ where $p$ is",
        ),
        source="PPO, arXiv 1707.06347; derived here",
        advice=(
            "PPO's surrogate is unbiased while every ratio lies inside the clip range; outside, the bias is the"
            " dropped part, which depends on the advantage's sign and so on its baseline."
        ),
        derivation=(
            Step(
                r"\min(\rho A, \mathrm{clip}(\rho)\,A) = \text{const} \iff \text{dropped}",
                r"beyond an end of the interval the clipped branch is constant, and it is the smaller one exactly if"
                r" $A$ pushes further out. Otherwise the gradient of the minimum is $\rho A\,s$, and"
                r" $E_\mu[\rho A\,s] = E_p[A\,s]$",
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
    return [theorem]


@functools.cache
def _far() -> tuple[Triple, ...]:
    """One step, ratios far outside PPO's interval on both sides."""
    return tuple(
        Triple(*random_pair(5, 1, seed=seed), TabularPolicy.random(5, 1, seed=10 * seed), f"far, seed {seed}")
        for seed in (4, 5, 6, 7)
    )


@functools.cache
def _near() -> tuple[Triple, ...]:
    """Samplers drawn towards the student until every ratio lies within PPO's interval."""
    found = []
    for triple in one_step():
        log_p, _, log_mu = triple.rows
        found.append(triple._replace(behavior=TabularPolicy([log_p.lerp(log_mu, 0.2)])))
    return tuple(found)


def _check_ppo(kept: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """PPO's clipped surrogate as a black box; `kept` says from the ratio and the advantage which tokens count."""
    for triple in _far():
        log_p, log_q, log_mu = triple.rows
        rho = (log_p - log_mu).exp()
        for name in SMOOTH:
            w = divergences.divergence(name).weight(log_q - log_p)
            found = triple.gradient("opd_plus", name, "ppo")[0]
            yield close(found, row_gradient(log_p.exp(), kept(rho, w) * w), triple, name)


def _check_ppo_unbiased(far: bool) -> Cases:
    """PPO against the exact gradient, with ratios inside the interval although p is not mu, or outside."""
    for triple in _far() if far else _near():
        log_p, _, log_mu = triple.rows
        largest = float(((log_p - log_mu).exp() - 1).abs().max())
        yield holds((0 < largest < 0.2) != far, triple, "ratios")
        for name in SMOOTH:
            yield close(triple.gradient("opd_plus", name, "ppo"), exact_gradient(*triple.pair, name), triple, name)


# The derivation.


def _ppo_branches() -> bool:
    r"""$\min(\rho A, \mathrm{clip}(\rho) A)$: which branch is the smaller beyond either end, for either sign."""
    a, gap, eps = sympy.symbols("A gap epsilon", positive=True)
    above, below = 1 + eps + gap, 1 - eps - gap
    # Beyond an end of the interval the clipped branch is constant; it is the smaller one iff A pushes further out.
    outward = (a * above - a * (1 + eps), (-a) * below - (-a) * (1 - eps))
    inward = ((-a) * (1 + eps) - (-a) * above, a * (1 - eps) - a * below)
    return all(sympy.expand(difference - a * gap) == 0 for difference in (*outward, *inward))
