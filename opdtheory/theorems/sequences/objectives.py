"""T6a, T6b and T6d: the weight of a token when the objective is a sum over tokens or a divergence of sequences."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import enumerated_value, expected_gradient
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import Pair, autograd_gradient, interval, pairs, sampled_gradient
from opdtheory.theorems.instances.one_sample import minus, ratios
from opdtheory.theorems.instances.trees import (
    Advantage,
    Dual,
    History,
    RationalTree,
    direction_of,
    gradient_of,
    product,
    reach,
    total,
    trees,
)
from opdtheory.theorems.instances.two_steps import two_steps
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, overlap, same

__all__ = ["by_autograd", "later_rewards", "return_weight", "some_cases", "step_sequence", "theorems"]

ONE = Fraction(1)
GAMMAS = (ONE, Fraction(1, 2), Fraction(2, 3))

Discounted = Callable[[Fraction], Advantage]


def theorems() -> list[Theorem]:
    """T6a, T6b and T6d."""
    return [_weights(), _gap(), _forward()]


def _weights() -> Theorem:
    return Theorem(
        number="T6a",
        name="weights of a sum over tokens and of a whole sequence",
        meaning=(
            r"On whole rollouts a divergence can be summed over the tokens, with a discount $\gamma$, or taken between"
            r" the distributions $P$ and $Q$ of whole sequences. The two objectives have different exact weights: the"
            r" token's own $w_f(u_n)$ minus the discounted costs $f(u_m)$ of the tokens after it, or $w_f(U)$ of the"
            r" whole sequence's ratio on every token."
        ),
        statement=(
            r"\nabla E_p\sum_n\gamma^{n-1}f(u_n) = -E_p\sum_n \gamma^{n-1}\Big[w_f(u_n) -"
            r" \sum_{m>n}\gamma^{m-n}f(u_m)\Big]s_n;\quad"
            r" \nabla D_f(Q\|P) = -E_p\sum_n w_f(U)\,s_n,\ U = \prod_n u_n"
        ),
        hypotheses=(
            "$f$ is differentiable and $f(1) = 0$",
            r"$p_\theta$ is differentiable and positive wherever $q$ is",
            r"$0 \le \gamma \le 1$",
        ),
        source="derived here from T1 and the policy-gradient theorem",
        advice=(
            "Choose the objective first, then its weight: a student that cannot match the teacher has a different"
            " minimiser under each."
        ),
        derivation=(
            Step(
                r"E_p[s_n \mid h_n] = 0",
                "the probabilities of a row sum to one, so the score has mean zero given the history. A reward already"
                " earned is fixed by that history; multiplied by a score of mean zero, it adds nothing",
                _step_score,
            ),
            Step(
                r"\nabla E_p[f(u_1) + \gamma f(u_2)] = -E_p[(w_1 - \gamma f(u_2))\,s_1 + \gamma w_2\,s_2]",
                "write $w_n$ for $w_f(u_n)$. T1 gives the part of each token's own ratio, and the score function that"
                " of later tokens. Sympy treats $f$ and the distributions as undefined functions",
                _step_return,
            ),
            Step(
                r"\nabla E_p f(U) = -E_p[w_f(U)(s_1 + s_2)]",
                "this is T1 with a whole sequence in the place of a token; the score of a sequence is the sum of the"
                " scores of its tokens",
                step_sequence,
            ),
        ),
        identities=(
            Identity(
                "discounted sum",
                r"A_n = \gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n}f(u_m)],\ f \text{ free}",
                _check_return_weight,
                return_weight,
                {
                    "sign of later rewards flipped": lambda gamma: return_weight(gamma, sign=1),
                    "later rewards dropped": lambda gamma: return_weight(gamma, keep=False),
                    "its own f counted among the later rewards": lambda gamma: return_weight(gamma, start=0),
                    "outer discount dropped": lambda gamma: return_weight(gamma, outer=False),
                },
                "exact",
            ),
            Identity(
                "whole sequence",
                r"A_n = w_f(U),\ f \text{ free}",
                _check_sequence_weight,
                lambda t, y, us, n: product(us).weight(),
                {
                    "the token's own ratio": lambda t, y, us, n: us[n].weight(),
                    "-f(U) (stop-gradient)": lambda t, y, us, n: product(us).f().scaled(-ONE),
                    "the ratio up to the token": lambda t, y, us, n: product(us[: n + 1]).weight(),
                    "the ratio from the token on": lambda t, y, us, n: product(us[n:]).weight(),
                },
                "exact",
            ),
            Identity(
                "losses as black boxes",
                r"E_p[\hat g] = \nabla J \text{ for both objectives}",
                _check_estimators,
                {},
                {
                    "outer discount dropped": {"token_return": ("return_to_go", {"gamma": 0.6})},
                    "undiscounted": {"token_return": ("return_to_go", {"gamma": 1.0})},
                    "per-token weight for the sequence": {"sequence": ("opd_plus", {})},
                },
            ),
        ),
    )


def _gap() -> Theorem:
    twins = {"sign flipped": (-1, 1), "the token's own reward included": (1, 0)}
    return Theorem(
        number="T6b",
        name="what the per-token weight leaves out",
        meaning=(
            "An estimator that gives each token the weight of its own ratio ignores that the token also changes which"
            " histories come after it. What it leaves out of the gradient of the sum over tokens is exactly a"
            " policy-gradient term: each score times the costs of all later tokens."
        ),
        statement=(
            r"\nabla E_p\sum_n f(u_n) - g_{\gamma=0} = E_p\Big[\sum_n s_n\sum_{m>n}f(u_m)\Big];\quad"
            r" g_{\gamma=0} = -E_p\sum_n w_f(u_n)\,s_n"
        ),
        hypotheses=(r"those of T6a, with $\gamma = 1$",),
        source="derived here; the estimator is that of OPD+, arXiv 2606.01039",
        advice=(
            r"The per-token estimator ignores that a token changes which histories follow. If that matters, add the"
            r" return-to-go $-\sum_{m>n} f(u_m)$ to the weight, at the price of its variance."
        ),
        derivation=(
            Step(
                r"\nabla E_p[f(u_1) + f(u_2)] + E_p[w_1 s_1 + w_2 s_2] = E_p[s_1 f(u_2)]",
                r"take T6a at $\gamma = 1$ and subtract the terms of the tokens' own weights $w_n = w_f(u_n)$. Of two"
                r" tokens, the score of the first times the cost of the second remains",
                _step_gap,
            ),
        ),
        identities=(
            Identity(
                "gap",
                r"\nabla J_{\mathrm{return}} - g_{\gamma=0} = E[\textstyle\sum_n s_n\sum_{m>n}f(u_m)],\ f \text{ free}",
                _check_gap,
                (1, 1),
                twins,
                "exact",
            ),
            Identity(
                "gap of the sampled losses",
                r"\nabla J_{\mathrm{return}} - E[\hat g_{\mathrm{OPD+}}] = E[\textstyle\sum_n s_n\sum_{m>n}f(u_m)]",
                _check_gap_sampled,
                (1, 1),
                twins,
            ),
        ),
    )


def _forward() -> Theorem:
    return Theorem(
        number="T6d",
        name="forward KL on the student's own prefixes",
        meaning=(
            "The forward KL of whole sequences counts a prefix as often as the teacher writes it, but rollouts of the"
            " student visit it as often as the student does. The forward KL summed over the student's own prefixes is"
            " therefore another objective, unless each prefix is weighted by $U_{<n}$, the ratio of the tokens before."
        ),
        statement=(
            r"\mathrm{KL}(Q\|P) = \sum_n E_P[U_{<n}\,\mathrm{KL}(q\|p)(h_n)];\quad"
            r" \nabla\mathrm{KL}(Q\|P) = -E_P\sum_n U_{<n}u_n s_n = \sum_h Q(h)(p-q)(h)"
        ),
        hypotheses=(
            r"$f = u\log u$",
            "$p$ is positive wherever $q$ is",
            "the last form is the gradient in the logits of the row of each history $h$",
        ),
        source="derived here; the second form is supervised distillation on the teacher's texts",
        advice=(
            "Forward KL on student rollouts is not the objective of distillation on teacher rollouts. Weighting"
            " prefixes by $U_{<n}$ turns one into the other, at a variance that grows with the length."
        ),
        derivation=(
            Step(
                r"E_P[U\log U] = E_P[u_1\log u_1 + u_1\,u_2\log u_2]",
                "this is the chain rule of the KL divergence under the teacher $Q$, written as a mean under the"
                " student by $E_Q[x] = E_P[U x]$",
                _step_forward,
            ),
            Step(
                r"E_P[U\,s_1] = E_P[u_1 s_1]",
                r"the weight is $w_f(U) = U$ up to a constant, and every later token has $E[u_m \mid h_m] = 1$, so its"
                r" ratio drops out of the mean",
                _step_forward_weight,
            ),
        ),
        identities=(
            Identity(
                "gradient",
                r"-E_P\textstyle\sum_n U_{<n}u_n s_n = \sum_h Q(h)(p-q)(h)",
                _check_prefix_weight,
                lambda t, y, us, n: ratio_before(us, n) * us[n],
                {
                    "prefixes of the student (token_local)": lambda t, y, us, n: us[n],
                    "u_n dropped": lambda t, y, us, n: ratio_before(us, n),
                },
                "exact",
            ),
            Identity(
                "whole ratio",
                r"-E_P[U S] = \sum_h Q(h)(p-q)(h)",
                _check_prefix_weight,
                lambda t, y, us, n: product(us),
                {"the ratio from the token on": lambda t, y, us, n: product(us[n:])},
                "exact",
            ),
            Identity(
                "value",
                r"\mathrm{KL}(Q\|P) = \sum_n E_P[U_{<n}\,\mathrm{KL}(q\|p)(h_n)]",
                _check_prefix_value,
                1,
                {"prefixes of the student (token_local)": 0, "U squared": 2},
                "rigorous",
                1e-40,
            ),
            Identity(
                "weighted loss as a black box",
                r"E[\hat g] = \nabla\mathrm{KL}(Q\|P) \text{ for } A_n = U_{<n}u_n",
                _check_prefix_loss,
                1,
                {"prefixes of the student (token_local)": 0, "U squared": 2},
            ),
        ),
    )


def some_cases(*names: str) -> Iterator[tuple[Divergence, Pair]]:
    """The named divergences on every pair of policies."""
    yield from itertools.product(map(divergences.divergence, names), pairs())


def later_rewards(us: list[Dual], n: int, gamma: Fraction, start: int = 1) -> Dual:
    r"""$\sum_{m \ge n + \mathrm{start}} \gamma^{m-n} f(u_m)$."""
    return total(us[m].f().scaled(gamma ** (m - n)) for m in range(n + start, len(us)))


@functools.cache
def by_autograd(pair: Pair, divergence: Divergence, objective: str, gamma: float = 1.0) -> list[Tensor]:
    """Gradient of an enumerated objective; cached, since every twin needs it again."""
    return autograd_gradient(pair, lambda s: enumerated_value(s, pair[1], divergence, objective, gamma))


# T6a: equal coefficients of f(u) and f'(u) at every rational u, with f free.


def _check_return_weight(weight: Discounted) -> Cases:
    """Gradients of the discounted sum, from its definition, against weighted scores."""
    for tree in trees():
        for gamma in GAMMAS:
            yield same(
                direction_of(tree, weight(gamma)), gradient_of(tree, "token_return", gamma), tree, f"gamma {gamma}"
            )


def _check_sequence_weight(weight: Advantage) -> Cases:
    """Gradients of the divergence between whole sequences, from its definition, against weighted scores."""
    for tree in trees():
        yield same(direction_of(tree, weight), gradient_of(tree, "sequence"), tree)


def _check_estimators(changes: dict[str, Any]) -> Cases:
    """The library's losses, run as black boxes on every rollout, against autograd of the enumerated objectives."""
    losses = {
        "token_return": ("return_to_go", {"gamma": 0.6, "discounted": True}),
        "sequence": ("sequence_opd_plus", {}),
        **changes,
    }
    for divergence, pair in some_cases("reverse_kl", "jsd", "total_variation"):
        for objective, gamma in (("token_return", 0.6), ("sequence", 1.0)):
            name, options = losses[objective]
            found = sampled_gradient(name, divergence, pair, **options)
            yield close(found, by_autograd(pair, divergence, objective, gamma), divergence, pair, objective)


