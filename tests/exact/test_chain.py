"""Dynamic programming over pairs of states: against the tree, autograd of a long loop, and exact relations."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory import FiniteStatePolicy, MarkovPolicy, divergence, exact_gradient, exact_value
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact.chain import Chain
from opdtheory.testing import gradient_gap
from tests.exact.automata import ENTRIES, FACTORING, by_automata, by_eos, chains
from tests.sparse import some
from tests.tolerances import ENUMERATION

SETTINGS = [("token_local", 1.0), ("sequence", 1.0), ("token_return", 1.0), ("token_return", 0.6)]
by_setting = pytest.mark.parametrize(("objective", "gamma"), SETTINGS)


@by_eos
@by_setting
@by_automata
def test_pairs_of_states_agree_with_the_tree(pair, objective, gamma, eos):
    student, teacher = pair(eos, 4)
    table, scores = student.tabulate(), teacher.tabulate()
    for name in ("reverse_kl", "forward_kl", "alpha(alpha=0.4)", "chi2") + ("jsd",) * (objective != "sequence"):
        value = exact_value(student, teacher, name, objective, gamma)
        assert gradient_gap([value], [exact_value(table, scores, name, objective, gamma)]) <= ENUMERATION
        gradient = student.pull_back(exact_gradient(table, scores, name, objective, gamma))
        assert gradient_gap(exact_gradient(student, teacher, name, objective, gamma), gradient) <= ENUMERATION


def test_a_chain_is_the_automaton_of_order_one():
    order_one = FiniteStatePolicy.ngram(4, 300, 1, eos=2, seed=8)
    chain = MarkovPolicy(order_one.table[0], order_one.table[1:], 300, eos=2)
    other = FiniteStatePolicy.ngram(4, 300, 1, eos=2, seed=9)
    found = exact_gradient(chain, other, "jsd", "token_return")
    assert (
        gradient_gap([torch.cat([found[0][None], found[1]])], exact_gradient(order_one, other, "jsd", "token_return"))
        < 1e-14
    )


def test_only_states_that_can_meet_are_rows():
    student, teacher = FiniteStatePolicy.ngram(3, 50, 3), FiniteStatePolicy.ngram(3, 50, 2)
    chain = Chain.build(student, teacher)
    assert chain.rows == 40
    assert torch.equal(chain.student_states[0], torch.tensor(0))


def long_objective(leaf, successors, teacher, horizon, divergence, objective):
    """An objective of an automaton by a differentiable loop over positions."""
    log_p, log_q = torch.log_softmax(leaf, -1), torch.log_softmax(teacher, -1)
    if objective == "sequence":
        # E_P U^a by a product of matrices, for the member that follows.
        alpha = divergence.parameters["alpha"]
        steps = torch.zeros(len(leaf), len(leaf), dtype=torch.float64)
        steps = steps.scatter_add(1, successors, ((1 - alpha) * log_p + alpha * log_q).exp())
        total = torch.linalg.matrix_power(steps, horizon)[0].sum()
        return (total - 1) / (alpha * (alpha - 1))
    steps = torch.zeros(len(leaf), len(leaf), dtype=torch.float64).scatter_add(1, successors, log_p.exp())
    costs = (log_p.exp() * divergence.generator(log_q - log_p)).sum(-1)
    at, total = torch.nn.functional.one_hot(torch.tensor(0), len(leaf)).double(), torch.zeros((), dtype=torch.float64)
    for n in range(horizon):
        total = total + 0.999**n * (at @ costs)
        at = at @ steps
    return total


@pytest.mark.parametrize(("objective", "name"), [("token_return", "jsd"), ("sequence", "alpha(alpha=0.3)")])
def test_a_horizon_of_four_hundred_by_autograd(objective, name):
    student, teacher = (FiniteStatePolicy.ngram(3, 400, 2, seed=s, scale=0.2) for s in (0, 1))
    d, leaf = opd.divergence(name), student.table.clone().requires_grad_()
    value = long_objective(leaf, student.successors, teacher.table, 400, d, objective)
    (gradient,) = torch.autograd.grad(value, leaf)
    gamma = 0.999 if objective == "token_return" else 1.0
    assert float(exact_value(student, teacher, d, objective, gamma)) == pytest.approx(float(value.detach()), rel=1e-12)
    assert gradient_gap(exact_gradient(student, teacher, d, objective, gamma), [gradient]) <= 1e-11


def test_visits_that_do_not_fit_are_refused():
    student, teacher = (FiniteStatePolicy.ngram(32, 10**6, 2, seed=s) for s in (0, 1))
    for objective, name in (("token_return", "jsd"), ("sequence", "chi2")):
        with pytest.raises(BudgetExceededError, match="positions"):
            exact_gradient(student, teacher, name, objective)


# Markov chains.


@pytest.mark.parametrize(("objective", "gamma"), [*SETTINGS[:3], ("token_return", 0.0), ("token_return", 0.3)])
@pytest.mark.parametrize("eos", [None, 1])
@pytest.mark.parametrize("horizon", some([5, 1, 2]))
def test_dynamic_programming_agrees_with_the_tree(objective, gamma, eos, horizon):
    student, teacher = chains(3, horizon, eos)
    table, scores = student.tabulate(), teacher.tabulate()
    for entry in FACTORING if objective == "sequence" else ENTRIES:
        d = divergence(entry) if isinstance(entry, str) else divergence(entry[0], **entry[1])
        value = exact_value(table, scores, d, objective, gamma)
        assert gradient_gap([exact_value(student, teacher, d, objective, gamma)], [value]) <= ENUMERATION, d
        gradient = student.pull_back(exact_gradient(table, scores, d, objective, gamma))
        assert gradient_gap(exact_gradient(student, teacher, d, objective, gamma), gradient) <= ENUMERATION, d


def test_a_chain_beside_a_table_goes_through_the_tree():
    student, teacher = chains(3, 3, eos=0)
    both = exact_gradient(student, teacher, "jsd", "token_return")
    assert gradient_gap(exact_gradient(student, teacher.tabulate(), "jsd", "token_return"), both) <= ENUMERATION


@pytest.mark.parametrize("eos", [None, 0])
def test_a_chain_of_a_thousand_tokens(eos):
    student, teacher = chains(64, 1000, eos)
    tokens = [f(student, teacher, "reverse_kl", "token_return") for f in (exact_value, exact_gradient)]
    whole = [f(student, teacher, "reverse_kl", "sequence") for f in (exact_value, exact_gradient)]
    assert float(tokens[0]) == pytest.approx(float(whole[0]), rel=ENUMERATION)
    assert gradient_gap(tokens[1], whole[1]) <= ENUMERATION
    # The forward KL is the reverse KL of the exchanged pair.
    forward = exact_value(student, teacher, "forward_kl", "sequence")
    assert float(forward) == pytest.approx(float(exact_value(teacher, student, "reverse_kl", "sequence")), rel=1e-12)
    assert torch.isfinite(torch.cat([g.flatten() for g in exact_gradient(student, teacher, "jsd")])).all()
    # Rows of logits do not mind a constant, so every row of a gradient sums to zero.
    for gradient in (tokens[1], exact_gradient(student, teacher, "jsd", "token_return", 0.99)):
        rows = torch.cat([gradient[0].unsqueeze(0), gradient[1]])
        assert float(rows.sum(-1).abs().max()) <= ENUMERATION * max(1.0, float(rows.abs().max()))


def test_a_long_chain_without_ends_has_the_stationary_rate():
    student, teacher = chains(5, 3000)
    occupancy = torch.linalg.matrix_power(student.transition.softmax(-1), 200)[0]
    p, q = student.transition.log_softmax(-1), teacher.transition.log_softmax(-1)
    rate = float(occupancy @ (p.exp() * (p - q)).sum(-1))
    shorter = [MarkovPolicy(policy.initial, policy.transition, 2999) for policy in (student, teacher)]
    gain = float(exact_value(student, teacher, "reverse_kl") - exact_value(*shorter, "reverse_kl"))
    assert gain == pytest.approx(rate, rel=1e-9)


@pytest.mark.parametrize("name", ["jsd", "total_variation", "le_cam"])
def test_a_sequence_divergence_that_does_not_factor_is_refused(name):
    for function in (exact_value, exact_gradient):
        with pytest.raises(InvalidArgumentError, match=f"must factor along a chain .* got {name}"):
            function(*chains(3, 4), name, "sequence")


def test_the_hellinger_distance_of_far_chains_does_not_underflow():
    student, teacher = chains(8, 1000, scale=3.0)
    assert float(exact_value(student, teacher, "hellinger", "sequence")) == pytest.approx(
        _at_disjoint("hellinger"), rel=ENUMERATION
    )
    gradient = exact_gradient(student, teacher, "hellinger", "sequence")
    assert gradient_gap(gradient, [torch.zeros_like(g) for g in gradient]) <= ENUMERATION


def _at_disjoint(name: str) -> float:
    d = divergence(name)
    return d.at_zero + d.slope_at_infinity
