"""Read a TOML file, or say in one sentence why not."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

from opdtheory.errors import InvalidArgumentError

__all__ = ["read_toml"]


def read_toml(name: str, path: Path) -> dict[str, Any]:
    """The values of a TOML file.

    Args:
        name: what the file is called in the error, such as `config`.
        path: the file.

    Raises:
        InvalidArgumentError: the file cannot be read, it is not valid TOML, or no TOML parser is installed.
    """
    if "\0" in str(path):
        raise InvalidArgumentError(name, f"must be the path of a file, got {str(path)!r}")
    try:
        parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise InvalidArgumentError(name, 'TOML needs Python 3.11 or pip install "opdtheory[train]"') from None
    try:
        values: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
        return values
    except OSError as error:
        raise InvalidArgumentError(name, f"{path} cannot be read: {error.strerror}") from None
    except RecursionError:
        raise InvalidArgumentError(name, f"{path} is not valid TOML: it is nested too deeply") from None
    except ValueError as error:  # neither TOML nor UTF-8
        raise InvalidArgumentError(name, f"{path} is not valid TOML: {error}") from None
