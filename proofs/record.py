"""The record of what Coq has checked: built, compared with the one that is stored, and written."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sources import Source, Statement, digest

__all__ = ["differences", "made", "stored", "write"]

Axioms = Mapping[str, tuple[str, ...]]


def made(sources: Mapping[str, Source], axioms: Mapping[str, Axioms], version: str, old: Mapping[str, Any]) -> Any:
    """The record of theorems that Coq has just checked.

    Args:
        sources: all files by name.
        axioms: those of each statement, by theorem.
        version: of Coq.
        old: the stored record, whose dates stay where nothing has changed.
    """
    today = datetime.date.today().isoformat()
    theorems = {}
    for name, found in axioms.items():
        source, hashed = sources[name], digest(sources, name)
        before = old.get("theorems", {}).get(name, {})
        same = before.get("digest") == hashed and old.get("coq") == version
        theorems[name] = {
            "title": source.title,
            "file": source.path,
            "digest": hashed,
            "checked": before.get("checked", today) if same else today,
            "left_out": source.left_out,
            "statements": [_entry(each, found) for each in source.statements if not each.is_twin],
            "twins": [_entry(each, found) for each in source.statements if each.is_twin],
        }
    return {"coq": version, "theorems": theorems}


def _entry(statement: Statement, axioms: Axioms) -> dict[str, Any]:
    return {
        "name": statement.name,
        "words": statement.words,
        "text": statement.text,
        "axioms": list(axioms[statement.name]),
    }


def stored(path: Path) -> Any:
    """The record in the file; an empty one if there is none or it cannot be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    theorems = found.get("theorems") if isinstance(found, dict) else None
    return found if isinstance(theorems, dict) and all(isinstance(each, dict) for each in theorems.values()) else {}


def differences(new: Mapping[str, Any], old: Mapping[str, Any]) -> list[str]:
    """The theorems about which the two say something else, apart from the day and Coq's version."""
    ours, theirs = ({name: {**each, "checked": ""} for name, each in r.get("theorems", {}).items()} for r in (new, old))
    return [name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)]


def write(path: Path, record: Mapping[str, Any]) -> None:
    """Write the record."""
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
