"""Tokens that an environment writes and prompts: objectives and losses against fractions and autograd."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opdtheory import MarkovPolicy, Rollouts, TabularPolicy, divergences, estimator, exact_gradient, exact_value
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import estimator_names
from opdtheory.exact import Enumeration, enumerated_value, expected_gradient, gradient_moments, random_pair
from opdtheory.exact.oracle import full_vocabulary_variance
from opdtheory.testing import divergences as any_divergence
from opdtheory.testing import gradient_gap
from opdtheory.theorems.instances.trees import RationalTree, field_of, gradient_of, rational_tree
from tests.tolerances import ALGEBRA, ENUMERATION

OBJECTIVES = (("token_local", 1.0), ("token_return", 1.0), ("token_return", 0.5), ("sequence", 1.0))
WRITTEN = ((0,), (1,), (0, 1), (0, 2), (2,))


def with_leaves(policy: TabularPolicy) -> TabularPolicy:
    leaves = [z.clone().requires_grad_() for z in policy.logits]
    return TabularPolicy(leaves, eos=policy.eos, environment=policy.environment)


def by_autograd(student, teacher, divergence, objective, gamma):
    leaves = with_leaves(student)
    value = enumerated_value(leaves, teacher, divergence, objective, gamma)
    return value.detach(), list(torch.autograd.grad(value, leaves.logits, materialize_grads=True, allow_unused=True))


# In fractions (T6f), with the theorems' own tree.


def fraction_tree(size, horizon, eos, environment, seed) -> RationalTree:
    """A tree with rational distributions in which an environment's token ends nothing."""
    draw = random.Random(seed)

    def distribution():
        parts = [draw.randint(1, 7) for _ in range(size)]
        return tuple(Fraction(part, sum(parts)) for part in parts)

    def ended(y):
        return any(a == eos and n not in environment for n, a in enumerate(y))

    every = [y for n in range(horizon) for y in itertools.product(range(size), repeat=n)]
    histories = [y for y in every if not ended(y)]
    complete = tuple(
        (*y, a) for y in histories for a in range(size) if len(y) + 1 == horizon or (ended((*y, a)) and eos is not None)
    )
    world = {y: distribution() for y in histories if len(y) in environment}
    return RationalTree(
        {y: distribution() for y in histories}, {y: distribution() for y in histories}, world, complete, horizon, eos
    )


def policies_of(tree: RationalTree, size: int, environment) -> tuple[TabularPolicy, TabularPolicy]:
    """The same pair as tables; histories that have ended get a uniform row, which nothing may read."""
    pair = []
    for distributions in (tree.student, tree.teacher):
        levels = []
        for n in range(tree.horizon):
            source = tree.world if n in environment else distributions
            rows = [source.get(y, (Fraction(1),) * size) for y in itertools.product(range(size), repeat=n)]
            levels.append(torch.tensor([[float(p) for p in row] for row in rows], dtype=torch.float64).log())
        pair.append(TabularPolicy(levels, eos=tree.eos, environment=environment))
    return pair[0], pair[1]


def level_gradient(tree: RationalTree, size: int, entries) -> list[torch.Tensor]:
    levels = [torch.zeros(size**n, size, dtype=torch.float64) for n in range(tree.horizon)]
    for (history, a), entry in zip(tree.logits, entries, strict=True):
        row = sum(b * size**k for k, b in enumerate(reversed(history)))
        levels[len(history)][row, a] = float(entry)
    return levels


def agrees_with_fractions(tree, size, environment, pair, name) -> bool:
    divergence = divergences.divergence(name)

    def number(linear):
        return linear.exactly(divergence) if linear != 0 else Fraction(0)

    def local(t, y, us, n):
        return us[n].weight()

    truths = [("token_local", 1.0, [number(g.value) for g in field_of(tree, local)])]
    for objective, gamma in (("token_return", 1), ("token_return", Fraction(1, 2)), ("sequence", 1)):
        discount = Fraction(gamma)
        truths.append((objective, float(gamma), [number(g) for g in gradient_of(tree, objective, discount)]))
        value = float(number(tree.value(objective, discount).value))
        if abs(float(exact_value(*pair, name, objective, float(gamma))) - value) > ENUMERATION * max(1.0, abs(value)):
            return False
    return all(
        gradient_gap(exact_gradient(*pair, name, objective, gamma), level_gradient(tree, size, truth)) <= ENUMERATION
        for objective, gamma, truth in truths
    )


FRACTIONS = [(2, 3, None, (1,)), (2, 3, 1, (0, 1)), (2, 3, 0, (1,)), (3, 2, 0, (0,)), (2, 3, 0, (2,)), (2, 3, 1, (0,))]


