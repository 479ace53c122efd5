"""Fitted numbers of objectives, and gradients at any discount from those at a few."""

from __future__ import annotations

import pytest
import torch

from opdtheory import divergences
from opdtheory.auditing.naming.fit import flat
from opdtheory.auditing.naming.knob import discount_basis, discount_nodes, knob_of
from opdtheory.auditing.scenario import Scenario
from opdtheory.exact.oracle import tree_gradient
from opdtheory.exact.tree import Tree
from opdtheory.objective import Objective
from tests.tolerances import ENUMERATION

ALPHA, JSD, KL = divergences.alpha, divergences.divergence("jsd"), divergences.divergence("reverse_kl")


@pytest.mark.parametrize(
    ("objective", "name", "turned"),
    [
        (Objective.of(ALPHA(0.3), "sequence"), "alpha", Objective.of(ALPHA(0.4), "sequence")),
        (Objective.of(JSD, "token_return", 0.3), "gamma", Objective.of(JSD, "token_return", 0.4)),
        (Objective(((2.0, KL), (0.6, JSD))), "jsd per reverse_kl", Objective(((2.0, KL), (0.8, JSD)))),
    ],
    ids=["parameter", "discount", "ratio"],
)
def test_the_fitted_number_can_be_turned(objective: Objective, name: str, turned: Objective) -> None:
    knob = knob_of(objective)
    assert knob is not None and knob.name == name and knob.value == pytest.approx(0.3)
    assert knob.turned(0.4) == turned and knob.low < knob.value < knob.high


def test_nothing_was_fitted_in_an_entry_without_a_parameter() -> None:
    assert knob_of(Objective.of(JSD)) is None and knob_of(Objective.of(JSD, "token_return")) is None


def test_any_discount_follows_from_a_few() -> None:
    case = Scenario().pairs()[3]
    trees = [Tree.build(case.student, case.teacher)]
    nodes = discount_nodes(trees)
    assert len(nodes) == case.student.horizon and (nodes[0], nodes[-1]) == (0.0, 1.0)

    def gradient(gamma: float) -> torch.Tensor:
        return flat(tree_gradient(trees[0], JSD, "token_return", gamma=gamma))

    sampled = torch.stack([gradient(node) for node in nodes])
    for gamma in (0.0, 0.37, 1.0):
        assert float((discount_basis(nodes, gamma) @ sampled - gradient(gamma)).abs().max()) <= ENUMERATION
    # One node fewer is not enough.
    fewer = discount_basis(nodes[:-1], 0.8) @ sampled[:-1]
    assert float((fewer - gradient(0.8)).abs().max()) > 1e-4
