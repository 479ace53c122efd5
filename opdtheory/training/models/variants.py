"""Students made from a model without training: noisy weights, a layer left out."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any, TypeVar

import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.transformer import TransformerConfig

__all__ = ["drop_layer", "perturb"]

Model = TypeVar("Model", bound=LanguageModel)


@torch.no_grad()
def perturb(model: Model, sigma: float, *, seed: int = 0) -> Model:
    r"""A copy whose weight matrices are $W + \sigma\,\mathrm{std}(W)\,\varepsilon$ with $\varepsilon$ standard normal.

    Args:
        model: left as it is.
        sigma: size of the noise, as a share of each matrix's own spread.
        seed: of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = _copy(model)
    for parameter in noisy.parameters():
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(sigma * parameter.std() * noise)
    return noisy


def drop_layer(model: Model, index: int) -> Model:
    """A copy without one block; the others follow each other.

    Args:
        model: left as it is.
        index: of the block, from 0.

    Raises:
        InvalidArgumentError: the model has no such block, or no list of blocks that is known here.
    """
    shorter = _copy(model)
    owner, name = _blocks(shorter)
    blocks = list(getattr(owner, name))
    if not 0 <= index < len(blocks) or len(blocks) == 1:
        raise InvalidArgumentError("index", f"is {index!r}; the model has {len(blocks)} blocks and must keep one")
    del blocks[index]
    setattr(owner, name, torch.nn.ModuleList(blocks))
    for number, block in enumerate(blocks):
        # transformers numbers the layers for its cache.
        attention = getattr(block, "self_attn", None)
        if attention is not None and hasattr(attention, "layer_idx"):
            attention.layer_idx = number
    config: Any = getattr(owner, "config", None)
    if isinstance(config, TransformerConfig):
        owner.config = dataclasses.replace(config, layers=len(blocks))
    elif getattr(config, "num_hidden_layers", None) is not None:
        config.num_hidden_layers = len(blocks)
        if getattr(config, "layer_types", None) is not None:
            config.layer_types = [kind for number, kind in enumerate(config.layer_types) if number != index]
    return shorter


def _blocks(model: LanguageModel) -> tuple[Any, str]:
    inner: Any = model
    for name in ("network", "model"):
        inner = getattr(inner, name, inner)
    for name in ("blocks", "layers", "h"):
        if isinstance(getattr(inner, name, None), torch.nn.ModuleList):
            return inner, name
    raise InvalidArgumentError("model", f"{type(model).__name__} has no list of blocks under a known name")


def _copy(model: Model) -> Model:
    """A deep copy that shares the vocabulary, which is read only."""
    return copy.deepcopy(model, {id(model.vocabulary): model.vocabulary})
