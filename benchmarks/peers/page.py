"""A record of the GPU benchmark as a section of a page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch

from benchmarks.peers import subjects as s
from benchmarks.peers.marks import marks
from benchmarks.peers.profile import READINGS
from benchmarks.peers.records import Record, fingerprint
from opdtheory.rendering.markdown import markdown_table

__all__ = ["number", "section", "shape"]

TITLES = {
    "logits": "From logits",
    "hidden": "From hidden states",
    "frozen": "From hidden states, the head frozen",
    "top_k": f"On the teacher's {s.K} likeliest tokens",
    "sampled_tail": f"On {s.K} tokens and a sampled one",
}
# The peers whose time ours is divided by.
BESIDE = {
    "logits": (s.COMPILED, s.LIGER),
    "hidden": (s.COMPILED, s.CHUNKED, s.FUSED),
    "frozen": (s.FUSED,),
    "top_k": (s.COMPILED,),
    "sampled_tail": (s.EAGER,),
}
NONE = "–"


def section(record: Record) -> str:
    """All that a page says of a record."""
    parts = [_head(record), "### Marks", _marks(record)]
    for kind, title in TITLES.items():
        tables = [_table(table, record) for table in record["tables"] if table["kind"] == kind]
        parts += [f"### {title}", *tables] if tables else []
    if record["errors"]:
        parts += ["### Errors against float64", *_errors(record["errors"])]
    if record["profile"]:
        parts += ["### Kernels", *_profile(record["profile"])]
    missing = list(_missing(record))
    if missing:
        parts += ["### Not measured", "\n".join(missing)]
    return "\n\n".join(parts)


def _head(record: Record) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    copied, repeats = record.get("copy_gb_s"), record.get("repeats")
    found = f"Measured on {record['machine']} with {versions} ({record['date']})"
    found += f", by `{record['command']}` in {record['seconds']:.0f} s" if "seconds" in record else ""
    found += f", of {record['source']}" if "source" in record else ""
    found += "."
    if record["kernels"] != fingerprint():
        found += " **`opdtheory/kernels` has changed since, and no row below has been measured again.**"
    text = [
        found,
        "Forward and backward pass, in milliseconds"
        + (f", medians of {repeats} alternated repeats" if repeats else "")
        + "; memory in MB (1e6 bytes) beyond the inputs, the gradients included. The limit from logits is two readings "
        "and one writing of them (one and one where the teacher sends tokens) at the speed of a copy"
        + (f", {copied:,.0f} GB/s" if copied else "")
        + "; from hidden states, the matrix products alone. GB/s and TFLOP/s count this traffic and these products, "
        "whatever a loss really moves. Eager and torch.compile take the textbook formula in float32; *over* is a ratio "
        "of times.",
    ]
    return "\n\n".join(text)


def number(value: float | None) -> str:
    """A figure of any size, with about three digits."""
    if value is None or not math.isfinite(value):
        return NONE if value is None else str(value)
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.{2 + (size < 0.1)}f}"


def shape(table: dict[str, Any]) -> str:
    """The shape and dtype of a table's inputs."""
    width = f" x {table['width']:,} states" if table.get("width") else ""
    return f"{table['tokens']:,} tokens{width} x {table['words']:,} words, {table['dtype']}"


def _table(table: dict[str, Any], record: Record) -> str:
    kind, limit = table["kind"], table.get("limit_ms")
    times = {(row["divergence"], row["by"]): row.get("ms") for row in table["rows"]}
    flops = kind in s.PRODUCTS
    head = ["", "by", "ms", "of the limit"]
    head += [f"over {by}" for by in BESIDE[kind]] + ["MB", "TFLOP/s" if flops else "GB/s"]
    rows = []
    for row in table["rows"]:
        first = [f"`{row['divergence']}`", row["by"]]
        if "failed" in row:
            rows.append([*first, row["failed"], *[NONE] * (len(head) - 3)])
            continue
        took = row["ms"]
        ratios = [_ratio(took, times.get((row["divergence"], by))) for by in BESIDE[kind]]
        share = f"{limit / took:.0%}" if limit else NONE
        rows.append([*first, number(took), share, *ratios, number(row.get("mb")), number(_rate(table, took))])
    title = f"{shape(table)}{f'; limit {number(limit)} ms' if limit else ''}"
    if "tflop_s" in table:
        how = "as is assumed, not measured" if table.get("assumed") else "as `torch.mm` reaches on the same shapes"
        title += f", at {number(table['tflop_s'])} TFLOP/s, {how}"
    return f"{title}:\n\n{markdown_table(head, rows)}"


