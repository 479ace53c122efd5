"""T18: losses whose expected gradient does not see the teacher."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, expected_gradient
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import Distribution, Pair, autograd_gradient, pairs, rational_distributions
from opdtheory.theorems.instances.lengths import inverse_length, score_of_length
from opdtheory.theorems.instances.one_sample import mean_gradient, simplex
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, same

__all__ = ["theorems"]

# A penalty on the log-ratio of a probability to its own detached copy.
Penalty = Callable[[Tensor], Tensor]

_PENALTIES: Mapping[str, Penalty] = {
    "difference": lambda x: x,
    "square": lambda x: x.square() / 2,
    "k3": lambda x: (-x).expm1() + x,
    "exponential": lambda x: x.exp(),
}


def theorems() -> list[Theorem]:
    """T18 and T18b."""
    return [_own_copy(), _log_ratio()]


def _own_copy() -> Theorem:
    return Theorem(
        number="T18",
        name="a student beside its own copy",
        meaning=(
            "A loss that compares the student with a detached copy of itself has no expected gradient, whatever the"
            r" penalty $\varphi$ on the difference of the log-probabilities, and whatever the teacher. The same holds"
            " for a divergence from the copy that is summed over the whole vocabulary. Such a loss moves the student"
            " by noise at most."
        ),
        statement=(
            r"E_p[\nabla\varphi(\log p_\theta - \log\mathrm{sg}(p_\theta))] = \varphi'(0)\,E_p[s] = 0;\quad \nabla"
            r" D_f(\mathrm{sg}(p_\theta)\,\|\,p_\theta) = 0"
        ),
        hypotheses=(
            "the rollouts are the student's, and the loss is summed over tokens",
            r"$\varphi$ is differentiable at zero, and $f$ at one; $\mathrm{sg}$ marks the detached copy",
        ),
        source="derived here",
        advice=(
            "A loss that compares the student with a detached copy of itself has no expected gradient, whatever the"
            " teacher; look for a log-probability that should have been the teacher's."
        ),
        derivation=(
            Step(
                r"\nabla\varphi(\log p - \log\mathrm{sg}(p)) = \varphi'(0)\,s",
                r"the argument of $\varphi$ is zero, but its slope is the score, because only one of the two terms is"
                " differentiated",
                _slope_at_copy,
            ),
            Step(
                r"E_p[s] = 0",
                "the probabilities sum to one at all parameters, so the score has mean zero",
                _score_vanishes,
            ),
            Step(
                r"\partial_p\,p f(\bar p/p)\big|_{\bar p = p} = -w_f(1)",
                r"write $\bar p$ for the copy. The slope of a token's term is then the same number at every token, and"
                " a constant weight is a baseline, which adds nothing",
                _divergence_of_copy,
            ),
        ),
        identities=(
            Identity(
                "on sampled tokens",
                r"E_p[\nabla\textstyle\sum_n\varphi(\log p - \log\mathrm{sg}(p))] = 0",
                _check_copy,
                "student",
                {"rollouts of another policy as well": "behavior", "of the teacher": "teacher"},
            ),
            Identity(
                "over the vocabulary",
                r"\nabla D_f(\mathrm{sg}(p)\,\|\,p) = 0",
                _check_copy_in_full,
                "copy",
                {"beside the teacher as well": "teacher"},
            ),
        ),
    )


def _log_ratio() -> Theorem:
    return Theorem(
        number="T18b",
        name="the log-ratio, backpropagated",
        meaning=(
            r"If $\log p - \log q$ of sampled tokens is backpropagated, which is k1 as a loss, the teacher drops out"
            " of the gradient. Summed over the student's own tokens, its expected gradient is zero. A token mean"
            r" leaves a push on the lengths of rollouts, and the rollouts of another policy $\mu$ leave one away from"
            r" $\mu$."
        ),
        statement=(
            r"E_p[\nabla\textstyle\sum_n(\log p_n - \log q_n)] = 0;\quad E_p\Big[\nabla\frac{\sum_{b,n}(\log p - \log"
            r" q)}{N}\Big] = \nabla E_p[1/N],\ N = \sum_b L_b;\quad E_\mu[\nabla\textstyle\sum_n(\log p_n - \log q_n)]"
            r" = -\nabla\,\mathrm{KL}(\mu\|p)"
        ),
        hypotheses=(
            "the teacher is frozen",
            r"$\mu$ does not depend on the student's parameters",
        ),
        source="on k1 as a loss: Tang and Munos, arXiv 2506.09477; the rest derived here",
        advice=(
            r"Do not backpropagate through $\log p - \log q$ on samples (k1 as a loss): the teacher has no effect on"
            " the gradient, a token mean leaves a push on lengths, and stale rollouts a push away from their sampler."
            " Use it detached, as a weight on the score."
        ),
        derivation=(
            Step(
                r"\nabla(\log p - \log q) = s",
                "the teacher is frozen, so its term is a constant and only the score is left, whose mean under the"
                " student is zero",
                _teacher_drops_out,
            ),
            Step(
                r"E_p[S/N] = \nabla E_p[1/N],\quad S = \textstyle\sum_{b,n} s_{b,n}",
                "the sum $S$ of the scores is the gradient of the log-probability of the whole batch, so $E_p[S/N]$"
                " is a gradient too: that of $E_p[1/N]$",
                score_of_length,
            ),
            Step(
                r"E_\mu[S] = \nabla E_\mu[\log p] = -\nabla\,\mathrm{KL}(\mu\|p)",
                r"the entropy of $\mu$ does not depend on the student. Sympy confirms it for one row of three tokens;"
                " over whole sequences it holds by the chain rule",
                _away_from_sampler,
            ),
        ),
        identities=(
            Identity(
                "one softmax row",
                r"E_p[\nabla(\log p - \log q)] = 0,\quad E_\mu[\nabla(\log p - \log q)] = \mu - p",
                _check_row,
                lambda p, q, mu: [m - x for m, x in zip(mu, p, strict=True)],
                {
                    "towards the sampler": lambda p, q, mu: [x - m for m, x in zip(mu, p, strict=True)],
                    "away from the teacher": lambda p, q, mu: [y - x for y, x in zip(q, p, strict=True)],
                    "nothing": lambda p, q, mu: [0 * x for x in p],
                },
                "exact",
            ),
            Identity(
                "summed over tokens",
                r"E_p[\nabla\textstyle\sum_n(\log p_n - \log q_n)] = 0 \text{ for every teacher}",
                _check_sum,
                0.0,
                {"the reverse KL's gradient": 1.0, "half of it": 0.5},
            ),
            Identity(
                "a token mean",
                r"E_p[\nabla\tfrac1N\textstyle\sum_{b,n}(\log p - \log q)] = \nabla E_p[1/N]",
                _check_mean,
                1.0,
                {"zero": 0.0, "sign flipped": -1.0},
            ),
            Identity(
                "rollouts of another policy",
                r"E_\mu[\nabla\textstyle\sum_n(\log p_n - \log q_n)] = -\nabla\,\mathrm{KL}(\mu\|p)",
                _check_off_policy,
                lambda log_p, log_mu: -(log_mu.exp() * (log_mu - log_p)).sum(),
                {
                    "towards the sampler": lambda log_p, log_mu: (log_mu.exp() * (log_mu - log_p)).sum(),
                    "the other direction": lambda log_p, log_mu: -(log_p.exp() * (log_p - log_mu)).sum(),
                },
            ),
        ),
    )


# As black boxes.


@functools.cache
def _copied(name: str, pair: Pair, sampler: TabularPolicy) -> list[Tensor]:
    """Expected gradient of a penalty on the student's ratio to its detached copy."""

    def loss(r: Rollouts) -> Tensor:
        return r.token_sum(_PENALTIES[name](r.student_logprobs - r.student_logprobs.detach()))

    return expected_gradient(loss, *pair, behavior=sampler)


