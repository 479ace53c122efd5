"""Write docs/theory/, one page per theorem, from the objects: `python docs/generate_theory.py [T4 ...]`.

`python docs/generate_theory.py --proofs` writes only what the pages say about proofs in Coq, and runs no check.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from opdtheory.theorems import theorems
from opdtheory.verification.markdown import index, machine_checked_part, page, slug

FOLDER = Path(__file__).parent / "theory"


def main(numbers: list[str]) -> None:
    """Run the checks of the named theorems, or of all, and write their pages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "index.md").write_text(index(theorems()), encoding="utf-8")
    if numbers == ["--proofs"]:
        return _write_proofs()
    for theorem in theorems():
        if not numbers or theorem.number in numbers:
            path = FOLDER / f"{slug(theorem)}.md"
            path.write_text(page(theorem, theorem.run()), encoding="utf-8")
            print(f"wrote {path.name}")


def _write_proofs() -> None:
    for theorem in theorems():
        path = FOLDER / f"{slug(theorem)}.md"
        path.write_text(with_proof(path.read_text(encoding="utf-8"), theorem.number), encoding="utf-8")


def with_proof(page: str, number: str) -> str:
    """The page with what Coq checks of the theorem today, in its place before the checks."""
    without = re.sub(r"^## Machine-checked\n.*?(?=^## )", "", page, flags=re.DOTALL | re.MULTILINE)
    before, heading, after = without.partition("## What was checked\n")
    part = machine_checked_part(number)
    return before + (f"{part}\n\n" if part else "") + heading + after


if __name__ == "__main__":
    main(sys.argv[1:])