def return_weight(gamma: Fraction, sign: int = -1, start: int = 1, outer: bool = True, keep: bool = True) -> Advantage:
    r"""$\gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n} f(u_m)]$, or a variant that changes one thing in it."""

    def weight(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        total = us[n].weight()
        if keep:
            total = total + later_rewards(us, n, gamma, start).scaled(Fraction(sign))
        return total.scaled(gamma**n) if outer else total

    return weight


# T6b: the gap.


def _check_gap(sign_and_start: tuple[int, int]) -> Cases:
    r"""$\nabla J_{return} - g_{local} = E[\sum_n s_n \sum_{m>n} f(u_m)]$, f free."""
    sign, start = sign_and_start
    for tree in trees():
        local = direction_of(tree, lambda t, y, us, n: us[n].weight())
        # `direction_of` puts a minus in front of the weight.
        gap = direction_of(tree, lambda t, y, us, n: later_rewards(us, n, ONE, start).scaled(Fraction(-sign)))
        yield same(minus(gradient_of(tree, "token_return"), local), gap, tree)


def _check_gap_sampled(sign_and_start: tuple[int, int]) -> Cases:
    """The gap in float64: autograd of the objective, and two losses run as black boxes."""
    sign, start = sign_and_start
    for divergence, pair in some_cases("reverse_kl", "jsd", "total_variation"):

        def loss(r: Rollouts, d: Divergence = divergence) -> Tensor:
            rewards = torch.where(r.mask > 0, d.generator(r.log_u.detach()), 0.0)
            from_here = rewards.flip(-1).cumsum(-1).flip(-1)
            return r.token_sum(sign * (from_here - start * rewards) * r.student_logprobs)

        whole, local = by_autograd(pair, divergence, "token_return"), sampled_gradient("opd_plus", divergence, pair)
        yield close(minus(whole, local), expected_gradient(loss, *pair), divergence, pair)


# T6d: the forward KL.


def ratio_before(us: list[Dual], n: int) -> Dual:
    r"""$U_{<n}$, the ratio of the tokens before one."""
    return product(us[:n])


def _check_prefix_weight(weight: Advantage) -> Cases:
    r"""$-E_P[\sum_n A_n s_n] = \sum_h Q(h)(p - q)(h)$, the gradient of the teacher's cross-entropy, in fractions."""
    for tree in trees():
        left = [reach(tree.teacher, h) * (tree.student[h][a] - tree.teacher[h][a]) for h, a in tree.logits]
        yield same(left, direction_of(tree, weight), tree)


def _check_prefix_value(power: int) -> Cases:
    r"""$KL(Q\|P) = \sum_n E_P[U_{<n}^k\,KL(q\|p)(h_n)]$ in intervals."""
    forward = divergences.divergence("forward_kl")
    for tree in trees():
        right = interval(0)
        for history, p in tree.student.items():
            own, teacher = (reach(policy, history) for policy in (tree.student, tree.teacher))
            kl = total(Dual(u).f().scaled(a) for a, u in zip(p, ratios(p, tree.teacher[history]), strict=True))
            right += kl.value.enclosed(forward) * interval(own * (teacher / own) ** power)
        yield overlap(right, tree.value("sequence").value.enclosed(forward), tree)


def _check_prefix_loss(power: int) -> Cases:
    r"""A loss with weight $U_{<n}^k u_n$, as a black box, against autograd of the enumerated sequence objective."""
    for forward, pair in some_cases("forward_kl"):

        def loss(r: Rollouts) -> Tensor:
            log_u = r.mask * r.log_u.detach()
            before = log_u.cumsum(-1) - log_u
            return r.token_sum(-(power * before + log_u).exp() * r.student_logprobs)

        yield close(expected_gradient(loss, *pair), by_autograd(pair, forward, "sequence"), pair)


# The derivations, with f and the distributions undefined.


def _step_score() -> bool:
    tree = two_steps()
    p = tree.sequences[0][0][1]
    return sympy.simplify(p * tree.score(p) + (1 - p) * tree.score(1 - p)) == 0


def _step_return() -> bool:
    t, gamma = two_steps(), sympy.Symbol("gamma", positive=True)
    value = t.expect(lambda p, u: t.f(u[0]) + gamma * t.f(u[1]))
    weighed = t.expect(lambda p, u: (t.w(u[0]) - gamma * t.f(u[1])) * t.score(p[0]) + gamma * t.w(u[1]) * t.score(p[1]))
    return t.zero(sympy.diff(value, t.theta) + weighed)


def step_sequence(ends: bool = False, environment: bool = False) -> bool:
    r"""$\nabla E_P f(U) = -E_P[w_f(U) S]$ with the scores of the student's tokens; arguments as in `two_steps`."""
    t = two_steps(ends, environment)
    value = t.expect(lambda p, u: t.f(sympy.Mul(*u)))
    own = (lambda p: [p[0], p[2]]) if environment else list
    weighed = t.expect(lambda p, u: t.w(sympy.Mul(*u)) * sum(t.score(x) for x in own(p)))
    return t.zero(sympy.diff(value, t.theta) + weighed)


def _step_gap() -> bool:
    t = two_steps()
    value = t.expect(lambda p, u: t.f(u[0]) + t.f(u[1]))
    local = t.expect(lambda p, u: t.w(u[0]) * t.score(p[0]) + t.w(u[1]) * t.score(p[1]))
    gap = t.expect(lambda p, u: t.score(p[0]) * t.f(u[1]))
    return t.zero(sympy.diff(value, t.theta) + local - gap)


def _step_forward() -> bool:
    t = two_steps()
    value = t.expect(lambda p, u: u[0] * u[1] * sympy.log(u[0] * u[1]))
    rows = t.expect(lambda p, u: u[0] * sympy.log(u[0]) + u[0] * (u[1] * sympy.log(u[1])))
    return sympy.simplify(sympy.expand_log(value - rows, force=True)) == 0


def _step_forward_weight() -> bool:
    """The second token's ratio has mean one, which leaves $u_1$ of $U$ on the first token."""
    t = two_steps()
    gap = t.expect(lambda p, u: u[0] * u[1] * t.score(p[0])) - t.expect(lambda p, u: u[0] * t.score(p[0]))
    return sympy.simplify(gap) == 0
