"""The processes of a plan: their order, their failures, what is kept and adopted."""

from __future__ import annotations

import copy
import dataclasses
import json
import time

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.reproduction.page import write_page
from opdtheory.reproduction.runner import adopt, reproduce, stored


def test_arms_wait_for_their_models_and_failures_are_told(stand_in, tmp_path):
    lines: list[str] = []
    outcome = reproduce(stand_in, tmp_path / "out", workers=2, cache=str(tmp_path / "cache"), report=lines.append)
    order = (tmp_path / "order").read_text().split()
    assert set(order[:2]) == {"teacher", "student"}
    assert [each["name"] for each in outcome.rows] == ["reverse_kl/opd", "reverse_kl/opd_plus", "jsd/opd_plus"]
    assert outcome.missing == {"arithmetic, jsd/opd, seed 0": "status 1: out of memory"}
    assert any("out of memory" in line for line in lines)
    # Again: what is finished is not run once more, what has no row is.
    (tmp_path / "order").unlink()
    reproduce(stand_in, tmp_path / "out", workers=2, cache=str(tmp_path / "cache"))
    assert "reverse_kl/opd" not in (tmp_path / "order").read_text().split()
    assert "jsd/opd" in (tmp_path / "order").read_text().split()


def test_rows_of_another_configuration_are_not_taken_for_these(stand_in, tmp_path):
    folder = tmp_path / "out" / "arms"
    folder.mkdir(parents=True)
    arm = stand_in.arms()[0]
    path = folder / f"{arm.key}.json"
    made = json.loads((tmp_path / "rows" / path.name).read_text())
    path.write_text(json.dumps(made))
    assert len(stored(stand_in, tmp_path / "out").rows) == 1
    for key, value in (("models", {"student": "x", "teacher": "y"}), ("identity", {**made["identity"], "format": 0})):
        path.write_text(json.dumps({**copy.deepcopy(made), key: value}))
        assert stored(stand_in, tmp_path / "out").rows == []
    path.write_text(json.dumps(made)[:-9])
    assert stored(stand_in, tmp_path / "out").rows == []


def test_rows_beside_a_page_are_adopted_for_the_same_arms_only(stand_in, tmp_path):
    first = dataclasses.replace(stand_in, divergences=("reverse_kl",), controls=())
    page = write_page(reproduce(first, tmp_path / "first", workers=1), tmp_path / "docs" / "page.md")
    rows, out = page.with_suffix(".jsonl"), tmp_path / "second"
    assert adopt(rows, out) == 2 and adopt(rows, out) == 0
    found = stored(stand_in, out)
    assert {each["name"] for each in found.rows} == {"reverse_kl/opd", "reverse_kl/opd_plus"}
    assert len(found.missing) == 2 and found.sessions == stored(first, tmp_path / "first").sessions
    longer = dataclasses.replace(stand_in, steps=stand_in.steps + 1)
    assert stored(longer, out).rows == []
    with pytest.raises(InvalidArgumentError, match="none.jsonl"):
        adopt(tmp_path / "none.jsonl", out)


def test_an_interrupt_ends_the_processes_and_keeps_the_rows(stand_in, tmp_path, monkeypatch):
    plan = dataclasses.replace(stand_in, forms=("opd_plus", "full_vocab"), divergences=("jsd",), controls=())
    started = time.perf_counter()

    def interrupt(line: str) -> None:
        if "jsd/opd_plus" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        reproduce(plan, tmp_path / "out", workers=2, cache=str(tmp_path / "cache"), report=interrupt)
    assert time.perf_counter() - started < 30
    assert [each["name"] for each in stored(plan, tmp_path / "out").rows] == ["reverse_kl/opd", "jsd/opd_plus"]
