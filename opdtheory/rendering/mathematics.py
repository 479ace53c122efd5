r"""Formulas in LaTeX as MathML, which browsers typeset without a script, a font or a network (extra `plots`).

`<math>` does not break over lines. A formula is therefore written as one element per term, so that a line may end
before a relation or a sign, first between the outermost terms and only then within brackets. Words inside
`\text{...}` are ordinary text. What cannot be read stays LaTeX in `<code>`. `rendering.style.FORMULAS` has the rules.
"""

from __future__ import annotations

import re
from functools import lru_cache
from html import escape
from importlib.util import find_spec
from xml.etree import ElementTree

__all__ = ["can_typeset", "display", "inline", "lines_of", "typeset"]

_FORMULA = re.compile(r"(?<!\\)\$([^$]+)(?<!\\)\$")
# Where one line of a display ends: after a semicolon between two statements.
_NEXT_LINE = re.compile(r"\\q?quad\b|\\ ")
_OPEN, _CLOSE = frozenset("([{⟨⌈⌊"), frozenset(")]}⟩⌉⌋")
_RELATIONS = frozenset("=≠<>≤≥≡≈≃∼∝∈∉⊂⊆→←↔↦⇒⇐⇔⟹⟸⟺⟶≪≫≔")
_SIGNS = frozenset("+−-±·⋅×∕")
_SEPARATORS = frozenset(",;:")
_THIN = "0.167em"
# A formula within a sentence of so few characters stays on one line.
_SHORT = 9


def can_typeset() -> bool:
    """Whether `latex2mathml` is installed; without it formulas stand as LaTeX."""
    return find_spec("latex2mathml") is not None


def inline(latex: str) -> str:
    """A formula within a sentence, as HTML; as LaTeX in `<code>` where `latex2mathml` is not installed."""
    return _shown(latex, shown_large=False)


def display(latex: str) -> str:
    r"""A formula on lines of its own, as HTML: one line for each statement that ends with `;\quad`."""
    rows = "".join(f"<div class='formula-line'>{_shown(line, shown_large=True)}</div>" for line in lines_of(latex))
    return f"<div class='formula-display'>{rows}</div>"


def typeset(prose: str) -> str:
    """Text as HTML, in which formulas stand between dollar signs."""
    parts = _FORMULA.split(prose)
    return "".join(inline(part) if i % 2 else escape(part, quote=False) for i, part in enumerate(parts))


def lines_of(latex: str) -> list[str]:
    r"""The statements of a formula that are separated by a semicolon and a wide space outside all braces."""
    lines, depth, start, i = [], 0, 0, 0
    while i < len(latex):
        depth += {"{": 1, "}": -1}.get(latex[i], 0) if latex[i - 1 : i] != "\\" else 0
        space = _NEXT_LINE.match(latex, i + 1) if latex[i] == ";" and depth == 0 else None
        if space:
            lines.append(latex[start:i])
            start = i = space.end()
        else:
            i += 1
    return [line.strip() for line in (*lines, latex[start:]) if line.strip()]


def _shown(latex: str, shown_large: bool) -> str:
    shown = _converted(latex, shown_large) if can_typeset() else None
    return f"<code>{escape(latex, quote=False)}</code>" if shown is None else f"<span class='formula'>{shown}</span>"


@lru_cache(maxsize=4096)
def _converted(latex: str, shown_large: bool) -> str | None:
    """The terms of a formula as HTML; None if it cannot be read."""
    from latex2mathml.converter import convert

    if not _is_balanced(latex):
        return None
    try:
        # The converter knows the signs and not, after \big, the names.
        source = convert(re.sub(r"\\vert(?![a-z])", "|", re.sub(r"\\Vert(?![a-z])", r"\\|", latex)))
        source = re.sub(r' xmlns="[^"]*"', "", source)
        # The words of \text come out as they are.
        source = re.sub(r"(?<=<mtext>).*?(?=</mtext>)", lambda words: re.sub(r"&(?!#)", "&amp;", words[0]), source)
        root = ElementTree.fromstring(re.sub(r"<(?![/\w])", "&lt;", source))
    except Exception:  # every mistake has an exception of its own, and they share no class
        return None
    _tidy(root)
    # A command that is unknown comes back as its name.
    if any("\\" in (element.text or "") for element in root.iter()):
        return None
    terms = _terms(_flat(root), shown_large)
    if len(terms) > 1 and not shown_large and len("".join(root.itertext())) <= _SHORT:
        return f"<span class='term'>{''.join(terms)}</span>"
    return "<wbr>".join(terms)


def _is_balanced(latex: str) -> bool:
    """Whether braces are; the conversion overlooks it."""
    depth = 0
    for brace in re.findall(r"[{}]", re.sub(r"\\.", "", latex)):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


# What the conversion leaves to mend.

_LIMITS = {"msub": "munder", "msup": "mover", "msubsup": "munderover"}


