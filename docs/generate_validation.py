"""Write docs/validation.md and docs/validation.json: `python docs/generate_validation.py [--quick] [--smollm2]`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch

from opdtheory.reproduction import validation_cases as cases
from opdtheory.reproduction.validation_page import page
from opdtheory.training.validation.report import Validation

FOLDER = Path(__file__).parent
RECORD = FOLDER / "validation.json"
NUMBERS = ("bias", "predicted_bias", "cosine", "z", "along", "signal_to_noise")


def run(section: str, chosen: tuple[cases.Case, ...] | None = None) -> dict[str, Any]:
    """Run the cases of a section, or some of them, and return their rows."""
    generate, every = SECTIONS[section]
    chosen = every if chosen is None else chosen
    began, rows = time.process_time(), []
    for case, found in zip(chosen, generate(chosen), strict=True):
        rows.append({**found.to_dict(), "off_policy": case.off_policy})
        print(f"{section}: {found.estimator}: {found.verdict}", file=sys.stderr, flush=True)
    return {"rows": rows, "seconds": round(time.process_time() - began, 1)}


SECTIONS: dict[str, tuple[Any, tuple[cases.Case, ...]]] = {
    "small": (cases.small, cases.SMALL),
    "enumerated": (cases.enumerated, cases.ENUMERATED),
    "smollm2_noise": (cases.smollm2, cases.SMOLLM2),
    "smollm2_layer": (lambda chosen: cases.smollm2(chosen, layer=15), cases.SMOLLM2),
}


def differences(section: str, chosen: tuple[cases.Case, ...]) -> list[str]:
    """Run some cases again, and return how their rows differ from the record."""
    recorded = json.loads(RECORD.read_text(encoding="utf-8"))[section]["rows"]
    every, found = SECTIONS[section][1], []
    for case, row in zip(chosen, run(section, chosen)["rows"], strict=True):
        old = recorded[every.index(case)]
        for name in NUMBERS:
            a, b = row[name], old[name]
            same = a == b if a is None or b is None else abs(a - b) <= 1e-6 * max(1.0, abs(b))
            if not same or row["estimator"] != old["estimator"]:
                found.append(f"{section}: {old['estimator']}: {name} is {a}, recorded {b}")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the sections; return 1 if a row disagrees with theory or, with --quick, with the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="repeat a few rows and compare them with the record")
    parser.add_argument("--smollm2", action="store_true", help="also run SmolLM2-135M, which needs the extra lm")
    parser.add_argument("--only", choices=tuple(SECTIONS), help="run one section; the others stay as recorded")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    if options.quick:
        found = [text for section, chosen in cases.QUICK.items() for text in differences(section, chosen)]
        print("\n".join(found) or "all rows are as recorded")
        return int(bool(found))
    record = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.is_file() else {}
    wanted = [options.only] if options.only else ["small", "enumerated"]
    wanted += ["smollm2_noise", "smollm2_layer"] if options.smollm2 else []
    for section in wanted:
        try:
            record[section] = run(section)
        except ImportError as error:
            print(f"{section} is left as recorded: {error}", file=sys.stderr)
        RECORD.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    (FOLDER / "validation.md").write_text(page(record), encoding="utf-8")
    rows = [row for section in record.values() for row in section["rows"]]
    wrong = [row["estimator"] for row in rows if not Validation.from_dict(row).agrees]
    print(f"{len(rows)} rows, {len(wrong)} disagree" + (f": {'; '.join(wrong)}" if wrong else ""))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
