"""Every notebook runs from top to bottom, and prints today what is stored in it.

The claims of a notebook are assertions in its cells. `python tests/laws/test_notebooks.py --write` runs the notebooks
and stores their outputs.
"""

from __future__ import annotations

import base64
import copy
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
import pytest
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbclient.util import run_sync

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from tests.laws.test_docs import same

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

SECONDS = 120

# The default suite runs these; the others are executed by `make test-slow`, as the last one trains eight models.
_QUICK = ("05_k1_k2_k3",)


# What one notebook leaves in a kernel is gone before the next one: its names, its outputs and its figures.
_FORGET = nbformat.v4.new_notebook(
    cells=[nbformat.v4.new_code_cell("%reset -f\nimport matplotlib.pyplot as _plt\n_plt.close('all')\n%reset -f")]
)


class Kernel:
    """A kernel for several notebooks, one after the other: most of a short one's time is spent on imports.

    It is started with the first notebook, and anew if the last one killed it.
    """

    def __init__(self) -> None:
        self._manager: AsyncKernelManager | None = None

    def executed(self, path: Path) -> nbformat.NotebookNode:
        """The notebook with fresh outputs; a cell that fails raises."""
        notebook = nbformat.read(path, as_version=4)
        alive = self._manager is not None and run_sync(self._manager.is_alive)()
        self._manager = self._manager if alive else AsyncKernelManager(kernel_name="python3")
        if alive:
            self._run(copy.deepcopy(_FORGET))
        self._run(notebook)
        return notebook

    def close(self) -> None:
        """End the process."""
        if self._manager is not None:
            run_sync(self._manager.shutdown_kernel)(now=True)

    def _run(self, notebook: nbformat.NotebookNode) -> None:
        # A stream arrives in pieces that depend on timing.
        client = NotebookClient(notebook, km=self._manager, timeout=SECONDS, record_timing=False, coalesce_streams=True)
        try:
            # Kernels run beside other tests, and torch's threads waiting for a busy core cost more than they gain.
            client.execute(cwd=str(ROOT), env={**os.environ, "OMP_NUM_THREADS": "1"})
        finally:
            if client.kc is not None:
                client.kc.stop_channels()


@pytest.fixture(scope="module")
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.close()


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


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_stored_figures_can_be_shown(path):
    for cell in nbformat.read(path, as_version=4).cells:
        for output in cell.get("outputs", []):
            if "image/png" in output.get("data", {}):
                assert base64.b64decode(output["data"]["image/png"]).startswith(b"\x89PNG")


# The kernel's sockets and asyncio's loop are closed late, by their finalisers.
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in _QUICK else [pytest.mark.slow], id=path.stem) for path in NOTEBOOKS],
)
def test_notebooks_run_and_print_what_is_stored(path, kernel):
    notebook = nbformat.read(path, as_version=4)
    stored = outputs(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "stored before it was run"
    assert stored and not any(kind in ("error", "stderr") for kind, _ in stored)
    printed = outputs(kernel.executed(path))
    assert [kind for kind, _ in printed] == [kind for kind, _ in stored]
    for (_, text), (_, today) in zip(stored, printed, strict=True):
        assert same(text, today), (
            f"{path.relative_to(ROOT)} prints\n{today}\nand not\n{text}\n"
            "regenerate with: python tests/laws/test_notebooks.py --write"
        )


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.slow
def test_a_notebook_leaves_nothing_to_the_next(tmp_path, kernel):
    texts = {}
    for name, source in (("first", "left = 1"), ("second", "print('left' in globals())"), ("third", "1 / 0")):
        path = tmp_path / f"{name}.ipynb"
        nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source)]), path)
        if name == "third":
            with pytest.raises(CellExecutionError, match="ZeroDivisionError"):
                kernel.executed(path)
        else:
            texts[name] = outputs(kernel.executed(path))
    assert texts == {"first": [], "second": [("stdout", "False\n")]}


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        sys.exit("usage: python tests/laws/test_notebooks.py --write")
    for each in NOTEBOOKS:
        # A kernel of its own: the cells are counted from 1.
        kernel_of_one = Kernel()
        nbformat.write(kernel_of_one.executed(each), each)
        kernel_of_one.close()
        print(f"{each.relative_to(ROOT)}: outputs stored")
