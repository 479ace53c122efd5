"""T6e and T6f: which tokens count: the end of a sequence, the length cap, and tokens of an environment."""

from __future__ import annotations

import dataclasses
import itertools
import math
import operator
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, exact_value, expected_gradient
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import catalogue, pairs
from opdtheory.theorems.instances.trees import (
    Dual,
    History,
    RationalTree,
    always,
    by_the_student,
    direction_of,
    gradient_of,
    product,
    rational_tree,
)
from opdtheory.theorems.sequences.objectives import ONE, by_autograd, later_rewards, some_cases, step_sequence
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, same

__all__ = ["theorems"]

Loss = Callable[[Rollouts], Tensor]


def theorems() -> list[Theorem]:
    """T6e and T6f."""
    return [_ends(), _environment()]


def _ends() -> Theorem:
    return Theorem(
        number="T6e",
        name="end of sequence and length cap",
        meaning=(
            "Rollouts end with an EOS token or are cut at a length cap. The weights of T6a stay exact if the sums run"
            " over the $L$ tokens that were written: padding after the end adds nothing, while the EOS token and the"
            " rollouts cut at the cap count like all others."
        ),
        statement=(
            r"\text{T6a holds with sums over } n \le L;\quad"
            r" \text{after the end } u = 1,\ s = 0,\ f(1) = 0;\quad"
            r" \text{the end token itself counts, and so does a rollout cut at the cap}"
        ),
        hypotheses=(
            "a sequence ends after its EOS token or at $T$ tokens, and the same cap applies to both models",
            "$f(1) = 0$",
        ),
        source="derived here",
        advice=(
            "Mask what follows EOS, keep EOS, and keep truncated rollouts: dropping them conditions on the outcome."
        ),
        derivation=(
            Step(
                r"\nabla E_P f(U) = -E_P[w_f(U)\textstyle\sum_{n \le L} s_n]",
                "this is T1 with a whole sequence in the place of a token, where the first token may already end the"
                " sequence. Sympy treats $f$ and the distributions as undefined functions",
                lambda: step_sequence(ends=True),
            ),
        ),
        identities=(
            Identity(
                "variable length",
                r"A_n \text{ as in T6a for } n \le L,\ f \text{ free}",
                _check_endings,
                {},
                {"EOS token not scored": {"end": "unscored"}, "truncated rollouts dropped": {"cap": "dropped"}},
                "exact",
            ),
            Identity(
                "padding",
                r"E[\hat g] = \nabla J \text{ with padding masked}",
                _check_padding,
                True,
                {"padding counted": False},
            ),
            Identity(
                "longer caps",
                r"D_f(Q_{\le T}\|P_{\le T}) \le D_f(Q_{\le T+1}\|P_{\le T+1})",
                _check_cap,
                operator.le,
                {"reversed": operator.ge},
            ),
        ),
    )


def _environment() -> Theorem:
    return Theorem(
        number="T6f",
        name="tokens of an environment",
        meaning=(
            r"A tool or another environment may write some tokens of a rollout. Student and teacher meet these with"
            r" the same probability $\kappa$, which cancels in their ratio and has no score. So they belong in the"
            r" history that the models read, and neither in the score nor in the reward."
        ),
        statement=(
            r"P = \prod p\prod\kappa,\ Q = \prod q\prod\kappa;\quad"
            r" \text{the environment's tokens have } u = 1,\ s = 0;\quad"
            r" \text{each is in the history and nowhere else}"
        ),
        hypotheses=(
            r"the environment's distribution $\kappa(e \mid h)$ does not depend on $\theta$",
            "both models meet the same environment",
        ),
        source="derived here",
        advice=(
            "Mask tool results out of the score and out of the reward; the models' probabilities of them do not count."
        ),
        derivation=(
            Step(
                r"\nabla E_P f(U) = -E_P[w_f(U)(s_1 + s_3)],\quad U = u_1 u_3",
                r"take three tokens, of which the environment draws the second from $\kappa(\cdot \mid y_1)$: it"
                r" cancels in $U$ and has no score. Sympy treats $f$ and the distributions as undefined functions",
                lambda: step_sequence(environment=True),
            ),
        ),
        identities=(
            Identity(
                "neither score nor reward",
                r"A_n = w_f(u_n) - \sum_{m>n}f(u_m),\ A_n = w_f(U) \text{ over the student's tokens},\ f \text{ free}",
                _check_environment,
                {},
                {
                    "scored": {"scored": True},
                    "rewarded": {"rewarded": True},
                    "scored and rewarded": {"scored": True, "rewarded": True},
                },
                "exact",
            ),
            Identity(
                "masked losses as black boxes",
                r"E[\hat g] = \nabla J \text{ with the environment's tokens masked}",
                _check_environment_sampled,
                True,
                {"not masked": False},
            ),
        ),
    )


