"""Write the table of recognised field names into docs/runs.md: `python docs/generate_runs.py`."""

from __future__ import annotations

from pathlib import Path

from opdtheory.monitoring.files.fields import TRAINERS
from opdtheory.rendering.markdown import markdown_table

PAGE = Path(__file__).parent / "runs.md"
MARKERS = ("<!-- fields -->", "<!-- /fields -->")

_HEAD = ("trainer", "student", "teacher", "sampler", "mask", "entropy", "what is read")


def table() -> str:
    """The names of each trainer, the first that a record has taken."""
    rows = []
    for names in TRAINERS:
        roles = (names.student, names.teacher, names.behavior, names.masks + names.rollout_masks, names.entropy)
        cells = (", ".join(f"`{name}`" for name in role) or "–" for role in roles)
        rows.append((names.trainer, *cells, names.remark))
    return markdown_table(_HEAD, rows)


def page_with(text: str) -> str:
    """The page with the table between its markers."""
    before, _, rest = text.partition(MARKERS[0])
    return f"{before}{MARKERS[0]}\n{table()}\n{MARKERS[1]}{rest.partition(MARKERS[1])[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
