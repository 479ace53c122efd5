"""The checks of T6a to T6f."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.estimators import estimator
from opdtheory.exact import (
    MarkovPolicy,
    TabularPolicy,
    enumerated_value,
    exact_gradient,
    exact_value,
    expected_gradient,
)
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import Pair, autograd_gradient, catalogue, interval, pairs, sampled_gradient
from opdtheory.theorems.instances.one_sample import minus, ratios
from opdtheory.theorems.instances.trees import (
    Advantage,
    Dual,
    History,
    Linear,
    RationalTree,
    always,
    by_the_student,
    direction_of,
    gradient_of,
    product,
    rational_tree,
    reach,
    total,
    trees,
)
from opdtheory.theorems.theorem import Cases, close, holds, overlap, same

__all__ = [
    "both_objectives",
    "check_cap",
    "check_chain_rule",
    "check_endings",
    "check_environment",
    "check_environment_sampled",
    "check_estimators",
    "check_gap",
    "check_gap_sampled",
    "check_long_chains",
    "check_padding",
    "check_prefix_loss",
    "check_prefix_value",
    "check_prefix_weight",
    "check_return_weight",
    "check_sequence_weight",
    "later_rewards",
    "ratio_before",
    "return_weight",
]

ONE = Fraction(1)
GAMMAS = (ONE, Fraction(1, 2), Fraction(2, 3))

Discounted = Callable[[Fraction], Advantage]
Loss = Callable[[Rollouts], Tensor]


def _some_cases(*names: str) -> Iterator[tuple[Divergence, Pair]]:
    """The named divergences on every pair of policies."""
    yield from itertools.product(map(divergences.divergence, names), pairs())


def later_rewards(us: list[Dual], n: int, gamma: Fraction, start: int = 1) -> Dual:
    r"""$\sum_{m \ge n + \mathrm{start}} \gamma^{m-n} f(u_m)$."""
    return total(us[m].f().scaled(gamma ** (m - n)) for m in range(n + start, len(us)))


@functools.cache
def _by_autograd(pair: Pair, divergence: Divergence, objective: str, gamma: float = 1.0) -> list[Tensor]:
    return autograd_gradient(pair, lambda s: enumerated_value(s, pair[1], divergence, objective, gamma))


# T6a: the weights, with f free: equal coefficients of f(u) and f'(u) at every rational u.


def check_return_weight(weight: Discounted) -> Cases:
    """Gradients of the discounted sum, from its definition, against weighted scores."""
    for tree in trees():
        for gamma in GAMMAS:
            yield same(
                direction_of(tree, weight(gamma)), gradient_of(tree, "token_return", gamma), tree, f"gamma {gamma}"
            )


def check_sequence_weight(weight: Advantage) -> Cases:
    """Gradients of the divergence between whole sequences, from its definition, against weighted scores."""
    for tree in trees():
        yield same(direction_of(tree, weight), gradient_of(tree, "sequence"), tree)


def check_estimators(changes: dict[str, Any]) -> Cases:
    """The library's losses, run as black boxes on every rollout, against autograd of the enumerated objectives."""
    losses = {
        "token_return": ("return_to_go", {"gamma": 0.6, "discounted": True}),
        "sequence": ("sequence_opd_plus", {}),
        **changes,
    }
    for divergence, pair in _some_cases("reverse_kl", "jsd", "total_variation"):
        for objective, gamma in (("token_return", 0.6), ("sequence", 1.0)):
            name, options = losses[objective]
            found = sampled_gradient(name, divergence, pair, **options)
            yield close(found, _by_autograd(pair, divergence, objective, gamma), divergence, pair, objective)


