"""All outcomes of a trainer's own sampling, one after the other, each with its probability."""

from __future__ import annotations

import contextlib
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationMixin

from opdtheory.errors import LossError

__all__ = ["Draws", "Generation", "Odometer", "sampling_by"]

# A token less likely than this is never played; together they miss less than the rounding of a float32 sampler.
_FLOOR = 1e-9


@dataclass
class _Draw:
    law: list[tuple[int, float]]
    index: int = 0


@dataclass
class Generation:
    """One call of `generate`: prompts, and what was drawn for each.

    Attributes:
        prompts: the tokens of each row that the attention mask shows.
        answers: the tokens drawn, up to and including the end of the sequence.
        laws: the law of each token drawn, over the whole vocabulary.
    """

    prompts: list[list[int]]
    answers: list[list[int]]
    laws: list[list[list[float]]]


@dataclass
class Odometer:
    """A depth-first walk over the draws of a step: each pass plays one outcome.

    Attributes:
        log_probability: of the outcome being played.
        generations: the calls of `generate` in this pass.
    """

    log_probability: float = 0.0
    generations: list[Generation] = field(default_factory=list)
    _draws: list[_Draw] = field(default_factory=list)
    _at: int = 0

    @property
    def probability(self) -> float:
        """The probability of the outcome being played."""
        return math.exp(self.log_probability)

    def begin(self) -> None:
        """Start a pass."""
        self._at, self.log_probability, self.generations = 0, 0.0, []

    def draw(self, law: list[float]) -> int:
        """The next token of this pass.

        Raises:
            LossError: the same draws before led to another law.
        """
        options = [(token, chance) for token, chance in enumerate(law) if chance > _FLOOR]
        if self._at == len(self._draws):
            self._draws.append(_Draw(options))
        draw = self._draws[self._at]
        same = len(draw.law) == len(options) and all(
            a == b and abs(x - y) < 1e-6 for (a, x), (b, y) in zip(draw.law, options, strict=True)
        )
        if not same:
            raise LossError(
                "the trainer does not replay: after the same draws, its next token has another law; fix its seeds, or "
                "audit the update alone with audit_update"
            )
        self._at += 1
        token, chance = draw.law[draw.index]
        self.log_probability += math.log(chance)
        return token

    def advance(self) -> bool:
        """Go to the next outcome; False if all have been played.

        Raises:
            LossError: the pass drew fewer tokens than its outcome has.
        """
        if self._at < len(self._draws) and any(draw.index for draw in self._draws[self._at :]):
            raise LossError("the trainer does not replay: it drew fewer tokens than in the same step before")
        del self._draws[self._at :]
        while self._draws and self._draws[-1].index + 1 == len(self._draws[-1].law):
            self._draws.pop()
        if not self._draws:
            return False
        self._draws[-1].index += 1
        return True


@dataclass
class Draws:
    """Independent draws, in place of a walk over all of them.

    Attributes:
        steps: how many steps are sampled.
        seed: of the draws.
    """

    steps: int
    seed: int = 0

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, law: list[float]) -> int:
        """The next token."""
        return self._random.choices(range(len(law)), law)[0]


@contextlib.contextmanager
def sampling_by(current: Any) -> Iterator[None]:
    """Within this context, `generate` draws its tokens from `current.draw` and notes them in `current.generations`.

    `torch.multinomial` is replaced while `generate` runs, so that temperature, top-k, top-p and min-p are those of the
    caller. Sequences that have ended draw nothing.
    """
    multinomial, generate = torch.multinomial, GenerationMixin.generate

    def noted(self: Any, *args: Any, **kwargs: Any) -> Any:
        ids: Any = kwargs.get("input_ids", args[0] if args else kwargs.get("inputs"))
        mask = kwargs.get("attention_mask")
        ends = _ends(self, kwargs)
        shown = torch.ones_like(ids) if mask is None else mask
        prompts = [row[seen > 0].tolist() for row, seen in zip(ids, shown, strict=True)]
        found = Generation(prompts, [[] for _ in prompts], [[] for _ in prompts])
        current.generations.append(found)

        def drawn(probabilities: Tensor, number: int, *_: Any, **__: Any) -> Tensor:
            if number != 1 or len(probabilities) != len(found.answers):
                raise LossError(
                    f"generate must draw one token for each of {len(found.answers)} rows, it asked for {number} for "
                    f"{len(probabilities)} rows; beams and several returned sequences are not played"
                )
            tokens = []
            for answer, laws, law in zip(found.answers, found.laws, probabilities.double().tolist(), strict=True):
                if answer and answer[-1] in ends:
                    tokens.append(answer[-1])
                    continue
                answer.append(current.draw(law))
                laws.append(law)
                tokens.append(answer[-1])
            return torch.tensor(tokens, device=probabilities.device).unsqueeze(-1)

        def scripted(input: Tensor, num_samples: int, *args: Any, **kwargs: Any) -> Tensor:
            return drawn(input, num_samples)

        torch.multinomial = scripted  # type: ignore[assignment]
        try:
            return generate(self, *args, **kwargs)
        finally:
            torch.multinomial = multinomial

    GenerationMixin.generate = noted  # type: ignore[method-assign]
    try:
        yield
    finally:
        GenerationMixin.generate = generate  # type: ignore[method-assign]
        torch.multinomial = multinomial


def _ends(model: Any, kwargs: dict[str, Any]) -> set[int]:
    """The tokens that end a sequence in this call."""
    config = kwargs.get("generation_config") or model.generation_config
    given = kwargs.get("eos_token_id", config.eos_token_id)
    if given is None:
        given = model.generation_config.eos_token_id
    return set() if given is None else {int(token) for token in torch.as_tensor(given).flatten().tolist()}
