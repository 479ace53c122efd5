"""Students made from a model without training."""

from __future__ import annotations

import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.variants import drop_layer, perturb
from tests.tolerances import ALGEBRA
from tests.training.models.small import PROMPTS, cache_error, model


@torch.no_grad()
def test_copies_leave_the_model_as_it_was():
    subject, row = model(), torch.tensor([PROMPTS[3]])
    before = subject.logits(row).clone()
    noisy, shorter = perturb(subject, 0.1, seed=2), drop_layer(subject, 0)
    assert torch.equal(subject.logits(row), before)
    assert torch.equal(perturb(subject, 0.0).logits(row), before)
    assert (noisy.logits(row) - before).abs().max() > 1e-2 and noisy.vocabulary is subject.vocabulary
    spread = (noisy.blocks[0].up.weight - subject.blocks[0].up.weight).std() / subject.blocks[0].up.weight.std()
    assert 0.09 < float(spread) < 0.11
    assert len(shorter.blocks) == shorter.config.layers == 1
    assert cache_error(shorter) < ALGEBRA
    kept = subject.blocks[1].up.weight
    assert torch.equal(shorter.blocks[0].up.weight, kept) and shorter.blocks[0].up.weight is not kept
    with pytest.raises(InvalidArgumentError, match=r"index: must be in \[0, 2\) and leave one block, got 2"):
        drop_layer(subject, 2)