def _tidy(element: ElementTree.Element) -> None:
    """Join upright letters to names, space those of functions, tell signs from differences, make arrows operators."""
    for child in element:
        _tidy(child)
    letters = [child.text or "" for child in element if child.tag == "mi" and child.get("mathvariant") == "normal"]
    if element.tag == "mrow" and len(letters) == len(element) > 1:
        element.clear()
        element.tag, element.text = "mi", "".join(letters)
    if element.tag == "mi" and element.text and ("←" <= element.text <= "⇿" or "⟰" <= element.text <= "⟿"):
        element.tag = "mo"
    if element.tag == "mo" and element.text == "∞":
        element.tag = "mi"  # a number, without the space around an operator
    if element.tag == "mtext" and element.text:
        element.text = re.sub(r"\\([_&%#${}])", r"\1", element.text)
    if element.tag == "mo" and not element.attrib and len(element.text or "") > 1 and (element.text or "").isalpha():
        element.tag = "mi"
    if element.tag in _LIMITS and element[0].tag == "mo" and element[0].text in ("∑", "∏"):
        element.tag = _LIMITS[element.tag]
    children = list(element)
    for before, after in zip(children, children[1:], strict=False):
        if after.tag == "mo" and after.text in ("+", "−", "-", "±") and not _ends_term(before):
            after.set("form", "prefix")
        if (_names(before) and not _opens(after) and after.tag not in ("mo", "mspace")) or (
            _names(after) and before.tag in ("mi", "mn", "msub", "msup", "msubsup", "mfrac", "mrow", "mstyle")
        ):
            if element.tag in ("mrow", "mstyle", "math", "mtd"):
                element.insert(list(element).index(after), ElementTree.Element("mspace", width=_THIN))


def _names(element: ElementTree.Element) -> bool:
    """Whether the element is the name of a function, such as log, with or without an index."""
    base = element[0] if element.tag in ("msub", "msup", "msubsup", "munder") and len(element) else element
    return base.tag == "mi" and len(base.text or "") > 1 and (base.text or "").isalpha()


def _opens(element: ElementTree.Element) -> bool:
    while element.tag in ("mrow", "mstyle") and len(element):
        element = element[0]
    return element.tag == "mo" and (element.text or "") in _OPEN


# Terms, between which a line may end.

_Parts = list[ElementTree.Element]


def _flat(root: ElementTree.Element) -> _Parts:
    """The parts of a formula, without the rows that only hold others; a style is handed down to what it holds."""
    parts: _Parts = []
    for child in root:
        if child.tag == "mrow":
            parts += _flat(child)
        elif child.tag == "mstyle" and len(child) > 1:
            parts += [_styled(part, child.attrib) for part in _flat(child)]
        else:
            parts.append(child)
    return parts


def _styled(part: ElementTree.Element, attributes: dict[str, str]) -> ElementTree.Element:
    if part.tag in ("mo", "mi", "mn", "mspace", "mtext"):
        return part
    wrapped = ElementTree.Element("mstyle", attributes)
    wrapped.append(part)
    return wrapped


def _terms(parts: _Parts, shown_large: bool) -> list[str]:
    """The outermost terms as HTML, each made of shorter ones if there is a place within its brackets to end a line."""
    shown = []
    for i, term in enumerate(_split(parts, within=False)):
        if _is_prose(term[0]):
            # The conversion writes spaces that do not break.
            shown.append(escape((term[0].text or "").replace("\xa0", " "), quote=False))
            continue
        pieces = _split(term, within=True)
        texts = [_element(piece, shown_large, first=i == j == 0) for j, piece in enumerate(pieces)]
        shown.append(texts[0] if len(texts) == 1 else f"<span class='term'>{'<wbr>'.join(texts)}</span>")
    return shown


def _split(parts: _Parts, within: bool) -> list[_Parts]:
    """Cut before relations and signs, after separators and around prose; within brackets too if asked to."""
    terms: list[_Parts] = [[]]
    depth = 0
    for part in parts:
        sign = (part.text or "") if part.tag == "mo" else ""
        depth -= _bracket(part) in _CLOSE
        alone, free = _is_prose(part) and depth == 0, within or depth == 0
        if terms[-1] and (alone or (free and _starts_term(sign, terms[-1][-1]))):
            terms.append([])
        terms[-1].append(part)
        depth += _bracket(part) in _OPEN
        if alone or (free and (sign in _SEPARATORS or _is_wide(part))):
            terms.append([])
    return [term for term in terms if term]


def _bracket(part: ElementTree.Element) -> str:
    """The sign of an operator, also of one with a power, as of the bracket in `(a + b)^2`."""
    base = part[0] if part.tag in ("msub", "msup", "msubsup") and len(part) else part
    return (base.text or "") if base.tag == "mo" else ""


def _starts_term(sign: str, before: ElementTree.Element) -> bool:
    return sign in _RELATIONS or (sign in _SIGNS and _ends_term(before))


def _ends_term(before: ElementTree.Element) -> bool:
    # A sign that follows an operator or an opening bracket belongs to its number.
    return before.tag != "mo" or (before.text or "") in _CLOSE | {"!", "′", "|", "…", "⋯"}


def _is_prose(part: ElementTree.Element) -> bool:
    return part.tag == "mtext" and " " in (part.text or "").strip("\xa0").replace("\xa0", " ")


def _is_wide(part: ElementTree.Element) -> bool:
    return part.tag == "mspace" and part.get("width") in ("1em", "2em")


def _element(parts: _Parts, shown_large: bool, first: bool) -> str:
    if parts[0].tag == "mo" and not first and (parts[0].text or "") in _RELATIONS | _SIGNS:
        parts[0].set("form", "infix")  # at the start of an element it would be taken for a prefix
    inner = "".join(ElementTree.tostring(part, encoding="unicode") for part in parts)
    return f"<math displaystyle='{str(shown_large).lower()}'>{inner}</math>"