# T6e: the end of a sequence.


def _check_endings(claim: dict[str, Any]) -> Cases:
    """Variable lengths, f free: every token of the student is scored, the EOS too, and every rollout counts."""

    def scored_token(t: RationalTree, y: History, n: int) -> bool:
        return claim.get("end") != "unscored" or y[n] != t.eos

    def counted(t: RationalTree, y: History) -> bool:
        return claim.get("cap") != "dropped" or y[-1] == t.eos

    def weight(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        return us[n].weight() - later_rewards(us, n, ONE) if scored_token(t, y, n) else Dual(Fraction(0))

    for tree in (rational_tree(2, 3, eos=1, seed=4), rational_tree(3, 2, eos=0, seed=5)):
        found = direction_of(tree, weight, counted=counted)
        yield same(found, gradient_of(tree, "token_return"), tree, "token_return")
        if not claim.get("end"):
            whole = direction_of(tree, lambda t, y, us, n: product(us).weight(), counted=counted)
            yield same(whole, gradient_of(tree, "sequence"), tree, "sequence")


def _check_padding(keep_mask: bool) -> Cases:
    """Rollouts padded after their end, with the mask that hides the padding or without it."""
    for divergence, pair in some_cases("reverse_kl", "forward_kl", "jsd"):
        if pair[0].eos is None:
            continue
        loss = estimator("return_to_go", divergence, gamma=1.0)

        def masked(r: Rollouts, inner: Loss = loss) -> Tensor:
            return inner(r if keep_mask else dataclasses.replace(r, mask=torch.ones_like(r.mask)))

        yield close(expected_gradient(masked, *pair), by_autograd(pair, divergence, "token_return"), divergence, pair)


def _check_cap(claim: Callable[[float, float], bool]) -> Cases:
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


def _check_environment(claim: dict[str, bool]) -> Cases:
    """Histories with an environment's tokens, f free; both models also give these tokens probabilities."""

    def seen(t: RationalTree, y: History, us: list[Dual]) -> list[Dual]:
        if not claim.get("rewarded"):
            return us
        return [Dual(t.teacher[y[:m]][a] / t.student[y[:m]][a]) for m, a in enumerate(y)]

    def later(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        found = seen(t, y, us)
        return found[n].weight() - later_rewards(found, n, ONE)

    def whole(t: RationalTree, y: History, us: list[Dual], n: int) -> Dual:
        return product(seen(t, y, us)).weight()

    scored = always if claim.get("scored") else by_the_student
    for tree in (rational_tree(2, 3, environment=(1,), seed=6), rational_tree(2, 3, 1, (0, 1), seed=7)):
        for weight, objective in ((later, "token_return"), (whole, "sequence")):
            yield same(direction_of(tree, weight, scored), gradient_of(tree, objective), tree, objective)


def _check_environment_sampled(masked: bool) -> Cases:
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

            truth = by_autograd((played, judged), divergence, objective)
            truth = [truth[0], torch.zeros_like(truth[1]), truth[2]]
            yield close(expected_gradient(seen, student, teacher, behavior=played), truth, divergence, objective)
