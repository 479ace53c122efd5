"""`opdtheory` itself: its version, its help, and what it does with a wrong command."""

from __future__ import annotations

import pytest

from opdtheory import __version__, cli
from opdtheory.errors import InvalidArgumentError


def test_a_wrong_command_or_none_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["nonsense"])
    assert exit_.value.code == 2
    assert cli.main([]) == 2
    assert "audit" in capsys.readouterr().out


def test_the_version_is_the_packages(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["--version"])
    assert exit_.value.code == 0 and capsys.readouterr().out == f"opdtheory {__version__}\n"


def test_help_names_every_default(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "sampling policy (default: 0.0)" in shown and "seed of the panel of policies (default: 0)" in shown
    assert "print the audit as JSON --html" in shown and "None" not in shown


def test_an_error_of_the_library_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise InvalidArgumentError("page", 'figures need matplotlib: pip install "opdtheory[plots]"')

    monkeypatch.setattr("opdtheory.commands.table.run", fail)
    assert cli.main(["table"]) == 2
    assert capsys.readouterr().err == 'opdtheory table: page: figures need matplotlib: pip install "opdtheory[plots]"\n'
