"""The result of auditing a whole trainer."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from opdtheory.choices import FAITHFUL, Verdict
from opdtheory.objective import Objective
from opdtheory.rendering import text
from opdtheory.rendering.table import Table
from opdtheory.rendering.values import plain_values

__all__ = ["SCHEMA_VERSION", "TrainerAudit", "Variant"]

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Variant:
    """The same trainer in a slightly different setting.

    Attributes:
        name: the setting.
        holds: whether the trainer does there what it does in the main setting; None if it could not be asked.
        error: its distance from that, at the best scale; None if not asked.
        scale: the multiple at which it does so, over that of the main setting; None if not asked.
        words: what changes, or why it was not asked; empty if nothing does.
    """

    name: str
    holds: bool | None
    error: float | None = None
    scale: float | None = None
    words: str = ""

    @property
    def cells(self) -> tuple[str, ...]:
        """The row as text: setting, error, scale, what follows."""
        if self.holds is None:
            return self.name, "-", "-", "not asked"
        error = "-" if self.error is None else f"{self.error:.1e}"
        scale = "-" if self.scale is None else f"{self.scale:.6g}"
        return self.name, error, scale, "holds" if self.holds else "changes the gradient"


@dataclass(frozen=True)
class TrainerAudit:
    """What a trainer really descends, from its own sampling, collating, masking and stepping.

    Attributes:
        name: of the trainer.
        claim: the objective it was held to.
        histories: whose prefixes the claim is about: the `student`'s or the `sampler`'s.
        verdict: how its expected gradient relates to the claimed one.
        scale: the multiple of the claimed gradient that is nearest.
        scale_cause: what that multiple is, in a sentence; empty if it is one, or if nothing explains it.
        relative_bias: distance from the claimed gradient, at scale one.
        error: distance at the best scale, relative to the scaled gradient.
        cosine: of the angle between the expected and the claimed gradient.
        tolerance: relative error that counts as rounding.
        descends: the objective that its gradient follows to rounding, read as `reading` says; None if none was found.
        nearest: the catalogue objective that is nearest, if none matches.
        reading: what is unlike a faithful trainer, in sentences.
        where: the share of the gradient's squared length by kind of prefix.
        variants: the same trainer in other settings.
        words: the findings, in sentences.
        variance: trace of the covariance of one step's gradient, over the squared length of the claimed one.
        outcomes: how many outcomes of its sampling were played.
        settings: the arguments of the audit.
        monte_carlo: the number of sampled steps, if the outcomes were too many to play; None if the result is exact.
        seconds: duration of the audit.
    """

    name: str
    claim: Objective
    histories: str
    verdict: Verdict
    scale: float
    scale_cause: str
    relative_bias: float
    error: float
    cosine: float
    tolerance: float
    descends: str | None
    nearest: str | None
    reading: tuple[str, ...]
    where: dict[str, float]
    words: tuple[str, ...]
    variants: tuple[Variant, ...] = ()
    variance: float = 0.0
    outcomes: int = 0
    settings: dict[str, Any] = field(default_factory=dict)
    monte_carlo: int | None = None
    seconds: float = 0.0

    @property
    def passes(self) -> bool:
        """Whether the trainer descends what it claims, up to a positive scale, in every setting that was asked."""
        return self.verdict in FAITHFUL and all(variant.holds is not False for variant in self.variants)

    @property
    def headline(self) -> str:
        """The verdict in capitals, and that a variant fails if one does."""
        words = self.verdict.replace("_", " ").upper()
        if self.monte_carlo is not None:
            return f"{words}, BY SAMPLING"
        if self.verdict not in FAITHFUL or self.passes:
            return words
        return f"FAILS ({words} IN THE MAIN SETTING)"

    @property
    def limits(self) -> tuple[str, ...]:
        """What was not asked, in sentences."""
        settings = self.settings
        found = [
            f"Other batches than of {settings['batch_size']} rollouts, {settings['accumulate']} in a step, answers of "
            f"more than {settings['horizon']} tokens, other prompts than {' and '.join(settings['prompts'])}: "
            "batch_size, accumulate, horizon and prompts ask for them.",
            "Clipping of the gradient's norm, weight decay and the learning rate are switched off: the gradient is "
            "audited, not the optimizer.",
            "One process, in the dtype of the table: narrower dtypes, sharding and engines that sample elsewhere.",
            "The table has no dropout; in which mode models are called is noted, not its effect.",
        ]
        if self.monte_carlo is not None:
            found.append(
                f"{self.monte_carlo:,} steps were sampled, not all outcomes played, and no other setting was asked; "
                "the findings say which difference is excluded."
            )
        found += [f"{each.name}: {each.words}" for each in self.variants if each.holds is None]
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The report as values that `json.dumps` takes; infinite numbers and NaN become None."""
        record = {each.name: getattr(self, each.name) for each in dataclasses.fields(self) if each.name != "claim"}
        record |= {"objective": self.claim.label, "granularity": self.claim.granularity}
        record |= {"reduction": self.claim.reduction, "passes": self.passes, "limits": self.limits}
        record |= {"variants": [dataclasses.asdict(each) for each in self.variants], "schema_version": SCHEMA_VERSION}
        found: dict[str, Any] = plain_values(record)
        return found

    def __str__(self) -> str:
        parts = [f"{self.name}: {self.headline}", "", text.paragraph(" ".join(self.words))]
        parts += [
            "",
            *Table([("gradient at", "share"), *((k, f"{v:.2%}") for k, v in self.where.items())], "lr").lines(),
        ]
        if self.variants:
            rows = [("setting", "error at best scale", "scale", ""), *(variant.cells for variant in self.variants)]
            parts += ["", *Table(rows, "lrrl").lines()]
        parts += ["", "What was not asked:", *map(text.item, self.limits)]
        return "\n".join(parts)
