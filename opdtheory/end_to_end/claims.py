"""The exact gradient of a claim in the student's table, by the oracle."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.end_to_end.pair import TrainerPair
from opdtheory.exact import exact_gradient

__all__ = ["claimed_gradient", "kinds_of_prefix", "share_by_kind"]


def claimed_gradient(pair: TrainerPair, divergence: Divergence, granularity: str) -> Float[Tensor, "R V"]:
    """The mean over the prompts of the exact gradient, summed over tokens."""
    total = torch.zeros(pair.student.model.table.shape, dtype=torch.float64)
    for prompt in pair.prompt_tokens:
        student, teacher = (model.policy(prompt, pair.horizon) for model in (pair.student, pair.teacher))
        total += pair.student.place(exact_gradient(student, teacher, divergence, granularity), prompt)
    return total / len(pair.prompts)


def kinds_of_prefix(pair: TrainerPair) -> list[str]:
    """What each row of the table is to the prompts, in a few words."""
    rows = pair.student.model.rows
    return [_kind(pair, rows.prefix(number)) for number in range(rows.count)]


def share_by_kind(pair: TrainerPair, gradient: Float[Tensor, "R V"]) -> dict[str, float]:
    """The share of the gradient's squared length by the kind of prefix, the largest first."""
    squares = gradient.square().sum(-1)
    found: dict[str, float] = {}
    for kind, square in zip(kinds_of_prefix(pair), squares.tolist(), strict=True):
        found[kind] = found.get(kind, 0.0) + square
    total = sum(found.values())
    return {
        kind: square / total if total else 0.0
        for kind, square in sorted(found.items(), key=lambda item: -item[1])
        if square > 0 or kind == "response"
    }


def _kind(pair: TrainerPair, prefix: list[int] | None) -> str:
    if prefix is None:
        return "longer than prompt and response"
    end, pad = pair.tokenizer.eos_token_id, pair.tokenizer.pad_token_id
    kinds = set()
    for prompt in pair.prompt_tokens:
        response = prefix[len(prompt) :]
        if prefix[: len(prompt)] != prompt:
            if prefix == prompt[: len(prefix)]:
                kinds.add("inside a prompt")
        elif end in response:
            kinds.add("after EOS")
        elif pad not in response:
            kinds.add("past the horizon" if len(response) >= pair.horizon else "response")
    for kind in ("response", "inside a prompt", "after EOS", "past the horizon"):
        if kind in kinds:
            return kind
    return "padding read as text" if pad in prefix else "not a prefix of these prompts"
