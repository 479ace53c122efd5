"""What Coq has checked of the theorems, as `make proofs` recorded it; Coq itself is not needed to read it."""

from __future__ import annotations

import datetime
import functools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opdtheory.errors import InvalidArgumentError

__all__ = ["Proof", "ProvedStatement", "proof", "proofs", "read"]

RECORD = Path(__file__).with_name("proofs.json")


@dataclass(frozen=True)
class ProvedStatement:
    """A statement that is proved in Coq, or a false twin that is refuted there.

    Attributes:
        name: in the file of proofs, such as `T1_softmax`.
        words: what it says.
        text: its definition in Coq.
        axioms: what the proof rests on, beyond Coq's logic.
    """

    name: str
    words: str
    text: str
    axioms: tuple[str, ...]


@dataclass(frozen=True)
class Proof:
    """What Coq has checked of one theorem.

    Attributes:
        number: the theorem's, such as `T1`.
        title: its name in the file of proofs.
        file: that file, such as `proofs/T1.v`.
        digest: SHA-256 of that file and of all files of proofs that it requires.
        checked: the day, as in 2026-11-29.
        coq: the version of Coq.
        left_out: what of the theorem's page is not proved; empty if the file names nothing.
        statements: what is proved.
        twins: what is refuted.
    """

    number: str
    title: str
    file: str
    digest: str
    checked: str
    coq: str
    left_out: str
    statements: tuple[ProvedStatement, ...]
    twins: tuple[ProvedStatement, ...]

    @property
    def axioms(self) -> tuple[str, ...]:
        """The axioms of all its proofs, without the modules that they stand in."""
        names = [name.rpartition(".")[2] for each in (*self.statements, *self.twins) for name in each.axioms]
        return tuple(dict.fromkeys(names))

    def to_dict(self) -> dict[str, Any]:
        """When what was checked, as plain Python values for `json.dumps`."""
        return {
            "checked": self.checked,
            "coq": self.coq,
            "digest": self.digest,
            "axioms": list(self.axioms),
            "file": self.file,
            "left_out": self.left_out,
            "statements": [each.name for each in self.statements],
            "twins": [each.name for each in self.twins],
        }


def proof(number: str) -> Proof | None:
    """The proof of a theorem in Coq; None if there is none.

    Raises:
        InvalidArgumentError: the record of the proofs is damaged.

    Example:
        >>> proof("T1").statements[0].name
        'T1_any_student'
    """
    return proofs().get(number)


@functools.cache
def proofs() -> Mapping[str, Proof]:
    """All proofs by the number of the theorem.

    Raises:
        InvalidArgumentError: the record of the proofs is damaged.
    """
    return read(RECORD)


def read(path: Path) -> dict[str, Proof]:
    """The proofs of a record.

    Raises:
        InvalidArgumentError: the file is not there, or is not what `python3 proofs/check.py --write` writes.
    """
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return {number: _proof(number, str(record["coq"]), found) for number, found in record["theorems"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        wanted = "must be what `python3 proofs/check.py --write` writes"
        raise InvalidArgumentError(path.name, f"{wanted}; {_problem(error)}") from error


def _problem(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"it has no {error.args[0]!r}"
    return f"it cannot be read: {error}"


def _proof(number: str, coq: str, found: Mapping[str, Any]) -> Proof:
    title, file, digest, checked = (_text(found, name) for name in ("title", "file", "digest", "checked"))
    statements, twins = (tuple(map(_statement, found[name])) for name in ("statements", "twins"))
    datetime.date.fromisoformat(checked)
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ValueError(f"the digest of {number} must be 64 hexadecimal digits, got {digest!r}")
    if not statements or not twins:
        raise ValueError(f"{number} has {len(statements)} statements and {len(twins)} false twins")
    left_out = _text(found, "left_out") if found["left_out"] != "" else ""
    return Proof(number, title, file, digest, checked, coq, left_out, statements, twins)


def _statement(found: Mapping[str, Any]) -> ProvedStatement:
    name, words, text = (_text(found, name) for name in ("name", "words", "text"))
    return ProvedStatement(name, words, text, tuple(map(str, found["axioms"])))


def _text(found: Mapping[str, Any], name: str) -> str:
    if not isinstance(found[name], str) or not found[name]:
        raise ValueError(f"{name!r} must be text, got {found[name]!r}")
    return str(found[name])
