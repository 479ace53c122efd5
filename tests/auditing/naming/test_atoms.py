"""The functions that formulas are made of."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import opdtheory as opd
from opdtheory.auditing.naming.atoms import PARAMETRIC, Atom, catalogue_atom, catalogue_atoms, fixed_atoms
from opdtheory.divergences import implied_generator_values
from tests.auditing.naming.weights import GRID, evaluated

ATOMS = [
    *fixed_atoms(),
    *catalogue_atoms(),
    *(make(0.3) for make, _, _ in PARAMETRIC.values()),
    catalogue_atom(opd.divergence("skew_forward_kl", lam=0.3)),
]


@pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: atom.label)
def test_generator_and_expression_of_an_atom(atom: Atom) -> None:
    """The closed form beside the integral that it is, and the expression beside the values, up to a constant."""
    values = atom.values(GRID.numpy())
    constant = evaluated(atom.expr(), GRID) - values
    np.testing.assert_allclose(constant, constant[0], atol=1e-12)
    if atom.generator() is None:
        return
    integral = implied_generator_values(lambda t: torch.from_numpy(atom.values(t.numpy())), GRID, breaks=(0.0,)).numpy()
    np.testing.assert_allclose(evaluated(atom.generator(), GRID), integral, atol=1e-11)
    wrong = evaluated(atom.generator(), GRID) * 1.001
    assert np.abs(wrong - integral).max() > 1e-5
