"""Position and other tokens of the rollout: how a token's expected weight depends on them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from opdtheory.auditing.effects.probes import Rows, differ, expected_weights
from opdtheory.exact import Loss

__all__ = ["TokenEffects", "token_effects"]


@dataclass(frozen=True)
class TokenEffects:
    """The part of `Dependence` on position and other tokens.

    Attributes:
        position: relative weights of the positions; None if they are equal.
        position_label: their pattern in words.
        other_tokens: whether the ratios of other tokens enter.
        words: the findings in sentences.
    """

    position: list[float] | None = None
    position_label: str | None = None
    other_tokens: bool = False
    words: list[str] = field(default_factory=list)


def token_effects(loss: Loss, size: tuple[int, int], batch_size: int, limit: float) -> TokenEffects:
    """How a token's expected weight depends on its position and on other tokens; `size`: vocabulary and horizon."""
    rows = Rows(*size)
    # With equal rows everywhere, later divergences are the same after every token, hence a baseline.
    alike = expected_weights(loss, rows.pair(lambda n, row: 0), batch_size)
    scale = max(float(level.abs().max()) for level in alike)
    later = [_effect(loss, rows, batch_size, level, alike) for level in range(1, rows.horizon)]
    size_of = max(scale, *(float(effect.abs().max()) for effect in later))
    if size_of <= 1e-12:
        return TokenEffects()
    earlier = expected_weights(loss, rows.pair(lambda n, row: 1 if n == 0 else 0), batch_size)
    from_earlier = any(differ(a, b, limit * size_of) for a, b in zip(earlier[1:], alike[1:], strict=True))
    from_history = any(differ(level, level[:1].expand_as(level), limit * size_of) for level in alike[1:])
    from_later = any(float(effect.abs().max()) > limit * size_of for effect in later)
    if from_earlier or from_history:
        text = "A token's weight depends on the ratios of the tokens before it"
        text += " and after it, as a weight of the whole rollout does (T6)." if from_later else " (T6)."
        return TokenEffects(None, None, True, [text])
    position, label = _positions([level[0] for level in alike], limit)
    words = [] if position is None else [_position_words(position, label)]
    if from_later and _without_ratios(loss, rows, batch_size, limit * size_of):
        text = "A token's weight depends on the tokens after it, whatever their ratios, as the return of a reward does."
        words.append(text)
    elif from_later:
        words.append(_later_words(later, position, label, limit * size_of))
    elif (factor := _by_length(loss, size, batch_size, alike[0], limit)) is not None:
        words.append(factor)
    return TokenEffects(position, label, from_later, words)


def _effect(loss: Loss, rows: Rows, batch_size: int, level: int, alike: list[Tensor]) -> Tensor:
    """The change of the first row's weights when the rows of a later level depend on the first token."""
    pair = rows.pair(lambda n, row: 1 + rows.first_token(n, row) if n == level else 0)
    return expected_weights(loss, pair, batch_size)[0][0] - alike[0][0]


def _without_ratios(loss: Loss, rows: Rows, batch_size: int, limit: float) -> bool:
    """Whether later tokens change the first weights even where student and teacher agree on them."""

    def first(level: int) -> Tensor:
        pair = rows.pair(lambda n, row: 1 + rows.first_token(n, row) if n == level else 0, lambda n: n > 0)
        return expected_weights(loss, pair, batch_size)[0][0]

    plain = first(rows.horizon)
    return any(differ(first(level), plain, limit) for level in range(1, rows.horizon))


def _positions(rows: list[Tensor], limit: float) -> tuple[list[float] | None, str | None]:
    """The weight of each position relative to the first, and its pattern; None if the positions are equal."""
    norms = [float(row.norm()) for row in rows]
    largest = rows[norms.index(max(norms))]
    factors = [float(row @ largest) / float(largest @ largest) for row in rows]
    if any(differ(row, f * largest, limit * max(norms)) for row, f in zip(rows, factors, strict=True)):
        return None, None
    if factors[0] != 0.0 and abs(factors[0]) > limit:
        factors = [f / factors[0] for f in factors]
    factors = [_short(f) for f in factors]
    if all(abs(f - factors[0]) <= limit for f in factors):
        return None, None
    return factors, _pattern(factors)


