"""Language models as the trainer sees them: logits, scores and samples."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from opdtheory.training.vocabulary import Vocabulary

__all__ = [
    "Cache",
    "Environment",
    "LanguageModel",
    "Samples",
    "check_same_vocabulary",
    "left_pad",
    "response_logits",
    "rollouts",
]


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
        logprobs: `(B, T)`, $\log\mu(y_n|h_n)$ in nats of the law that sampled, temperature included; 0 where
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


class LanguageModel(nn.Module, ABC):
    """A causal language model over a vocabulary.

    Masks are 1 on tokens and 0 on padding; padding on the left, on the right or both changes no other row or
    position. A model has no dropout: the same tokens give the same logits.
    """

    vocabulary: Vocabulary

    @abstractmethod
    def logits(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        r"""Logits of the next token: row $n$ predicts token $n+1$.

        Args:
            tokens: `(B, L)`.
            mask: `(B, L)`; without it every token counts.
            since: leave out the rows before this one, which a large vocabulary makes expensive.

        Returns:
            `(B, L - since, V)`; finite and meaningless at padding.
        """

    @abstractmethod
    def prefill(
        self, tokens: Int64[Tensor, "B P"], mask: Float[Tensor, "B P"], capacity: int
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """Read prompts padded on the left; the logits after their last token, and a cache for `capacity` tokens."""

    @abstractmethod
    def decode(self, tokens: Int64[Tensor, " B"], cache: Cache) -> Float[Tensor, "B V"]:
        """Read one more token a row; the logits after it. The cache grows in place."""

    def forward(
        self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None, *, since: int = 0
    ) -> Float[Tensor, "B L2 V"]:
        """As `logits`."""
        return self.logits(tokens, mask, since=since)

    def score(self, tokens: Int64[Tensor, "B L"], mask: Float[Tensor, "B L"] | None = None) -> Float[Tensor, "B L"]:
        r"""$\log p(y_n \mid y_{<n})$ of each token in nats; 0 at padding and at each row's first token."""
        logits = self.logits(tokens, mask)[:, :-1]
        logprobs = torch.log_softmax(logits, -1).gather(-1, tokens[:, 1:, None]).squeeze(-1)
        if mask is not None:
            logprobs = torch.where((mask[:, 1:] > 0) & (mask[:, :-1] > 0), logprobs, torch.zeros_like(logprobs))
        return torch.cat((logprobs.new_zeros(tokens.shape[0], 1), logprobs), dim=1)

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        generator: torch.Generator | None = None,
        uniforms: Float[Tensor, "B T"] | None = None,
        temperature: float = 1.0,
        greedy: bool = False,
        environment: Environment | None = None,
    ) -> Samples:
        r"""Sample a response to each prompt from $\mathrm{softmax}(z/\text{temperature})$.

        Row b draws its n-th token by inverting the cumulative probabilities at `uniforms[b, n]`, so a row's
        response does not depend on the rows beside it (but for rounding, which may differ with the batch's size).

        Args:
            prompts: token ids, at least one each; repeat a prompt to sample it more than once.
            max_new_tokens: cap on the length of a response, the environment's tokens included.
            generator: draws `uniforms`, `(B, max_new_tokens)` at once, on the generator's device.
            uniforms: numbers in [0, 1), float64, in the place of `generator`.
            temperature: divides the logits; positive.
            greedy: take the likeliest token.
            environment: answers calls; its tokens count in the history and carry mask 0.

        Raises:
            InvalidArgumentError: no prompt, an empty prompt, or an argument out of its range.
        """
        from opdtheory.training.sampling import sample

        return sample(
            self,
            prompts,
            max_new_tokens=max_new_tokens,
            generator=generator,
            uniforms=uniforms,
            temperature=temperature,
            greedy=greedy,
            environment=environment,
        )

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""
        return next(self.parameters()).dtype


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


def response_logits(model: LanguageModel, samples: Samples) -> Float[Tensor, "B T V"]:
    """A model's logits at each response position, given the prompt and the response before it; differentiable."""
    tokens = torch.cat((samples.prompts, samples.tokens[:, :-1]), dim=1)
    mask = torch.cat((samples.prompt_mask, samples.present[:, :-1]), dim=1)
    return model.logits(tokens, mask, since=samples.prompts.shape[1] - 1)


def rollouts(student: LanguageModel, teacher: LanguageModel, samples: Samples, *, temperature: float = 1.0) -> Rollouts:
    r"""The input of every loss: samples with both models' logits, divided by the temperature that sampled.

    Differentiable in the student; the teacher is scored without gradients.

    Raises:
        InvalidArgumentError: the models' vocabularies differ.
    """
    check_same_vocabulary(student, teacher)
    with torch.no_grad():
        teacher_logits = response_logits(teacher, samples)
    student_logits = response_logits(student, samples)
    return Rollouts.from_logits(
        samples.tokens,
        student_logits / temperature,
        teacher_logits / temperature,
        mask=samples.mask.to(student_logits.dtype),
        behavior_logprobs=samples.logprobs.to(student_logits.dtype),
    )


def check_same_vocabulary(student: LanguageModel, teacher: LanguageModel) -> None:
    """Refuse two models whose tokens do not mean the same.

    Raises:
        InvalidArgumentError: the fingerprints or the sizes of the vocabularies differ.
    """
    ours, theirs = student.vocabulary, teacher.vocabulary
    if ours.size != theirs.size or ours.fingerprint != theirs.fingerprint:
        raise InvalidArgumentError(
            "teacher",
            f"has a vocabulary of {theirs.size} tokens ({theirs.fingerprint}), the student one of {ours.size} "
            f"({ours.fingerprint}); a teacher must score the student's own tokens",
        )
