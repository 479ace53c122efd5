"""A tiny random language model of transformers, whose tokens are characters."""

from __future__ import annotations

import tokenizers
import torch
import transformers

from opdtheory.training.models.huggingface import HuggingFaceModel

WORDS = ["<end>", "<unk>", *"abcd[]"]


def tokenizer(words: list[str] = WORDS):
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: n for n, word in enumerate(words)}, "<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    inner.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>", unk_token="<unk>")


def tiny(*, seed: int = 0, words: list[str] = WORDS, length: int = 64) -> HuggingFaceModel:
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=length,
        initializer_range=0.6,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = transformers.LlamaForCausalLM(config)
    return HuggingFaceModel(network.double(), tokenizer(words))