def return_weight(gamma: Fraction, sign: int = -1, start: int = 1, outer: bool = True, keep: bool = True) -> Advantage:
    r"""$\gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n} f(u_m)]$, or a variant that changes one thing in it."""

    def weight(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        total = us[n].weight()
        if keep:
            total = total + later_rewards(us, n, gamma, start).scaled(Fraction(sign))
        return total.scaled(gamma**n) if outer else total

    return weight


# T6b: the gap.


def check_gap(sign_and_start: tuple[int, int]) -> Cases:
    r"""$\nabla J_{return} - g_{local} = E[\sum_n s_n \sum_{m>n} f(u_m)]$, f free."""
    sign, start = sign_and_start
    for tree in trees():
        local = direction_of(tree, lambda t, y, us, n: us[n].weight())
        # `direction_of` puts a minus in front of the weight.
        gap = direction_of(tree, lambda t, y, us, n: later_rewards(us, n, ONE, start).scaled(Fraction(-sign)))
        yield same(minus(gradient_of(tree, "token_return"), local), gap, tree)


def check_gap_sampled(sign_and_start: tuple[int, int]) -> Cases:
    """The gap in float64: autograd of the objective, and two losses run as black boxes."""
    sign, start = sign_and_start
    for divergence, pair in _some_cases("reverse_kl", "jsd", "total_variation"):

        def loss(r: Rollouts, d: Divergence = divergence) -> Tensor:
            rewards = torch.where(r.mask > 0, d.generator(r.log_u.detach()), 0.0)
            from_here = rewards.flip(-1).cumsum(-1).flip(-1)
            return r.token_sum(sign * (from_here - start * rewards) * r.student_logprobs)

        whole, local = _by_autograd(pair, divergence, "token_return"), sampled_gradient("opd_plus", divergence, pair)
        yield close(minus(whole, local), expected_gradient(loss, *pair), divergence, pair)


# T6c: the reverse KL's chain rule.


def both_objectives(tree: RationalTree, gamma: Fraction = ONE) -> Iterator[tuple[Linear, Linear, object]]:
    """The sum over tokens and the divergence of whole sequences: their values, then their slopes in each logit."""
    yield tree.value("token_return", gamma).value, tree.value("sequence").value, "value"
    yield from zip(gradient_of(tree, "token_return", gamma), gradient_of(tree, "sequence"), tree.logits, strict=True)


def check_chain_rule(claim: tuple[str, Fraction]) -> Cases:
    """Values and gradients of both objectives, in intervals."""
    divergence = divergences.divergence(claim[0])
    for tree in trees():
        for summed, whole, entry in both_objectives(tree, claim[1]):
            yield overlap(summed.enclosed(divergence), whole.enclosed(divergence), tree, entry)


def check_long_chains(claim: tuple[str, Fraction]) -> Cases:
    """Both objectives at 60 tokens, by two dynamic programmes."""
    for eos in (None, 0):
        pair = MarkovPolicy.random(4, 60, eos=eos, seed=1), MarkovPolicy.random(4, 60, eos=eos, seed=2)
        for of in (exact_gradient, exact_value):
            summed: Any = of(*pair, claim[0], "token_return", float(claim[1]))
            yield close(summed, of(*pair, claim[0], "sequence"), f"eos {eos}", of.__name__)


# T6d: the forward KL.


def ratio_before(us: list[Dual], n: int) -> Dual:
    r"""$U_{<n}$, the ratio of the tokens before one."""
    return product(us[:n])


def check_prefix_weight(weight: Advantage) -> Cases:
    r"""$-E_P[\sum_n A_n s_n] = \sum_h Q(h)(p - q)(h)$, the gradient of the teacher's cross-entropy, in fractions."""
    for tree in trees():
        left = [reach(tree.teacher, h) * (tree.student[h][a] - tree.teacher[h][a]) for h, a in tree.logits]
        yield same(left, direction_of(tree, weight), tree)


def check_prefix_value(power: int) -> Cases:
    r"""$KL(Q\|P) = \sum_n E_P[U_{<n}^k\,KL(q\|p)(h_n)]$ in intervals."""
    forward = divergences.divergence("forward_kl")
    for tree in trees():
        right = interval(0)
        for history, p in tree.student.items():
            own, teacher = (reach(policy, history) for policy in (tree.student, tree.teacher))
            kl = total(
                Dual(u, Fraction(0)).f().scaled(a) for a, u in zip(p, ratios(p, tree.teacher[history]), strict=True)
            )
            right += kl.value.enclosed(forward) * interval(own * (teacher / own) ** power)
        yield overlap(right, tree.value("sequence").value.enclosed(forward), tree)


def check_prefix_loss(power: int) -> Cases:
    r"""A loss with weight $U_{<n}^k u_n$, as a black box, against autograd of the enumerated sequence objective."""
    for forward, pair in _some_cases("forward_kl"):

        def loss(r: Rollouts) -> Tensor:
            log_u = r.mask * r.log_u.detach()
            before = log_u.cumsum(-1) - log_u
            return r.token_sum(-(power * before + log_u).exp() * r.student_logprobs)

        yield close(expected_gradient(loss, *pair), _by_autograd(pair, forward, "sequence"), pair)


# T6e: the end of a sequence.


def check_endings(claim: dict[str, Any]) -> Cases:
    """Variable lengths, f free: every token of the student is scored, the EOS too, and every rollout counts."""

    def scored_token(t: RationalTree, y: History, n: int) -> bool:
        return claim.get("end") != "unscored" or y[n] != t.eos

    def counted(t: RationalTree, y: History) -> bool:
        return claim.get("cap") != "dropped" or y[-1] == t.eos

    def weight(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        return us[n].weight() - later_rewards(us, n, ONE) if scored_token(t, y, n) else Dual.zero()

    for tree in (rational_tree(2, 3, eos=1, seed=4), rational_tree(3, 2, eos=0, seed=5)):
        found = direction_of(tree, weight, counted=counted)
        yield same(found, gradient_of(tree, "token_return"), tree, "token_return")
        if not claim.get("end"):
            whole = direction_of(tree, lambda t, y, us, n: product(us).weight(), counted=counted)
            yield same(whole, gradient_of(tree, "sequence"), tree, "sequence")


def check_padding(keep_mask: bool) -> Cases:
    """Rollouts padded after their end, with the mask that hides the padding or without it."""
    for divergence, pair in _some_cases("reverse_kl", "forward_kl", "jsd"):
        if pair[0].eos is None:
            continue
        loss = estimator("return_to_go", divergence, gamma=1.0)

        def masked(r: Rollouts, inner: Loss = loss) -> Tensor:
            return inner(r if keep_mask else dataclasses.replace(r, mask=torch.ones_like(r.mask)))

        yield close(expected_gradient(masked, *pair), _by_autograd(pair, divergence, "token_return"), divergence, pair)


def check_cap(claim: Callable[[float, float], bool]) -> Cases:
    r"""$D_f$ of the sequences cut at `T` tokens does not fall as `T` grows, for any generator."""
    for divergence, pair in itertools.product(catalogue(), pairs()):
        cut = []
        for cap in range(1, pair[0].horizon + 1):
            student, teacher = (TabularPolicy(policy.logits[:cap], eos=policy.eos) for policy in pair)
            cut.append(float(exact_value(student, teacher, divergence, "sequence")))
        for cap, (earlier, later) in enumerate(itertools.pairwise(cut), 1):
            grows = claim(earlier, later) or math.isclose(earlier, later, rel_tol=1e-14)
            yield holds(grows, divergence, pair, f"cap {cap}")


# T6f: tokens that an environment wrote.


def check_environment(claim: dict[str, bool]) -> Cases:
    """Histories with an environment's tokens, f free; both models also give these tokens probabilities."""

    def seen(t: RationalTree, y: History, us: list[Dual]) -> list[Dual]:
        if not claim.get("rewarded"):
            return us
        return [Dual(t.teacher[y[:m]][a] / t.student[y[:m]][a], Fraction(0)) for m, a in enumerate(y)]

    def later(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        found = seen(t, y, us)
        return found[n].weight() - later_rewards(found, n, ONE)

    def whole(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        return product(seen(t, y, us)).weight()

    scored = always if claim.get("scored") else by_the_student
    for tree in (rational_tree(2, 3, environment=(1,), seed=6), rational_tree(2, 3, 1, (0, 1), seed=7)):
        for weight, objective in ((later, "token_return"), (whole, "sequence")):
            yield same(direction_of(tree, weight, scored), gradient_of(tree, objective), tree, objective)


def check_environment_sampled(masked: bool) -> Cases:
    """Token 2 of 3 written by an environment: the library's losses with its mask, as a black box."""
    student, teacher = pairs()[1]
    world = TabularPolicy.random(3, 3, seed=11).logits[1]
    played, judged = (TabularPolicy([z[0], world, z[2]]) for z in (student.logits, teacher.logits))
    for divergence in map(divergences.divergence, ("reverse_kl", "jsd")):
        for objective, loss in (
            ("token_return", estimator("return_to_go", divergence, gamma=1.0)),
            ("sequence", estimator("sequence_opd_plus", divergence)),
        ):

            def seen(r: Rollouts, inner: Loss = loss) -> Tensor:
                own = torch.tensor([1.0, 0.0 if masked else 1.0, 1.0], dtype=r.mask.dtype)
                return inner(dataclasses.replace(r, mask=r.mask * own))

            truth = _by_autograd((played, judged), divergence, objective)
            truth = [truth[0], torch.zeros_like(truth[1]), truth[2]]
            yield close(expected_gradient(seen, student, teacher, behavior=played), truth, divergence, objective)
