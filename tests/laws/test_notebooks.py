"""Every notebook runs from top to bottom, and prints today what is stored in it.

The claims of a notebook are assertions in its cells. `python tests/laws/test_notebooks.py --write` runs the notebooks
and stores their outputs.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.laws.test_docs import same

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SECONDS = 120


def executed(path: Path) -> nbformat.NotebookNode:
    """The notebook with fresh outputs; a cell that fails raises."""
    notebook = nbformat.read(path, as_version=4)
    # A stream arrives in pieces that depend on timing.
    client = NotebookClient(
        notebook, timeout=SECONDS, kernel_name="python3", record_timing=False, coalesce_streams=True
    )
    # Kernels run beside other tests, and torch's threads waiting for a busy core cost more than they gain.
    client.execute(cwd=str(ROOT), env={**os.environ, "OMP_NUM_THREADS": "1"})
    return notebook


def outputs(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    """The kind and the text of every output; of a figure, that it is one."""
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            if output.output_type == "stream":
                found.append((output.name, output.text))
            else:
                data = output.get("data", {})
                text = "" if "image/png" in data else data.get("text/plain", "")
                found.append((output.output_type, text))
    return found


def test_there_are_notebooks():
    assert NOTEBOOKS


# The kernel's sockets and asyncio's loop are closed late, by their finalisers.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_and_print_what_is_stored(path):
    notebook = nbformat.read(path, as_version=4)
    stored = outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "stored before it was run"
    assert stored and not any(kind in ("error", "stderr") for kind, _ in stored)
    printed = outputs(executed(path))
    assert [kind for kind, _ in printed] == [kind for kind, _ in stored]
    for (_, text), (_, today) in zip(stored, printed, strict=True):
        assert same(text, today), (
            f"{path.relative_to(ROOT)} prints\n{today}\nand not\n{text}\n"
            "regenerate with: python tests/laws/test_notebooks.py --write"
        )


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/laws/test_notebooks.py --write")
    for each in NOTEBOOKS:
        nbformat.write(executed(each), each)
        print(f"{each.relative_to(ROOT)}: outputs stored")
