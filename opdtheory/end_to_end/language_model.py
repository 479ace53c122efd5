"""A causal language model of transformers that is known exactly: its next-token logits are a table of the prefix.

It generates, pads, packs, caches, saves and loads as any other model does, so that a trainer cannot tell. The row that
a position reads is that of the tokens which it may attend to, in order: a token too many or too few is another row.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from opdtheory.end_to_end.prefix_rows import PrefixRows
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import TabularPolicy

__all__ = ["TabularConfig", "TabularForCausalLM", "TabularModel"]


class TabularConfig(PreTrainedConfig):
    """The configuration: `longest` is the length of the longest prefix that has a row of its own."""

    model_type = "opdtheory_tabular"

    def __init__(self, vocab_size: int = 4, longest: int = 4, **others: Any) -> None:
        """See the class."""
        self.vocab_size = self.hidden_size = vocab_size
        self.longest = longest
        # Some trainers ask for the fields of a transformer.
        self.num_hidden_layers = self.num_attention_heads = self.num_key_value_heads = 1
        others.pop("hidden_size", None)
        super().__init__(**{"tie_word_embeddings": False, **others})


class TabularModel(PreTrainedModel):
    """The backbone: the hidden state of a position is its row of the table, `V` numbers."""

    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: TabularConfig) -> None:
        """See the class."""
        super().__init__(config)
        self.rows = PrefixRows(config.vocab_size, config.longest)
        self.table = nn.Parameter(torch.zeros(self.rows.count, config.vocab_size))
        # Some trainers read its size; no token needs an embedding.
        self.embed_tokens = nn.Embedding(config.vocab_size, 1).requires_grad_(False)
        # Whether losses were computed in train mode: what dropout would have seen.
        self.modes: set[bool] = set()
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """The table is given, not drawn."""

    def get_input_embeddings(self) -> nn.Module:
        """The embedding that no position reads."""
        return self.embed_tokens

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        position_ids: Int64[Tensor, "B T"] | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        **_: Any,
    ) -> BaseModelOutputWithPast:
        """The rows that the positions of `input_ids` read, `(B, T, V)`.

        Args:
            input_ids: tokens; with a cache, those that it does not hold.
            attention_mask: `(B, S)`, 1 where a token is read; or `(B, 1, T, S)`, boolean or added to scores.
            position_ids: without a mask, a document starts where the position is 0, as in packed batches.
            past_key_values: the cache.
            use_cache: whether to make one.
        """
        if input_ids is None or input_ids.ndim != 2:
            shape = "none" if input_ids is None else tuple(input_ids.shape)
            raise InvalidArgumentError("input_ids", f"must have shape (batch, time), got {shape}")
        if not torch.is_inference_mode_enabled() and torch.is_grad_enabled():
            self.modes.add(self.training)
        fresh = input_ids.shape[1]
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        if past_key_values is not None:
            # The tokens themselves are the keys; float64 holds them exactly.
            keys = input_ids.double()[:, None, :, None]
            input_ids = past_key_values.update(keys, keys, 0)[0][:, 0, :, 0].round().long()
            position_ids = None
        rows = self.rows.read(input_ids, attention_mask, position_ids, fresh)
        return BaseModelOutputWithPast(last_hidden_state=self.table[rows], past_key_values=past_key_values)


class TabularForCausalLM(PreTrainedModel, GenerationMixin):
    """The language model: the table's rows are its logits, by way of a frozen head that is the identity."""

    config_class = TabularConfig
    base_model_prefix = "model"
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True
    supports_gradient_checkpointing = True

    def __init__(self, config: TabularConfig) -> None:
        """See the class."""
        super().__init__(config)
        self.model = TabularModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False).requires_grad_(False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.eye_(module.weight)

    def get_input_embeddings(self) -> nn.Module:
        """As `TabularModel.get_input_embeddings`."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.lm_head

    def _set_gradient_checkpointing(self, *_: Any, **__: Any) -> None:
        """A row of a table is not worth a checkpoint."""

    def forward(
        self,
        input_ids: Int64[Tensor, "B T"],
        attention_mask: Tensor | None = None,
        position_ids: Int64[Tensor, "B T"] | None = None,
        past_key_values: Any = None,
        labels: Int64[Tensor, "B T"] | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **options: Any,
    ) -> CausalLMOutputWithPast:
        """The next-token logits, and transformers' own loss if there are labels."""
        hidden = self.model(input_ids, attention_mask, position_ids, past_key_values, use_cache)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(hidden.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **options)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=hidden.past_key_values,
            hidden_states=(hidden.last_hidden_state,) if options.get("output_hidden_states") else None,
        )

    def policy(self, prompt: list[int], horizon: int) -> TabularPolicy:
        """The policy of responses to a prompt, in float64.

        Args:
            prompt: the prompt's tokens.
            horizon: the length cap of a response.

        Raises:
            InvalidArgumentError: prompt and response together are longer than the prefixes that have rows.
        """
        table = self.model.table.detach().double()
        levels = [table[self.model.rows.after(prompt, n)].clone() for n in range(horizon)]
        return TabularPolicy(levels, eos=self.config.eos_token_id)

    def place(self, gradient: list[Float[Tensor, "_ V"]], prompt: list[int]) -> Float[Tensor, "R V"]:
        """A gradient by level of `policy(prompt, ...)` as one of the whole table, zero elsewhere."""
        whole = torch.zeros(self.model.table.shape, dtype=torch.float64)
        for n, level in enumerate(gradient):
            whole[self.model.rows.after(prompt, n)] = level
        return whole


AutoConfig.register(TabularConfig.model_type, TabularConfig)
AutoModel.register(TabularConfig, TabularModel)
AutoModelForCausalLM.register(TabularConfig, TabularForCausalLM)
