"""What a project says once for all its audits: the table `[tool.opdtheory]` of its `pyproject.toml`."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import re
import sys
import types
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from opdtheory.errors import InvalidArgumentError
from opdtheory.toml import read_toml

__all__ = ["project_settings"]

_FILE, _TABLE = "pyproject.toml", "opdtheory"

# Arguments of `audit` that belong to one loss or one call, not to a project.
_OF_ONE_AUDIT = ("loss", "name", "details")

# No setting is as large, and torch refuses larger seeds.
_HUGE = 2**31


def project_settings(folder: Path) -> dict[str, Any]:
    """The arguments of `opdtheory.audit` that the nearest `pyproject.toml` sets, from `folder` upward.

    Args:
        folder: the working directory of the command line, or the root directory of pytest.

    Returns:
        Names and values, such as `{"objective": "jsd", "eos": 0}`; empty without a file or its table.

    Raises:
        InvalidArgumentError: the file is not valid TOML, a key is not a setting of an audit, or a value has the wrong
            type; the message names the file.
    """
    path = next((each / _FILE for each in (folder, *folder.parents) if (each / _FILE).is_file()), None)
    table = {} if path is None else _table(path)
    if path is None or not table:
        return {}
    kinds = _settings()
    for key, value in table.items():
        if key not in kinds:
            near = difflib.get_close_matches(key, kinds, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"the settings are {', '.join(kinds)}"
            raise InvalidArgumentError(key, f"is not a setting of [tool.{_TABLE}] in {path}; {hint}")
        if not _fits(value, kinds[key]):
            wanted = _in_words(kinds[key])
            raise InvalidArgumentError(key, f"must be {wanted} in [tool.{_TABLE}] of {path}, got {value!r}")
    return table


def _table(path: Path) -> dict[str, Any]:
    # A file without our table is not parsed: it may be broken, and Python 3.10 may have no parser.
    try:
        text = path.read_bytes()
    except OSError as error:
        raise InvalidArgumentError(_FILE, f"{path} cannot be read: {error.strerror}") from None
    parser = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    has_table = re.search(rb"\btool\s*\.\s*[\"']?" + _TABLE.encode(), text)
    if _TABLE.encode() not in text or (not has_table and importlib.util.find_spec(parser) is None):
        return {}
    found: Any = read_toml(_FILE, path)
    for key in ("tool", _TABLE):
        found = found.get(key, {})
        if not isinstance(found, dict):
            raise InvalidArgumentError(_FILE, f"{path}: {key} must be a table, got {found!r}")
    table: dict[str, Any] = found
    return table


def _settings() -> dict[str, Any]:
    """The arguments of `audit` that a project may set, with their types."""
    from opdtheory.auditing import audit

    hints = typing.get_type_hints(audit)
    return {name: hints[name] for name in inspect.signature(audit).parameters if name not in _OF_ONE_AUDIT}


def _fits(value: object, kind: Any) -> bool:
    """Whether a value of TOML has a type; a truth value is no number."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in arguments)
    if origin is typing.Literal:
        return value in arguments
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return isinstance(value, list) and all(_fits(each, arguments[0]) for each in value)
    if kind is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) < _HUGE
    return isinstance(kind, type) and isinstance(value, kind)


def _in_words(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        # TOML has neither None nor divergences.
        return " or ".join(words for words in map(_in_words, arguments) if words)
    if origin is typing.Literal:
        return "one of " + ", ".join(map(str, arguments))
    if isinstance(origin, type) and issubclass(origin, Iterable):
        return f"a list of which each is {_in_words(arguments[0])}"
    return {int: "an integer below 2**31", float: "a number", str: "a string", bool: "true or false"}.get(kind, "")
