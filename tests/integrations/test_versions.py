"""Which versions of a framework are accepted, and what is said of others."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys

import pytest

from opdtheory.errors import IntegrationError
from opdtheory.integrations.versions import check_version

RANGE = (1, 10), (1, 16)


@pytest.mark.parametrize("found", ["1.10.0", "1.13.2", "1.16.0", "1.16.0.dev0"])
def test_versions_in_the_range(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: found)
    assert check_version("trl", *RANGE, extra="trl") == found


@pytest.mark.parametrize("found", ["1.9.0", "1.17.0", "0.16.0", "2.10.0", "unknown"])
def test_versions_outside(monkeypatch: pytest.MonkeyPatch, found: str) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: found)
    message = rf"^trl {found} is installed: opdtheory supports trl 1\.10 to 1\.16; pip install 'opdtheory\[trl\]'$"
    with pytest.raises(IntegrationError, match=message) as error:
        check_version("trl", *RANGE, extra="trl")
    assert isinstance(error.value, ImportError)


def test_what_is_missing() -> None:
    with pytest.raises(IntegrationError, match=r"^no-such-framework is not installed: opdtheory supports"):
        check_version("no-such-framework", *RANGE, extra="trl")


def test_the_plug_in_asks_before_it_imports() -> None:
    """In a process of its own, where neither is loaded."""
    code = (
        "import importlib.metadata, sys\n"
        "importlib.metadata.version = lambda name: '1.9.1'\n"
        "try:\n    import opdtheory.integrations.trl\n"
        "except ImportError as error:\n    print(error, 'trl' in sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert found.startswith("trl 1.9.1 is installed: opdtheory supports trl 1.10 to 1.16;")
    assert found.endswith("False\n")
