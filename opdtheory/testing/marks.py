"""`opd_loss`: a mark that says what a loss should minimise, for `pytest --opd-audit` to check.

Nothing here imports torch, so a trainer's module can use the mark at no cost.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from opdtheory.choices import GRANULARITIES, VERDICTS
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from opdtheory.divergences import Divergence

__all__ = ["LossClaim", "claims_of", "opd_loss"]

F = TypeVar("F", bound=Callable[..., Any])

_ATTRIBUTE = "__opd_claims__"


@dataclass(frozen=True)
class LossClaim:
    """One `opd_loss` mark.

    Attributes:
        claims: the divergence that the loss should minimise, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        verdict: the verdict that the audit should find.
        settings: other arguments of `opdtheory.audit`.
    """

    claims: str | Divergence
    granularity: str
    verdict: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The claim and its settings in one line, such as `forward_kl-token_local-eos=0`."""
        name = self.claims if isinstance(self.claims, str) else self.claims.label
        return "-".join([name, self.granularity, *(f"{key}={value}" for key, value in sorted(self.settings.items()))])

    def is_met_by(self, verdict: str) -> bool:
        """Whether a verdict is the claimed one; `exact` also meets `exact_up_to_scale`."""
        return verdict == self.verdict or (self.verdict == "exact_up_to_scale" and verdict == "exact")


def opd_loss(
    claims: str | Divergence, granularity: str = "token_local", verdict: str = "exact", **settings: Any
) -> Callable[[F], F]:
    """Mark a function `loss(rollouts) -> scalar` with what it should minimise, for `pytest --opd-audit` to audit.

    The function itself is returned unchanged. A function with several marks is audited once for each.

    Args:
        claims: the divergence that the loss should minimise, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        verdict: the verdict that the audit should find: `exact`; `exact_up_to_scale`, which `exact` meets too; or, for
            a loss that is known to do something else, `other_objective`, `zero` or `biased`.
        **settings: other arguments of `opdtheory.audit`: `batch_size`, `eos`, `off_policy`, `gamma`, `seed`, `name`.

    Raises:
        InvalidArgumentError: the granularity or verdict is unknown, or the marked object cannot carry a mark.

    Example:
        >>> @opd_loss(claims="reverse_kl")
        ... @opd_loss(claims="reverse_kl", granularity="sequence", verdict="biased")
        ... def k2(rollouts):
        ...     return rollouts.token_sum(rollouts.log_u.square() / 2)
        >>> [claim.label for claim in claims_of(k2)]
        ['reverse_kl-token_local', 'reverse_kl-sequence']
    """
    if callable(claims):
        raise InvalidArgumentError("claims", f"must be a divergence, as in @opd_loss(claims=...), got {claims!r}")
    claimable = tuple(each for each in VERDICTS if each != "undecided")
    for name, value, allowed in (("granularity", granularity, GRANULARITIES), ("verdict", verdict, claimable)):
        if value not in allowed:
            raise InvalidArgumentError(name, f"must be one of {', '.join(allowed)}, got {value!r}")
    claim = LossClaim(claims, granularity, verdict, settings)

    def mark(loss: F) -> F:
        try:
            # The decorator nearest to the function runs first, but the topmost one is listed first.
            setattr(loss, _ATTRIBUTE, (claim, *claims_of(loss)))
        except AttributeError:
            raise InvalidArgumentError(
                "loss",
                f"must be an object that takes attributes, got {type(loss).__name__}; mark a function that calls it",
            ) from None
        return loss

    return mark


def claims_of(loss: object) -> tuple[LossClaim, ...]:
    """The marks of a function, the topmost first; anything else has none."""
    # From the object's own dictionary: a mock, which answers to every name, has no mark.
    found = getattr(loss, "__dict__", {}).get(_ATTRIBUTE, ()) if not isinstance(loss, type) else ()
    return found if isinstance(found, tuple) else ()