def _check_copy(whose: str) -> Cases:
    for pair in pairs():
        sampler = {"student": pair[0], "teacher": pair[1], "behavior": pair[0].perturbed(0.5, seed=4)}[whose]
        for name in _PENALTIES:
            found = _copied(name, pair, sampler)
            yield close(found, [torch.zeros_like(g) for g in found], name, pair)


def _check_copy_in_full(beside: str) -> Cases:
    """A whole-vocabulary divergence from the detached copy, or from the teacher."""
    for name in ("reverse_kl", "forward_kl", "jsd", "chi2"):
        divergence = divergences.divergence(name)

        def loss(r: Rollouts, generator: Penalty = divergence.generator) -> Tensor:
            log_p = r.student_logits.log_softmax(-1)
            other = log_p.detach() if beside == "copy" else r.teacher_logits.log_softmax(-1)
            return r.token_sum((log_p.exp() * generator(other - log_p)).sum(-1))

        for pair in pairs():
            found = expected_gradient(loss, *pair)
            yield close(found, [torch.zeros_like(g) for g in found], name, pair)


def _k1(r: Rollouts) -> Tensor:
    return r.token_sum(r.student_logprobs - r.teacher_logprobs)


def _k1_mean(r: Rollouts) -> Tensor:
    return r.token_mean(r.student_logprobs - r.teacher_logprobs)


