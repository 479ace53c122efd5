"""Responses as the trainer holds them, and what may write into them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["Cache", "Environment", "Samples", "left_pad"]


@runtime_checkable
class Environment(Protocol):
    """What answers the policy within an episode, from the row's text alone.

    Attributes:
        closers: the characters that may close a call; after any other token nobody is asked.
    """

    @property
    def closers(self) -> str:
        """The characters that may close a call."""

    def reply(self, text: str) -> str | None:
        """What the environment writes after `text`, the prompt and the response so far; None: nothing."""


class Cache(ABC):
    """Keys and values of the tokens that a model has read, one row per sequence."""

    @abstractmethod
    def select(self, rows: Int64[Tensor, " K"]) -> None:
        """Keep only these rows, in this order."""


@dataclass(frozen=True)
class Samples:
    r"""Prompts and the responses that a model sampled to them.

    Attributes:
        prompts: `(B, P)`, padded on the left.
        prompt_mask: `(B, P)`, 1 on the prompts' tokens.
        tokens: `(B, T)`, the response: the model's own tokens and the environment's, padded on the right.
        mask: `(B, T)`, 1 on the model's own tokens, up to and including the end-of-sequence token.
        present: `(B, T)`, 1 on every token that is not padding, the environment's too.
        logprobs: `(B, T)`, $\log\mu(y_n|h_n)$ in nats of the distribution that sampled, temperature included; 0 where
            `mask` is 0, and everywhere for greedy samples, which are certain.
        ended: `(B,)`, whether the response ended by itself and not by the cap on its length.
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
        """The text of each response, the environment's part included; special tokens are left out."""
        lengths = self.present.sum(-1).long().tolist()
        return [vocabulary.decode(row[:length]) for row, length in zip(self.tokens.tolist(), lengths, strict=True)]

    def rows(self, index: slice | Tensor) -> Samples:
        """Some of the rows; padding that none of them needs is cut off."""
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
    """Rows of tokens as one tensor that is padded on the left, and its mask."""
    if not rows or not all(len(row) for row in rows):
        empty = next((number for number, row in enumerate(rows) if not len(row)), None)
        got = "there is none" if empty is None else f"number {empty} of {len(rows)} is empty"
        raise InvalidArgumentError("prompts", f"{got}; at least one prompt of at least one token is needed")
    width = max(map(len, rows))
    tokens = torch.tensor([[pad] * (width - len(row)) + list(row) for row in rows], dtype=torch.int64)
    mask = torch.tensor([[0.0] * (width - len(row)) + [1.0] * len(row) for row in rows], dtype=dtype)
    return tokens.to(device), mask.to(device)
