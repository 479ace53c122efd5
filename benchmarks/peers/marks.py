"""The marks of the GPU benchmark: what is asked of our losses, and what a record has of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from benchmarks.peers.subjects import CHUNKED, COMPILED, OURS

__all__ = ["Mark", "marks"]

MET, PARTLY, MISSED, UNKNOWN = "met", "met where measured", "missed", "not measured"
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd")
# From this number of tokens on a GPU is full.
MANY = 4_096
OF_LIMIT, OF_COMPILED, OF_COMPILED_FEW = 0.60, 1.0, 0.60
OF_CHUNKED, OF_ITS_MEMORY, OF_PRODUCTS, GRADIENT = 1.0, 0.5, 3.0, 1e-2


class Mark(NamedTuple):
    """What is asked, of which inputs, the worst figure with what it belongs to, and whether that meets it."""

    asked: str
    where: str
    found: str
    state: str


def marks(record: dict[str, Any], shape: Callable[[dict[str, Any]], str]) -> Iterator[Mark]:
    """Each mark for each table that was asked for."""
    tables = {shape(table) + table["kind"]: table for table in record["tables"]}
    for asked in record["asked"]:
        where = shape(asked)
        table = {"rows": [], **asked, **tables.get(where + asked["kind"], {})}
        if asked["kind"] == "logits":
            yield from _from_logits(table, where)
        elif asked["kind"] == "hidden":
            yield from _from_hidden(table, where, record["errors"])


def _from_logits(table: dict[str, Any], where: str) -> Iterator[Mark]:
    held, limit = _rows(table), table.get("limit_ms")
    shares, ratios = {}, {}
    for name in DIVERGENCES:
        ours, other = held.get((name, OURS)), held.get((name, COMPILED))
        shares[name] = limit / ours["ms"] if ours and limit else None
        ratios[name] = ours["ms"] / other["ms"] if ours and other else None
    if table["tokens"] >= MANY:
        yield _mark(f"at least {OF_LIMIT:.0%} of the limit", where, shares, OF_LIMIT, least=True)
        yield _mark("no slower than torch.compile", where, ratios, OF_COMPILED)
    else:
        yield _mark(f"at most {OF_COMPILED_FEW:.0%} of torch.compile's time", where, ratios, OF_COMPILED_FEW)


def _from_hidden(table: dict[str, Any], where: str, errors: list[dict[str, Any]]) -> Iterator[Mark]:
    held, limit = _rows(table), table.get("limit_ms")
    ours, chunked = held.get(("jsd", OURS)), held.get(("jsd", CHUNKED))
    faster = ours["ms"] / chunked["ms"] if ours and chunked else None
    smaller = ours["mb"] / chunked["mb"] if ours and chunked and ours.get("mb") and chunked.get("mb") else None
    products = ours["ms"] / limit if ours and limit else None
    yield _mark("no slower than Liger's chunked JSD", where, {"jsd": faster}, OF_CHUNKED)
    yield _mark(
        f"at most {OF_ITS_MEMORY:.0%} of the memory of Liger's chunked JSD", where, {"jsd": smaller}, OF_ITS_MEMORY
    )
    yield _mark(f"at most {OF_PRODUCTS:g} times the matrix products", where, {"jsd": products}, OF_PRODUCTS)
    off: dict[str, float | None] = {}
    for near in (False, True):
        some = [e for e in errors if e["kind"] == "hidden" and e["near"] is near and _same(e, table)]
        rows = [row for e in some for row in e["rows"] if row["by"] == OURS]
        complete = rows and all("gradient" in row for row in rows)
        off["near" if near else "at random"] = max(_worst(row) for row in rows) if complete else None
    yield _mark(f"gradients off by at most {GRADIENT:.0%} in norm", where, off, GRADIENT)


def _worst(row: dict[str, Any]) -> float:
    # NaN, which a maximum may lose, is the worst of all.
    return max(each if each == each else float("inf") for each in row["gradient"].values())


def _same(errors: dict[str, Any], table: dict[str, Any]) -> bool:
    return all(errors.get(name) == table.get(name) for name in ("words", "width", "dtype"))


def _rows(table: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    return {(row["divergence"], row["by"]): row for row in table["rows"] if "ms" in row}


def _mark(asked: str, where: str, found: dict[str, float | None], bound: float, least: bool = False) -> Mark:
    """Missed if any figure misses, met if all are there and meet it."""
    known = {name: value for name, value in found.items() if value is not None}
    if not known:
        return Mark(asked, where, "", UNKNOWN)
    name, worst = (min if least else max)(known.items(), key=lambda each: each[1])
    missed = worst < bound if least else worst > bound
    text = f"{worst:.3g} ({name})"
    lacking = [name for name in found if name not in known]
    if lacking:
        text += f", without {', '.join(lacking)}"
    return Mark(asked, where, text, MISSED if missed else PARTLY if lacking else MET)
