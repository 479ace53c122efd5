"""Published distillation losses: what each says it minimises, and what an audit finds.

`python examples/published_losses/gallery.py` audits the losses that are installed and prints a table. With
`--write README.md` it writes the table of TRL and torchrl between the markers `<!-- gallery:start -->` and
`<!-- gallery:end -->` of that file. With `--page` it updates `gallery.json` and the table of `docs/gallery.md`, and
keeps the records of packages that are absent.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# As a script, this file cannot import the package that it is part of.
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from examples.published_losses import (  # noqa: E402
    claims_packages,
    claims_papers,
    claims_rollouts,
    claims_tokens,
    claims_trl,
)
from examples.published_losses.entry import Entry  # noqa: E402
from opdtheory.choices import FAITHFUL  # noqa: E402

__all__ = [
    "END",
    "ENTRIES",
    "IN_README",
    "PAGE",
    "RECORD",
    "START",
    "Entry",
    "between_markers",
    "page",
    "record",
    "row",
    "table",
    "write",
]

START, END = "<!-- gallery:start -->", "<!-- gallery:end -->"
PAGE, RECORD = ROOT / "docs" / "gallery.md", Path(__file__).with_name("gallery.json")

IN_README: tuple[Entry, ...] = claims_trl.ENTRIES
ENTRIES: tuple[Entry, ...] = (
    *claims_trl.ENTRIES,
    *claims_packages.ENTRIES,
    *claims_papers.ENTRIES,
    *claims_tokens.ENTRIES,
    *claims_rollouts.ENTRIES,
)

_README_HEADER = ("loss", "package", "says it minimises", "the audit finds", "rollouts that end early")
_PAGE_HEADER = ("loss", "says it minimises", "descends", "in detail")
_NAMES = {
    "forward_kl": "forward KL",
    "reverse_kl": "reverse KL",
    "skew_jsd": "JSD",
    "jsd": "JSD(0.5)",
    "jeffreys": "Jeffreys divergence",
    "neyman_chi2": "χ²(p‖q)",
    "total_variation": "total variation",
    "skew_forward_kl": "skew KL",
    "skew_reverse_kl": "skew reverse KL",
}

_MEANS = {"token_mean": "a token mean", "sequence_mean": "a mean over each rollout's tokens"}

# Scaled error below which a scale is written as a fraction rather than a decimal.
_FRACTION = 1e-5


def found(audit: opd.Audit) -> str:
    """The verdict at fixed length in a few words."""
    if audit.verdict == "zero":
        return "**zero gradient**"
    if audit.descends is None:
        wrong_way = " (the wrong way)" if audit.cosine < 0 else ""
        return f"no catalogue objective; cosine down to {audit.cosine:.3f}{wrong_way}"
    what = _descended(audit)
    times = _times(audit)
    return f"{what}{times}" if audit.verdict in FAITHFUL else f"**{what}**{times}"


def found_at_variable_lengths(audit: opd.Audit) -> str:
    """Whether the verdict is the same if rollouts may end early, or the same as a mean."""
    if audit.variable_lengths is None:
        return "–"
    if audit.reduction in _MEANS:
        off = f"{100 * audit.variable_lengths['relative_bias']:.0f}%"
        return f"the same, as {_MEANS[audit.reduction]}; off by up to {off} as a sum"
    if audit.variable_lengths["verdict"] in ("exact", "exact_up_to_scale"):
        return "the same"
    return f"off by up to {100 * audit.variable_lengths['relative_bias']:.0f}%"


def implied(entry: Entry, audit: opd.Audit) -> str:
    """The divergence whose exact gradient the loss follows, or why there is none to name."""
    if audit.verdict == "zero":
        return "none"
    if audit.descends is not None:
        return _descended(audit) + _times(audit)
    if entry.follows:
        return entry.follows
    if not audit.weight["depends_on_ratio_only"]:
        return "no f-divergence: the weight is not a function of u alone"
    if audit.weight["explains_panel"] is False:
        return "none: the weight depends on more than the token's own ratio"
    if audit.weight["non_decreasing"]:
        return "an f-divergence outside the catalogue, judging by |log u| ≤ 4"
    return "no f-divergence: the weight falls somewhere"


def sentence(entry: Entry, audit: opd.Audit) -> str:
    """The expected gradient on the student's own rollouts in words, followed by the entry's remark."""
    times = "" if audit.identified is None else _times(audit).replace(" × ", ", times ")
    if audit.verdict == "zero":
        says = "The expected gradient is zero."
    elif audit.verdict == "exact":
        says = "The expected gradient is that of the claim."
    elif audit.verdict == "exact_up_to_scale":
        says = f"The expected gradient is that of the claim{times}."
    elif audit.verdict == "other_objective":
        says = f"The expected gradient is that of another objective, the {_descended(audit)}{times}."
    else:
        claimed = _objective(entry.objective, entry.parameters) + _where(entry.granularity)
        says = f"The expected gradient is not a multiple of the gradient of the {claimed}."
    return f"{says} {entry.remark}".strip()


def row(entry: Entry, audit: opd.Audit) -> str:
    """The entry's row of the table in the README."""
    return _line(entry.label, entry.origin, entry.says, found(audit), found_at_variable_lengths(audit))


