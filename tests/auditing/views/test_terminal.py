"""An audit in a terminal."""

from __future__ import annotations

import pytest

from opdtheory.auditing.views.terminal import print_audit
from tests.auditing.views.parts import whole


def test_a_terminal_gets_colours_and_tables(report):
    console_module = pytest.importorskip("rich.console")
    console = console_module.Console(force_terminal=True, width=110, record=True, file=open("/dev/null", "w"))
    name = "[red]my[/red] <loss>"
    print_audit(whole(report, name), console)
    coloured = console.export_text(styles=True, clear=False)
    text = console.export_text()
    assert "\x1b[" in coloured
    for part in (
        name,
        "OTHER OBJECTIVE",
        "Pairs",
        "Checks",
        "FAILED",
        "Numerics",
        "What would make it right",
        "weight w(u) = ",
    ):
        assert part in text
    console.file.close()


def test_what_is_no_terminal_gets_plain_text(report, capsys):
    console_module = pytest.importorskip("rich.console")
    print_audit(report)
    print_audit(report, console_module.Console())
    assert capsys.readouterr().out == f"{report}\n{report}\n"
