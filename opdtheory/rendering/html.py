"""A page and its parts as HTML: sections, tables, lists; numbers, formulas and prose as in print."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from opdtheory.rendering.style import CONTENT_POLICY, STYLE

__all__ = [
    "aligned",
    "breakable",
    "bullets",
    "cosine",
    "document",
    "facts",
    "figure",
    "folded",
    "formula",
    "number",
    "plain_text",
    "prose",
    "rows_of",
    "save_page",
    "section",
    "sentence",
    "table",
    "verdict_words",
    "yes_or_no",
]

# A narrow page shows a table with more columns than this as one card a row, unless it is all numbers.
_NARROW = 3


def save_page(page: str, path: Path) -> Path:
    """Write a page, creating its folder if necessary, and return the path."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")
    return path


def document(kicker: str, name: str, verdict: str, tone: str, lead: str, sections: Iterable[str], foot: str) -> str:
    """A page: one self-contained file, without scripts and without requests.

    Args:
        kicker: what the page is, above the name.
        name: of what it is about.
        verdict: in words.
        tone: `good`, `bad` or `open`.
        lead: paragraphs below the verdict, HTML.
        sections: HTML; empty ones are left out.
        foot: HTML.
    """
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{CONTENT_POLICY}">
<title>{escape(name)}: {escape(verdict)}</title>
<style>{STYLE}</style>
</head>
<body>
<main>
<header>
<p class="kicker">{escape(kicker)}</p>
<h1>{breakable(name)}</h1>
</header>
<section class="verdict {tone}" aria-label="Verdict">
<p class="word">{escape(verdict)}</p>
{lead}
</section>
{"".join(each for each in sections if each)}
</main>
<footer><p>{foot}</p></footer>
</body>
</html>
"""


def section(title: str, body: str, name: str = "") -> str:
    """A section with a heading; the body is HTML, and `name` is what links to it say."""
    return f"<section{f' id={name!r}' if name else ''}><h2>{escape(title)}</h2>{body}</section>"


def table(header: Sequence[str], rows: Iterable[Sequence[str]], caption: str, numbers: Sequence[int] = ()) -> str:
    """A table under its caption; the cells are HTML.

    On a narrow page a row of a wide table is a card, and a table of numbers scrolls by itself beside its first column.
    """
    cards = _NARROW < len(header) and len(numbers) + 1 < len(header)

    def cell(tag: str, i: int, text: str, more: str = "") -> str:
        return f"<{tag}{more}{' class=number' if i in numbers else ''}>{text}</{tag}>"

    def named(i: int) -> str:
        return f" data-label='{escape(header[i], quote=True)}'" if cards and i and header[i] else ""

    head = "".join(
        cell("th", i, escape(text), " scope='col'") if text else "<td></td>" for i, text in enumerate(header)
    )
    body = "".join(f"<tr>{''.join(cell('td', i, text, named(i)) for i, text in enumerate(row))}</tr>" for row in rows)
    return (
        f"<figure class='table'><figcaption>{escape(caption)}</figcaption>"
        f"<div class='scroll' tabindex='0' role='region' aria-label='{escape(caption, quote=True)}'>"
        f"<table{' class=cards' if cards else ''}><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
        "</div></figure>"
    )


def folded(title: str, body: str, opened: bool = False) -> str:
    """A part of a page that opens when its title is clicked; the body is HTML."""
    return f"<details{' open' if opened else ''}><summary>{escape(title)}</summary>{body}</details>"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """The few facts at the top of a page; the values are HTML."""
    return f"<dl class='facts'>{''.join(f'<div><dt>{escape(k)}</dt><dd>{v}</dd></div>' for k, v in pairs)}</dl>"


def bullets(items: Iterable[str]) -> str:
    """A list of HTML."""
    return f"<ul>{''.join(f'<li>{each}</li>' for each in items)}</ul>"


def figure(title: str, alt: str, svg: str, caption: str) -> str:
    """A figure with its heading, its description for readers who do not see it, and its caption."""
    return (
        f"<figure><h3>{escape(title)}</h3><div role='img' aria-label='{escape(alt, quote=True)}'>{svg}</div>"
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def rows_of(rows: Iterable[tuple[str, str]]) -> str:
    """Terms and their descriptions side by side; both are HTML."""
    inner = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in rows)
    return f"<dl class='rows'>{inner}</dl>" if inner else ""


def number(value: object) -> str:
    """A number as HTML, with four digits, a minus sign and raised powers of ten; other values as text."""
    if isinstance(value, bool):
        return yes_or_no(value)
    if not isinstance(value, (int, float)):
        return "–" if value is None else escape(str(value))
    if math.isnan(value):
        return "not a number"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    mantissa, _, exponent = f"{value:.4g}".partition("e")
    power = f" × 10<sup>{int(exponent)}</sup>" if exponent else ""
    return (mantissa + power).replace("-", "−")


def aligned(value: float | None) -> str:
    """A number for a column: four digits, with trailing zeros."""
    text = number(value)
    if value is None or not 1e-3 <= abs(value) < 1e3:
        return text
    return f"{value:#.4g}".replace("-", "−")


def cosine(value: float | None) -> str:
    """A cosine with its sign and six decimals."""
    return "–" if value is None else f"{value:+.6f}".replace("-", "−")


def plain_text(value: object) -> str:
    """Lists and dictionaries of numbers as one line of HTML."""
    if isinstance(value, (list, tuple)):
        return ", ".join(plain_text(v) for v in value)
    if isinstance(value, dict):
        return ", ".join(f"{escape(str(key))} {plain_text(v)}" for key, v in value.items())
    return number(value)


def yes_or_no(value: object) -> str:
    """`yes` or `no`; a dash for None."""
    return "–" if value is None else "yes" if value else "no"


def verdict_words(value: object) -> str:
    """A verdict without its underscores."""
    return str(value).replace("_", " ")


def sentence(text: str) -> str:
    """The escaped text with a capital letter and a full stop."""
    return escape(text[:1].upper() + text[1:] + "." if text else "")


def prose(text: object) -> str:
    """Text with formulas in plain characters, as HTML with arrows, minus signs, sums, indices and powers.

    Only names of one letter have an index: `u_m`, but not `off_policy`.
    """
    shown = escape(str(text or ""))
    for plain, sign in (("-&gt; inf", "→ ∞"), ("-&gt;", "→"), ("&lt;=", "≤"), ("&gt;=", "≥"), (" - ", " − ")):
        shown = shown.replace(plain, sign)
    shown = re.sub(r"(?<![\w)\]])-(?=[\du])", "−", shown)
    shown = re.sub(r"\bsum_\{([^{}]*)\}", r"Σ<sub>\1</sub>", shown).replace("gamma^", "γ^")
    shown = re.sub(r"(?<=\S)_\{([^{}]*)\}", r"<sub>\1</sub>", shown)
    shown = re.sub(r"\b([A-Za-z0-9])_(\w)\b", r"\1<sub>\2</sub>", shown)
    shown = re.sub(r"\^\(([^()]*)\)", lambda power: f"<sup>{power[1].replace('-', '−')}</sup>", shown)
    shown = re.sub(r"(?:\^|\*\*)(−?\d+)", r"<sup>\1</sup>", shown)
    # A space that neither breaks nor is wide stands for a product.
    return re.sub(r"(?<=[\w)])\*(?=[\w(])", "\u202f", shown)


def breakable(name: str) -> str:
    """A name that may break after its separators on a narrow page."""
    return re.sub(r"([/_.:]+)", r"\1<wbr>", escape(name))


def formula(text: object) -> str:
    """A sympy expression of `u` as HTML, without stars and with plain powers raised; lines end between terms."""
    if not text:
        return ""
    shown = escape(str(text)).replace("-", "−")
    shown = re.sub(r"\*\*(−?[\w.]+|\(−?[\w./]+\))", lambda m: f"<sup>{m[1].strip('()')}</sup>", shown)
    if "**" in shown:
        # A power of more than a number stays as it is.
        return f"<code>{escape(str(text))}</code>"
    shown = re.sub(r"(?<![A-Za-z])u(?![A-Za-z])", "<var>u</var>", shown)
    terms = re.split(r" (?=[+−] )", shown.replace("*", "\u202f"))
    depth, whole = 0, [""]
    for term in terms:
        # A sign within brackets starts no term.
        whole[-1:] = [f"{whole[-1]} {term}".strip()] if depth or not whole[-1] else [whole[-1], term]
        depth += term.count("(") - term.count(")")
    return f"<span class='formula'>{' '.join(f'<span class=term>{term}</span>' for term in whole)}</span>"