def record(entry: Entry, audit: opd.Audit) -> dict[str, Any]:
    """The results of an audit that the page shows, as plain values."""
    return {
        "package": entry.package,
        "version": entry.version,
        "verdict": audit.verdict,
        "descends": audit.descends,
        "granularity": None if audit.descends is None or audit.identified is None else audit.identified["granularity"],
        "implied": implied(entry, audit),
        "cosine": f"{audit.cosine:.3f}",
        "at_variable_lengths": found_at_variable_lengths(audit),
        "sentence": sentence(entry, audit),
    }


def page(records: dict[str, dict[str, Any]]) -> str:
    """The tables of `docs/gallery.md` from the records by function, one for each package and for each kind of paper."""
    groups: dict[str, list[str]] = {}
    for entry in ENTRIES:
        if entry.function in records:
            recorded = records[entry.function]
            group = f"{recorded['package']} {recorded['version']}" if recorded["version"] else _kind(entry)
            groups.setdefault(group, []).append(_page_row(entry, recorded))
    return "\n\n".join(f"### {group}\n\n{table(rows, _PAGE_HEADER)}" for group, rows in groups.items())


def table(rows: Iterable[str], header: tuple[str, ...] = _README_HEADER) -> str:
    """A Markdown table of these rows."""
    return "\n".join([_line(*header), _line(*("---" for _ in header)), *rows])


def between_markers(text: str) -> str:
    """The text between the two markers.

    Raises:
        ValueError: if a marker does not occur exactly once, or the end comes before the start.
    """
    if text.count(START) != 1 or text.count(END) != 1 or text.index(START) > text.index(END):
        raise ValueError(f"the file must hold the lines {START} and {END} once each, in this order")
    return text.split(START)[1].split(END)[0].strip()


def write(path: Path, content: str) -> None:
    """Replace the text between the markers of a file.

    Raises:
        ValueError: as `between_markers`.
    """
    text = path.read_text(encoding="utf-8")
    between_markers(text)
    before, after = text.split(START)[0], text.split(END)[1]
    path.write_text(f"{before}{START}\n{content}\n{END}{after}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> int:
    """Audit every entry whose package is installed, and print the table or write it to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the table between the markers of this file")
    parser.add_argument("--page", action="store_true", help=f"update {RECORD.name} and docs/{PAGE.name}")
    parser.add_argument("--require-all", action="store_true", help="fail if a package is absent")
    options = parser.parse_args(arguments)
    entries = IN_README if options.write else ENTRIES
    absent = sorted({e.package for e in entries if e.version is None})
    if absent:
        print(f"skipped, not installed: {', '.join(absent)}; `make gallery` installs them", file=sys.stderr)
        if options.require_all:
            return 1
    audits = []
    for entry in entries:
        if entry.version is not None:
            audit = entry.audit()
            audits.append((entry, audit))
            print(f"{entry.function}: {audit.verdict} ({audit.seconds:.1f} s)", file=sys.stderr)
    if options.page:
        records = json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}
        records |= {e.function: record(e, audit) for e, audit in audits}
        ordered = {e.function: records[e.function] for e in ENTRIES if e.function in records}
        RECORD.write_text(json.dumps(ordered, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        write(PAGE, page(ordered))
        return 0
    content = table(row(e, audit) for e, audit in audits)
    if options.write:
        write(options.write, content)
    else:
        print(content)
    return 0


def _kind(entry: Entry) -> str:
    """What the estimators of one module that were written from descriptions have in common."""
    if entry in claims_tokens.ENTRIES:
        return "Written from descriptions: token by token"
    if entry in claims_rollouts.ENTRIES:
        return "Written from descriptions: rollouts, samplers, teachers and rewards"
    return "Written from descriptions: well-known estimators"


def _page_row(entry: Entry, recorded: dict[str, Any]) -> str:
    label = f"[{entry.label}]({entry.source})" if entry.source.startswith("https://") else entry.label
    verdict = f"{recorded['verdict'].replace('_', ' ')}, cosine {recorded['cosine']}"
    early = recorded["at_variable_lengths"]
    detail = recorded["sentence"] + ("" if early == "–" else f" With rollouts that end early: {early}.")
    return _line(label, entry.says, f"{recorded['implied']}<br>({verdict})", detail)


def _line(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _descended(audit: opd.Audit) -> str:
    assert audit.identified is not None
    name = _objective(audit.identified["objective"], audit.identified["parameters"])
    return name + _where(audit.identified["granularity"])


def _objective(name: str, parameters: dict[str, float]) -> str:
    values = ", ".join(f"{value:g}" for value in parameters.values())
    return _NAMES.get(name, name) + (f"({values})" if values else "")


def _where(granularity: str) -> str:
    return {"token_local": "", "sequence": " of whole rollouts"}.get(granularity, f" ({granularity})")


def _times(audit: opd.Audit) -> str:
    assert audit.identified is not None
    scale, tolerance = audit.identified["scale"], max(audit.tolerance, _FRACTION)
    fraction = Fraction(scale).limit_denominator(12)
    if abs(float(fraction) - scale) > tolerance:
        return f" × {scale:.3g}"
    return "" if fraction == 1 else f" × {fraction}"


if __name__ == "__main__":
    sys.exit(main())
