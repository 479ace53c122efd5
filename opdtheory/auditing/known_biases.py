"""Files of known biases: what an audit may find and pass, so that only a new bias fails."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from opdtheory.auditing.records import plain
from opdtheory.auditing.report import Audit
from opdtheory.choices import FAITHFUL
from opdtheory.errors import InvalidArgumentError

__all__ = ["BASELINE_VERSION", "STATUSES", "Judgement", "KnownVerdict", "judge", "read_known", "write_known"]

BASELINE_VERSION = 1

STATUSES = {
    "as_claimed": "the audit finds what was claimed",
    "known": "the audit does not find what was claimed, and the file of known biases says so",
    "recorded": "the audit does not find what was claimed, and the file of known biases now says so",
    "vanished": "the file of known biases records a bias that is gone",
    "new": "the audit does not find what was claimed",
    "grew": "the bias is larger than the one in the file of known biases",
    "changed": "the audit finds another verdict than the file of known biases records",
}

# Statuses that pass.
_PASSING = ("as_claimed", "known", "recorded", "vanished")

# A bias recorded on another machine differs by rounding: at most this share of its size, or this many tolerances.
_SLACK = 1e-6
_ROUNDINGS = 10.0


@dataclass(frozen=True)
class KnownVerdict:
    """The recorded finding of one audit.

    Attributes:
        objective: the claimed divergence.
        granularity: the claimed granularity.
        verdict: a key of `VERDICTS`.
        descends: the catalogue objective that the loss follows, such as `forward_kl (token_local)`, or None.
        relative_bias: worst over the panel, at scale one; may be infinite.
        cosine: worst over the panel.
        settings: the settings of the audit.
    """

    objective: str
    granularity: str
    verdict: str
    descends: str | None
    relative_bias: float
    cosine: float
    settings: dict[str, Any]

    @classmethod
    def of(cls, report: Audit) -> KnownVerdict:
        """The record of an audit."""
        followed = report.identified if report.descends is not None else None
        return cls(
            objective=report.objective,
            granularity=report.granularity,
            verdict=report.verdict,
            descends=None if followed is None else f"{report.descends} ({followed.granularity})",
            # The bias of an exact loss is rounding.
            relative_bias=0.0 if report.verdict == "exact" else float(report.relative_bias),
            cosine=float(report.cosine),
            settings=plain(report.settings),
        )

    def is_about(self, report: Audit) -> bool:
        """Whether claim and settings of the audit are those of the record."""
        settings = plain(report.settings)
        # An older record lacks the settings of later versions.
        same = all(key in settings and settings[key] == value for key, value in self.settings.items())
        return same and (report.objective, report.granularity) == (self.objective, self.granularity)


@dataclass(frozen=True)
class Judgement:
    """An audit compared with its claim and with its record.

    Attributes:
        status: a key of `STATUSES`.
        detail: the numbers in a sentence.
    """

    status: str
    detail: str

    @property
    def passes(self) -> bool:
        """Whether this is as claimed, as recorded, or better."""
        return self.status in _PASSING


def judge(report: Audit, known: KnownVerdict | None = None, met: Callable[[str], bool] | None = None) -> Judgement:
    r"""Compare an audit with its claim and, if it fails that, with the record of the loss.

    A bias has grown if $b > b_0 (1 + 10^{-6}) + 10\,\mathrm{tolerance}$, for the relative bias or for one minus the
    cosine.

    Args:
        report: the audit.
        known: the record of the loss, if there is one; a record of another claim or other settings is ignored.
        met: whether a verdict is the claimed one (default: whether the audit passes).
    """
    as_claimed = report.passes if met is None else met(report.verdict)
    found, aside = _words(KnownVerdict.of(report)), ""
    if known is not None and not known.is_about(report):
        known, aside = None, "; its record is of another claim or other settings"
    if as_claimed:
        if known is not None and report.passes and known.verdict not in FAITHFUL:
            return Judgement("vanished", f"it was {_words(known)}, it is {found}; update the file of known biases")
        if known is None or known.verdict != report.verdict or report.passes:
            return Judgement("as_claimed", found)
    if known is None:
        return Judgement("new", found + aside)
    return _against_record(report, known)


def _against_record(report: Audit, known: KnownVerdict) -> Judgement:
    found = KnownVerdict.of(report)
    moved = f"it was {_words(known)}, it is {_words(found)}"
    if (found.verdict, found.descends) != (known.verdict, known.descends):
        return Judgement("changed", moved)
    worse, better = _compare(found, known, _ROUNDINGS * report.tolerance)
    if worse:
        return Judgement("grew", moved)
    tightened = f"; it was {_words(known)}, so the record may be tightened" if better else ""
    return Judgement("known", _words(found) + tightened)


def _compare(found: KnownVerdict, known: KnownVerdict, rounding: float) -> tuple[bool, bool]:
    """Whether a bias is larger, and whether it is smaller, than the recorded one."""
    pairs = ((found.relative_bias, known.relative_bias), (1.0 - found.cosine, 1.0 - known.cosine))
    worse = any(now > before + _SLACK * before + rounding for now, before in pairs)
    better = any(now < before - _SLACK * before - rounding for now, before in pairs if math.isfinite(before))
    return worse, better


def read_known(path: Path) -> dict[str, KnownVerdict]:
    """Read a file of known biases: the record of each loss, by name.

    Raises:
        InvalidArgumentError: the file cannot be read, or is not a file of known biases.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InvalidArgumentError("baseline", f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InvalidArgumentError("baseline", f"{path} is not JSON: {error}") from None
    version = content.get("baseline_version") if isinstance(content, dict) else None
    if version != BASELINE_VERSION or isinstance(version, bool):
        raise InvalidArgumentError("baseline", f"{path} must have baseline_version {BASELINE_VERSION}, got {version!r}")
    losses = content.get("losses")
    if not isinstance(losses, dict):
        raise InvalidArgumentError("baseline", f"{path} must have an object 'losses', got {losses!r}")
    return {name: _record(path, name, record) for name, record in losses.items()}


def write_known(path: Path, records: Mapping[str, KnownVerdict]) -> Path:
    """Write records into a file of known biases, keep the records of other losses in it, and return its path.

    Raises:
        InvalidArgumentError: the file exists but is not a file of known biases.
    """
    merged = {**(read_known(path) if path.is_file() else {}), **records}
    losses = {name: _plain(merged[name]) for name in sorted(merged)}
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"baseline_version": BASELINE_VERSION, "losses": losses}, indent=2, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def _plain(record: KnownVerdict) -> dict[str, Any]:
    values = asdict(record)
    # Nine digits distinguish two biases; further ones are rounding and would differ between machines.
    for key in ("relative_bias", "cosine"):
        values[key] = float(f"{values[key]:.9g}") if math.isfinite(values[key]) else None
    return values


def _record(path: Path, name: str, values: object) -> KnownVerdict:
    try:
        assert isinstance(values, dict)
        found = {each.name: values[each.name] for each in fields(KnownVerdict)}
        bias = math.inf if found["relative_bias"] is None else _number(found["relative_bias"])
        cosine, settings = _number(found["cosine"]), dict(found["settings"])
        return KnownVerdict(**{**found, "relative_bias": bias, "cosine": cosine, "settings": settings})
    except (AssertionError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise InvalidArgumentError("baseline", f"{path}: the record of {name!r} is incomplete: {error!r}") from None


def _number(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return float(value)


def _words(record: KnownVerdict) -> str:
    verdict = record.verdict.replace("_", " ")
    other = f", {record.descends}," if record.verdict == "other_objective" else ""
    return f"{verdict}{other} with relative bias {record.relative_bias:.3g} and cosine {record.cosine:.6g}"
