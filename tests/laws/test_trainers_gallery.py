"""The page of trainers is that of its record, and what is quick to audit again is as recorded."""

from __future__ import annotations

import json

import pytest

from examples.trainers import gallery

pytest.importorskip("trl")

# A sound one, one at another temperature, one that divides by tokens.
AGAIN = (
    "GKDTrainer, beta=1, temperature=1",
    "GKDTrainer, beta=1, default temperature",
    "DistillationTrainer, defaults",
)


def recorded() -> dict[str, dict]:
    return {each["name"]: each for each in json.loads(gallery.RECORD.read_text(encoding="utf-8"))}


def test_the_page_is_that_of_its_record() -> None:
    assert gallery.PAGE.read_text(encoding="utf-8") == gallery.page(list(recorded().values()))


def test_every_entry_has_a_record() -> None:
    names = [entry.name for entry in gallery.entries()]
    assert len(set(names)) == len(names) and set(names) <= set(recorded())


@pytest.mark.slow
@pytest.mark.parametrize("name", AGAIN)
def test_an_audit_is_as_recorded(name: str) -> None:
    (entry,) = [each for each in gallery.entries() if each.name == name]
    found, old = gallery.record(entry, gallery.audited(entry)), recorded()[name]
    assert found == {**old, "package": found["package"], "error": found["error"]}
