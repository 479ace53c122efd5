"""Brings the docstrings into the form that mkdocstrings expects."""

from __future__ import annotations

import re
from typing import Any

import griffe

# What describes a field in the source, beside its default, which comes first.
_FIELDS = ("_field", "_option", "_runtime")


class Docstrings(griffe.Extension):
    """`Example:` is code, `__init__` says nothing of its own, and a field is shown with the value of its default."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite one docstring before it is parsed."""
        if obj.docstring is None:
            return
        if obj.docstring.value == "See the class.":
            obj.docstring = None
        else:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.MULTILINE)

    def on_class_members(self, *, cls: griffe.Class, **_: Any) -> None:
        """Show the default of a dataclass's field where the source has a call that also describes it."""
        for member in cls.attributes.values():
            if isinstance(member.value, griffe.ExprCall) and str(member.value.function) in _FIELDS:
                member.value = member.value.arguments[0]
