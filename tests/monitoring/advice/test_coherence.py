"""Sums over histories that share parameters, against real linear layers and explicit kernels."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from opdtheory.monitoring.advice.coherence import Features, Square
from tests.tolerances import ALGEBRA


def rows(count: int, size: int, seed: int = 0) -> Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def square_of(vectors: Tensor, features: Features, pieces: int = 1) -> Square:
    found = Square()
    parts = (x.tensor_split(pieces) for x in (vectors, features.phi, features.left))
    for piece in zip(*parts, strict=True):
        found.add(*piece)
    return found


def test_it_is_the_gradient_of_a_linear_layer() -> None:
    vectors, inputs = rows(6, 5), torch.nn.functional.normalize(rows(6, 4, 1), dim=-1)
    layer = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad((vectors * (inputs @ layer.T)).sum() / 6, layer)
    features = Features(inputs, torch.zeros(6, dtype=torch.float64))
    for pieces in (1, 4):
        found = square_of(vectors, features, pieces).of_mean(6)
        assert found == pytest.approx(float(gradient.square().sum()), rel=ALGEBRA)
    assert found != pytest.approx(float(vectors.square().sum()) / 36, rel=1e-2)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_fewer_tokens_are_those_of_every_choice(tokens: int) -> None:
    vectors = rows(5, 3)
    features = Features.of([rows(5, 6, 1)])
    kernel = features.phi @ features.phi.T + torch.diag(features.left)
    choices = [list(each) for each in itertools.combinations(range(5), tokens)]
    squares = [((vectors[x] @ vectors[x].T) * kernel[x][:, x]).sum() / tokens**2 for x in choices]
    found = square_of(vectors, features).of_mean(tokens)
    assert found == pytest.approx(float(torch.stack(squares).mean()), rel=ALGEBRA)


@pytest.mark.parametrize(("count", "size"), [(5, 6), (60, 40), (7, 300)])
def test_the_kernel_is_one_on_the_diagonal_and_blind_to_a_shift(count: int, size: int) -> None:
    logits = rows(count, size)
    features = Features.of([logits[:3], logits[3:]])
    norms = features.phi.square().sum(-1) + features.left
    torch.testing.assert_close(norms, torch.ones_like(norms), rtol=ALGEBRA, atol=ALGEBRA)
    shifted = Features.of([logits + 3.0])
    torch.testing.assert_close(shifted.phi @ shifted.phi.T, features.phi @ features.phi.T, rtol=1e-9, atol=1e-9)


def test_a_small_vocabulary_has_the_cosines_themselves() -> None:
    logits = rows(6, 8)
    centred = logits.log_softmax(-1)
    centred = torch.nn.functional.normalize(centred - centred.mean(-1, keepdim=True), dim=-1)
    features = Features.of([logits])
    torch.testing.assert_close(features.phi @ features.phi.T, centred @ centred.T, rtol=ALGEBRA, atol=ALGEBRA)


def test_uniform_rows_and_no_rows() -> None:
    features = Features.of([torch.zeros(2, 4, dtype=torch.float64)])
    assert features.left.tolist() == [1.0, 1.0]
    assert Square().of_mean(3) == 0.0
