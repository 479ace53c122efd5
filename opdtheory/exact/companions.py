r"""Frozen policies beside student and teacher, and rewards: pseudo-random functions of the prefix, for any vocabulary.

A further teacher, a base policy or a reward must give the same numbers wherever a loss meets the same tokens: in an
enumeration, a sample, or a batch made for one check. So each is a function of the tokens alone, by integer arithmetic
that is the same on every machine, and needs no table.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import check_integer
from opdtheory.exact.policies import TabularPolicy, prefixes

__all__ = ["PrefixPolicy", "random_rewards", "softened"]

# Modulus and multipliers of the hash; products stay below 2**62.
_PRIME = 2**31 - 1
_STEP, _FIRST, _SECOND, _SPREAD = 48_271, 44_485_709, 950_706_376, 742_938_285


@dataclass(frozen=True)
class PrefixPolicy:
    r"""A policy whose logits are Gaussian, of standard deviation `scale`, independent for each prefix and token.

    It reads what the student wrote, and not which tokens an environment wrote, such as a prompt.

    Attributes:
        seed: equal seeds give equal policies.
        scale: the standard deviation of the logits.

    Example:
        >>> policy, student = PrefixPolicy(1), TabularPolicy.random(3, 2)
        >>> tokens = torch.tensor([[2, 0]])
        >>> bool((policy.logits(tokens, torch.ones(1, 2), 3)[0, 1] == policy.table(student).logits[1][2]).all())
        True
    """

    seed: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        check_integer("seed", self.seed, 0)

    def logits(
        self, tokens: Int64[Tensor, "B T"], mask: Float[Tensor, "B T"], vocab_size: int
    ) -> Float[Tensor, "B T V"]:
        """The logits at every position, float64; position `n` reads the unmasked tokens before it."""
        states = [torch.full_like(tokens[:, 0], self._start)]
        for n in range(tokens.shape[1] - 1):
            states.append(_after(states[-1], torch.where(mask[:, n] > 0, tokens[:, n] + 1, 0)))
        return self._rows(torch.stack(states, 1), vocab_size)

    def table(self, like: TabularPolicy) -> TabularPolicy:
        """The policy as a table over the sequences of another one, with its environment's distribution."""
        levels = []
        for n, level in enumerate(like.logits):
            if n in like.environment:
                levels.append(level)
                continue
            tokens = prefixes(like.vocab_size, n)
            state = torch.full((len(tokens),), self._start, dtype=torch.int64)
            for m in range(n):
                state = _after(state, torch.zeros_like(state) if m in like.environment else tokens[:, m] + 1)
            levels.append(self._rows(state, like.vocab_size))
        return TabularPolicy(levels, eos=like.eos, environment=like.environment)

    @property
    def _start(self) -> int:
        return (_STEP * (self.seed + 1)) % _PRIME

    def _rows(self, states: Tensor, vocab_size: int) -> Tensor:
        each = torch.arange(1, vocab_size + 1, device=states.device) * _SPREAD
        return self.scale * _normal(_mixed(states.unsqueeze(-1) + each))


def random_rewards(tokens: Int64[Tensor, "B T"], mask: Float[Tensor, "B T"], seed: int) -> Float[Tensor, " B"]:
    """A Gaussian reward of each rollout, a fixed function of the tokens that the student wrote; float64."""
    state = torch.full_like(tokens[:, 0], (_STEP * (seed + 1)) % _PRIME)
    for n in range(tokens.shape[1]):
        state = torch.where(mask[:, n] > 0, _after(state, tokens[:, n] + 1), state)
    return _normal(_mixed(state))


def softened(policy: TabularPolicy, temperature: float) -> TabularPolicy:
    r"""The policy $\mathrm{softmax}(z/\tau)$; the distribution of an environment does not change."""
    if temperature == 1.0:
        return policy
    levels = [z if n in policy.environment else z / temperature for n, z in enumerate(policy.logits)]
    return TabularPolicy(levels, eos=policy.eos, environment=policy.environment)


def _after(state: Tensor, read: Tensor) -> Tensor:
    """The state after one more token: its number from 1 on, or 0 if it is not read."""
    return _mixed(state * _STEP + read)


def _mixed(values: Tensor) -> Tensor:
    """A hash of integers, in `[0, _PRIME)`."""
    values = values % _PRIME
    values = ((values ^ (values >> 15)) * _FIRST) % _PRIME
    return ((values ^ (values >> 13)) * _SECOND) % _PRIME


def _normal(values: Tensor) -> Tensor:
    """Hashes as Gaussian numbers, float64."""
    return math.sqrt(2.0) * torch.erfinv(2.0 * (values.double() + 0.5) / _PRIME - 1.0)