@pytest.mark.parametrize(("size", "horizon", "eos", "environment"), FRACTIONS)
@pytest.mark.parametrize("name", ["chi2", "neyman_chi2"])
def test_values_and_gradients_are_those_in_fractions(size, horizon, eos, environment, name):
    tree = fraction_tree(size, horizon, eos, environment, seed=3)
    assert agrees_with_fractions(tree, size, environment, policies_of(tree, size, environment), name)


def test_an_environment_that_ends_rollouts_or_is_scored_is_another_tree():
    size, environment = 2, (1,)
    pair = policies_of(fraction_tree(size, 3, 0, environment, seed=3), size, environment)
    cut = rational_tree(size, 3, 0, environment, seed=3)  # there an environment's end-of-sequence token ends
    assert len(cut.sequences) < len(Enumeration.build(*pair))
    tree = fraction_tree(size, 3, 0, environment, seed=3)
    own = tuple(TabularPolicy(policy.logits, eos=0) for policy in policies_of(tree, size, ()))
    assert not agrees_with_fractions(tree, size, environment, own, "chi2")


# The oracle's two routes.


@given(st.integers(0, 10**6), st.sampled_from((None, 0, 1)), st.sampled_from(WRITTEN), any_divergence(smooth=True))
def test_both_routes_agree_and_nothing_flows_to_the_environment(seed, eos, environment, divergence):
    student, teacher = random_pair(2, 3, eos=eos, scale=0.7, seed=seed, environment=environment)
    for objective, gamma in OBJECTIVES:
        value, gradient = by_autograd(student, teacher, divergence, objective, gamma)
        exact = exact_gradient(student, teacher, divergence, objective, gamma)
        size = max(1.0, abs(float(value)))
        assert float((exact_value(student, teacher, divergence, objective, gamma) - value).abs()) <= ENUMERATION * size
        assert gradient_gap(exact, gradient) <= ENUMERATION
        for n in environment:
            assert torch.equal(exact[n], torch.zeros_like(exact[n]))
            assert torch.equal(gradient[n], torch.zeros_like(gradient[n]))


def test_the_environment_changes_what_the_student_sees():
    """The false twin of the routes' agreement: the same tables, all written by the student."""
    student, teacher = random_pair(2, 3, eos=0, seed=5, environment=(1,))
    _, gradient = by_autograd(
        *(TabularPolicy(each.logits, eos=0) for each in (student, teacher)), "jsd", "sequence", 1.0
    )
    assert gradient_gap(exact_gradient(student, teacher, "jsd", "sequence"), gradient) > 1e-2


