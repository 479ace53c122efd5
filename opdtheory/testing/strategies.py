"""Hypothesis strategies for divergences, policies and rollouts, which shrink to the reverse KL on uniform bandits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences.registry import Family, entries
from opdtheory.divergences.transform import has_kinks
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import TabularPolicy
from opdtheory.rollouts import Rollouts

try:
    from hypothesis import strategies as st
except ModuleNotFoundError as error:
    if error.name != "hypothesis":
        raise
    raise ImportError("the strategies of opdtheory.testing need hypothesis: pip install opdtheory[testing]") from error

__all__ = ["divergences", "policies", "policy_pairs", "rollouts"]

Size: TypeAlias = int | tuple[int, int]
Draw: TypeAlias = Callable[..., Any]  # hypothesis' own protocol cannot be checked at run time

# Up to this many logits are drawn one by one, which shrinks best; for more, a seed is drawn.
_DRAWN_LOGITS = 96

# A logit this many nats above the others leaves them a probability of about 1e-13.
_SHARP = 30.0


def divergences(*, families: bool = True, smooth: bool = False) -> st.SearchStrategy[Divergence]:
    """Catalogue entries, families with a drawn parameter; shrinks to `reverse_kl`.

    Args:
        families: whether to draw `skew_jsd`, `alpha` and the skew KLs too.
        smooth: whether to exclude generators with a kink, such as that of `total_variation`.
    """
    kept = [each for each in entries() if families or isinstance(each, Divergence)]
    kept = [each for each in kept if not (smooth and _kinked(each))]
    kept.sort(key=lambda each: each.name != "reverse_kl")
    return st.sampled_from(kept).flatmap(_member)


@st.composite
def policies(
    draw: Draw,
    vocab_size: Size = (2, 4),
    horizon: Size = (1, 3),
    eos: int | Literal["any"] | None = "any",
    zeros: Size = 0,
    sharp: bool = False,
) -> TabularPolicy:
    r"""A policy with logits in $[-2, 2]$; shrinks to the uniform one over few, short sequences.

    Args:
        draw: given by hypothesis.
        vocab_size: number of tokens, or the smallest and the largest.
        horizon: largest length, likewise.
        eos: a token that ends a sequence, None for fixed lengths, or "any" for None or token 0.
        zeros: number of tokens, the last ones, with probability zero everywhere, likewise; at most `vocab_size - 1`.
        sharp: whether some rows may be nearly deterministic.

    Raises:
        InvalidArgumentError: a size is below one, or an interval is empty.
    """
    size, length, end, absent = _dimensions(draw, vocab_size, horizon, eos, zeros)
    return TabularPolicy(_tables(draw, size, length, absent, sharp), eos=end)


@st.composite
def policy_pairs(
    draw: Draw,
    vocab_size: Size = (2, 4),
    horizon: Size = (1, 3),
    eos: int | Literal["any"] | None = "any",
    zeros: Size = 0,
    sharp: bool = False,
    distinct: bool = False,
) -> tuple[TabularPolicy, TabularPolicy]:
    r"""A student and a teacher over the same sequences; shrinks to two equal uniform bandits.

    The teacher's logits are the student's plus noise in $[-2, 2]$ times 1, 1e-2 or 1e-5: far, near or nearly equal.
    Both give probability zero to the same tokens.

    Args:
        draw: given by hypothesis.
        vocab_size: as in `policies`.
        horizon: as in `policies`.
        eos: as in `policies`.
        zeros: as in `policies`.
        sharp: as in `policies`.
        distinct: whether to exclude pairs with a row in which the two agree.

    Raises:
        InvalidArgumentError: as `policies`, or `distinct` with fewer than two tokens of positive probability.
    """
    size, length, end, absent = _dimensions(draw, vocab_size, horizon, eos, zeros)
    student = _tables(draw, size, length, absent, sharp)
    distance = draw(st.sampled_from((1.0, 1e-2, 1e-5)), label="distance")
    noise = _tables(draw, size, length, 0, False)
    if distinct:
        if size - absent < 2:
            raise InvalidArgumentError("distinct", "must have two tokens of positive probability, got one")
        for level in noise:
            # If the noise of two tokens is nearly equal, one is moved away.
            level[:, 0] += torch.where((level[:, 0] - level[:, 1]).abs() < 0.05, 0.5, 0.0)
    teacher = [logits + distance * moved for logits, moved in zip(student, noise, strict=True)]
    return TabularPolicy(student, eos=end), TabularPolicy(teacher, eos=end)


@st.composite
def rollouts(
    draw: Draw,
    vocab_size: Size = (2, 4),
    horizon: Size = (1, 4),
    batch_size: Size = (1, 3),
    masked: bool = True,
    off_policy: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Rollouts:
    """A valid batch whose `student_logits` require a gradient; shrinks to one uniform, unmasked token.

    Args:
        draw: given by hypothesis.
        vocab_size: number of tokens, or the smallest and the largest.
        horizon: number of positions, likewise.
        batch_size: number of rollouts, likewise.
        masked: whether rollouts may end early and have tokens that an environment wrote.
        off_policy: whether another policy than the student may have sampled.
        dtype: dtype of everything but the tokens.

    Raises:
        InvalidArgumentError: a size is below one, or an interval is empty.
    """
    size, length = _size(draw, "vocab_size", vocab_size), _size(draw, "horizon", horizon)
    count = _size(draw, "batch_size", batch_size)
    drawn = draw(st.lists(st.integers(0, size - 1), min_size=count * length, max_size=count * length), label="tokens")
    tokens = torch.tensor(drawn).view(count, length)
    mask = torch.ones(count, length, dtype=dtype)
    if masked:
        hidden = draw(st.lists(st.booleans(), min_size=count * length, max_size=count * length), label="masked")
        mask -= torch.tensor(hidden).view(count, length).to(dtype)
    student = _logits(draw, (count, length, size), "student").to(dtype).requires_grad_()
    teacher = _logits(draw, (count, length, size), "teacher").to(dtype)
    behavior_logprobs = None
    if off_policy:
        behavior = _logits(draw, (count, length, size), "behavior").to(dtype)
        behavior_logprobs = torch.log_softmax(behavior, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Rollouts.from_logits(tokens, student, teacher, mask=mask, behavior_logprobs=behavior_logprobs)


def _kinked(entry: Divergence | Family) -> bool:
    member = entry if isinstance(entry, Divergence) else entry(entry.examples[0])
    return has_kinks(member.expr)


def _member(entry: Divergence | Family) -> st.SearchStrategy[Divergence]:
    """The divergence, or a member of the family with a parameter in hundredths; shrinks to zero or the middle."""
    if isinstance(entry, Divergence):
        return st.just(entry)
    low, high = (round(100 * end) for end in entry.drawn)
    origin = 0 if low <= 0 <= high else (low + high) // 2
    return st.integers(low - origin, high - origin).map(lambda n: entry((origin + n) / 100))


def _dimensions(
    draw: Draw, vocab_size: Size, horizon: Size, eos: int | Literal["any"] | None, zeros: Size
) -> tuple[int, int, int | None, int]:
    size, length = _size(draw, "vocab_size", vocab_size), _size(draw, "horizon", horizon)
    absent = min(_size(draw, "zeros", zeros, lowest=0), size - 1)
    end = draw(st.sampled_from((None, 0)), label="eos") if eos == "any" else eos
    return size, length, end, absent


def _size(draw: Draw, name: str, wanted: Size, lowest: int = 1) -> int:
    low, high = (wanted, wanted) if isinstance(wanted, int) else wanted
    if not lowest <= low <= high:
        raise InvalidArgumentError(
            name, f"must be an integer of at least {lowest}, or a pair (low, high) of them, got {wanted!r}"
        )
    return int(draw(st.integers(low, high), label=name))


def _tables(draw: Draw, size: int, length: int, absent: int, sharp: bool) -> list[Tensor]:
    flat = _logits(draw, (sum(size**n for n in range(length)), size), "logits")
    if sharp:
        rows = draw(st.sets(st.integers(0, len(flat) - 1), max_size=4), label="sharp rows")
        for row in rows:
            flat[row, row % (size - absent)] += _SHARP
    if absent:
        flat[:, size - absent :] = -torch.inf
    return [level.clone() for level in flat.split([size**n for n in range(length)])]


def _logits(draw: Draw, shape: tuple[int, ...], label: str) -> Tensor:
    count = math.prod(shape)
    if count <= _DRAWN_LOGITS:
        tenths = draw(st.lists(st.integers(-20, 20), min_size=count, max_size=count), label=f"{label}, tenths")
        return torch.tensor(tenths, dtype=torch.float64).view(shape) / 10
    # It shrinks to a spread of zero, the uniform policy for every seed.
    spread = draw(st.integers(0, 20), label=f"{label}, spread in tenths") / 10
    seed = draw(st.integers(0, 2**16), label=f"{label}, seed")
    generator = torch.Generator().manual_seed(seed)
    return spread * (2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1)
