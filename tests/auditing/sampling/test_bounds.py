"""Bounds that contain what they bound."""

from __future__ import annotations

import pytest
import torch

from opdtheory.auditing.sampling.bounds import Bounds, Target, relative_bias, scale_range


def test_the_whole_bias_is_bounded_by_what_the_directions_and_the_length_say() -> None:
    """For random truths within their intervals; without the product of the two ways the bound would fail."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64)).Q.T
    careless = 0
    for _ in range(300):
        truth, known, vector = torch.randn(3, 6, generator=generator, dtype=torch.float64)
        low = basis @ truth - 0.3 * torch.rand(3, generator=generator, dtype=torch.float64)
        bound = Bounds(low, low + 0.3, known, basis @ known, float((truth - known).norm()) * 1.01)
        distance = float((truth - vector).norm())
        assert bound.distance(vector, basis @ vector) >= distance
        careless += (bound.unseen**2 + float((known - vector).square().sum())) ** 0.5 < distance
    assert careless > 0


def test_bounds_contain_what_they_bound() -> None:
    target = Target.of(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), torch.eye(2, 3, dtype=torch.float64))
    truth = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    near = truth + 0.01
    bound = Bounds(truth[:2] - 0.1, truth[:2] + 0.1, near, near[:2], 0.02)
    low, high = relative_bias(bound, target)
    assert low <= float((truth - target.vector).norm()) / 2.0 <= high
    low, high = bound.cosine(target)
    assert low <= 1.0 / float(truth.norm()) <= high
    assert scale_range([bound], [target]) is None
    wide = Bounds(truth[:2] - 0.6, truth[:2] + 0.6, truth, truth[:2], 0.0)
    assert scale_range([wide], [target]) == pytest.approx((0.2, 0.8))