def test_an_environment_that_comes_last_adds_nothing():
    student, teacher = random_pair(3, 2, eos=0, seed=1)
    world = torch.randn(9, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    longer = [TabularPolicy([*each.logits, world], eos=0, environment=(2,)) for each in (student, teacher)]
    for objective, gamma in OBJECTIVES:
        found = exact_gradient(*longer, "forward_kl", objective, gamma)
        assert gradient_gap(found[:2], exact_gradient(student, teacher, "forward_kl", objective, gamma)) <= ENUMERATION


def test_a_prompt_is_a_mixture_of_policies():
    student, teacher = random_pair(3, 3, eos=0, seed=2, environment=(0,))
    distribution = student.logits[0][0].softmax(-1)
    parts = [
        [
            TabularPolicy([level.view(3, -1, 3)[x] for level in policy.logits[1:]], eos=0)
            for policy in (student, teacher)
        ]
        for x in range(3)
    ]
    for objective in ("token_local", "token_return", "sequence"):
        value = sum(distribution[x] * exact_value(*parts[x], "jsd", objective) for x in range(3))
        assert float((exact_value(student, teacher, "jsd", objective) - value).abs()) <= ENUMERATION
        found = exact_gradient(student, teacher, "jsd", objective)
        for n in range(2):
            pieces = [distribution[x] * exact_gradient(*parts[x], "jsd", objective)[n] for x in range(3)]
            assert gradient_gap([found[1 + n]], [torch.cat(pieces)]) <= ENUMERATION


@pytest.mark.parametrize("case", Scenario(eos=0, prompts=2, environment=(1,)).pairs()[::2], ids=lambda case: case.label)
def test_both_routes_agree_where_most_tokens_are_no_prompt(case):
    for objective, gamma in OBJECTIVES:
        _, gradient = by_autograd(case.student, case.teacher, "jsd", objective, gamma)
        found = exact_gradient(case.student, case.teacher, "jsd", objective, gamma)
        assert gradient_gap(found, gradient) <= ENUMERATION


# Sampled losses.


def some_form_of(name: str):
    """An entry of the zoo, with a divergence and an option where it needs one."""
    for divergence, options in itertools.product((None, "jsd"), ({}, {"k": 2}, {"alpha": 0.5}, {"gamma": 1.0})):
        with contextlib.suppress(InvalidArgumentError):
            return estimator(name, divergence, **options)
    raise AssertionError(f"no form of {name} found")


@pytest.mark.parametrize("loss", [some_form_of(name) for name in estimator_names()], ids=lambda loss: loss.name)
def test_every_estimator_leaves_a_prompt_alone(loss):
    """What it does after a mixture of prompts is the mixture of what it does after each."""
    student, teacher = random_pair(3, 3, eos=0, seed=2, environment=(0,))
    distribution = student.logits[0][0].softmax(-1)
    found = expected_gradient(loss, student, teacher)
    pieces = []
    for x in range(3):
        own = [TabularPolicy([z.view(3, -1, 3)[x] for z in each.logits[1:]], eos=0) for each in (student, teacher)]
        pieces.append([distribution[x] * level for level in expected_gradient(loss, *own)])
    truth = [torch.zeros(1, 3, dtype=torch.float64), *(torch.cat(level) for level in zip(*pieces, strict=True))]
    assert gradient_gap(found, truth) <= ENUMERATION


LOSSES = [
    ("opd_plus", "jsd", {}, "token_local", 1),
    ("full_vocab", "forward_kl", {}, "token_local", 1),
    ("opd_plus", "forward_kl", {"baseline": "vocabulary"}, "token_local", 1),
    ("opd_plus", "reverse_kl", {"baseline": "leave_one_out"}, "token_local", 2),
    ("return_to_go", "jsd", {"gamma": 1.0}, "token_return", 1),
    ("sequence_opd_plus", "jsd", {}, "sequence", 1),
]


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize(("name", "divergence", "options", "objective", "batch_size"), LOSSES)
def test_expected_gradients_honour_the_environment_and_leaks_are_seen(
    name, divergence, options, objective, batch_size, eos
):
    loss = estimator(name, divergence, **options)
    student, teacher = random_pair(2, 3, eos=eos, seed=7, environment=(1,))
    truth = exact_gradient(student, teacher, divergence, objective)
    found = expected_gradient(loss, student, teacher, batch_size)
    assert gradient_gap(found, truth) <= ENUMERATION
    assert torch.equal(found[1], torch.zeros_like(found[1]))

    def leaky(r: Rollouts) -> torch.Tensor:
        own = r.mask.clone()
        own[:, 1] = 1.0
        return loss(dataclasses.replace(r, mask=own))

    assert gradient_gap(expected_gradient(leaky, student, teacher, batch_size), truth) > 1e-3


@pytest.mark.parametrize("importance", ["prefix", "sequence"])
def test_importance_ratios_leave_the_environment_out(importance):
    student, teacher = random_pair(2, 3, eos=0, seed=3, environment=(0, 1))
    behavior = student.perturbed(0.5, seed=9)
    assert all(torch.equal(behavior.logits[n], student.logits[n]) for n in (0, 1))
    loss = estimator("opd_plus", "jsd", importance=importance)
    truth = exact_gradient(student, teacher, "jsd")
    assert gradient_gap(expected_gradient(loss, student, teacher, behavior=behavior), truth) <= ENUMERATION

    def leaky(r: Rollouts) -> torch.Tensor:
        ratio = (r.student_logprobs - r.behavior_logprobs).sum(-1, keepdim=True).exp().detach()
        return r.token_sum(-ratio * divergences.jsd.weight(r.log_u).detach() * r.student_logprobs)

    assert gradient_gap(expected_gradient(leaky, student, teacher, behavior=behavior), truth) > 1e-3


def test_the_whole_vocabulary_has_the_variance_of_the_prefix_alone():
    student, teacher = random_pair(3, 3, eos=0, seed=4, environment=(0, 2))
    moments = gradient_moments(estimator("full_vocab", "jsd"), student, teacher)
    assert moments.variance == pytest.approx(full_vocabulary_variance(student, teacher, "jsd"), rel=1e-10)


# What is refused.


def test_one_environment_for_all():
    student, teacher = random_pair(2, 3, seed=1, environment=(1,))
    elsewhere = TabularPolicy(teacher.logits, environment=(2,))
    other = TabularPolicy(
        [teacher.logits[0], teacher.logits[1] + torch.tensor([0.0, 1e-6]), teacher.logits[2]], None, (1,)
    )
    shifted = TabularPolicy([teacher.logits[0], teacher.logits[1] + 3.0, teacher.logits[2]], None, (1,))
    chain = MarkovPolicy.random(2, 3)
    for wrong in (elsewhere, other, chain):
        for call in (exact_value, exact_gradient, enumerated_value):
            with pytest.raises(InvalidArgumentError) as caught:
                call(student, wrong, "jsd")
            assert caught.value.argument == "teacher"
        with pytest.raises(InvalidArgumentError) as caught:
            expected_gradient(estimator("k2_loss"), student, teacher, behavior=wrong)
        assert caught.value.argument == "behavior"
    assert gradient_gap(exact_gradient(student, shifted, "jsd"), exact_gradient(student, teacher, "jsd")) <= ALGEBRA
