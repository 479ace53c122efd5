"""`opdtheory` itself: its version, its help, and what it does with a wrong command."""

from __future__ import annotations

import pytest

from opdtheory import __version__, cli
from opdtheory.commands.audit import SETTINGS
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
    assert "print the audit as JSON, and nothing else --html" in shown and "None" not in shown
    # The objective comes first, and every setting of the audit says what it is without the option.
    assert "LOSS PATH.py" in shown.replace("positional arguments: ", "") and "options: -h" in shown
    first = shown.partition("show this help message and exit ")[2]
    assert first.startswith("--objective NAME claimed divergence, such as jsd or 'skew_jsd(beta=0.1)' (default: rev")
    settings = first.partition("--call")[0]
    assert settings.count("(default: ") == len(SETTINGS)


def test_an_error_of_the_library_is_a_usage_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise InvalidArgumentError("page", 'figures need matplotlib: pip install "opdtheory[plots]"')

    monkeypatch.setattr("opdtheory.commands.table.run", fail)
    assert cli.main(["table"]) == 2
    assert capsys.readouterr().err == 'opdtheory table: page: figures need matplotlib: pip install "opdtheory[plots]"\n'


@pytest.mark.parametrize("error", [IsADirectoryError(21, "Is a directory", "page.html"), OSError("no space left")])
def test_a_file_that_cannot_be_used_is_a_usage_error(
    error: OSError, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(options: object) -> int:
        raise error

    monkeypatch.setattr("opdtheory.commands.table.run", fail)
    assert cli.main(["table"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("opdtheory table: ") and "cannot be read or written: " in said and said.count("\n") == 1