def _short(value: float) -> float:
    """The nearest short decimal, if the difference is rounding."""
    for digits in range(0, 7):
        if abs(round(value, digits) - value) < 1e-9:
            return round(value, digits) + 0.0
    return value


def _pattern(factors: list[float]) -> str:
    """The pattern of the relative weights of two or three positions, in words."""
    count, close = len(factors), 1e-7
    if all(abs(f) < close for f in factors[1:]):
        return "the first position only"
    if all(abs(f) < close for f in factors[:-1]):
        return "the last position only"
    if count < 3:
        return f"the second position has {factors[1]:.6g} times the first's weight"
    patterns = {
        "proportional to the position n": [1.0 + n for n in range(count)],
        "proportional to 1/n of the position n": [1.0 / (1 + n) for n in range(count)],
        "proportional to the number of positions left": [(count - n) / count for n in range(count)],
    }
    for name, pattern in patterns.items():
        if all(abs(f - x) < close for f, x in zip(factors, pattern, strict=True)):
            return name
    gamma = factors[1]
    if all(abs(f - gamma**n) < close for n, f in enumerate(factors)):
        return f"geometric with factor {gamma:.6g}"
    step = factors[1] - factors[0]
    if all(abs(f - factors[0] - n * step) < close for n, f in enumerate(factors)):
        return f"linear, by {step:+.6g} of the first's weight for each position"
    return "no simple pattern"


def _position_words(position: list[float], label: str | None) -> str:
    values = ", ".join(f"{f:.6g}" for f in position)
    return f"At equal ratios the positions have the relative weights {values}: {label}."


def _later_words(later: list[Tensor], position: list[float] | None, label: str | None, limit: float) -> str:
    text = "A token's weight depends on the ratios of the tokens after it, as a return-to-go does (T6)"
    # A token one step further away counts gamma times as much.
    nearest = later[0]
    if len(later) < 2 or float(nearest.abs().max()) <= limit:
        return f"{text}."
    gamma = float(later[1] @ nearest) / float(nearest @ nearest)
    if differ(later[1], gamma * nearest, 10 * limit):
        return f"{text}; the next two tokens count with no common factor."
    if abs(gamma - 1) <= 1e-6:
        return f"{text}; later tokens count alike: there is no discount."
    text = f"{text}; each step further counts {_short(gamma):.6g} times as much"
    if position is None:
        return f"{text}, without the outer gamma^(n-1): the gradient of no objective for 0 < gamma < 1."
    outer = label is not None and label.startswith("geometric") and abs(position[1] - gamma) < 1e-6
    return f"{text}, with the outer gamma^(n-1): a discounted return." if outer else f"{text}."


def _by_length(loss: Loss, size: tuple[int, int], batch_size: int, first: Tensor, limit: float) -> str | None:
    """A sentence if the weight is divided by the number of tokens, from rollouts of one token fewer."""
    vocabulary, horizon = size
    if horizon < 2 or float(first.abs().max()) == 0.0:
        return None
    shorter = expected_weights(loss, Rows(vocabulary, horizon - 1).pair(lambda n, row: 0), batch_size)[0]
    factor = float((shorter * first).sum() / first.square().sum())
    if differ(shorter, factor * first, limit * float(first.abs().max())):
        return None
    if abs(factor - horizon / (horizon - 1)) <= 1e-6:
        return (
            "The weight is divided by the number of tokens: where lengths differ, that is not a sum over tokens (T11)."
        )
    if abs(factor - 1.0) > 1e-6:
        return f"The weight changes with the rollouts' length: {factor:.6g} times as much at {horizon - 1} tokens."
    return None
