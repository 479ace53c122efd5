"""What a reader could not use, by name and count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FAULTS", "LeftOut"]

# What is counted, and what is wrong with it.
FAULTS: dict[str, tuple[str, str]] = {
    "truncated": ("lines", "are the last of a file and cut off; the run may still be writing"),
    "damaged": ("lines", "are not JSON objects"),
    "unreadable": ("files", "cannot be read"),
    "unrecognised": ("records", "have none of the fields"),
    "missing": ("records", "lack the log-probabilities of the student or the teacher"),
    "not_numbers": ("records", "have a field that does not hold rows of numbers"),
    "empty": ("records", "have no unmasked token"),
    "ragged": ("tokens", "are in rows whose columns differ in length"),
    "nan": ("tokens", "have a log-probability that is not a number"),
    "impossible": ("tokens", "have probability zero under the student or the sampler, which cannot have written them"),
    "above_zero": ("tokens", "have a log-probability above zero"),
    "all_zero": ("tokens", "are in rollouts where one column is zero throughout and another is not"),
}


@dataclass
class LeftOut:
    """Counts of what was left out, by the names of `FAULTS`.

    Attributes:
        counts: how many, of lines, files, records or tokens.
        first: where the first was met, such as `run.jsonl, line 12`.
        tokens: the number of tokens that were used.
        records: the number of records read, usable or not.
        stand_ins: the number of records whose student is the sampling engine's log-probabilities.
        unmasked_zeros: the number of used tokens without a mask whose columns are all exactly zero, as padding is.
    """

    counts: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    tokens: int = 0
    records: int = 0
    stand_ins: int = 0
    unmasked_zeros: int = 0

    def add(self, fault: str, count: int = 1, where: str | None = None) -> None:
        """Count a fault.

        Args:
            fault: a name of `FAULTS`.
            count: how many.
            where: the place of the first of them.
        """
        if count:
            self.counts[fault] = self.counts.get(fault, 0) + count
            if where is not None:
                self.first.setdefault(fault, where)

    def update(self, counts: Mapping[str, int], where: str | None = None) -> None:
        """Count several."""
        for fault, count in counts.items():
            self.add(fault, count, where)

    @property
    def words(self) -> tuple[str, ...]:
        """A sentence for each fault, in the order of `FAULTS`, and for what a reader of the figures should know."""
        found = []
        for fault, (unit, what) in FAULTS.items():
            if count := self.counts.get(fault):
                place = f" (first: {self.first[fault]})" if fault in self.first else ""
                found.append(f"{count:,} {unit} {what}{place}.")
        if self.stand_ins:
            found.append(
                f"In {self.stand_ins:,} records the sampling engine's log-probabilities stand in for the student's, "
                "which are not logged: a mismatch between the two cannot be seen."
            )
        if self.unmasked_zeros > 0.01 * self.tokens:
            found.append(
                f"{self.unmasked_zeros:,} tokens are zero in every column and there is no mask: they may be padding; "
                "name the mask with mask=."
            )
        return tuple(found)

    def __str__(self) -> str:
        return "\n".join(self.words) or "Nothing was left out."
