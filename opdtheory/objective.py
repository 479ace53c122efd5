r"""What a loss may minimise: a divergence or a weighted sum of several, at one granularity and discount."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

from opdtheory.choices import CLAIMED_REDUCTIONS, GRANULARITIES
from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError

__all__ = ["DENOMINATOR", "NEAR", "Objective", "check_discount", "check_objective", "label_of_terms", "simple_ratios"]

# A ratio of coefficients is shown as a fraction if one with a denominator this small is this near.
DENOMINATOR = 12
NEAR = 1e-5


@dataclass(frozen=True)
class Objective:
    r"""An objective $\sum_i c_i J_i$ at one granularity and discount, usually a single divergence with $c = 1$.

    Attributes:
        terms: pairs of a coefficient and its divergence.
        granularity: `token_local`, `token_return` or `sequence`.
        gamma: discount of `token_return`.
        reduction: how the losses of tokens become one number (T11): `token_sum` (sum over tokens, mean over rollouts),
            `token_mean`, `sequence_mean`, or `any` of them.

    Raises:
        InvalidArgumentError: the granularity or reduction is unknown, or the discount is out of range or does not
            apply.

    Example:
        >>> from opdtheory.divergences import divergence
        >>> Objective.of(divergence("jsd"), "token_return", 0.5)
        jsd (token_return, gamma=0.5)
    """

    terms: tuple[tuple[float, Divergence], ...]
    granularity: str = "token_local"
    gamma: float = 1.0
    reduction: str = "token_sum"

    def __post_init__(self) -> None:
        check_objective(self.granularity, self.gamma)
        if self.reduction not in CLAIMED_REDUCTIONS:
            raise InvalidArgumentError(
                "reduction", f"must be one of {', '.join(CLAIMED_REDUCTIONS)}, got {self.reduction!r}"
            )

    @classmethod
    def of(
        cls,
        divergence: Divergence,
        granularity: str = "token_local",
        gamma: float = 1.0,
        reduction: str = "token_sum",
    ) -> Objective:
        """The objective of one divergence."""
        return cls(((1.0, divergence),), granularity, gamma, reduction)

    @property
    def divergence(self) -> Divergence:
        """The divergence, or the first one of a sum."""
        return self.terms[0][1]

    @property
    def label(self) -> str:
        """The objective's name without its granularity, such as `jsd` or `reverse_kl - forward_kl`."""
        if len(self.terms) == 1:
            return self.divergence.label
        return label_of_terms({d.label: c for c, d in self.terms})

    @property
    def discounted(self) -> bool:
        """Whether a discount other than 1 applies."""
        return self.granularity == "token_return" and self.gamma != 1.0

    @property
    def where(self) -> str:
        """The granularity, with the discount if one applies."""
        return f"{self.granularity}, gamma={self.gamma:.6g}" if self.discounted else self.granularity

    def __str__(self) -> str:
        return f"{self.label} ({self.where})"

    __repr__ = __str__


def check_objective(granularity: str, gamma: float = 1.0) -> None:
    """Raise unless the granularity is known and the discount applies to it.

    Raises:
        InvalidArgumentError: `granularity` is not one of `GRANULARITIES`, or `gamma` is outside [0, 1] or applies to
            `token_return` only.
    """
    if granularity not in GRANULARITIES:
        raise InvalidArgumentError("objective", f"must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    check_discount(gamma)
    if gamma != 1.0 and granularity != "token_return":
        raise InvalidArgumentError("gamma", f"must be 1 for {granularity}, which has no discount, got {gamma!r}")


def check_discount(gamma: object) -> None:
    """Raise unless `gamma` is a number in [0, 1]."""
    if isinstance(gamma, bool) or not isinstance(gamma, (int, float)) or not 0.0 <= gamma <= 1.0:
        raise InvalidArgumentError("gamma", f"must be a number in [0, 1], got {gamma!r}")


def label_of_terms(terms: Mapping[str, float]) -> str:
    """A signed sum as text: positive terms first, coefficients as simple ratios where they are."""
    simple = simple_ratios(list(terms.values()))
    sizes = terms if simple is None else dict(zip(terms, map(float, simple), strict=True))
    order = sorted(sizes, key=lambda name: sizes[name] < 0)
    text = " ".join(f"{'-' if sizes[name] < 0 else '+'} {_times(sizes[name])}{name}" for name in order)
    return text.removeprefix("+ ") if text.startswith("+") else "-" + text.removeprefix("- ")


def _times(size: float) -> str:
    return "" if abs(size) == 1.0 else f"{abs(size):.6g} * "


def simple_ratios(coefficients: Sequence[float]) -> list[Fraction] | None:
    """The coefficients as simple fractions of the smallest one, signs kept; None if they are not simple."""
    smallest = min(abs(float(c)) for c in coefficients)
    if smallest == 0.0:
        return None
    found = [Fraction(float(c) / smallest).limit_denominator(DENOMINATOR) for c in coefficients]
    near = all(abs(float(f) - c / smallest) <= NEAR * abs(f) for f, c in zip(found, coefficients, strict=True))
    return found if near else None
