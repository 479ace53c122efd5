"""Write docs/theory/, one page per theorem, from the objects: `python docs/generate_theory.py [T4 ...]`."""

from __future__ import annotations

import sys
from pathlib import Path

from opdtheory.theorems import theorems
from opdtheory.verification.markdown import index, page, slug

FOLDER = Path(__file__).parent / "theory"


def main(numbers: list[str]) -> None:
    """Run the checks of the named theorems, or of all, and write their pages."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "index.md").write_text(index(theorems()), encoding="utf-8")
    for theorem in theorems():
        if not numbers or theorem.number in numbers:
            path = FOLDER / f"{slug(theorem)}.md"
            path.write_text(page(theorem, theorem.run()), encoding="utf-8")
            print(f"wrote {path.name}")


if __name__ == "__main__":
    main(sys.argv[1:])
