"""The checks of T6 (a) to (f): each takes a formula and says how far it is from the truth on every case."""

from __future__ import annotations

import dataclasses
import functools
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
from opdtheory.theorems.instances.cases import Pair, autograd_gradient, catalogue, interval, pairs
from opdtheory.theorems.instances.trees import (
    Advantage,
    Dual,
    History,
    RationalTree,
    by_the_student,
    field_of,
    gradient_of,
    product,
    rational_tree,
    trees,
)
from opdtheory.theorems.theorem import Cases, close, holds, overlap, same

__all__ = [
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
REVERSE, FORWARD = "reverse_kl", "forward_kl"

Discounted = Callable[[Fraction], Advantage]
Loss = Callable[[Rollouts], Tensor]


def _some_cases() -> Iterator[tuple[Divergence, Pair]]:
    """A generator of each shape on every pair: bounded and not, smooth and with a kink."""
    names = ("reverse_kl", "jsd", "total_variation")
    for divergence in map(divergences.divergence, names):
        for pair in pairs():
            yield divergence, pair


def later_rewards(ratios: list[Dual], n: int, gamma: Fraction, start: int = 1) -> Dual:
    r"""$\sum_{m \ge n + \mathrm{start}} \gamma^{m-n} f(u_m)$."""
    terms = (ratios[m].f().scaled(gamma ** (m - n)) for m in range(n + start, len(ratios)))
    return functools.reduce(lambda a, b: a + b, terms, Dual.zero())


# (a) the weights, with f free: equal coefficients of f(u) and f'(u) at every rational u.


def check_return_weight(weight: Discounted) -> Cases:
    """Gradients of the discounted sum, from its definition, against weighted scores."""
    for tree in trees():
        for gamma in GAMMAS:
            yield same(
                [g.value for g in field_of(tree, weight(gamma))], gradient_of(tree, "token_return", gamma), tree, gamma
            )


def check_sequence_weight(weight: Advantage) -> Cases:
    """Gradients of the divergence between whole sequences, from its definition, against weighted scores."""
    for tree in trees():
        yield same([g.value for g in field_of(tree, weight)], gradient_of(tree, "sequence"), tree)


def check_estimators(changes: dict[str, Any]) -> Cases:
    """The library's losses, run as black boxes on every rollout, against autograd of the enumerated objectives."""
    for divergence, pair in _some_cases():
        for objective, gamma in (("token_return", 0.6), ("sequence", 1.0)):
            name, options = "sequence_opd_plus", {}
            if objective == "token_return":
                name, options = "return_to_go", {"gamma": gamma, "discounted": True}
            name, options = changes.get(objective, (name, options))
            yield close(
                _sampled(name, divergence, pair, tuple(options.items())),
                _by_autograd(divergence, pair, objective, gamma),
                divergence,
                pair,
                objective,
                gamma,
            )


@functools.cache
def _sampled(name: str, divergence: Divergence, pair: Pair, options: tuple[tuple[str, Any], ...]) -> list[Tensor]:
    return expected_gradient(estimator(name, divergence, **dict(options)), *pair)


@functools.cache
def _by_autograd(divergence: Divergence, pair: Pair, objective: str, gamma: float) -> list[Tensor]:
    return autograd_gradient(pair, lambda s: enumerated_value(s, pair[1], divergence, objective, gamma))


def return_weight(gamma: Fraction, sign: int = -1, start: int = 1, outer: bool = True, keep: bool = True) -> Advantage:
    r"""$\gamma^{n-1}[w_f(u_n) - \sum_{m>n}\gamma^{m-n} f(u_m)]$, or a variant that changes one thing in it."""

    def weight(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        total = us[n].weight()
        if keep:
            total = total + later_rewards(us, n, gamma, start).scaled(Fraction(sign))
        return total.scaled(gamma**n) if outer else total

    return weight


# (b) the gap.


def check_gap(sign_and_start: tuple[int, int]) -> Cases:
    r"""$\nabla J_{return} - g_{local} = E[\sum_n s_n \sum_{m>n} f(u_m)]$, f free."""
    sign, start = sign_and_start
    for tree in trees():
        local = field_of(tree, lambda t, y, us, n: us[n].weight())
        # `field_of` has a minus in front of its weight.
        gap = field_of(tree, lambda t, y, us, n: later_rewards(us, n, ONE, start).scaled(Fraction(-sign)))
        whole = gradient_of(tree, "token_return")
        yield same([a - b.value for a, b in zip(whole, local, strict=True)], [g.value for g in gap], tree)


def check_gap_sampled(sign_and_start: tuple[int, int]) -> Cases:
    """The gap in float64: autograd of the objective, and two losses run as black boxes."""
    sign, start = sign_and_start
    for divergence, pair in _some_cases():

        def loss(r: Rollouts, d: Divergence = divergence) -> Tensor:
            rewards = torch.where(r.mask > 0, d.generator(r.log_u.detach()), 0.0)
            from_here = rewards.flip(-1).cumsum(-1).flip(-1)
            return r.token_sum(sign * (from_here - start * rewards) * r.student_logprobs)

        local = _sampled("opd_plus", divergence, pair, ())
        whole = _by_autograd(divergence, pair, "token_return", 1.0)
        yield close(
            [a - b for a, b in zip(whole, local, strict=True)], expected_gradient(loss, *pair), divergence, pair
        )


# (c) the reverse KL's chain rule.


def check_chain_rule(claim: tuple[str, Fraction]) -> Cases:
    """Values and gradients of both objectives, in intervals."""
    divergence = divergences.divergence(claim[0])
    for tree in trees():
        whole, summed = tree.value("sequence").value, tree.value("token_return", claim[1]).value
        yield overlap(summed.enclosed(divergence), whole.enclosed(divergence), tree)
        for a, b in zip(gradient_of(tree, "token_return", claim[1]), gradient_of(tree, "sequence"), strict=True):
            yield overlap(a.enclosed(divergence), b.enclosed(divergence), tree)


def check_long_chains(claim: tuple[str, Fraction]) -> Cases:
    """Both objectives at 60 tokens, by two dynamic programmes."""
    for eos in (None, 0):
        student, teacher = (MarkovPolicy.random(4, 60, eos=eos, seed=seed) for seed in (1, 2))
        for of in (exact_gradient, lambda *a: [exact_value(*a)]):
            summed = of(student, teacher, claim[0], "token_return", float(claim[1]))
            yield close(summed, of(student, teacher, claim[0], "sequence"), eos, of)


# (d) the forward KL.


def ratio_before(ratios: list[Dual], n: int) -> Dual:
    r"""$U_{<n}$, the ratio of the tokens before one."""
    return product(ratios[:n])


def check_prefix_weight(weight: Advantage) -> Cases:
    r"""$-E_P[\sum_n A_n s_n] = \sum_h Q(h)(p - q)(h)$, the gradient of the teacher's cross-entropy, in fractions."""
    for tree in trees():
        left = []
        for history, a in tree.logits:
            reach = ONE
            for n, token in enumerate(history):
                reach *= tree.teacher[history[:n]][token]
            left.append(reach * (tree.student[history][a] - tree.teacher[history][a]))
        yield same(left, [g.value for g in field_of(tree, weight)], tree)


def check_prefix_value(power: int) -> Cases:
    r"""$KL(Q\|P) = \sum_n E_P[U_{<n}^k\,KL(q\|p)(h_n)]$ in intervals."""
    forward = divergences.divergence(FORWARD)
    for tree in trees():
        right = interval(0)
        for history, distribution in tree.student.items():
            reach = ONE
            for n, token in enumerate(history):
                p, q = tree.student[history[:n]][token], tree.teacher[history[:n]][token]
                reach *= p * (q / p) ** power
            ratios = [Dual(q / p, Fraction(0)) for p, q in zip(distribution, tree.teacher[history], strict=True)]
            terms = (u.f().scaled(p) for p, u in zip(distribution, ratios, strict=True))
            row = functools.reduce(lambda a, b: a + b, terms)
            right += row.value.enclosed(forward) * interval(reach)
        yield overlap(right, tree.value("sequence").value.enclosed(forward), tree)


def check_prefix_loss(power: int) -> Cases:
    r"""A loss with weight $U_{<n}^k u_n$, as a black box, against autograd of the enumerated sequence objective."""
    forward = divergences.divergence(FORWARD)
    for pair in pairs():

        def loss(r: Rollouts) -> Tensor:
            log_u = r.mask * r.log_u.detach()
            before = log_u.cumsum(-1) - log_u
            return r.token_sum(-(power * before + log_u).exp() * r.student_logprobs)

        yield close(expected_gradient(loss, *pair), _by_autograd(forward, pair, "sequence", 1.0), pair)


# (e) the end of a sequence.


def _everywhere(tree: RationalTree, _: History) -> bool:
    return True


def check_endings(claim: dict[str, Any]) -> Cases:
    """Variable lengths with f free: every choice of the student scores, the one of the end too, and all rollouts."""
    for tree in (rational_tree(2, 3, eos=1, seed=4), rational_tree(3, 2, eos=0, seed=5)):

        def weight(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
            if claim.get("end") == "unscored" and y[n] == t.eos:
                return Dual.zero()
            return us[n].weight() - later_rewards(us, n, ONE)

        def counted(t: RationalTree, y: History) -> bool:
            return claim.get("cap") != "dropped" or y[-1] == t.eos

        yield same([g.value for g in field_of(tree, weight, counted=counted)], gradient_of(tree, "token_return"), tree)
        whole = field_of(tree, lambda t, y, us, n: product(us).weight(), counted=counted)
        if not claim.get("end"):
            yield same([g.value for g in whole], gradient_of(tree, "sequence"), tree)


def _with_ends() -> tuple[Pair, ...]:
    return tuple(pair for pair in pairs() if pair[0].eos is not None)


def check_padding(keep_mask: bool) -> Cases:
    """Rollouts padded after their end, with the mask that hides the padding or without it."""
    for divergence in map(divergences.divergence, ("reverse_kl", "forward_kl", "jsd")):
        loss = estimator("return_to_go", divergence, gamma=1.0)

        def masked(r: Rollouts, inner: Loss = loss) -> Tensor:
            return inner(r if keep_mask else dataclasses.replace(r, mask=torch.ones_like(r.mask)))

        for pair in _with_ends():
            yield close(
                expected_gradient(masked, *pair), _by_autograd(divergence, pair, "token_return", 1.0), divergence, pair
            )


def check_cap(claim: Callable[[float, float], bool]) -> Cases:
    r"""$D_f$ of the sequences cut at `T` tokens does not fall as `T` grows, for any generator."""
    for divergence in catalogue():
        for student, teacher in pairs():
            cut = []
            for cap in range(1, student.horizon + 1):
                short, long = (TabularPolicy(each.logits[:cap], eos=each.eos) for each in (student, teacher))
                cut.append(float(exact_value(short, long, divergence, "sequence")))
            for earlier, later in zip(cut, cut[1:], strict=False):
                yield holds(
                    claim(earlier, later) or math.isclose(earlier, later, rel_tol=1e-14), divergence, student, teacher
                )


# (f) tokens that an environment wrote.


def check_environment(claim: dict[str, bool]) -> Cases:
    """Histories that hold an environment's tokens, f free; both models have an opinion of these tokens."""
    for tree in (rational_tree(2, 3, environment=(1,), seed=6), rational_tree(2, 3, 1, (0, 1), seed=7)):

        def ratios(t: RationalTree, y: History, us: list[Dual]) -> list[Dual]:
            if not claim.get("rewarded"):
                return us
            return [Dual(t.teacher[y[:m]][y[m]] / t.student[y[:m]][y[m]], Fraction(0)) for m in range(len(y))]

        def later(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
            found = ratios(t, y, us)
            return found[n].weight() - later_rewards(found, n, ONE)

        def whole(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
            return product(ratios(t, y, us)).weight()

        for weight, objective in ((later, "token_return"), (whole, "sequence")):
            scored = _everywhere if claim.get("scored") else by_the_student
            yield same(
                [g.value for g in field_of(tree, weight, scored=scored)],
                gradient_of(tree, objective),
                tree,
                weight,
                objective,
            )


def check_environment_sampled(masked: bool) -> Cases:
    """Token 2 of 3 written by an environment: the library's losses with its mask, as a black box."""
    student, teacher = pairs()[1]
    world = TabularPolicy.random(3, 3, seed=11).logits[1]
    played, judged = (TabularPolicy([z[0], world, z[2]]) for z in (student.logits, teacher.logits))
    for divergence in map(divergences.divergence, ("reverse_kl", "jsd")):
        for name, options, objective in (
            ("return_to_go", {"gamma": 1.0}, "token_return"),
            ("sequence_opd_plus", {}, "sequence"),
        ):
            loss = estimator(name, divergence, **options)  # type: ignore[arg-type]

            def seen(r: Rollouts, inner: Loss = loss) -> Tensor:
                own = torch.tensor([1.0, 0.0 if masked else 1.0, 1.0], dtype=r.mask.dtype)
                return inner(dataclasses.replace(r, mask=r.mask * own))

            truth = _by_autograd(divergence, (played, judged), objective, 1.0)
            truth = [truth[0], torch.zeros_like(truth[1]), truth[2]]
            yield close(
                expected_gradient(seen, student, teacher, behavior=played), truth, divergence, name, options, objective
            )
