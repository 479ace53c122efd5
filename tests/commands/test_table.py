"""`opdtheory table` in every format."""

from __future__ import annotations

import json

import pytest

from opdtheory import cli
from opdtheory.commands.table import render
from opdtheory.verification.estimators import rows


@pytest.mark.slow
def test_formats(capsys: pytest.CaptureFixture[str]) -> None:
    table = rows()
    text, markdown, latex = render(table), render(table, "markdown"), render(table, "latex")
    assert len(text.splitlines()) == len(table) + 1
    assert len(markdown.splitlines()) == len(table) + 2
    assert len({line.count(" | ") for line in markdown.splitlines() if "---" not in line}) == 1
    body = latex.splitlines()[1:-2]
    assert len(body) == len(table) + 1
    assert all(line.count(" & ") >= 5 and r"\\" in line for line in body)
    assert cli.main(["table", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert [row["verdict"] for row in record] == [row.verdict for row in table]
