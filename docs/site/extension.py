"""What the site's Markdown adds: formulas as MathML, and tables that can be read on a telephone."""

from __future__ import annotations

import re
from html import unescape
from xml.etree import ElementTree

from markdown import Markdown
from markdown.extensions import Extension
from markdown.treeprocessors import Treeprocessor
from markdown.util import HTML_PLACEHOLDER_RE, AtomicString

from opdtheory.rendering.mathematics import display, inline

__all__ = ["PLACES", "SiteExtension"]

# A name in code may break after these on a narrow page, and nowhere else.
PLACES = re.compile(r"(?<=[/_.:,=(\[\-])(?=[^\s/_.:,=(\[\-])")
# From this many columns on, a row becomes a card where the page is narrow.
_WIDE = 3


class SiteExtension(Extension):
    """To be listed after `pymdownx.arithmatex`, which finds the formulas."""

    def extendMarkdown(self, md: Markdown) -> None:  # noqa: N802
        """Run after inline patterns and tables have made their elements."""
        md.treeprocessors.register(_Formulas(md), "opdtheory-formulas", 2)
        md.treeprocessors.register(_Tables(md), "opdtheory-tables", 1)
        md.treeprocessors.register(_Names(md), "opdtheory-names", 0)


class _Formulas(Treeprocessor):
    def run(self, root: ElementTree.Element) -> None:
        for parent in root.iter():
            for i, child in enumerate(parent):
                if child.get("class") != "arithmatex":
                    continue
                # Between \( and \), or \[ and \], and escaped.
                latex = unescape(child.text or "").strip()[2:-2].strip()
                shown = display(latex) if child.tag == "div" else inline(latex)
                if "<code>" in shown:
                    raise ValueError(f"a formula must be LaTeX that can be typeset, got {latex!r}")
                kept = ElementTree.Element(child.tag, {"class": "formula-box"})
                kept.text, kept.tail = self.md.htmlStash.store(shown), child.tail
                parent[i] = kept


class _Tables(Treeprocessor):
    def run(self, root: ElementTree.Element) -> None:
        for table in list(root.iter("table")):
            heads = [self._text(cell) for cell in table.iterfind("thead/tr/th")]
            for row in table.iterfind("tbody/tr"):
                for cell, head in zip(row, heads, strict=False):
                    cell.set("data-label", head)
            table.set("class", "cards" if len(heads) >= _WIDE else "pair")

    def _text(self, cell: ElementTree.Element) -> str:
        text = "".join(cell.itertext())
        stashed = self.md.htmlStash.rawHtmlBlocks
        # What the stash holds, such as a formula, has only its letters in a label.
        text = HTML_PLACEHOLDER_RE.sub(lambda m: re.sub(r"<[^>]*>", "", str(stashed[int(m[1])])), text)
        return text.replace("\x02", "").replace("\x03", "").strip()


class _Names(Treeprocessor):
    """Blocks of code are not elements at this stage, so these are names and expressions within text."""

    def run(self, root: ElementTree.Element) -> None:
        for code in list(root.iter("code")):
            if len(code) or not code.text:
                continue
            first, *others = PLACES.split(code.text)
            code.text = AtomicString(first)
            for piece in others:
                ElementTree.SubElement(code, "wbr").tail = AtomicString(piece)
