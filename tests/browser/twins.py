"""Small pages with one fault each, and next to each its near neighbours, which have none."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["TWINS", "Twin", "document"]


@dataclass(frozen=True)
class Twin:
    """A fault: its kind, the body that has it, bodies that are close to it and sound, and where it shows.

    Attributes:
        kind: one of `findings.KINDS`.
        bad: body of the page that has the fault.
        good: bodies of pages that have none.
        at: the settings in which it shows.
    """

    kind: str
    bad: str
    good: tuple[str, ...]
    at: str = "1400, 400"


def document(body: str, paper: str = ":root { color-scheme: light dark }") -> str:
    """A page that follows the colour scheme."""
    style = f"{paper} * {{ box-sizing: border-box }} body {{ margin: 8px; font: 16px sans-serif }}"
    head = f'<meta charset="utf-8"><title>twin</title><style>{style}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{body}</body></html>'


_CODE = (
    "<pre style='position: relative; padding: 8px 4px{}'><code>{}</code><button style='position: absolute; top: 4px; \
right: 4px; height: 24px; width: 24px'></button></pre>"
)
_LINE = "x" * 40 + " "
_WIDE = f"<table><tr><td style='white-space: nowrap'>{_LINE * 2}</td></tr></table>"
_FORMULA = "<math><mtext>" + "x" * 70 + "</mtext></math>"
_FRACTION = (
    "<math><msubsup><mi>w</mi><mi>a</mi><mn>2</mn></msubsup><mo>=</mo><mfrac><mi>q</mi><msqrt><mi>p</mi></msqrt></mfrac>"
    "</math>"
)
_WORDS = "many words that fill more than one line, " * 8
_LONG = "stop_gradient_forward_kl_with_baseline"

TWINS = {
    "a wide box": Twin(
        "page too wide",
        "<div style='width: 1500px'>text</div>",
        ("<div style='width: 100%'>text</div>", "<div style='max-width: 1500px'>text</div>"),
    ),
    "a column beyond the edge of a page that does not scroll": Twin(
        "beyond the edge",
        "<style>html { overflow-x: hidden }</style><p style='margin-left: 1350px; "
        "white-space: nowrap'>the last column of a table</p>",
        (
            "<div style='position: absolute; left: -300px; width: 300px'>a drawer</div>",
            "<style>html { overflow-x: hidden }</style><div style='position: fixed; left: 100%; width: 9em'>menu</div>",
            "<a style='position: absolute; opacity: 0; left: -9px' href='#top'>skip</a>",
        ),
    ),
    "text that starts left of the page": Twin(
        "beyond the edge",
        "<p style='margin-left: -40px'>text</p>",
        ("<p style='text-indent: -9999px; overflow: hidden; width: 1px; height: 1px'>for readers of screens</p>",),
    ),
    "a box that hides the end of its text": Twin(
        "cut off",
        f"<div style='overflow: hidden; width: 200px; white-space: nowrap'>{_LINE}</div>",
        (
            f"<div style='overflow: hidden; width: 200px'>{_LINE.replace('x', 'x ')}</div>",
            f"<span style='position: absolute; overflow: hidden; width: 1px; height: 1px'>{_LINE}</span>",
            f"<div style='overflow: hidden; height: 0'>{_WORDS}</div>",
            "<div style='overflow: hidden; width: 200px'><p style='position: absolute; margin-left: 100px; "
            "width: 150px'>an absolute child is not cut</p></div>",
        ),
    ),
    "an ellipsis": Twin(
        "cut off",
        f"<div style='overflow: hidden; width: 200px; white-space: nowrap; text-overflow: ellipsis'>{_LINE}</div>",
        ("<div style='overflow: hidden; width: 200px; white-space: nowrap; text-overflow: ellipsis'>short</div>",),
    ),
    "a box that hides its last lines": Twin(
        "cut off",
        f"<div style='overflow: hidden; width: 300px; height: 50px'>{_WORDS}</div>",
        (f"<div style='overflow: auto; width: 300px; height: 50px'>{_WORDS}</div>",),
    ),
    "code that scrolls": Twin(
        "must be scrolled",
        f"<pre style='width: 300px; overflow-x: auto' tabindex='0'>{_LINE * 2}</pre>",
        (f"<pre style='width: 300px; white-space: pre-wrap; overflow: auto'>{'xxx ' * 40}</pre>",),
        at="1400",
    ),
    "a table that only a mouse scrolls": Twin(
        "must be scrolled",
        f"<div style='overflow-x: auto'>{_WIDE}</div>",
        (f"<div style='overflow-x: auto' tabindex='0'>{_WIDE}</div>",),
        at="400",
    ),
    "a formula that scrolls": Twin(
        "must be scrolled",
        f"<div style='overflow-x: auto' tabindex='0'>{_FORMULA}</div>",
        ("<div style='overflow-x: auto' tabindex='0'><math><mi>u</mi></math></div>",),
        at="400",
    ),
    "a button over code": Twin(
        "text under something",
        _CODE.format("; width: 360px", "a line of code that reaches the button"),
        (
            _CODE.format("; width: 360px", "a short line"),
            _CODE.format("; padding-top: 32px; width: 360px", "a line of code that reaches the button"),
        ),
    ),
    "a faint button over code": Twin(
        "text under something",
        _CODE.format("; width: 360px", "a line of code that reaches the button").replace(
            "<button style='", "<button style='opacity: 0; "
        ),
        ("<p>text</p><span style='position: absolute; top: 8px; opacity: 0; background: red'>tip</span>",),
    ),
    "text over the next column": Twin(
        "text under something",
        "<div style='display: flex'><div style='width: 90px; white-space: nowrap'>opd_plus_centred</div>"
        "<div style='width: 90px'>reverse_kl</div></div>",
        (
            "<div style='display: flex'><div style='min-width: 90px'>opd_plus_centred</div><div>reverse_kl</div></div>",
            "<p style='line-height: 1'>u<sup>2</sup><br>v<sub>1</sub></p>",
            f"<p style='width: 300px; line-height: 1.2'>{f'lines with {_FRACTION} in their middle, ' * 9}</p>",
            "<header style='position: fixed; top: 0; background: Canvas; height: 20px'>title</header>"
            "<p style='margin-top: 5px'>text below</p>",
            "<div style='height: 99px; overflow: auto'><table><tr><th style='position: sticky; top: 0; "
            "background: Canvas'>head</th></tr><tr><td style='height: 300px'>cell</td></tr></table></div>",
        ),
    ),
    "a word that breaks": Twin(
        "broken word",
        f"<p style='width: 120px; overflow-wrap: anywhere'>{_LONG.replace('_', '')}</p>",
        (
            f"<p style='width: 160px'>{_LONG.replace('_', '_<wbr>')}</p>",
            f"<p style='width: 160px'>{_LONG.replace('_', '&shy;')}</p>",
            "<p style='width: 60px; overflow-wrap: anywhere'>opd(jsd,<wbr>beta=<wbr>0.1)</p>",
            f"<p style='width: 120px; white-space: nowrap'>{_LONG}</p>",
            "<p style='width: 90px'>on-policy state-of-the-art</p>",
        ),
    ),
    "a name in pieces that breaks": Twin(
        "broken word",
        "<p style='width: 84px; font-family: monospace; word-break: break-all'><b>abcdefgh</b><i>klm</i></p>",
        (
            "<p style='width: 84px; font-family: monospace'><b>abcdefgh</b> <i>klm</i></p>",
            "<p style='width: 84px; font-family: monospace'><b>abcdefgh</b><wbr><i>klm</i></p>",
            "<div style='width: 84px; font-family: monospace'><div>abcdefgh</div><div>klm</div></div>",
        ),
    ),
    "the source of a formula": Twin(
        "raw formula",
        r"<p>The loss \(u f'(u)\) is</p>",
        (
            r"<p>In LaTeX, <code>\(u f'(u)\)</code></p><pre>\frac{a}{b}</pre>",
            "<p>f(u) (where u is a ratio)</p>",
            r"<math alttext='\frac{a}{b}'><semantics><mfrac><mi>a</mi><mi>b</mi></mfrac><annotation "
            r"encoding='application/x-tex'>\frac{a}{b}</annotation></semantics></math>",
        ),
        at="1400 light",
    ),
    "a command of LaTeX": Twin("raw formula", r"<p>the \operatorname{KL}</p>", ("<p>the KL</p>",), at="1400 light"),
    "a raised brace": Twin("raw formula", "<p>e^{x}</p>", ("<p>e<sup>x</sup>, {x}</p>",), at="1400 light"),
    "dollars": Twin(
        "raw formula",
        "<p>the ratio $u = q/p$ is</p>",
        ("<p>It costs $5, or $6 with tax, or US$7.</p>", "<p>$HOME is a variable</p>"),
        at="1400 light",
    ),
    "a folded formula": Twin(
        "raw formula",
        r"<details><summary>more</summary>\[ x \]</details>",
        ("<details><summary>more</summary>[ x ]</details>",),
        at="1400 light",
    ),
    "a formula that is wrong": Twin(
        "raw formula",
        "<math><merror><mtext>bad</mtext></merror></math>",
        ("<math><mtext>good</mtext></math>",),
        at="1400 light",
    ),
    "a star": Twin(
        "star for a product",
        "<p>u*log(u)</p>",
        ("<p><code>u*log(u)</code>, u log u</p>", "<p>a note* and *.html, ** and *</p>"),
        at="1400 light",
    ),
    "a page that is not there": Twin(
        "dead link", "<a href='nowhere.html'>x</a>", ("<a href='other.html'>x</a>",), at="1400 light"
    ),
    "a place that is not there": Twin(
        "dead link",
        "<a href='other.html#nowhere'>x</a>",
        (
            "<a href='other.html#place'>x</a><a href='#mine'>y</a><a id='mine' href='#'>z</a>",
            "<a href='folder/'>x</a><a href='folder/#inside'>x</a>",
        ),
        at="1400 light",
    ),
    "a folder without a page": Twin("dead link", "<a href='bare/'>x</a>", (), at="1400 light"),
    "an address with a space": Twin(
        "dead link",
        "<a href='https://example.org/a b'>x</a>",
        ("<a href='https://example.org/a_b'>x</a><a href='mailto:a@example.org'>y</a>",),
        at="1400 light",
    ),
    "a message of an error": Twin(
        "console error", "<script>console.error('no')</script>", ("<script>console.log('yes')</script>",)
    ),
    "an exception": Twin("console error", "<script>throw Error('no')</script>", ()),
    "a request to another machine": Twin(
        "request",
        "<link rel='stylesheet' href='https://example.org/style.css'>",
        ("<link rel='stylesheet' href='style.css'>", "<img alt='' src='data:image/gif;base64,R0lGODlhAQABAAAAACw='>"),
        at="1400 light, 400 light",
    ),
    "a file that is not there": Twin("request", "<img alt='' src='nowhere.png'>", (), at="1400 light, 400 light"),
    "pale text": Twin(
        "low contrast",
        "<p style='color: #999; background: #fff'>text</p>",
        (
            "<p style='color: #666; background: #fff'>text</p>",
            "<p style='color: #888; background: #fff; font-size: 24px'>large</p>",
            "<p style='color: #999; background: #fff; visibility: hidden'>text</p>",
        ),
    ),
    "text that fades": Twin(
        "low contrast",
        "<p style='opacity: .4'>text</p>",
        ("<p style='opacity: .9'>text</p>",),
    ),
    "a drawing in dark ink": Twin(
        "low contrast",
        "<svg width='90' height='30'><text y='20' fill='#222'>axis</text></svg>",
        (
            "<svg width='90' height='30'><text y='20' fill='currentColor'>axis</text></svg>",
            "<svg width='90' height='30'><rect width='90' height='30' fill='#fff'/><text x='9' y='20' fill='#222'>axis"
            "</text></svg>",
        ),
        at="1400 dark, 400 dark",
    ),
    "a page that stays light": Twin(
        "ignores the scheme",
        "<style>body { background: #fff; color: #000 }</style><p>text</p>",
        ("<style>body { background: Canvas; color: CanvasText }</style><p>text</p>",),
        at="1400 dark, 400 dark",
    ),
}
