"""Finite-state policies: their states, and what the constructors refuse."""

from __future__ import annotations

import pytest
import torch

from opdtheory import FiniteStatePolicy, MarkovPolicy
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact.policies import prefixes
from opdtheory.testing import gradient_gap
from tests.tolerances import ALGEBRA


def test_the_states_of_an_ngram_are_its_last_tokens():
    policy = FiniteStatePolicy.ngram(3, 5, 2)
    assert len(policy.table) == 1 + 3 + 9
    level = policy.rows(4, 0, 81)
    for number in range(81):
        # 4 and 5 states stand for shorter histories.
        assert torch.equal(level[number], policy.table[4 + number % 9])


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"table": torch.zeros(3)}, "table"),
        ({"table": torch.zeros(2, 3)}, "table"),
        ({"successors": torch.zeros(2, 2, dtype=torch.int64)}, "successors"),
        ({"successors": torch.full((2, 3), 2)}, "successors"),
        ({"successors": torch.zeros(2, 3)}, "successors"),
        ({"start": 2}, "start"),
        ({"start": True}, "start"),
        ({"eos": 3}, "eos"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_no_automaton_is_refused_by_name(arguments, named):
    right = {"table": torch.zeros(2, 3, dtype=torch.float64), "successors": torch.zeros(2, 3, dtype=torch.int64)}
    assert FiniteStatePolicy(**right, horizon=2)
    with pytest.raises(InvalidArgumentError, match=named):
        FiniteStatePolicy(**{**right, "horizon": 2, **arguments})


@pytest.mark.parametrize("named", ["states", "order"])
def test_sizes_of_random_automata_are_checked(named):
    make = {"states": FiniteStatePolicy.random, "order": FiniteStatePolicy.ngram}[named]
    with pytest.raises(InvalidArgumentError, match=named):
        make(3, 2, -1)
    if named == "order":
        with pytest.raises(BudgetExceededError, match="lower the order"):
            make(100, 2, 5)


def test_a_chain_unrolls_to_the_row_of_the_last_token():
    chain = MarkovPolicy.random(3, 3, eos=1, seed=0)
    table = chain.tabulate()
    assert torch.equal(table.logits[0][0], chain.initial) and table.eos == 1
    for row, prefix in enumerate(prefixes(3, 2).tolist()):
        assert torch.equal(table.logits[2][row], chain.transition[prefix[-1]])


@pytest.mark.parametrize("horizon", [1, 2, 4])
def test_the_chain_pulls_back_as_autograd_does(horizon):
    chain = MarkovPolicy.random(3, horizon, seed=0)
    chain.initial.requires_grad_()
    chain.transition.requires_grad_()
    tables = chain.tables()
    generator = torch.Generator().manual_seed(1)
    levels = [torch.randn(table.shape, generator=generator, dtype=torch.float64) for table in tables]
    auto = torch.autograd.grad(tables, chain.parameters(), levels, allow_unused=True, materialize_grads=True)
    assert gradient_gap(chain.pull_back(levels), auto) <= ALGEBRA
