"""The YAML and TOML of the documentation and of the examples: its commands, actions and hooks must be real."""

from __future__ import annotations

import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.laws import shell

ROOT = Path(__file__).resolve().parents[2]


def check_yaml(text: str) -> Any:
    """The value of a document, whose commands, uses of our action and of our hook are real.

    Raises:
        WrongCommand: one of them is not.
    """
    import yaml

    value = yaml.safe_load(text)
    for table in _tables(value):
        if isinstance(table.get("run"), str):
            for command, _ in shell.commands(table["run"]):
                shell.check(command)
        if "/opdtheory@" in str(table.get("uses", "")):
            _check_action(table.get("with", {}))
        if str(table.get("repo", "")).endswith("/opdtheory"):
            for hook in table["hooks"]:
                _check_hook(hook)
        if "entry" in table and "language" in table:
            shell.check([*shell.split(table["entry"]), *table.get("args", ())])
    return value


def check_toml(text: str) -> None:
    """Read a `pyproject.toml`; its table of ours must be one that the library takes.

    Raises:
        InvalidArgumentError: it is not.
    """
    from opdtheory.testing.project import project_settings

    if sys.version_info >= (3, 11):
        import tomllib

        tomllib.loads(text)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "pyproject.toml").write_text(text, encoding="utf-8")
        project_settings(Path(folder))


def action() -> dict[str, Any]:
    """The composite action of the repository."""
    import yaml

    found: dict[str, Any] = yaml.safe_load((ROOT / "action.yml").read_text(encoding="utf-8"))
    return found


def hooks() -> dict[str, dict[str, Any]]:
    """The hooks of the repository, by their names."""
    import yaml

    found = yaml.safe_load((ROOT / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    return {hook["id"]: hook for hook in found}


def _tables(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
    for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _tables(each)


def _check_action(given: dict[str, str]) -> None:
    inputs = action()["inputs"]
    unknown = sorted(set(given) - set(inputs))
    missing = sorted(name for name, each in inputs.items() if each.get("required") and name not in given)
    if unknown or missing:
        raise shell.WrongCommand(f"the action has no input {unknown}, and needs {missing}")
    options = shell.split(" ".join(str(given.get("arguments", "")).split()))
    objective = ["--objective", given["objective"]] if given.get("objective") else []
    for target in str(given["targets"]).split("\n"):
        if target.strip():
            shell.check(["opdtheory", "audit", target.strip(), *objective, *options])
    for line in str(given.get("install", "")).splitlines():
        shell.check(shell.split(line))


def _check_hook(hook: dict[str, Any]) -> None:
    found = hooks().get(hook["id"])
    if found is None:
        raise shell.WrongCommand(f"there is no hook {hook['id']}")
    if not hook.get("args"):
        raise shell.WrongCommand(f"the hook {hook['id']} needs the losses in args")
    shell.check([*shell.split(found["entry"]), *map(str, hook["args"])])
    for pattern in ("files", "exclude"):
        re.compile(hook.get(pattern, ""))
