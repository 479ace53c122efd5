"""The batch of a step: the same whichever process samples it, and whole in its parts."""

from __future__ import annotations

import torch

from opdtheory.training.batches import parts, uniforms
from tests.training.runs import config, gradients


def test_rollouts_are_the_same_in_any_part_of_the_batch() -> None:
    whole = uniforms(3, 7, range(6), 2, 5)
    assert torch.equal(whole[4:8], uniforms(3, 7, range(2, 4), 2, 5))
    assert len(torch.unique(whole)) == whole.numel()
    for other in (uniforms(3, 8, range(6), 2, 5), uniforms(4, 7, range(6), 2, 5)):
        assert not (other == whole).any()


def test_parts_hold_every_row_once() -> None:
    _, _, run = gradients(config())
    from opdtheory.training.trainer import collect

    _, samples = collect(run, 0)
    for size in (None, 1, 4, 100):
        pieces = list(parts(samples, size))
        assert sum(map(len, pieces)) == len(samples)
        assert sum(float(piece.mask.sum()) for piece in pieces) == float(samples.mask.sum())
