"""`opd_loss` and `opd_trainer`: marks that say what is minimised, for `pytest --opd-audit` to check.

Nothing here imports torch, so a trainer's module can use the mark at no cost.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar

from opdtheory.choices import FAITHFUL, GRANULARITIES, VERDICTS
from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from opdtheory.auditing import Audit
    from opdtheory.divergences import Divergence
    from opdtheory.testing.calls import Call

__all__ = ["LossClaim", "TrainerClaim", "claims_of", "opd_loss", "opd_trainer", "trainer_claims_of"]

# A function, or a static or class method, which is not itself callable.
F = TypeVar("F")

_ATTRIBUTE, _OF_TRAINER = "__opd_claims__", "__opd_trainer_claims__"


@dataclass(frozen=True)
class LossClaim:
    """One `opd_loss` mark.

    Attributes:
        claims: the divergence that the loss should minimise, an object or a catalogue name; None for the project's.
        granularity: `token_local`, `token_return` or `sequence`; None for the project's, else `token_local`.
        verdict: the verdict that the audit should find.
        settings: other arguments of `opdtheory.audit`.
        call: how to call a function that does not take rollouts alone, or None.
    """

    claims: str | Divergence | None
    granularity: str | None
    verdict: str
    settings: dict[str, Any] = field(default_factory=dict)
    call: Call | None = None

    @property
    def label(self) -> str:
        """The claim and its settings in one line, such as `forward_kl-token_local-eos=0`."""
        name = self.claims if self.claims is None or isinstance(self.claims, str) else self.claims.label
        # A label is one line, whatever the values are.
        settings = (" ".join(f"{key}={value}".split()) for key, value in sorted(self.settings.items()))
        return "-".join([name or "no objective", self.granularity or "token_local", *settings])

    def within(self, project: Mapping[str, Any]) -> LossClaim:
        """The mark with the settings of its project, over which its own win."""
        others = {name: value for name, value in project.items() if name not in ("objective", "granularity")}
        return replace(
            self,
            claims=project.get("objective") if self.claims is None else self.claims,
            granularity=project.get("granularity", "token_local") if self.granularity is None else self.granularity,
            settings={**others, **self.settings},
        )

    def is_met_by(self, report: Audit) -> bool:
        """Whether an audit finds the claimed verdict; a claim of exactness also needs every check of soundness.

        The verdict `exact` also meets `exact_up_to_scale`.
        """
        met = report.verdict == self.verdict or (self.verdict == "exact_up_to_scale" and report.verdict == "exact")
        return met and (self.verdict not in FAITHFUL or report.passes)


def opd_loss(
    claims: str | Divergence | None = None,
    granularity: str | None = None,
    verdict: str = "exact",
    *,
    call: Call | None = None,
    **settings: Any,
) -> Callable[[F], F]:
    """Mark a function `loss(rollouts) -> scalar` with what it should minimise, for `pytest --opd-audit` to audit.

    The function itself is returned unchanged. A function with several marks is audited once for each. A method is
    audited on an instance of its class that is made without arguments; a static method needs none.

    Args:
        claims: the divergence that the loss should minimise, an object or a catalogue name (default: the objective in
            `[tool.opdtheory]` of `pyproject.toml`).
        granularity: `token_local`, `token_return` or `sequence` (default: that of `[tool.opdtheory]`, else
            `token_local`).
        verdict: the verdict that the audit should find: `exact`; `exact_up_to_scale`, which `exact` meets too; or, for
            a loss that is known to do something else, `other_objective`, `zero` or `biased`.
        call: how to call a function that does not take rollouts alone: a function of `(f, rollouts)`, or an expression
            of `f`, `r`, `opdtheory` and `torch` as for `opdtheory audit --call`; `f` is what the class has under the
            name of the method, without an instance.
        **settings: other arguments of `opdtheory.audit`, such as `batch_size`, `eos`, `off_policy`, `gamma`, `prompts`,
            `seed` and `name`.

    Raises:
        InvalidArgumentError: the granularity, the verdict or the call makes no sense, or the marked object is a class
            or cannot carry a mark.

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
    for name, value, allowed in (("granularity", granularity, (*GRANULARITIES, None)), ("verdict", verdict, claimable)):
        if value not in allowed:
            words = ", ".join(each for each in allowed if each is not None)
            raise InvalidArgumentError(name, f"must be one of {words}, got {value!r}")
    if call is not None:
        from opdtheory.testing.calls import checked_call

        checked_call(call)
    claim = LossClaim(claims, granularity, verdict, settings, call)

    def mark(loss: F) -> F:
        if isinstance(loss, type):
            raise InvalidArgumentError("loss", f"must be a function, got class {loss.__name__}; mark its method")
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
    """The marks of a function, or of a static or class method, the topmost first; anything else has none."""
    if isinstance(loss, type):
        return ()
    # From the object's own dictionary: a mock, which answers to every name, has no mark.
    found = getattr(loss, "__dict__", {}).get(_ATTRIBUTE)
    if found is None and isinstance(loss, staticmethod | classmethod):
        return claims_of(loss.__func__)
    return found if isinstance(found, tuple) else ()


@dataclass(frozen=True)
class TrainerClaim:
    """One `opd_trainer` mark.

    Attributes:
        claims: the divergence that the trainer should descend, an object or a catalogue name.
        granularity: `token_local`, `token_return` or `sequence`.
        settings: other arguments of `opdtheory.audit_trainer`.
    """

    claims: str | Divergence
    granularity: str
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """The claim and its settings in one line."""
        name = self.claims if isinstance(self.claims, str) else self.claims.label
        settings = (" ".join(f"{key}={value}".split()) for key, value in sorted(self.settings.items()))
        return "-".join([name, self.granularity, *settings])


def opd_trainer(claims: str | Divergence, granularity: str = "token_local", **settings: Any) -> Callable[[F], F]:
    """Mark a function that builds a trainer, or an update, for `pytest --opd-audit` to audit as a whole.

    The function itself is returned unchanged. With one parameter it is `build(pair)`, which returns the trainer; with
    three it is `update(pair, prompts, answers)`, which leaves a gradient. The audit passes if the trainer descends the
    claim, up to a positive scale, in every setting that is asked.

    Args:
        claims: the divergence that the trainer should descend.
        granularity: `token_local`, `token_return` or `sequence`.
        **settings: other arguments of `opdtheory.audit_trainer`, such as `batch_size` and `reduction`.

    Raises:
        InvalidArgumentError: the granularity is unknown, or there is no divergence.

    Example:
        >>> @opd_trainer(claims="reverse_kl")
        ... def build(pair):
        ...     "Returns the trainer."
        >>> [claim.label for claim in trainer_claims_of(build)]
        ['reverse_kl-token_local']
    """
    if callable(claims):
        raise InvalidArgumentError("claims", f"must be a divergence, as in @opd_trainer(claims=...), got {claims!r}")
    if granularity not in GRANULARITIES:
        raise InvalidArgumentError("granularity", f"must be one of {', '.join(GRANULARITIES)}, got {granularity!r}")
    claim = TrainerClaim(claims, granularity, settings)

    def mark(build: F) -> F:
        setattr(build, _OF_TRAINER, (claim, *trainer_claims_of(build)))
        return build

    return mark


def trainer_claims_of(build: object) -> tuple[TrainerClaim, ...]:
    """The marks of a function that builds a trainer, the topmost first; anything else has none."""
    found = getattr(build, "__dict__", {}).get(_OF_TRAINER)
    return found if isinstance(found, tuple) else ()
