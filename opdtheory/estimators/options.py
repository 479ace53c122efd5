"""What an entry of the table of estimators holds, and the checks of the options that it takes."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any, get_args

from opdtheory.choices import Baseline, Importance, Support
from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError, check_between, check_integer
from opdtheory.estimators.base import Claim, TokenLoss
from opdtheory.objective import check_discount

if TYPE_CHECKING:
    import sympy

__all__ = [
    "Build",
    "Entry",
    "Formula",
    "Options",
    "check_applicable",
    "check_on_policy",
    "checked",
    "choice",
    "nearest",
]

Options = dict[str, Any]
Build = Callable[[Divergence, Options], TokenLoss]
Formula = Callable[[Any, "sympy.Expr", "sympy.Symbol", Options], "sympy.Expr"]


@dataclass(frozen=True)
class Entry:
    """How one named estimator is built, which options it takes, and what the theory says about its unmodified form.

    Attributes:
        build: makes the loss of each token from the divergence and the options.
        options: options that apply.
        theorem: theorem behind the claim.
        nominal: the divergence that the estimator is for; None if the caller names one.
        required: options that must be given.
        descends: what the estimator descends, if that is another objective and cannot be derived.
        importance: importance weights that apply.
        baseline: baselines that apply.
        examples: calls that `opdtheory verify` audits, as keyword arguments.
        formula: the local weight, a function of sympy, the generator, `u` and the options; None if the weight is not a
            function of the ratio, or is listed under another name.
        claim: the claim, from the divergence and the options, if it cannot be derived from the kind of the loss.
    """

    build: Build
    options: frozenset[str]
    theorem: str
    nominal: str | None = None
    required: tuple[str, ...] = ()
    descends: str | None = None
    importance: tuple[str, ...] = get_args(Importance)
    baseline: tuple[str, ...] = tuple(name for name in get_args(Baseline) if name != "rest")
    examples: tuple[Options, ...] = ({},)
    formula: Formula | None = None
    claim: Callable[[Divergence, Options], Claim] | None = None


def check_applicable(name: str, entry: Entry, options: Options) -> None:
    """Raise unless every option applies to an estimator, and those that it needs are given."""
    for option in options:
        if option not in entry.options:
            takes = ", ".join(sorted(entry.options | {"reduction"}))
            raise InvalidArgumentError(option, f"does not apply to estimator {name!r}, which takes {takes}")
    for option in entry.required:
        if option not in options:
            raise InvalidArgumentError(option, f"must be given for estimator {name!r}")
    for option, allowed in (("importance", entry.importance), ("baseline", entry.baseline)):
        if option in options:
            choice(option, options[option], allowed, f" for estimator {name!r}")
    _check_together(options, "baseline_value", "baseline", "constant")
    _check_together(options, "clip_range", "importance", "ppo", "tis")
    _check_together(options, "keep_range", "importance", "mask", "sequence_mask")
    if options.get("baseline") == "constant" and "baseline_value" not in options:
        raise InvalidArgumentError("baseline_value", "must be given for baseline='constant'")
    if "eps" in options and "zscore" not in options:
        raise InvalidArgumentError("eps", "applies to zscore=True only")
    if "zscore" in options and "baseline" in options:
        raise InvalidArgumentError(
            "zscore", f"subtracts the group mean itself and takes no baseline, got baseline={options['baseline']!r}"
        )


def check_on_policy(options: Options) -> None:
    """Raise unless a ratio of one, that of the student's own rollouts, is left as it is."""
    if options.get("importance") == "tis" and options.get("clip_range", 1.0) < 1.0:
        raise InvalidArgumentError(
            "clip_range",
            f"must be at least 1 for importance='tis', or it scales every token, got {options['clip_range']}",
        )
    low, high = options.get("keep_range", (1.0, 1.0))
    if not low <= 1.0 <= high:
        raise InvalidArgumentError(
            "keep_range", f"must hold 1, or none of the student's own tokens counts, got ({low:g}, {high:g})"
        )


def _check_together(options: Options, option: str, other: str, *values: str) -> None:
    if option in options and options.get(other) not in values:
        allowed = " and ".join(f"{other}={value!r}" for value in values)
        raise InvalidArgumentError(option, f"applies to {allowed} only, got {other}={options.get(other)!r}")


def checked(name: str, option: str, value: object) -> object:
    """An option in its final type, or an error that names it."""
    if option in ("zscore", "discounted"):
        if not isinstance(value, bool):
            raise InvalidArgumentError(option, f"must be True or False, got {value!r}")
        return value
    if option == "support":
        return choice(option, value, get_args(Support))
    if option == "k":
        check_integer("k", value)
        return value
    if option == "clip_weight":
        return _interval(option, value)
    if option == "keep_range":
        low, high = _interval(option, value)
        check_between(option, low)
        return low, high
    if option in ("baseline_value", "alpha", "gamma", "eps", "clip_range", "clip_log_ratio"):
        number = _finite(option, value)
        if option == "gamma":
            check_discount(number)
        if option in ("eps", "clip_range", "clip_log_ratio") or (option, name) == ("alpha", "power"):
            check_between(option, number)
        return number
    return value


def _finite(option: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
        raise InvalidArgumentError(option, f"must be a finite number, got {value!r}")
    return float(value)


def _interval(option: str, value: object) -> tuple[float, float]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InvalidArgumentError(option, f"must be a pair (low, high), got {value!r}")
    low, high = _finite(option, value[0]), _finite(option, value[1])
    if low >= high:
        raise InvalidArgumentError(option, f"must have low below high, got ({low:g}, {high:g})")
    return low, high


def choice(argument: str, value: object, allowed: Iterable[str], where: str = "") -> str:
    """The value, if it is one of those allowed."""
    allowed = tuple(allowed)
    if not isinstance(value, str) or value not in allowed:
        wanted = f"must be one of {', '.join(allowed)}{where}"
        raise InvalidArgumentError(argument, f"{wanted}, got {value!r}{nearest(value, allowed)}")
    return value


def nearest(value: object, known: Iterable[str]) -> str:
    """A hint at the known word that is nearest; empty if none is near."""
    found = difflib.get_close_matches(str(value), list(known), n=1)
    return f"; did you mean {found[0]!r}?" if found else ""
