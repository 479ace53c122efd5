"""The style sheet of all pages, with a light and a dark palette, and its rules for formulas."""

from __future__ import annotations

__all__ = ["CONTENT_POLICY", "DARK", "FORMULAS", "LIGHT", "STYLE", "palette"]

# Whatever the page contains, nothing is fetched and nothing is run.
CONTENT_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"

LIGHT = {
    "paper": "#fdfdfb",
    "ink": "#1d2329",
    "muted": "#5a646e",
    "rule": "#dcdfdd",
    "good": "#19692c",
    "bad": "#b3261e",
    "open": "#7a5600",
    "claimed": "#b5651d",
    "found": "#1f5f9e",
    "panel": "#f4f4f0",
}
DARK = {
    "paper": "#14171a",
    "ink": "#e6e8ea",
    "muted": "#a3adb6",
    "rule": "#343b42",
    "good": "#6fcf87",
    "bad": "#ff8a80",
    "open": "#e6b450",
    "claimed": "#e59a52",
    "found": "#74b0ec",
    "panel": "#1c2125",
}


def _variables(palette: dict[str, str]) -> str:
    return " ".join(f"--{name}: {colour};" for name, colour in palette.items())


# What `rendering.mathematics` writes. A line ends between outermost terms first, as each is a box, then within one.
FORMULAS = """
math { font-family: "STIX Two Math", "Latin Modern Math", "Cambria Math", math; white-space: nowrap; }
.formula { font-size: 1.08em; } .formula .term { display: inline-block; max-width: 100%; }
.formula-display { margin: .8rem 0; }
.formula-line { text-align: center; line-height: 2; padding: .35rem 0; overflow-x: auto; overflow-y: hidden; }
"""


def palette() -> str:
    """The colours as variables, for a light and for a dark page; in print they are light."""
    return f"""
:root {{ color-scheme: light dark; {_variables(LIGHT)} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {_variables(DARK)} }} }}
"""


