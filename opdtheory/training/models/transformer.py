"""A small decoder-only transformer in plain torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F  # noqa: N812
from jaxtyping import Float, Int64
from torch import Tensor, nn

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.samples import Cache
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["Transformer", "TransformerConfig"]


@dataclass(frozen=True)
class TransformerConfig:
    """The size of a `Transformer`.

    Attributes:
        width: width of the residual stream.
        layers: number of blocks.
        heads: number of attention heads, which share the width; 24 per head is fast on CPUs.
        context: longest sequence of prompt and response, without padding.
    """

    width: int = 48
    layers: int = 2
    heads: int = 2
    context: int = 128

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "context"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidArgumentError(name, f"must be an integer of at least 1, got {value!r}")
        if self.width % self.heads:
            raise InvalidArgumentError("heads", f"must divide the width {self.width}, got {self.heads}")


class Transformer(LanguageModel):
    """A decoder-only transformer: pre-norm blocks of causal attention and GELU, learned positions, untied output.

    A token's position is its index among the row's tokens, so padding shifts nothing.

    Args:
        config: the size.
        vocabulary: the vocabulary.
        seed: seed of the initial weights; the global generator is not affected.
    """

    def __init__(self, config: TransformerConfig, vocabulary: Vocabulary, *, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.vocabulary = vocabulary
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(vocabulary.size, config.width)
            self.position = nn.Embedding(config.context, config.width)
            self.blocks = nn.ModuleList(_Block(config) for _ in range(config.layers))
            self.norm = nn.LayerNorm(config.width, bias=False)
            self.head = nn.Linear(config.width, vocabulary.size, bias=False)
            self._initialise()

    def _initialise(self) -> None:
        scale = 1 / math.sqrt(2 * self.config.layers)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                fan = 0.5 if "embedding" in name or "position" in name else 1 / math.sqrt(parameter.shape[1])
                nn.init.normal_(parameter, std=fan * (scale if name.endswith(("out.weight", "down.weight")) else 1))
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(self.config.width))

    def logits(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        """As `LanguageModel.logits`."""
        positions, bias = self._layout(tokens, mask)
        x = self.embedding(tokens) + self.position(positions)
        for block in self.blocks:
            x = block(x, bias)
        return self.head(self.norm(x[:, since:]))

    def prefill(
        self, tokens: Int64[Tensor, "B P"], mask: Float[Tensor, "B P"], capacity: int
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """As `LanguageModel.prefill`."""
        positions, bias = self._layout(tokens, mask)
        cache = _KeyValues(self.config, mask, capacity, self.dtype)
        self._check_positions(int(cache.positions.max()) + capacity - tokens.shape[1])
        x = self.embedding(tokens) + self.position(positions)
        for number, block in enumerate(self.blocks):
            x = block(x, bias, cache, number)
        cache.length = tokens.shape[1]
        return self.head(self.norm(x[:, -1])), cache

    def decode(self, tokens: Int64[Tensor, " B"], cache: Cache) -> Float[Tensor, "B V"]:
        """As `LanguageModel.decode`."""
        assert isinstance(cache, _KeyValues)
        x = (self.embedding(tokens) + self.position(cache.positions)).unsqueeze(1)
        bias = None if cache.bias is None else cache.bias[..., : cache.length + 1]
        for number, block in enumerate(self.blocks):
            x = block(x, bias, cache, number)
        cache.length += 1
        cache.positions = cache.positions + 1
        return self.head(self.norm(x.squeeze(1)))

    def _layout(self, tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Each token's position, and the bias of the attention scores: -inf where attention is masked."""
        length = tokens.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
        if mask is None or bool((mask > 0).all()):
            self._check_positions(length)
            return torch.arange(length, device=tokens.device).expand_as(tokens), _additive(causal, self.dtype)
        real = mask > 0
        positions = (real.cumsum(-1) - 1).clamp_min(0)
        self._check_positions(int(positions.max()) + 1)
        # Padding attends to itself: a row of scores that are all -inf would be NaN.
        itself = torch.eye(length, dtype=torch.bool, device=tokens.device)
        allowed = (causal & real[:, None, :]) | itself
        return positions, _additive(allowed, self.dtype).unsqueeze(1)

    def _check_positions(self, needed: int) -> None:
        if needed > self.config.context:
            raise InvalidArgumentError(
                "tokens", f"must be at most {self.config.context}, the context, got {needed} in prompt and response"
            )


class _KeyValues(Cache):
    """Keys and values, `(B, heads, capacity, width / heads)` per layer; the first `length` are filled."""

    def __init__(self, config: TransformerConfig, mask: Tensor, capacity: int, dtype: torch.dtype) -> None:
        shape = (mask.shape[0], config.heads, capacity, config.width // config.heads)
        self.keys = [torch.empty(shape, dtype=dtype, device=mask.device) for _ in range(config.layers)]
        self.values = [torch.empty(shape, dtype=dtype, device=mask.device) for _ in range(config.layers)]
        self.length = 0
        self.positions = mask.sum(-1).long()  # of the next token
        self.bias: Tensor | None = None
        if not bool((mask > 0).all()):
            allowed = torch.ones((mask.shape[0], capacity), dtype=torch.bool, device=mask.device)
            allowed[:, : mask.shape[1]] = mask > 0
            self.bias = _additive(allowed, dtype)[:, None, None, :]

    def select(self, rows: Int64[Tensor, " K"]) -> None:
        """Keep only these rows."""
        self.keys = [keys[rows] for keys in self.keys]
        self.values = [values[rows] for values in self.values]
        self.positions = self.positions[rows]
        if self.bias is not None:
            self.bias = self.bias[rows]

    def append(self, layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Store a layer's new keys and values, and return all of them."""
        stop = self.length + keys.shape[2]
        self.keys[layer][:, :, self.length : stop] = keys
        self.values[layer][:, :, self.length : stop] = values
        return self.keys[layer][:, :, :stop], self.values[layer][:, :, :stop]


class _Block(nn.Module):
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.scale = (config.width // config.heads) ** -0.5
        self.norm_1 = nn.LayerNorm(config.width, bias=False)
        self.qkv = nn.Linear(config.width, 3 * config.width, bias=False)
        self.out = nn.Linear(config.width, config.width, bias=False)
        self.norm_2 = nn.LayerNorm(config.width, bias=False)
        self.up = nn.Linear(config.width, 4 * config.width)
        self.down = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor, bias: Tensor | None, cache: _KeyValues | None = None, layer: int = 0) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        queries, keys, values = qkv.permute(2, 0, 3, 1, 4).unbind()
        if cache is not None:
            keys, values = cache.append(layer, keys, values)
        # For rows this short, this is faster than the fused kernels, and it can be differentiated twice.
        scores = (queries * self.scale) @ keys.transpose(-1, -2)
        mixed = torch.softmax(scores if bias is None else scores + bias, -1) @ values
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm_2(x))))


def _additive(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill(~allowed, -torch.inf)
