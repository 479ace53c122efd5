"""What `mkdocs build` does beside turning pages into HTML: formulas, tables, notebooks and the style of formulas."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from nbconvert import MarkdownExporter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[2]
_NAME = re.compile(r'(<span class="doc doc-object-name[^>]*>)([^<]*)(</span>)')
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
sys.path.insert(0, str(Path(__file__).parent))

from extension import PLACES, SiteExtension  # noqa: E402

from opdtheory.rendering import style  # noqa: E402


def on_config(config: MkDocsConfig) -> None:
    """Typeset formulas and tables at build time, so that the pages need no script and no network for them."""
    config.markdown_extensions.append(SiteExtension())
    pages = sorted((ROOT / "docs" / "theory").glob("t*.md"), key=_number)
    for section in config.nav:
        # The pages of a folder follow its index.
        if "Theory" in section:
            section["Theory"][0] = {"The theorems": ["theory/index.md", *(f"theory/{page.name}" for page in pages)]}
        elif "Notebooks" in section:
            section["Notebooks"] = ["notebooks/index.md", *(f"notebooks/{path.stem}.md" for path in NOTEBOOKS)]


def on_page_content(html: str, **_: Any) -> str:
    """Let the names of the API break after their separators; their HTML is none of Markdown's."""
    return _NAME.sub(lambda name: name[1] + "<wbr>".join(PLACES.split(name[2])) + name[3], html)


def on_files(files: Files, config: MkDocsConfig) -> None:
    """Add the notebooks with their outputs, a page that lists them, and the style sheet of formulas."""
    listed = []
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        text, resources = _exporter(path.stem).from_notebook_node(notebook)
        # Links lead from the folder of notebooks to pages of the site.
        text = text.replace("](../docs/", "](../")
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in resources["outputs"].items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
        title, question = notebook.cells[0].source.split("\n\n")[:2]
        listed.append(f"| [{title.lstrip('# ')}]({path.stem}.md) | {' '.join(question.strip('*').split())} |")
    index = f"# Notebooks\n\n{_INTRODUCTION}\n\n| notebook | the question |\n| --- | --- |\n" + "\n".join(listed)
    files.append(File.generated(config, "notebooks/index.md", content=index + "\n"))
    files.append(File.generated(config, "stylesheets/formulas.css", content=style.FORMULAS))


def _number(page: Path) -> tuple[int, str]:
    """T2 comes before T10, and T2b after T2."""
    found = re.fullmatch(r"t(\d+)(\w*)", page.stem)
    assert found is not None
    return int(found[1]), found[2]


def _exporter(stem: str) -> MarkdownExporter:
    name = f"{stem}_{{cell_index}}_{{index}}{{extension}}"
    return MarkdownExporter(config=Config({"ExtractOutputPreprocessor": {"output_filename_template": name}}))


_INTRODUCTION = (
    "Each notebook starts with a question. The tests run it from top to bottom and compare what it prints with the"
    " outputs shown here; the sources are in `notebooks/`."
)
