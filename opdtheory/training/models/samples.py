"""Sampled responses, and the environment that may write into them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["Cache", "Environment", "Samples", "left_pad"]


@runtime_checkable
class Environment(Protocol):
    """Answers the policy's calls within an episode, from the row's text alone.

    Attributes:
        closers: the characters that may close a call; after other tokens the environment is not asked.
    """

    @property
    def closers(self) -> str:
        """The characters that may close a call."""

    def reply(self, text: str) -> str | None:
        """What the environment writes after `text`, the prompt and the response so far; None for nothing."""


class Cache(ABC):
    """Keys and values of the tokens that a model has read, one row per sequence."""

    @abstractmethod
    def select(self, rows: Int64[Tensor, " K"]) -> None:
        """Keep only these rows, in this order."""


@dataclass(frozen=True)
class Samples:
    r"""Prompts and a model's responses.

    Attributes:
        prompts: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)`, 1 on the prompts' tokens.
        tokens: `(B, T)`, the response: the model's own tokens and the environment's, padded on the right.
        mask: `(B, T)`, 1 on the model's own tokens, up to and including the end-of-sequence token.
        present: `(B, T)`, 1 on every token that is not padding, also the environment's.
        logprobs: `(B, T)`, $\log\mu(y_n|h_n)$ in nats under the sampling policy, temperature included; 0 where `mask`
            is 0, and everywhere for greedy samples, which are certain.
        ended: `(B,)`, whether the response ended with the end-of-sequence token rather than at the length limit.
    """

    prompts: Int64[Tensor, "B P"]
    prompt_mask: Float[Tensor, "B P"]
    tokens: Int64[Tensor, "B T"]
    mask: Float[Tensor, "B T"]
    present: Float[Tensor, "B T"]
    logprobs: Float[Tensor, "B T"]
    ended: Bool[Tensor, " B"]

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def texts(self, vocabulary: Vocabulary) -> list[str]:
        """The text of each response, with the environment's part and without special tokens."""
        lengths = self.present.sum(-1).long().tolist()
        return [vocabulary.decode(row[:length]) for row, length in zip(self.tokens.tolist(), lengths, strict=True)]

    def rows(self, index: slice | Tensor) -> Samples:
        """Some of the rows, without padding that none of them needs."""
        prompt_mask, present = self.prompt_mask[index], self.present[index]
        start = self.prompts.shape[1] - max(1, int(prompt_mask.sum(-1).max()))
        stop = max(1, int(present.sum(-1).max()))
        return Samples(
            self.prompts[index][:, start:],
            prompt_mask[:, start:],
            self.tokens[index][:, :stop],
            self.mask[index][:, :stop],
            present[:, :stop],
            self.logprobs[index][:, :stop],
            self.ended[index],
        )


def left_pad(
    rows: Sequence[Sequence[int]], pad: int, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> tuple[Int64[Tensor, "B P"], Float[Tensor, "B P"]]:
    """Rows of tokens as one left-padded tensor, and its mask."""
    if not rows or not all(len(row) for row in rows):
        empty = next((number for number, row in enumerate(rows) if not len(row)), None)
        got = "none" if empty is None else f"an empty prompt, number {empty} of {len(rows)}"
        raise InvalidArgumentError("prompts", f"must be at least one prompt of at least one token, got {got}")
    tokens = pad_sequence([torch.tensor(list(row)) for row in rows], True, pad, padding_side="left")
    mask = pad_sequence([torch.ones(len(row), dtype=dtype) for row in rows], True, padding_side="left")
    return tokens.to(device), mask.to(device)
