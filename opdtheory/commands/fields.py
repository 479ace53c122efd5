"""Options of a command for fields of `TrainConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import typing
from collections.abc import Iterable
from typing import Any, Literal

from opdtheory.commands.console import or_none
from opdtheory.training.config import TrainConfig, field_kinds

__all__ = ["add_fields"]


def add_fields(
    parser: argparse._ActionsContainer, names: Iterable[str] | None = None, *, defaults: bool = True
) -> None:
    """One option for each field, or for those named; without the option there is no such attribute.

    Args:
        parser: of the command.
        names: the fields; all by default.
        defaults: whether the help tells the default of `TrainConfig`.
    """
    kinds = field_kinds()
    wanted = set(kinds if names is None else names)
    for field in dataclasses.fields(TrainConfig):
        if field.name not in wanted:
            continue
        text = field.metadata["help"].replace("%", "%%")
        if defaults and field.default is not None:
            shown = {True: "on", False: "off"}[field.default] if isinstance(field.default, bool) else field.default
            text += f" (default: {shown})"
        flag, reader = f"--{field.name.replace('_', '-')}", _reader(*kinds[field.name])
        parser.add_argument(flag, dest=field.name, default=argparse.SUPPRESS, help=text, **reader)


def _reader(kind: Any, optional: bool) -> dict[str, Any]:
    """How argparse reads a field of this type."""
    if kind is bool:
        return {"action": argparse.BooleanOptionalAction}
    if typing.get_origin(kind) is Literal:
        return {"choices": typing.get_args(kind)}
    if typing.get_origin(kind) is tuple:
        return {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")}
    metavar = {int: "N", float: "X", str: "TEXT"}[kind]
    return {"type": or_none(kind) if optional else kind, "metavar": metavar}
