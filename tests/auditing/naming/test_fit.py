"""The fit of one scale to several gradients."""

from __future__ import annotations

import pytest
import torch

from opdtheory.auditing.naming.fit import fit_scale


def test_fit_scale_of_zero_gradients_does_not_divide_by_zero() -> None:
    ones, zeros = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    fit = fit_scale([zeros, zeros], [ones, ones])
    assert fit.scale == 0.0 and fit.worst_error == float("inf")
    assert fit_scale([2 * ones, 2 * ones], [ones, ones]).scale == pytest.approx(2.0)
