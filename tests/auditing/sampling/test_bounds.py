"""Bounds that contain what they bound."""

from __future__ import annotations

import pytest
import torch

from opdtheory.auditing.sampling.bounds import (
    Bounds,
    OnPair,
    Target,
    best_scale,
    certified_scale,
    excluded,
    least_bias,
    relative_bias,
    scale_range,
)


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


def at(middle: float, half: float) -> Bounds:
    """Intervals of one half-width around a multiple of (2, 1)."""
    truth = middle * torch.tensor([2.0, 1.0], dtype=torch.float64)
    return Bounds(truth - half, truth + half, truth, truth, half)


TARGET = Target.of(torch.tensor([2.0, 1.0], dtype=torch.float64), torch.eye(2, dtype=torch.float64))


def test_the_best_scale_is_one_where_one_is_allowed() -> None:
    assert best_scale((0.5, 2.5)) == best_scale((1.0, 1.0)) == 1.0
    assert best_scale((2.0, 3.0)) == 2.5 and best_scale((-1.0, 0.5)) == -0.25


def test_a_certified_scale_is_positive_and_bounds_the_bias() -> None:
    found = certified_scale([at(3.0, 0.5), at(3.2, 0.5)], [TARGET, TARGET])
    assert found is not None and found[0] == pytest.approx(3.1)
    # The widest interval ends 0.7 from 3.1 times the first entry of the target, and |(2, 1)| is the root of 5.
    assert found[1] == pytest.approx((0.5 + 0.2) / (3.1 * 5**0.5))
    for bound in (at(-3.0, 0.5), at(0.1, 0.5), at(3.0, float("inf"))):
        assert certified_scale([bound], [TARGET]) is None
    assert certified_scale([at(3.0, 0.5), at(6.0, 0.5)], [TARGET, TARGET]) is None


def test_what_only_a_negative_multiple_explains_is_excluded() -> None:
    assert excluded([at(-3.0, 0.5)], [TARGET]) and not excluded([at(3.0, 0.5)], [TARGET])
    assert excluded([at(3.0, 0.5), at(6.0, 0.5)], [TARGET, TARGET])
    assert not excluded([at(-0.1, 0.5)], [TARGET])


def drawn(generator: torch.Generator, truth: torch.Tensor, basis: torch.Tensor, half: float) -> Bounds:
    """Bounds of random width around a gradient."""
    low = basis @ truth - half * torch.rand(len(basis), generator=generator, dtype=torch.float64)
    away = half * torch.randn(len(truth), generator=generator, dtype=torch.float64)
    return Bounds(low, low + half, truth + away, basis @ (truth + away), 1.01 * float(away.norm()))


@pytest.mark.parametrize("half", [0.0, 1e-3, 0.1, 3.0])
def test_what_is_said_of_a_pair_is_true_of_its_gradient(half: float) -> None:
    """For random gradients near and far from the target, uphill too."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(200):
        basis = torch.linalg.qr(torch.randn(6, 3, generator=generator, dtype=torch.float64)).Q.T
        target = Target.of(2.0 * basis[0], basis)
        noise, size = torch.randn(6, generator=generator, dtype=torch.float64), torch.randn(2, generator=generator)
        truth = float(size[0]) * basis[0] + 0.3 * float(size[1]) * noise
        bound = drawn(generator, truth, basis, half)
        pair = OnPair.of("a", bound, target)
        scale = float(truth @ target.vector) / 4.0
        across = truth - scale * target.vector
        error, slack = float(across.norm()) / (2.0 * abs(scale)), 1e-9
        assert pair.scale[0] - slack <= scale <= pair.scale[1] + slack
        assert pair.error[0] - slack <= error <= pair.error[1] * (1.0 + slack) + slack
        assert float((basis @ across).abs().max()) / (2.0 * abs(scale)) <= pair.seen * (1.0 + slack) + slack
        cosine = scale * 2.0 / float(truth.norm())
        assert pair.cosine[0] - slack <= cosine <= pair.cosine[1] + slack
        if scale > 0.0:  # At the nearest multiple, which may be nearer than the best common one.
            assert least_bias([bound], [target]) <= error + slack


def test_the_cosine_is_sharp_where_the_gradient_is_known() -> None:
    truth = torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    bound = Bounds(truth[:2], truth[:2], truth, truth[:2], 0.0)
    target = Target.of(torch.tensor([2.0, 0.0, 0.0], dtype=torch.float64), torch.eye(2, 3, dtype=torch.float64))
    low, high = bound.cosine(target)
    assert low == pytest.approx(1.0 / float(truth.norm()), abs=1e-12) and low <= high < 1.0
    nothing = Bounds(0.0 * truth[:2], 0.0 * truth[:2], 0.0 * truth, 0.0 * truth[:2], 0.0)
    assert -1.0 <= nothing.cosine(target)[0] <= nothing.cosine(target)[1] <= 1.0
    assert Bounds.unknown(truth, torch.eye(2, 3, dtype=torch.float64)).cosine(target) == (-1.0, 1.0)


def test_the_least_bias_is_that_at_the_best_common_scale() -> None:
    """Scales 1 and 3 without any width: at 3/2, both are off by the half; a wide interval proves less."""
    sharp = [at(1.0, 0.0), at(3.0, 0.0)]
    assert least_bias(sharp, [TARGET, TARGET]) == pytest.approx(0.5, abs=1e-6)
    tried = torch.linspace(0.01, 6.0, 4000, dtype=torch.float64)
    best = min(max(abs(1.0 / float(s) - 1.0), abs(3.0 / float(s) - 1.0)) for s in tried)
    assert least_bias(sharp, [TARGET, TARGET]) == pytest.approx(best, abs=1e-3)
    assert 0.0 < least_bias([at(1.0, 0.2), at(3.0, 0.2)], [TARGET, TARGET]) < 0.45
    assert least_bias([at(1.0, 2.0), at(3.0, 2.0)], [TARGET, TARGET]) == pytest.approx(0.0, abs=1e-6)
    assert least_bias([at(-1.0, 0.1)], [TARGET]) == 1.0
    assert least_bias([at(1.0, float("inf"))], [TARGET]) == 0.0
