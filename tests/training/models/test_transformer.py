"""The transformer: masks, cache, weights from a seed."""

from __future__ import annotations

import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from tests.tolerances import ALGEBRA
from tests.training.models.small import VOCABULARY, Echo, cache_error, model


class LeakyMask(Transformer):
    """Reads padding as if it were text."""

    def _layout(self, tokens, mask):
        positions, _ = super()._layout(tokens, mask)
        return positions, super()._layout(tokens, None)[1]


class ShiftedByPadding(Transformer):
    """Counts padding in a token's position."""

    def _layout(self, tokens, mask):
        return torch.arange(tokens.shape[1]).expand_as(tokens), super()._layout(tokens, mask)[1]


class StaleCache(Transformer):
    """Decodes every token at the position of the first."""

    def decode(self, tokens, cache):
        logits = super().decode(tokens, cache)
        cache.positions = cache.positions - 1
        return logits


class MixedRows(Transformer):
    """Reads the next token into the cache of another row."""

    def decode(self, tokens, cache):
        return super().decode(tokens.roll(1), cache)


def padding_error(subject: LanguageModel) -> float:
    """How far padding, of ids that are real tokens, moves a row's logits."""
    row = torch.tensor([VOCABULARY.encode("abdca")])
    bare = subject.logits(row)
    worst = 0.0
    for left, right in ((3, 0), (0, 3), (2, 2)):
        filler = torch.tensor([[2] * left]), torch.tensor([[5] * right], dtype=torch.int64)
        tokens = torch.cat((filler[0].long(), row, filler[1]), dim=1)
        mask = torch.tensor([[0.0] * left + [1.0] * 5 + [0.0] * right])
        padded = subject.logits(tokens, mask)
        assert torch.isfinite(padded).all()
        worst = max(worst, float((padded[:, left : left + 5] - bare).abs().max()))
    return worst


@torch.no_grad()
def test_padding_changes_no_logits():
    assert padding_error(model()) < ALGEBRA


@torch.no_grad()
@pytest.mark.parametrize("kind", [LeakyMask, ShiftedByPadding])
def test_a_model_that_reads_padding_is_refused(kind):
    assert padding_error(model(kind=kind)) > 1e-3


@torch.no_grad()
def test_logits_see_no_later_token():
    subject = model()
    row = torch.tensor([VOCABULARY.encode("abdca")])
    changed = row.clone()
    changed[0, 3] = 1
    difference = (subject.logits(row) - subject.logits(changed)).abs().amax(-1)[0]
    assert difference[:3].max() == 0 and difference[3:].min() > 1e-6


@torch.no_grad()
def test_rows_can_be_left_out_and_forward_is_logits():
    subject, row = model(), torch.tensor([VOCABULARY.encode("abdca")])
    assert torch.allclose(subject.logits(row)[:, 3:], subject.logits(row, since=3), atol=ALGEBRA, rtol=0)
    assert torch.equal(subject(row), subject.logits(row))


@torch.no_grad()
@pytest.mark.parametrize("environment", [None, Echo()])
def test_cached_and_uncached_logits_are_equal(environment):
    assert cache_error(model(), environment) < ALGEBRA


@torch.no_grad()
@pytest.mark.parametrize("kind", [StaleCache, MixedRows])
def test_a_wrong_cache_is_refused(kind):
    assert cache_error(model(kind=kind)) > 1e-3


def test_weights_come_from_the_seed_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    one, other, different = model(seed=4), model(seed=4), model(seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    assert not torch.equal(one.head.weight, different.head.weight)


def test_a_text_beyond_the_context_is_refused():
    with pytest.raises(InvalidArgumentError, match="must be at most 48, the context, got 49 in prompt and response"):
        model().logits(torch.ones((1, 49), dtype=torch.int64))


def test_sizes_are_checked():
    with pytest.raises(InvalidArgumentError, match="heads: must divide the width 16, got 3"):
        TransformerConfig(width=16, heads=3)
    with pytest.raises(InvalidArgumentError, match="layers: must be an integer of at least 1, got 0"):
        TransformerConfig(layers=0)
