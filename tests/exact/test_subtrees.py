"""Trees too large for memory: the sum over subtrees is the whole tree, and its parts are as large as allowed."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import opdtheory as opd
from opdtheory import FiniteStatePolicy, ModulePolicy, TabularPolicy, exact_gradient, exact_value
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import policies, random_pair, subtrees
from opdtheory.exact.recursions import tree_gradient, tree_value
from opdtheory.exact.tree import Tree
from opdtheory.testing import gradient_gap
from tests.sparse import some
from tests.tolerances import ENUMERATION

SETTINGS = [("token_local", 1.0), ("sequence", 1.0), ("token_return", 1.0), ("token_return", 0.6)]
by_setting = pytest.mark.parametrize(("objective", "gamma"), SETTINGS)


@by_setting
@pytest.mark.parametrize("at_once", some([7, 1, 2, 30, 81], 4))
@pytest.mark.parametrize(
    "options",
    [{}, {"eos": 1}, {"eos": 0, "zeros": 1}, {"eos": 2, "environment": (0, 2)}, {"environment": (3,)}],
    ids=str,
)
def test_part_by_part_is_the_whole_tree(monkeypatch, options, at_once, objective, gamma):
    student, teacher = random_pair(3, 4, seed=3, **options)
    tree = Tree.build(student, teacher)
    monkeypatch.setattr(subtrees, "_AT_ONCE", at_once)
    for name in ("jsd", "chi2"):
        d = opd.divergence(name)
        value = exact_value(student, teacher, d, objective, gamma)
        assert gradient_gap([value], [tree_value(tree, d, objective, gamma)]) <= ENUMERATION
        found = exact_gradient(student, teacher, d, objective, gamma)
        assert gradient_gap(found, tree_gradient(tree, d, objective, gamma)) <= ENUMERATION


@pytest.mark.parametrize("at_once", [1, 9])
def test_an_infinite_divergence_is_infinite_part_by_part(monkeypatch, at_once):
    student, teacher = random_pair(3, 3, seed=1)
    student.logits[1][0, 2] = -torch.inf
    monkeypatch.setattr(subtrees, "_AT_ONCE", at_once)
    for objective in ("token_local", "sequence"):
        assert math.isinf(exact_value(student, teacher, "forward_kl", objective))
        with pytest.raises(InvalidArgumentError, match="infinite"):
            exact_gradient(student, teacher, "forward_kl", objective)
        assert math.isfinite(exact_value(student, teacher, "jsd", objective))


@pytest.mark.parametrize("dropped", [{"first": 0}, {"cut": False}])
def test_a_subtree_that_forgets_where_it_hangs_is_seen(monkeypatch, dropped):
    student, teacher = random_pair(3, 4, seed=3, eos=1)
    right = exact_value(student, teacher, "jsd", "token_return", 0.6)
    gradient = exact_gradient(student, teacher, "jsd", "sequence")
    grown = Tree.grown.__func__

    def forgetful(cls, *arguments):
        return replace(grown(cls, *arguments), **dropped)

    monkeypatch.setattr(subtrees, "_AT_ONCE", 9)
    monkeypatch.setattr(Tree, "grown", classmethod(forgetful))
    wrong = exact_value(student, teacher, "jsd", "token_return", 0.6)
    gaps = gradient_gap([wrong], [right]), gradient_gap(exact_gradient(student, teacher, "jsd", "sequence"), gradient)
    assert max(gaps) > 1e-3


class Recurrent(nn.Module):
    """A module whose prefixes are read in as many calls as the oracle likes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cell, self.head = nn.Embedding(4, 5), nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.cell(self.embed(tokens))[0])


@by_setting
def test_a_module_is_pulled_back_some_prefixes_at_a_time(monkeypatch, objective, gamma):
    student = ModulePolicy(Recurrent().double(), 3, 4, eos=0, prompt=(3,))
    teacher = TabularPolicy.random(3, 4, eos=0, seed=5)
    whole = exact_gradient(student, teacher, "jsd", objective, gamma)
    tables = student.tables()
    levels = exact_gradient(student.tabulate(), teacher, "jsd", objective, gamma)
    by_autograd = torch.autograd.grad(tables, student.parameters(), levels)
    assert gradient_gap(whole, list(by_autograd)) <= ENUMERATION
    monkeypatch.setattr(policies, "PREFIXES_AT_ONCE", 4)
    monkeypatch.setattr(subtrees, "_AT_ONCE", 9)
    assert gradient_gap(exact_gradient(student, teacher, "jsd", objective, gamma), whole) <= ENUMERATION


def test_a_module_without_parameters_in_a_level_is_pulled_back():
    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, tokens):
            rows = torch.zeros(len(tokens), 2, dtype=torch.float64)
            return rows if tokens.shape[1] == 0 else rows + self.late * tokens[:, -1:]

    (gradient,) = exact_gradient(ModulePolicy(Positional(), 2, 3), TabularPolicy.random(2, 3), "jsd")
    assert float(gradient.abs().max()) > 0


def test_a_tree_beyond_the_budget_is_refused_with_its_size():
    student = FiniteStatePolicy.ngram(10, 9, 1)
    with pytest.raises(BudgetExceededError, match="V=10, T=9.*1,000,000,000"):
        exact_value(student, ModulePolicy(Recurrent(), 10, 9), "jsd")


@pytest.mark.parametrize(
    ("at_once", "top", "roots", "trees"), [(243, 5, 0, 0), (30, 2, 1, 9), (20, 3, 2, 14), (9, 3, 1, 27), (1, 4, 1, 81)]
)
def test_a_tree_is_cut_where_its_parts_fit(monkeypatch, at_once, top, roots, trees):
    """What is worked on together has as many sequences as are allowed, and no more unless one token has."""
    pair = random_pair(3, 5, seed=2)
    grown = []
    build = subtrees._grown

    def watched(*arguments):
        grown.append(build(*arguments))
        return grown[-1]

    monkeypatch.setattr(subtrees, "_AT_ONCE", at_once)
    monkeypatch.setattr(subtrees, "_grown", watched)
    exact_value(*pair, "jsd")
    first, *parts = grown
    assert first.horizon == top and first.cut == (top < 5) and len(parts) == trees
    if parts:
        assert len(parts[0].live[0]) == roots and parts[0].horizon == 5 - top
        assert all(3 * len(part.live[-2]) <= max(at_once, 3) for part in parts)


@pytest.mark.parametrize("shift", [-900.0, 30.0, 900.0])
def test_a_constant_of_a_row_changes_nothing(shift):
    """Whose exponentials would be zero or infinite."""
    student, teacher = random_pair(3, 3, seed=5)
    moved = TabularPolicy([level + shift * (1 + n % 2) for n, level in enumerate(student.logits)])
    for objective in ("token_return", "sequence"):
        found, wanted = (exact_gradient(policy, teacher, "jsd", objective) for policy in (moved, student))
        # Logits around 1800 are rounded to 2e-13.
        assert gradient_gap(found, wanted) <= 1e-11
