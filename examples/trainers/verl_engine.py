"""What verl's FSDP engine descends below its rollout, setting by setting: a table, and its rows as JSON.

build/verl/bin/python examples/trainers/verl_engine.py --out rows.json
"""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from pathlib import Path

import verl_platform  # noqa: F401  (before the rest of verl)
from transformers.utils import logging as transformers_logging
from verl_settings import Row, our_rows, verl_rows
from verl_update import Update

from opdtheory.divergences import divergence
from opdtheory.end_to_end import TrainerAudit, audit_update
from opdtheory.end_to_end.auditor import TOLERANCE
from opdtheory.rendering.table import Table

# What a page marks its table with.
MARKS = ("<!-- rows -->", "<!-- end of rows -->")


def audited(row: Row, variants: bool = True, seed: int = 0) -> TrainerAudit:
    """The audit of one setting, with the student and the teacher of a seed."""
    options = {"reduction": row.reduction, "variants": variants, "seed": seed}
    return audit_update(Update(row.setting), row.claim, name=row.words, **options)


def record(row: Row, report: TrainerAudit) -> dict:
    """A row of the table, with the variants that change the gradient."""
    return {
        "setting": row.words,
        "claim": divergence(row.claim).label,
        "verdict": report.verdict,
        "passes": report.passes,
        "scale": report.scale,
        "error": report.error,
        "cosine": report.cosine,
        "descends": report.descends,
        "reading": list(report.reading),
        "variants": {each.name: each.holds for each in report.variants},
        "words": " ".join(report.words),
    }


def cells(found: dict) -> tuple[str, ...]:
    """A record as text."""
    numbers = (f"{found['scale']:.6g}", f"{found['error']:.1e}", f"{found['cosine']:.4f}")
    fails = ", ".join(name for name, holds in found["variants"].items() if holds is False)
    return found["setting"], found["claim"], found["verdict"], *numbers, found["descends"] or "-", fails or "-"


def written(page: str, records: list[dict]) -> str:
    """A page with its table anew, between the two comments that mark it."""
    lines = ["| setting | claim | verdict | scale | error | what it descends |", "|---|---|---|---|---|---|"]
    for found in records:
        verdict, error = found["verdict"].replace("_", " "), f"{100 * found['error']:.3g} %"
        if found["error"] < TOLERANCE:
            error = f"{found['error']:.0e}"
        other = "" if found["verdict"] in ("exact", "exact_up_to_scale") else f" (cosine {found['cosine']:.3f})"
        fails = "".join(f"; changes with {name}" for name, holds in found["variants"].items() if holds is False)
        descends = (found["descends"] or "").removesuffix(" (token_local)")
        what = " ".join([f"`{descends}`." if descends else "none of the catalogue.", *found["reading"]])
        cells = (found["setting"], found["claim"], verdict + fails, f"{found['scale']:.4g}", error + other, what)
        lines.append(f"| {' | '.join(cells)} |")
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n" + "\n".join(lines) + f"\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    """Audit the settings whose words hold a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="file for the rows, as JSON")
    parser.add_argument("--page", type=Path, help="page whose table is written anew")
    parser.add_argument("--only", default="", help="audit the settings that hold this text")
    parser.add_argument("--no-variants", action="store_true", help="the main setting alone")
    parser.add_argument("--seed", type=int, default=0, help="seed of the student and the teacher")
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")
    records = []
    for row in [*verl_rows(), *our_rows()]:
        if options.only not in row.words:
            continue
        records.append(record(row, audited(row, not options.no_variants, options.seed)))
        print(f"{records[-1]['setting']}: {records[-1]['verdict']}, {records[-1]['words']}", flush=True)
        if options.out:
            options.out.write_text(json.dumps(records, indent=1) + "\n")
    if options.page:
        options.page.write_text(written(options.page.read_text(encoding="utf-8"), records), encoding="utf-8")
    titles = ("setting", "claim", "verdict", "scale", "error", "cosine", "descends", "changes with")
    Table([titles, *map(cells, records)], "lllrrrll").show()


if __name__ == "__main__":
    main()
