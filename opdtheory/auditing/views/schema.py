"""The JSON Schema (draft 2020-12) of `Audit.to_dict()`; `python -m opdtheory.auditing.views.schema` prints it.

It is derived from the dataclasses of the audit: types from annotations, descriptions from docstrings. Within one
`schema_version` keys are only ever added, so a reader should ignore unknown ones.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import types
import typing
from typing import Any

from torch import Tensor

from opdtheory.auditing.report import NOT_JSON, SCHEMA_VERSION, Audit
from opdtheory.auditing.scenario import Scenario
from opdtheory.choices import CLAIMED_REDUCTIONS, GRANULARITIES

__all__ = ["AUDIT_SCHEMA", "schema_text"]

_NUMBER_OR_NULL: dict[str, Any] = {"type": ["number", "null"]}
_PLAIN = {str: "string", bool: "boolean", int: "integer"}

# Keys that were added later, so that older records lack them.
_LATER = (
    *("form", "dependence", "checks", "numerics", "remedies", "monte_carlo"),
    *("prompts", "environment", "shared_prompt", "lengths", "vocabulary"),
    *("passes", "limits", "reduction", "against_sum", "worlds", "varies", "sampled"),
    *("least_bias", "by_pair", "unseen", "alpha"),
    *("explains_panel", "far_log_u", "far_weight", "generator_values", "stop_gradient_of", "seen_to"),
)


def _of(hint: Any) -> dict[str, Any]:
    """The schema of a type; infinite numbers are null."""
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Annotated:
        return {**_of(parts[0]), **dict(parts[1:])}
    if origin in (typing.Union, types.UnionType):
        (kind,) = (part for part in parts if part is not type(None))
        return _or_null(_of(kind))
    if origin is typing.Literal:
        return {"enum": list(parts)}
    if origin in (list, tuple):
        found = {"type": "array", "items": _of(parts[0])}
        fixed = origin is tuple and parts[-1] is not Ellipsis
        return {**found, "minItems": len(parts), "maxItems": len(parts)} if fixed else found
    if origin is dict:
        return {"type": "object", "additionalProperties": _of(parts[1])}
    if dataclasses.is_dataclass(hint):
        return _object(hint)
    if getattr(hint, "array_type", hint) is Tensor:  # with or without a shape
        return {"type": "array", "items": _NUMBER_OR_NULL}
    return _NUMBER_OR_NULL if hint is float else {"type": _PLAIN[hint]}


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    if "enum" in schema:
        return {"enum": [*schema["enum"], None]}
    kinds = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    return {**schema, "type": list(dict.fromkeys([*kinds, "null"]))}


def _object(kind: Any, left_out: tuple[str, ...] = ()) -> dict[str, Any]:
    """The schema of a dataclass; fields that may be absent are not required."""
    described, hints = _descriptions(kind), typing.get_type_hints(kind, include_extras=True)
    properties, required = {}, []
    for each in dataclasses.fields(kind):
        if each.name in left_out:
            continue
        hint = hints[each.name]
        if each.metadata.get("absent"):  # never null if it is present
            (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
        elif each.name not in _LATER:
            required.append(each.name)
        properties[each.name] = {**_of(hint), "description": described[each.name]}
    return {"type": "object", "description": _summary(kind), "properties": properties, "required": required}


def _summary(kind: Any) -> str:
    return " ".join(inspect.getdoc(kind).split("\n\n")[0].split())  # type: ignore[union-attr]


def _descriptions(kind: Any) -> dict[str, str]:
    """What the docstring says about each attribute."""
    text = inspect.getdoc(kind).partition("Attributes:\n")[2]  # type: ignore[union-attr]
    found = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", text, re.MULTILINE)
    return {name: " ".join(words.split()) for name, words in found}


def _described(kind: Any, name: str) -> str:
    return inspect.getdoc(getattr(kind, name)) or ""


def _settings() -> dict[str, Any]:
    schema = _object(Scenario)
    schema["properties"]["gamma"] = {"type": "number", "description": "discount of `token_return`"}
    schema["properties"]["reduction"] = {"enum": list(CLAIMED_REDUCTIONS), "description": "the claimed reduction"}
    schema["properties"]["alpha"] = {"type": "number", "description": "error rate of a sampled audit; else absent"}
    # Later versions may have more arguments.
    return {**schema, "additionalProperties": True, "required": [*schema["required"], "gamma"]}


def _audit() -> dict[str, Any]:
    computed: dict[str, dict[str, Any]] = {
        "objective": {"type": "string"},
        "granularity": {"enum": list(GRANULARITIES)},
        "passes": {"type": "boolean"},
        "faithful": {"type": "boolean"},
        "limits": {"type": "array", "items": {"type": "string"}},
        "descends": {"type": ["string", "null"]},
    }
    schema = _object(Audit, NOT_JSON)
    schema["properties"] = {
        "schema_version": {"const": SCHEMA_VERSION},
        **{name: {**kind, "description": _described(Audit, name)} for name, kind in computed.items()},
        **schema["properties"],
        "settings": _settings(),
    }
    known = [name for name in computed if name not in _LATER]
    schema["required"] = ["schema_version", *known, *schema["required"], "settings"]
    return schema


AUDIT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "opdtheory audit",
    **_audit(),
}


def schema_text() -> str:
    """The schema as the text of `docs/audit.schema.json`."""
    return json.dumps(AUDIT_SCHEMA, indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
