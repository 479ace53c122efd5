"""Sampling: a batch in lockstep, with a cache and an environment that answers calls."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models.samples import Cache, Environment, Samples, left_pad
from opdtheory.training.models.vocabulary import Vocabulary

__all__ = ["Decoder", "draw"]

# Ended rows stay in the batch, unread, until they are this share of it: copying the cache costs as much as a step.
_COMPACT_AT = 0.25


class Decoder(ABC):
    """A model that reads a sequence token by token, with a cache, and so can be sampled from."""

    vocabulary: Vocabulary

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of the parameters."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype of the parameters."""

    @abstractmethod
    def prefill(
        self, tokens: Int64[Tensor, "B P"], mask: Float[Tensor, "B P"], capacity: int
    ) -> tuple[Float[Tensor, "B V"], Cache]:
        """Read left-padded prompts; return the logits after their last token and a cache for `capacity` tokens."""

    @abstractmethod
    def decode(self, tokens: Int64[Tensor, " B"], cache: Cache) -> Float[Tensor, "B V"]:
        """Read one more token per row and return the logits after it. The cache grows in place."""

    @torch.no_grad()
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

        Row b draws its n-th token by inverting the cumulative probabilities at `uniforms[b, n]`, so a row's response
        does not depend on the other rows, except that rounding may differ with the size of the batch.

        Args:
            prompts: token ids, at least one each; repeat a prompt to sample it more than once.
            max_new_tokens: largest length of a response, the environment's tokens included.
            generator: draws `uniforms`, `(B, max_new_tokens)` at once, on the generator's device.
            uniforms: numbers in [0, 1), float64, in place of `generator`.
            temperature: divides the logits; positive.
            greedy: take the likeliest token.
            environment: answers calls; its tokens are part of the history and have mask 0.

        Raises:
            InvalidArgumentError: there is no prompt, a prompt is empty, or an argument is out of range.
        """
        _check(max_new_tokens, temperature)
        device, pad, count = self.device, self.vocabulary.pad, len(prompts)
        prompt_tokens, prompt_mask = left_pad(prompts, pad, device=device, dtype=self.dtype)
        noise = None if greedy else _noise(generator, uniforms, count, max_new_tokens).to(device)
        asked = None if environment is None else _Conversation(environment, self.vocabulary, prompts)

        tokens = torch.full((max_new_tokens, count), pad, dtype=torch.int64, device=device)
        mask = torch.zeros((max_new_tokens, count), dtype=self.dtype, device=device)
        present, logprobs = torch.zeros_like(mask), torch.zeros_like(mask)
        rows = torch.arange(count, device=device)  # the rows still in the batch
        running = torch.ones(count, dtype=torch.bool, device=device)  # of these, the ones that have not ended
        ended = torch.zeros(count, dtype=torch.bool, device=device)

        logits, cache = self.prefill(prompt_tokens, prompt_mask, prompt_tokens.shape[1] + max_new_tokens)
        step = 0
        for step in range(max_new_tokens):
            chosen, logprob = draw(logits, None if noise is None else noise[step, rows], temperature)
            own = running
            if asked is not None and asked.pending:
                chosen, own = asked.interrupt(chosen, running, rows)
            tokens[step, rows] = torch.where(running, chosen, pad)
            mask[step, rows] = own.to(mask.dtype)
            present[step, rows] = running.to(mask.dtype)
            logprobs[step, rows] = torch.where(own, logprob, 0.0)
            stops = own & (chosen == self.vocabulary.eos)
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
                logits = self.decode(chosen, cache)

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
        logits: `(B, V)`; a token with logit `-inf` has zero probability and is never drawn.
        uniforms: `(B,)`, float64; with None the likeliest token is taken.
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
    # Strictly below the total, so that rounding cannot select a token of zero probability.
    point = torch.minimum(uniforms * total, torch.nextafter(total, torch.zeros_like(total)))
    chosen = (cumulative <= point.unsqueeze(-1)).sum(-1)
    return chosen, logprobs.gather(-1, chosen.unsqueeze(-1)).squeeze(-1).to(logits.dtype)


@dataclass
class _Conversation:
    """What the environment has yet to write in each row, and the text that it replies to."""

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
        """Replace the sampled token with the environment's next one, in the rows where it has tokens to write."""
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
        """Record the tokens that the model wrote; ask the environment where one of them may close a call."""
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
            raise InvalidArgumentError("generator", "must be given for sampling, unless uniforms are")
        uniforms = torch.rand((count, length), dtype=torch.float64, generator=generator, device=generator.device)
    elif uniforms.shape[0] != count or uniforms.shape[1] < length or uniforms.dtype != torch.float64:
        raise InvalidArgumentError(
            "uniforms",
            f"must be float64 of shape ({count}, {length}), got {uniforms.dtype} of {tuple(uniforms.shape)}",
        )
    return uniforms.T.contiguous()


def _check(max_new_tokens: int, temperature: float) -> None:
    if isinstance(max_new_tokens, bool) or not isinstance(max_new_tokens, int) or max_new_tokens < 1:
        raise InvalidArgumentError("max_new_tokens", f"must be an integer of at least 1, got {max_new_tokens!r}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise InvalidArgumentError("temperature", f"must be positive and finite, got {temperature!r}")
