"""The sampling loop: a batch in lockstep, with a cache and an environment that answers calls."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.samples import Cache, Environment, Samples, left_pad
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["Decoder", "draw", "sample"]

# Ended rows stay in the batch, unread, until they are this share of it: to copy the cache costs a step.
_COMPACT_AT = 0.25


class Decoder(Protocol):
    """What sampling asks of a model; see `LanguageModel`, which has all of it."""

    vocabulary: Vocabulary

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    @property
    def dtype(self) -> torch.dtype:
        """The parameters' dtype."""

    def prefill(
        self, tokens: Int64[Tensor, "B P"], mask: Float[Tensor, "B P"], capacity: int
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """Read prompts padded on the left; the logits after their last token, and a cache."""

    def decode(self, tokens: Int64[Tensor, " B"], cache: Cache) -> Float[Tensor, "B V"]:
        """Read one more token a row; the logits after it."""


@torch.no_grad()
def sample(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    generator: torch.Generator | None = None,
    uniforms: Float[Tensor, "B T"] | None = None,
    temperature: float = 1.0,
    greedy: bool = False,
    environment: Environment | None = None,
) -> Samples:
    """As `LanguageModel.sample`."""
    _check(prompts, max_new_tokens, temperature)
    vocabulary, device = model.vocabulary, model.device
    prompt_tokens, prompt_mask = left_pad(prompts, vocabulary.pad, device=device, dtype=model.dtype)
    count = len(prompts)
    noise = None if greedy else _noise(generator, uniforms, count, max_new_tokens).to(device)
    asked = None if environment is None else _Conversation(environment, vocabulary, prompts)

    tokens = torch.full((max_new_tokens, count), vocabulary.pad, dtype=torch.int64, device=device)
    mask = torch.zeros((max_new_tokens, count), dtype=model.dtype, device=device)
    present, logprobs = torch.zeros_like(mask), torch.zeros_like(mask)
    rows = torch.arange(count, device=device)  # the rows still in the batch
    running = torch.ones(count, dtype=torch.bool, device=device)  # of these, the ones that have not ended
    ended = torch.zeros(count, dtype=torch.bool, device=device)

    logits, cache = model.prefill(prompt_tokens, prompt_mask, prompt_tokens.shape[1] + max_new_tokens)
    step = 0
    for step in range(max_new_tokens):
        chosen, logprob = draw(logits, None if noise is None else noise[step, rows], temperature)
        own = running
        if asked is not None and asked.pending:
            chosen, own = asked.interrupt(chosen, running, rows)
        tokens[step, rows] = torch.where(running, chosen, vocabulary.pad)
        mask[step, rows] = own.to(mask.dtype)
        present[step, rows] = running.to(mask.dtype)
        logprobs[step, rows] = torch.where(own, logprob, 0.0)
        stops = own & (chosen == vocabulary.eos)
        if asked is not None:
            asked.listen(chosen, own & ~stops, rows)
        if bool(stops.any()):
            ended[rows[stops]] = True
            running = running & ~stops
            left = int(running.sum())
            if not left:
                break
            if left <= (1 - _COMPACT_AT) * len(rows):
                kept = running.nonzero().squeeze(-1)
                cache.select(kept)
                rows, chosen, running = rows[kept], chosen[kept], running[kept]
        if step + 1 < max_new_tokens:
            logits = model.decode(chosen, cache)

    def cut(values: Tensor) -> Tensor:
        return values[: step + 1].T.contiguous()

    return Samples(
        prompts=prompt_tokens,
        prompt_mask=prompt_mask,
        tokens=cut(tokens),
        mask=cut(mask),
        present=cut(present),
        logprobs=cut(logprobs),
        ended=ended,
    )


def draw(
    logits: Float[Tensor, "B V"], uniforms: Float[Tensor, " B"] | None, temperature: float = 1.0
) -> tuple[Int64[Tensor, " B"], Float[Tensor, " B"]]:
    r"""One token a row: the first whose cumulative probability exceeds the row's number in [0, 1).

    Args:
        logits: `(B, V)`; `-inf` marks a token of zero probability, which is never drawn.
        uniforms: `(B,)`, float64; None takes the likeliest token.
        temperature: divides the logits.

    Returns:
        The tokens and the log-probabilities of drawing them, `(B,)` each.
    """
    if uniforms is None:
        chosen = logits.argmax(-1)
        return chosen, torch.zeros_like(logits[:, 0])
    logprobs = torch.log_softmax(logits.double() / temperature, -1)
    cumulative = logprobs.exp().cumsum(-1)
    total = cumulative[:, -1]
    # Below the total also after rounding, so that the search ends at a token of positive probability.
    point = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = (cumulative <= point.unsqueeze(-1)).sum(-1)
    return chosen, logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).to(logits.dtype)


@dataclass
class _Conversation:
    """What the environment has yet to write, by row, and the text that it is asked about."""

    environment: Environment
    vocabulary: Vocabulary
    prompts: Sequence[Sequence[int]]
    pending: dict[int, deque[int]] = field(default_factory=dict)
    closing: frozenset[int] = field(init=False)
    history: list[list[int]] = field(init=False)

    def __post_init__(self) -> None:
        self.closing = self.vocabulary.containing(self.environment.closers)
        self.history = [list(prompt) for prompt in self.prompts]

    def interrupt(self, chosen: Tensor, running: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Put the environment's next token in the place of the sampled one, in the rows where it speaks."""
        tokens, own = chosen.tolist(), running.tolist()
        for place, row in enumerate(rows.tolist()):
            queue = self.pending.get(row)
            if queue is not None:
                tokens[place], own[place] = queue.popleft(), False
                self.history[row].append(tokens[place])
                if not queue:
                    del self.pending[row]
        return chosen.new_tensor(tokens), running.new_tensor(own)

    def listen(self, chosen: Tensor, own: Tensor, rows: Tensor) -> None:
        """Note the tokens that the model wrote; ask the environment where one may close a call."""
        for token, speaks, row in zip(chosen.tolist(), own.tolist(), rows.tolist(), strict=True):
            if not speaks:
                continue
            self.history[row].append(token)
            if token in self.closing:
                answer = self.environment.reply(self.vocabulary.decode(self.history[row]))
                if answer:
                    self.pending[row] = deque(self.vocabulary.encode(answer))


def _noise(generator: torch.Generator | None, uniforms: Tensor | None, count: int, length: int) -> Float[Tensor, "T B"]:
    if uniforms is None:
        if generator is None:
            raise InvalidArgumentError("generator", "is None; sampling needs a generator or uniforms")
        uniforms = torch.rand((count, length), dtype=torch.float64, generator=generator, device=generator.device)
    elif uniforms.shape[0] != count or uniforms.shape[1] < length or uniforms.dtype != torch.float64:
        raise InvalidArgumentError(
            "uniforms",
            f"is {tuple(uniforms.shape)} of {uniforms.dtype}; float64 of shape ({count}, {length}) is needed",
        )
    return uniforms.T.contiguous()


def _check(prompts: Sequence[Sequence[int]], max_new_tokens: int, temperature: float) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InvalidArgumentError("max_new_tokens", f"is {max_new_tokens!r}; a positive integer is needed")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidArgumentError("temperature", f"is {temperature!r}; a positive number is needed")
