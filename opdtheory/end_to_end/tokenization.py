"""A tokenizer of one letter a token, with a chat template that only puts contents one after the other."""

from __future__ import annotations

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from opdtheory.errors import InvalidArgumentError

__all__ = ["CHAT_TEMPLATE", "letters"]

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
)


def letters(words: str = "ab", *, pad_is_eos: bool = False) -> PreTrainedTokenizerFast:
    """The tokenizer of `<pad>`, `<eos>` and one token a letter.

    Args:
        words: the letters.
        pad_is_eos: whether one token serves as both, as with many base models.

    Raises:
        InvalidArgumentError: letters repeat, or are not ASCII letters.
    """
    if not words or len(set(words)) < len(words) or not (words.isascii() and words.isalpha()):
        raise InvalidArgumentError("words", f"must be different ASCII letters, got {words!r}")
    special = ["<eos>"] if pad_is_eos else ["<pad>", "<eos>"]
    vocabulary = {token: number for number, token in enumerate([*special, *words])}
    # Byte-level, because some trainers refuse tokenizers of whole words.
    core = Tokenizer(models.BPE(vocabulary, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<eos>", pad_token=special[0], padding_side="left", model_max_length=64
    )
    made.chat_template = CHAT_TEMPLATE
    return made
