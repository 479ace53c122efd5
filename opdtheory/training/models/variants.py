"""Students made from a model without training: with noise in the weights, or without one layer."""

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
        model: the model, which is not changed.
        sigma: size of the noise, relative to each matrix's own standard deviation.
        seed: seed of the noise.
    """
    generator = torch.Generator().manual_seed(seed)
    noisy = _copy(model)
    for parameter in noisy.parameters():
        if parameter.ndim >= 2:
            noise = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.add_(sigma * parameter.std() * noise)
    return noisy


def drop_layer(model: Model, index: int) -> Model:
    """A copy without one block.

    Args:
        model: the model, which is not changed.
        index: index of the block, from 0.

    Raises:
        InvalidArgumentError: the model has no such block, or its list of blocks has an unknown name.
    """
    shorter = _copy(model)
    owner, name = _blocks(shorter)
    blocks = list(getattr(owner, name))
    if not 0 <= index < len(blocks) or len(blocks) == 1:
        raise InvalidArgumentError("index", f"must be in [0, {len(blocks)}) and leave one block, got {index!r}")
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
    raise InvalidArgumentError("model", f"must have a list of blocks under a known name, got {type(model).__name__}")


def _copy(model: Model) -> Model:
    """A deep copy that shares the vocabulary, which is never changed."""
    return copy.deepcopy(model, {id(model.vocabulary): model.vocabulary})
