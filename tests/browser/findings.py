"""What a walk finds, and how it is printed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

__all__ = ["KINDS", "Finding", "Findings", "Setting"]

# What a page must be free of, in the order of the report, with the columns of the table.
KINDS = {
    "page too wide": "overflow",
    "beyond the edge": "overflow",
    "cut off": "overflow",
    "must be scrolled": "overflow",
    "text under something": "overlap",
    "broken word": "words",
    "raw formula": "formulas",
    "star for a product": "formulas",
    "dead link": "links",
    "console error": "console",
    "request": "network",
    "low contrast": "contrast",
    "ignores the scheme": "contrast",
}


@dataclass(frozen=True, order=True)
class Setting:
    """A width in pixels and a colour scheme, `light` or `dark`."""

    width: int
    scheme: str

    def __str__(self) -> str:
        return f"{self.width} {self.scheme}"


@dataclass(frozen=True, order=True)
class Finding:
    """One fault of one element.

    Attributes:
        page: path of the page in the site, or name of the report.
        kind: one of `KINDS`.
        where: CSS path of the element.
        text: what the element says.
        detail: what is wrong with it, in words or pixels; it may differ between settings.
    """

    page: str
    kind: str
    where: str
    text: str
    detail: str = field(default="", compare=False)


class Findings:
    """The faults of a walk, each with the settings in which it shows."""

    def __init__(self) -> None:
        self.pages: list[str] = []
        self.at: dict[Finding, list[Setting]] = {}
        self.external: set[str] = set()

    def add(self, finding: Finding, *settings: Setting) -> None:
        """Record a fault in these settings."""
        if finding.kind not in KINDS:
            raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {finding.kind!r}")
        at = self.at.setdefault(finding, [])
        at.extend(each for each in settings if each not in at)

    def of(self, page: str | None = None, kind: str | None = None) -> list[Finding]:
        """The faults of a page and of a kind, in order."""
        return sorted(f for f in self.at if page in (None, f.page) and kind in (None, f.kind))

    def lines(self, most: int | None = 5) -> Iterator[str]:
        """The faults by kind, at most so many of a page, then pages by columns, then the sums."""
        for kind in KINDS:
            found = self.of(kind=kind)
            if not found:
                continue
            yield f"{kind}: {len(found)} on {len({f.page for f in found})} pages"
            for page in self.pages:
                own = [f for f in found if f.page == page]
                for each in own[:most]:
                    yield f"  {page} [{settings_in_words(self.at[each])}] {each.where}"
                    yield f"      {' — '.join(part for part in (each.text, each.detail) if part)}"
                if most is not None and len(own) > most:
                    yield f"  {page}: {len(own) - most} more (--all)"
            yield ""
        yield from self.table()

    def table(self) -> Iterator[str]:
        """The number of faults of each page, by column, and how many pages have none."""
        columns = list(dict.fromkeys(KINDS.values()))
        width = max([len("clean pages"), *map(len, self.pages)])
        counts = {
            page: [sum(KINDS[f.kind] == c for f in self.at if f.page == page) for c in columns] for page in self.pages
        }

        def row(name: str, cells: Iterable[object]) -> str:
            return f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells)

        yield row("page", columns)
        for page, cells in counts.items():
            yield row(page, cells)
        yield row("faults", [sum(column) for column in zip(*counts.values(), strict=True)] or [0] * len(columns))
        clean = [sum(cells[i] == 0 for cells in counts.values()) for i in range(len(columns))]
        yield row("clean pages", [f"{number}/{len(self.pages)}" for number in clean])


def settings_in_words(settings: list[Setting]) -> str:
    """The settings, shorter where both schemes of a width have the fault."""
    words = []
    for width in sorted({each.width for each in settings}, reverse=True):
        schemes = sorted((each.scheme for each in settings if each.width == width), reverse=True)
        words.append(str(width) if schemes == ["light", "dark"] else f"{width} {' '.join(schemes)}")
    return ", ".join(words)