STYLE = (
    palette()
    + FORMULAS
    + """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); line-height: 1.55; font-size: 1.0625rem;
  font-family: Charter, "Bitstream Charter", "Sitka Text", Cambria, Georgia, serif; }
main, footer { max-width: 62rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.75rem; }
.kicker, h3, th, dt, summary, .table > figcaption, .word, figure svg, footer, nav, .mark {
  font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
.kicker { margin: 0; font-size: .8rem; letter-spacing: .08em; text-transform: uppercase; color: var(--muted); }
h1 { margin: .2rem 0 1.4rem; line-height: 1.25; font-weight: 600; font-size: clamp(1.35rem, 4.5vw, 2rem);
  font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 2.6rem 0 .8rem; padding-top: .9rem;
  border-top: 1px solid var(--rule); }
h3 { font-size: .95rem; font-weight: 600; margin: 0 0 .3rem; }
p { margin: .5rem 0; max-width: 42rem; }
ul { padding-left: 1.2rem; max-width: 42rem; } li { margin: .3rem 0; }
.verdict { background: var(--panel); border-left: 5px solid; border-radius: 3px; padding: .9rem 1.2rem 1rem; }
.verdict.good { border-color: var(--good); } .verdict.bad { border-color: var(--bad); }
.verdict.open { border-color: var(--open); }
.verdict .word { margin: 0; font-weight: 700; font-size: .85rem; letter-spacing: .07em; text-transform: uppercase; }
.verdict.good .word, .good { color: var(--good); } .verdict.bad .word, .bad { color: var(--bad); }
.verdict.open .word { color: var(--open); }
section.verdict { color: var(--ink); }
.lead { font-size: 1.3rem; line-height: 1.35; margin: .15rem 0 .5rem; }
.note { color: var(--muted); }
dl { margin: 0; } dd { margin: 0; overflow-wrap: anywhere; }
dt { color: var(--muted); font-size: .82rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.7rem, 1fr)); gap: .9rem 1.2rem;
  margin-top: 1.5rem; }
.facts dd { font-size: 1.05rem; font-variant-numeric: tabular-nums lining-nums; }
.rows > div { display: grid; grid-template-columns: minmax(9rem, 15rem) 1fr; gap: .1rem 1.2rem; padding: .32rem 0;
  border-bottom: 1px solid var(--rule); align-items: baseline; }
.rows .formula-display { margin: 0; } .rows .formula-line { text-align: left; }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 25rem), 1fr)); gap: 2rem 2.2rem; }
figure { margin: 0; min-width: 0; } figure svg { display: block; width: 100%; height: auto; }
figcaption { font-size: .9rem; line-height: 1.45; color: var(--muted); margin-top: .3rem; }
.scroll { overflow-x: auto; } .scroll:focus-visible { outline: 2px solid var(--found); outline-offset: 2px; }
table { border-collapse: collapse; width: 100%; font-size: .95rem; }
.table { margin: .8rem 0 0; } .table > figcaption { margin: 0 0 .5rem; font-size: .85rem; }
th { text-align: left; font-size: .8rem; font-weight: 600; vertical-align: bottom;
  border-bottom: 1.5px solid var(--ink); }
thead td { border-bottom: 1.5px solid var(--ink); }
th, td { padding: .34rem 1.3rem .34rem 0; } th:last-child, td:last-child { padding-right: 0; }
td:not(.number):not(:first-child) { min-width: 8.5rem; }
td { border-bottom: 1px solid var(--rule); vertical-align: top; }
.scroll > :not(.cards) :is(th, td):first-child { position: sticky; left: 0; background: var(--paper); }
.number { text-align: right; font-variant-numeric: tabular-nums lining-nums; white-space: nowrap; }
th.number { white-space: normal; }
details { margin-top: .9rem; } summary { cursor: pointer; font-size: .95rem; color: var(--found); }
details > * + * { margin-top: .7rem; }
a { color: var(--found); text-underline-offset: .15em; }
:is(a, summary):focus-visible { outline: 2px solid var(--found); outline-offset: 2px; }
code { font-size: .9em; overflow-wrap: anywhere; } sup { line-height: 0; font-size: .72em; }
footer { color: var(--muted); font-size: .82rem; margin-top: 2.5rem; padding-bottom: 2.5rem; }
footer p { max-width: none; border-top: 1px solid var(--rule); padding-top: .8rem; }
.mark { font-size: .8rem; font-weight: 600; white-space: nowrap; }
.contents { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1.3rem 2rem; }
.contents ul { list-style: none; padding: 0; margin: 0; font-size: .9rem; line-height: 1.4; }
.contents li { margin: .22rem 0; padding-left: 3.1rem; text-indent: -3.1rem; }
.contents li b { display: inline-block; min-width: 3.1rem; text-indent: 0; font-weight: 600; }
.entry { position: relative; padding: .4rem 0 1.2rem; scroll-margin-top: 1rem; }
.entry + .entry { border-top: 1px solid var(--rule); padding-top: 1.1rem; }
.entry details { margin-top: .45rem; } .entry h3 { font-size: 1.05rem; padding-right: 5rem; }
.entry h3 .mark { margin-left: .5rem; }
.entry .back { position: absolute; right: 0; top: .4rem; margin: 0; font-size: .82rem; }
.entry + .entry .back { top: 1.1rem; } .entry > p { max-width: 46rem; }
.steps { padding-left: 1.5rem; } .steps > li { margin: .9rem 0; } .steps > li > p { max-width: 46rem; margin: 0; }
.multiples { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 9.5rem), 1fr)); gap: 1.1rem; }
.multiples figcaption { overflow-wrap: anywhere; font-size: .8rem; line-height: 1.35; }
@media (max-width: 34rem) {
  .rows > div { grid-template-columns: 1fr; } body { font-size: 1rem; } .lead { font-size: 1.15rem; }
  .cards, .cards tbody, .cards tr, .cards td { display: block; }
  .cards thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  .cards tr { padding: .55rem 0; border-bottom: 1px solid var(--rule); }
  .cards tr:first-child { border-top: 1.5px solid var(--ink); }
  .cards :is(td, td:not(.number):not(:first-child)) { border: 0; padding: .08rem 0; min-width: 0; text-align: left;
    white-space: normal; overflow-wrap: anywhere; }
  .cards td:empty { display: none; }
  .cards td[data-label]::before { content: attr(data-label) "\\2002"; font-size: .78rem; color: var(--muted);
    font-family: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
  .cards td.number[data-label]::before { display: inline-block; width: 11rem; padding-right: .6rem; }
  .steps { padding-left: 1.1rem; }
}
@media print {
  .scroll { overflow: visible; } .back { display: none; }
  details::details-content { content-visibility: visible; display: block; }
  figure, tr, .formula-line, .steps > li { break-inside: avoid; } h2, h3 { break-after: avoid; }
}
"""
)
