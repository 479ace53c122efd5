"""`opdtheory` itself: its version, its help, and what it does with a wrong command."""

from __future__ import annotations

import pytest

from opdtheory import __version__, cli


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