def _ratio(took: float, other: float | None) -> str:
    return f"{took / other:.2f}" if other else NONE


def _rate(table: dict[str, Any], took: float) -> float:
    size, kind = table["tokens"] * table["words"], table["kind"]
    if kind in s.PRODUCTS:
        return float(2 * s.PRODUCTS[kind] * size * table["width"] / took / 1e9)
    return float(s.TRANSFERS[kind] * size * getattr(torch, table["dtype"]).itemsize / took / 1e6)


def _marks(record: Record) -> str:
    rows = [[mark.asked, mark.where, mark.found or NONE, mark.state] for mark in marks(record, shape)]
    return markdown_table(["mark", "at", "found", ""], rows)


def _errors(tables: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "Of the mean value, relative, and of the gradient in norm, over its norm, against float64 autograd of the "
        "formula on the same rounded inputs. Near: the teacher's logits are the student's plus noise of 0.01, or its "
        "hidden states are the student's plus 0.03 with the same head."
    )
    groups: dict[str, dict[bool, dict[str, Any]]] = {}
    for table in tables:
        groups.setdefault(f"{TITLES[table['kind']]}, {shape(table)}", {})[table["near"]] = table
    for title, group in groups.items():
        some = next(iter(group.values()))
        leaves = ("student", "head") if some["kind"] == "hidden" else ("student",)
        called = {"student": "states" if "width" in some and some["width"] else "logits", "head": "head"}
        head = ["", "by"]
        for near in ("", ", near"):
            head += [f"value{near}", *(f"gradient in {called[leaf]}{near}" for leaf in leaves)]
        rows = []
        for place, row in enumerate(some["rows"]):
            cells = [f"`{row['divergence']}`", row["by"]]
            for close in (False, True):
                cells += _error_cells(group[close]["rows"][place] if close in group else {}, leaves)
            rows.append(cells)
        yield f"{title}:\n\n{markdown_table(head, rows)}"


def _error_cells(row: dict[str, Any], leaves: Sequence[str]) -> list[str]:
    if "value" not in row:
        return [row.get("failed", NONE), *[NONE] * len(leaves)]
    return [f"{each:.0e}" for each in (row["value"], *(row["gradient"][leaf] for leaf in leaves))]


def _profile(tables: list[dict[str, Any]]) -> Iterator[str]:
    yield (
        "What the device is busy with, and its GB/s if both rows are read from memory once, twice or three times and "
        "the gradient is written once: (2 n + 1) x tokens x words x bytes, over the busy time. A figure above the "
        "speed of a copy says that the logits are not read from memory so often."
    )
    head = ["", "", "busy, ms", *(f"GB/s, n = {n}" for n in READINGS), "kernels, with their share of the time"]
    cells = []
    for place, row in ((_place(table), row) for table in tables for row in table["rows"] if row["by"] == s.OURS):
        speeds = [number(each) for each in row.get("gb_s", [None] * len(READINGS))]
        told = row["kernels"] if "kernels" in row else row["failed"]
        cells.append([f"`{row['divergence']}`", place, number(row.get("busy_ms")), *speeds, told])
    yield markdown_table(head, cells)


def _missing(record: Record) -> Iterable[str]:
    """What was asked for and has neither a figure nor a reason."""
    held: dict[str, set[s.Key]] = {}
    for table in record["tables"]:
        held.setdefault(_place(table), set()).update((row["divergence"], row["by"]) for row in table["rows"])
    for asked in record["asked"]:
        found = held.get(_place(asked), set())
        left = {
            divergence: [by for by in names if (divergence, by) not in found]
            for divergence, names in s.PLAN[asked["kind"]].items()
        }
        told = "; ".join(f"`{divergence}` by {', '.join(names)}" for divergence, names in left.items() if names)
        if told:
            yield f"- {_place(asked)}: {told}."
    for name, title in (("errors", "Errors against float64"), ("profile", "Kernels")):
        if not record[name]:
            yield f"- {title}: all."


def _place(table: dict[str, Any]) -> str:
    return f"{TITLES[table['kind']]}, {shape(table)}"
