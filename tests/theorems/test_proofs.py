"""The record of what Coq has checked: it is of today's sources, and a damaged one is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from sources import Source, closure, digest
from sources import read as read_sources

from opdtheory.errors import InvalidArgumentError
from opdtheory.theorems import theorems
from opdtheory.theorems.proofs import RECORD, Proof, proof, proofs, read

PROOFS = Path(__file__).resolve().parents[2] / "proofs"
AXIOMS = {"sig_not_dec", "sig_forall_dec", "functional_extensionality_dep"}


def outdated(found: dict[str, Proof], sources: dict[str, Source]) -> list[str]:
    """The theorems whose files say something else than the record."""

    def recorded(number: str) -> object:
        one = found[number]
        stated = [(each.name, each.words, each.text) for each in (*one.statements, *one.twins)]
        return one.digest, one.title, one.file, one.left_out, sorted(stated)

    def written(number: str) -> object:
        source = sources[number]
        stated = [(each.name, each.words, each.text) for each in source.statements]
        return digest(sources, number), source.title, source.path, source.left_out, sorted(stated)

    numbers = {name for name, source in sources.items() if source.is_theorem}
    return sorted(n for n in numbers | set(found) if {n} - numbers or {n} - set(found) or recorded(n) != written(n))


def test_the_record_is_of_the_sources() -> None:
    assert outdated(dict(proofs()), read_sources(PROOFS)) == [], "run `python3 proofs/check.py --write`"


def test_a_source_that_was_not_checked_again_is_found() -> None:
    sources = read_sources(PROOFS)

    def resting_on(name: str) -> list[str]:
        return sorted(number for number in proofs() if name in closure(sources, number))

    def changed(name: str, old: str, new: str) -> list[str]:
        assert old in sources[name].text
        return outdated(dict(proofs()), {**sources, name: Source(name, sources[name].text.replace(old, new, 1))})

    assert changed("T1", "0 <= q a", "0 < q a") == resting_on("T1")
    assert changed("T1", "Proof.", "Proof. ") == resting_on("T1")
    assert changed("Sums", "sum m g + g m", "sum m g - g m") == resting_on("Sums") == sorted(proofs())
    assert "T1" in resting_on("T1")
    last = list(proofs())[-1]
    assert outdated(dict(proofs()), {name: each for name, each in sources.items() if name != last}) == [last]
    assert "T1" in outdated({n: each for n, each in proofs().items() if n != "T1"}, sources)


def test_the_identity_is_proved() -> None:
    found = proof("T1")
    assert found is not None and found.file == "proofs/T1.v" and found.title == "the OPD+ identity"
    assert {"T1_any_student", "T1_softmax"} <= {each.name for each in found.statements}
    assert all(each.name.startswith("T1_twin_") for each in found.twins) and found.twins


def test_every_proof_is_of_a_theorem_and_rests_on_the_real_numbers_alone() -> None:
    numbers = [theorem.number for theorem in theorems()]
    assert list(proofs()) == [number for number in numbers if number in proofs()]
    for found in proofs().values():
        assert set(found.axioms) <= AXIOMS and found.checked >= "2026-01-01"
        assert json.loads(json.dumps(found.to_dict()))["digest"] == found.digest
    assert proof("T99") is None


def without(name: str) -> Callable[[Any], None]:
    return lambda record: record["theorems"]["T1"].pop(name)


def with_(name: str, value: object) -> Callable[[Any], None]:
    return lambda record: record["theorems"]["T1"].update({name: value})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda record: record.pop("coq"), "it has no 'coq'"),
        (lambda record: record.pop("theorems"), "it has no 'theorems'"),
        (lambda record: record.update(theorems=[]), "it cannot be read"),
        (without("digest"), "it has no 'digest'"),
        (with_("digest", "abc"), "digest of T1 must be 64 hexadecimal digits, got 'abc'"),
        (with_("checked", "today"), "today"),
        (with_("title", ""), "'title' must be text, got ''"),
        (with_("file", 3), "'file' must be text, got 3"),
        (without("left_out"), "it has no 'left_out'"),
        (with_("left_out", None), "'left_out' must be text, got None"),
        (with_("statements", []), "T1 has 0 statements"),
        (with_("twins", []), "0 false twins"),
        (with_("statements", [{"name": "x"}]), "it has no 'words'"),
        (with_("twins", ["x"]), "it cannot be read"),
    ],
    ids=range(14),
)
def test_a_damaged_record_is_refused(tmp_path: Path, damage: Callable[[Any], None], said: str) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    path = tmp_path / "proofs.json"
    path.write_text(json.dumps(record), encoding="utf-8")
    assert read(path) == proofs()
    damage(record)
    path.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=r"proofs\.json: must be what .* --write` writes; ") as raised:
        read(path)
    assert said in str(raised.value)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "null"])
def test_what_is_no_record_is_refused(tmp_path: Path, text: str | None) -> None:
    path = tmp_path / "proofs.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match="proofs/check"):
        read(path)
