"""The weights that theory predicts."""

from __future__ import annotations

import math

import torch

from opdtheory.training.validation.prediction import standardised


def test_z_scores_of_two_are_signs() -> None:
    weight, distribution = torch.tensor([0.0, 1.0, 3.0]).double(), torch.tensor([0.5, 0.25, 0.25]).double()
    expected = torch.tensor([-0.5, 0.5 - 0.25, 0.75]).double() / math.sqrt(2)
    assert torch.allclose(standardised(weight, distribution, 1e-12), expected)
