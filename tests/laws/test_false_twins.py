"""The oracle's tests can fail: the comparison that accepts the closed forms refutes each near neighbour of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opdtheory import Divergence, TabularPolicy, divergence, exact_gradient, exact_value, random_pair
from opdtheory.exact import Enumeration, enumerated_value
from opdtheory.testing import divergences, gradient_gap, policy_pairs
from tests.tolerances import ENUMERATION

# A twin must miss by far more than rounding, or the comparison could not tell.
MISSED = 1e3 * ENUMERATION


@dataclasses.dataclass(frozen=True)
class Formula:
    """The weights `A_n` of a gradient `-E_p[sum_n A_n s_n]`, with the places where one may go wrong.

    Attributes:
        local: the weight of a single ratio.
        cost: what a later token adds to an earlier one's blame.
        outer: discount of the token itself, from gamma and its position.
        inner: discount of a later token, from gamma and the distance.
        whole: whether the ratio is that of the whole sequence.
        masked: whether positions after the end are left out.
        before: whether the tokens that come earlier are blamed too.
    """

    local: Callable[[Divergence, Tensor], Tensor] = lambda d, t: d.weight(t)
    cost: Callable[[Divergence, Tensor], Tensor] = lambda d, t: d.generator(t)
    outer: Callable[[float, int], float] = lambda gamma, n: gamma**n
    inner: Callable[[float, int], float] = lambda gamma, distance: gamma**distance
    whole: bool = False
    masked: bool = True
    before: bool = False


TRUE = Formula()
LOCAL = Formula(outer=lambda gamma, n: 1.0, inner=lambda gamma, distance: 0.0)
SEQUENCE = Formula(whole=True)


def closed_form(student, teacher, d: Divergence, gamma: float, formula: Formula) -> list[Tensor]:
    """The gradient of a formula, by a sum over spelled-out sequences of weights times scores."""
    everything = Enumeration.build(student, teacher)
    leaves = [level.detach().clone().requires_grad_() for level in student.logits]
    r = everything.rollouts(student_logits=everything.gather_logits(leaves))
    mask = r.mask if formula.masked else torch.ones_like(r.mask)
    log_u = mask * r.log_u.detach()
    weights = torch.zeros_like(log_u)
    for n in range(log_u.shape[1]):
        if formula.whole:
            weights[:, n] = formula.local(d, log_u.sum(-1))
            continue
        blame = torch.zeros(len(log_u), dtype=torch.float64)
        for m in range(log_u.shape[1]):
            if m > n or (formula.before and m < n):
                blame += formula.inner(gamma, abs(m - n)) * mask[:, m] * formula.cost(d, log_u[:, m])
        weights[:, n] = formula.outer(gamma, n) * (formula.local(d, log_u[:, n]) - blame)
    loss = -(everything.probability.unsqueeze(-1) * mask * weights * r.student_logprobs).sum()
    return list(torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True))


def gap(formula: Formula, objective: str, gamma: float, name: str, eos: int | None = 0) -> float:
    """How far a formula is from the oracle on one pair."""
    student, teacher = random_pair(3, 3, eos=eos, distance=1.0, seed=8)
    d = divergence(name)
    exact = exact_gradient(student, teacher, d, objective, gamma)
    return gradient_gap(closed_form(student, teacher, d, gamma, formula), exact)


# What is true is accepted.


@given(policy_pairs(), divergences(), st.sampled_from((0.0, 0.4, 1.0)))
def test_weights_times_scores_give_the_oracle_s_gradients(pair, d, gamma):
    for formula, objective, discount in (
        (TRUE, "token_return", gamma),
        (LOCAL, "token_local", 1.0),
        (SEQUENCE, "sequence", 1.0),
    ):
        exact = exact_gradient(*pair, d, objective, discount)
        assert gradient_gap(closed_form(*pair, d, discount, formula), exact) <= ENUMERATION


NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "total_variation", "le_cam")


@pytest.mark.parametrize("eos", [None, 0])
@pytest.mark.parametrize("name", NAMES)
def test_the_comparison_accepts_what_is_true(name, eos):
    assert gap(TRUE, "token_return", 0.7, name, eos) <= ENUMERATION
    assert gap(LOCAL, "token_local", 1.0, name, eos) <= ENUMERATION
    assert gap(SEQUENCE, "sequence", 1.0, name, eos) <= ENUMERATION


@given(policy_pairs(), divergences(), st.sampled_from((-3.0, 0.5)))
def test_a_constant_in_the_weight_is_a_baseline_not_a_twin(pair, d, constant):
    shifted = dataclasses.replace(LOCAL, local=lambda d, t: d.weight(t) + constant)
    assert gradient_gap(closed_form(*pair, d, 1.0, shifted), exact_gradient(*pair, d)) <= ENUMERATION


# What is false is refuted.

WRONG_WEIGHTS = {
    "f dropped": lambda d, t: d.log_slope(t),
    "u f' dropped": lambda d, t: -d.generator(t),
    "sign of f flipped": lambda d, t: d.log_slope(t) + d.generator(t),
    "sign flipped": lambda d, t: -d.weight(t),
    "ratio upside down": lambda d, t: d.weight(-t),
    "scaled": lambda d, t: 1.001 * d.weight(t),
}


@pytest.mark.parametrize("formula", [LOCAL, TRUE, SEQUENCE], ids=["token_local", "token_return", "sequence"])
@pytest.mark.parametrize("twin", WRONG_WEIGHTS)
def test_a_wrong_weight_is_refuted(twin, formula):
    objective = {id(LOCAL): "token_local", id(TRUE): "token_return", id(SEQUENCE): "sequence"}[id(formula)]
    false = dataclasses.replace(formula, local=WRONG_WEIGHTS[twin])
    assert gap(false, objective, 1.0, "forward_kl") > MISSED


def test_stop_gradient_is_right_for_the_reverse_kl_alone():
    false = dataclasses.replace(LOCAL, local=WRONG_WEIGHTS["u f' dropped"])
    for name in NAMES:
        missed = gap(false, "token_local", 1.0, name)
        assert missed <= ENUMERATION if name == "reverse_kl" else missed > MISSED, name


WRONG_RETURNS = {
    "later tokens dropped": dataclasses.replace(TRUE, inner=lambda gamma, distance: 0.0),
    "later tokens with the wrong sign": dataclasses.replace(TRUE, inner=lambda gamma, distance: -(gamma**distance)),
    "w of later tokens": dataclasses.replace(TRUE, cost=lambda d, t: d.weight(t)),
}


@pytest.mark.parametrize("twin", WRONG_RETURNS)
@pytest.mark.parametrize("gamma", [0.6, 1.0])
@pytest.mark.parametrize("name", ["forward_kl", "jsd", "hellinger"])
def test_a_wrong_return_is_refuted(twin, gamma, name):
    assert gap(WRONG_RETURNS[twin], "token_return", gamma, name) > MISSED


WRONG_DISCOUNTS = {
    "outer discount left out": dataclasses.replace(TRUE, outer=lambda gamma, n: 1.0),
    "outer discount one position late": dataclasses.replace(TRUE, outer=lambda gamma, n: gamma ** (n + 1)),
    "inner discount left out": dataclasses.replace(TRUE, inner=lambda gamma, distance: 1.0),
    "inner discount one position early": dataclasses.replace(TRUE, inner=lambda g, distance: g ** (distance - 1)),
    "outer discount squared": dataclasses.replace(TRUE, outer=lambda gamma, n: gamma ** (2 * n)),
}


@pytest.mark.parametrize("twin", WRONG_DISCOUNTS)
@pytest.mark.parametrize("name", ["reverse_kl", "jsd"])
def test_a_misplaced_discount_is_refuted_unless_there_is_none(twin, name):
    assert gap(WRONG_DISCOUNTS[twin], "token_return", 0.6, name) > MISSED
    assert gap(WRONG_DISCOUNTS[twin], "token_return", 1.0, name) <= ENUMERATION


def test_the_objectives_are_not_each_other():
    pair = random_pair(3, 3, distance=1.0, seed=8)
    gradients = {name: exact_gradient(*pair, "jsd", name) for name in ("token_local", "token_return", "sequence")}
    for one, other in (("token_local", "token_return"), ("token_return", "sequence"), ("sequence", "token_local")):
        assert gradient_gap(gradients[one], gradients[other]) > MISSED


@pytest.mark.parametrize("name", NAMES)
def test_the_chain_rule_is_refuted_for_all_but_the_reverse_kl(name):
    pair = random_pair(3, 3, eos=0, distance=1.0, seed=8)
    missed = gradient_gap(*(exact_gradient(*pair, name, objective) for objective in ("token_return", "sequence")))
    assert missed <= ENUMERATION if name == "reverse_kl" else missed > MISSED


@pytest.mark.parametrize(
    ("formula", "objective"), [(LOCAL, "token_local"), (TRUE, "token_return"), (SEQUENCE, "sequence")]
)
def test_reading_beyond_the_end_is_refuted(formula, objective):
    false = dataclasses.replace(formula, masked=False)
    assert gap(false, objective, 1.0, "jsd", eos=0) > MISSED
    assert gap(false, objective, 1.0, "jsd", eos=None) <= ENUMERATION


@pytest.mark.parametrize("objective", ["token_local", "token_return", "sequence"])
def test_an_ignored_end_of_sequence_is_refuted(objective):
    student, teacher = random_pair(3, 3, eos=0, distance=1.0, seed=8)
    endless = [TabularPolicy(policy.logits) for policy in (student, teacher)]
    value = enumerated_value(student, teacher, "jsd", objective)
    assert gradient_gap([exact_value(student, teacher, "jsd", objective)], [value]) <= ENUMERATION
    assert gradient_gap([exact_value(*endless, "jsd", objective)], [value]) > MISSED
    exact = exact_gradient(student, teacher, "jsd", objective)
    assert gradient_gap(exact_gradient(*endless, "jsd", objective), exact) > MISSED


@pytest.mark.parametrize("objective", ["token_local", "token_return", "sequence"])
def test_exchanged_policies_are_refuted(objective):
    student, teacher = random_pair(3, 3, eos=0, distance=1.0, seed=8)
    value = enumerated_value(student, teacher, "forward_kl", objective)
    assert gradient_gap([exact_value(teacher, student, "forward_kl", objective)], [value]) > MISSED


def test_differentiating_the_prefixes_is_refuted_for_token_local():
    student, teacher = random_pair(3, 2, distance=1.0, seed=8)
    leaves = [level.clone().requires_grad_() for level in student.logits]
    value = enumerated_value(TabularPolicy(leaves), teacher, "jsd", "token_return")
    through = torch.autograd.grad(value, leaves)
    local = exact_gradient(student, teacher, "jsd")
    assert gradient_gap(through[:1], local[:1]) > MISSED
    assert gradient_gap(through[1:], local[1:]) <= ENUMERATION


# Not every change is an error.


def test_blame_of_earlier_tokens_averages_out():
    # What came before a token is a baseline for it.
    assert gap(dataclasses.replace(TRUE, before=True), "token_return", 0.7, "jsd") <= ENUMERATION


def test_the_weight_of_chi2_is_its_generator_in_another_gauge():
    # u^2 - 1 = (u - 1)^2 + 2 (u - 1), and the gauge of later tokens is a martingale (T3).
    assert gap(WRONG_RETURNS["w of later tokens"], "token_return", 0.6, "chi2") <= ENUMERATION