def _check_row(claim: Callable[[Distribution, Distribution, Distribution], list[object]]) -> Cases:
    """A constant weight under a sampler, summed token by token; with the student as sampler nothing is left."""
    for p, q in rational_distributions():
        yield same(mean_gradient(p, [-1] * len(p)), [0] * len(p), p, q, "on-policy")
        for mu in dict.fromkeys((p[::-1], q)):
            yield same(mean_gradient(p, [-1] * len(p), mu), claim(p, q, mu), p, q, mu)


def _check_sum(factor: float) -> Cases:
    for pair in pairs():
        exact = exact_gradient(*pair, "reverse_kl")
        yield close(expected_gradient(_k1, *pair), [factor * g for g in exact], pair)


def _check_mean(sign: float) -> Cases:
    """Batches of one and two rollouts that end early, against the slope of the expected inverse length."""

    def value(student: TabularPolicy, teacher: TabularPolicy, size: int) -> Tensor:
        return sign * inverse_length(student, teacher, size)

    for pair in pairs():
        if pair[0].eos is None:
            continue
        for size in (1, 2):
            found = expected_gradient(_k1_mean, *pair, batch_size=size)
            yield close(found, autograd_gradient(pair, value, pair[1], size), pair, f"B {size}")


def _check_off_policy(value: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """The slope of a function of whole sequences' log-probabilities, differentiated by autograd."""

    def objective(student: TabularPolicy, mu: TabularPolicy) -> Tensor:
        log_p, log_mu = (
            (r.mask * r.student_logprobs).sum(-1)
            for r in (Enumeration.build(policy, mu).rollouts() for policy in (student, mu))
        )
        return value(log_p, log_mu)

    for pair in pairs():
        mu = pair[0].perturbed(0.5, seed=4)
        found = expected_gradient(_k1, *pair, behavior=mu)
        yield close(found, autograd_gradient(pair, objective, mu), pair)


# The derivations.


def _slope_at_copy() -> bool:
    theta, at = sympy.symbols("theta theta0", real=True)
    p, phi = sympy.Function("p", positive=True), sympy.Function("phi")
    loss = phi(sympy.log(p(theta)) - sympy.log(p(at)))
    slope = sympy.diff(loss, theta).subs(at, theta).doit()
    x = sympy.Symbol("x")
    claimed = sympy.diff(phi(x), x).subs(x, 0) * sympy.diff(sympy.log(p(theta)), theta)
    return sympy.simplify((slope - claimed).doit()) == 0


def _score_vanishes() -> bool:
    theta = sympy.Symbol("theta")
    first, second = (sympy.Function(name, positive=True)(theta) for name in ("a", "b"))
    p = [first, second, 1 - first - second]
    return sympy.simplify(sum(x * sympy.diff(sympy.log(x), theta) for x in p)) == 0


def _divergence_of_copy() -> bool:
    p, copy, u = sympy.symbols("p c u", positive=True)
    f = sympy.Function("f")
    slope = sympy.diff(p * f(copy / p), p).subs(copy, p).doit()
    weight = (u * sympy.diff(f(u), u) - f(u)).subs(u, 1).doit()
    return sympy.simplify((slope + weight).doit()) == 0


def _teacher_drops_out() -> bool:
    theta, q = sympy.Symbol("theta"), sympy.Symbol("q", positive=True)
    p = sympy.Function("p", positive=True)(theta)
    return sympy.simplify(sympy.diff(sympy.log(p) - sympy.log(q), theta) - sympy.diff(p, theta) / p) == 0


def _away_from_sampler() -> bool:
    theta, mu = sympy.Symbol("theta"), simplex("m")
    first, second = (sympy.Function(name, positive=True)(theta) for name in ("a", "b"))
    p = [first, second, 1 - first - second]
    score = sum(m * sympy.diff(sympy.log(x), theta) for m, x in zip(mu, p, strict=True))
    divergence = sum(m * (sympy.log(m) - sympy.log(x)) for m, x in zip(mu, p, strict=True))
    return sympy.simplify(score + sympy.diff(divergence, theta)) == 0
