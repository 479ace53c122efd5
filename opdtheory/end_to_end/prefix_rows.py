"""Which row of a table a position reads: the tokens that it may attend to, as a number."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = ["PrefixRows"]

# What an additive mask adds to the score of a token that is not read is far below this.
_HIDDEN = -1e3


@dataclass(frozen=True)
class PrefixRows:
    """The rows of all prefixes of at most `longest` tokens, by length and then by value, and one for all others.

    Attributes:
        vocab_size: the number of tokens `V`; a prefix is a base-`V` number.
        longest: length of the longest prefix that has a row of its own.
    """

    vocab_size: int
    longest: int

    @cached_property
    def starts(self) -> list[int]:
        """The first row of each length, and that of what is longer."""
        found = [0]
        for length in range(self.longest + 1):
            found.append(found[-1] + self.vocab_size**length)
        return found

    @property
    def count(self) -> int:
        """The number of rows."""
        return self.starts[-1] + 1

    def after(self, prompt: list[int], more: int) -> slice:
        """The rows of the prefixes that are the prompt and `more` tokens, in order of those tokens.

        Raises:
            InvalidArgumentError: such prefixes have no rows of their own.
        """
        length = len(prompt) + more
        if length > self.longest:
            raise InvalidArgumentError("longest", f"must be at least {length} for this prompt, got {self.longest}")
        first = self.starts[length] + self.code(prompt) * self.vocab_size**more
        return slice(first, first + self.vocab_size**more)

    def code(self, tokens: list[int]) -> int:
        """A prefix as a number."""
        found = 0
        for token in tokens:
            found = found * self.vocab_size + token
        return found

    def row(self, tokens: list[int]) -> int:
        """The row of a prefix."""
        if len(tokens) > self.longest:
            return self.count - 1
        return self.starts[len(tokens)] + self.code(tokens)

    def prefix(self, row: int) -> list[int] | None:
        """The tokens of a row; None for the row of all that is longer."""
        if row == self.count - 1:
            return None
        length = max(n for n in range(self.longest + 1) if self.starts[n] <= row)
        code = row - self.starts[length]
        tokens: list[int] = []
        for _ in range(length):
            code, token = divmod(code, self.vocab_size)
            tokens.insert(0, token)
        return tokens

    def read(
        self, ids: Int64[Tensor, "B S"], mask: Tensor | None, positions: Int64[Tensor, "B S"] | None, fresh: int
    ) -> Int64[Tensor, "B T"]:
        """The rows that the last `fresh` positions read.

        Args:
            ids: the tokens.
            mask: as an attention mask, `(B, S)` or `(B, 1, T, S)`.
            positions: without a mask, positions that start again at 0 with each document of a packed row.
            fresh: the number of positions, `T`.
        """
        read = self._read_by(ids, mask, positions, fresh)
        code = torch.zeros(read.shape[:2], dtype=torch.int64, device=ids.device)
        length = torch.zeros_like(code)
        for at in range(ids.shape[1]):
            seen = read[:, :, at]
            code = torch.where(seen & (length < self.longest), code * self.vocab_size + ids[:, at : at + 1], code)
            length = length + seen.long()
        starts = torch.tensor(self.starts, device=ids.device)
        return torch.where(length > self.longest, self.count - 1, starts[length.clamp_max(self.longest)] + code)

    def _read_by(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, fresh: int) -> Bool[Tensor, "B T S"]:
        """Which tokens each position reads."""
        total = ids.shape[1]
        keys = torch.arange(total, device=ids.device)
        queries = keys[total - fresh :]
        causal = (keys <= queries.unsqueeze(-1)).expand(len(ids), fresh, total)
        if mask is None:
            if positions is None or positions.shape != ids.shape:
                return causal
            document = (positions == 0).long().cumsum(-1)
            return causal & (document[:, queries].unsqueeze(-1) == document.unsqueeze(1))
        if mask.ndim == 2 and mask.shape[1] >= total:
            return causal & (mask[:, None, -total:] > 0)
        if mask.ndim == 4 and mask.shape[2] >= fresh and mask.shape[3] >= total:
            given = mask[:, 0, -fresh:, :total]
            allowed = given if given.dtype == torch.bool else given > _HIDDEN
            return causal & allowed
        raise InvalidArgumentError(
            "attention_mask", f"must have shape (B, S) or (B, 1, T, S) for S = {total} tokens, got {tuple(mask.shape)}"
        )
