"""The JSON schema of an audit."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from pathlib import Path
from typing import Literal

import jsonschema
import pytest
import torch
from jaxtyping import Float

from opdtheory.auditing.records import ABSENT, Count, Finite, plain
from opdtheory.auditing.views import schema
from opdtheory.auditing.views.schema import AUDIT_SCHEMA, schema_text
from tests.auditing.views.parts import whole

ROOT = Path(__file__).resolve().parents[3]


def closed(part):
    """The schema with every object held to the properties that it lists: a key that nobody described is an error."""
    if isinstance(part, dict):
        found = {key: closed(value) for key, value in part.items()}
        if "properties" in part and "additionalProperties" not in part:
            found["additionalProperties"] = False
        return found
    return [closed(value) for value in part] if isinstance(part, list) else part


def test_reports_obey_the_schema(reports):
    jsonschema.Draft202012Validator.check_schema(AUDIT_SCHEMA)
    validator = jsonschema.Draft202012Validator(closed(AUDIT_SCHEMA))
    for report in [*reports, whole(reports[0])]:
        validator.validate(json.loads(json.dumps(report.to_dict(), allow_nan=False)))


@pytest.mark.parametrize(
    ("module", "name", "part"),
    [
        ("report", "PairResult", AUDIT_SCHEMA["properties"]["pairs"]["items"]),
        ("naming.weight_form", "WeightForm", AUDIT_SCHEMA["properties"]["form"]),
        ("effects.dependence", "Dependence", AUDIT_SCHEMA["properties"]["dependence"]),
        ("checks.subject", "Check", AUDIT_SCHEMA["properties"]["checks"]["items"]),
        ("checks.numerics", "DtypeResult", AUDIT_SCHEMA["properties"]["numerics"]["items"]),
        ("fixes.remedies", "Remedy", AUDIT_SCHEMA["properties"]["remedies"]["items"]),
        ("sampling.montecarlo_result", "MonteCarloResult", AUDIT_SCHEMA["properties"]["monte_carlo"]),
    ],
)
def test_the_schema_describes_every_field(module, name, part):
    found = getattr(importlib.import_module(f"opdtheory.auditing.{module}"), name)
    assert [field.name for field in dataclasses.fields(found)] == list(part["properties"])


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r.pop("verdict"),
        lambda r: r.update(verdict="fine"),
        lambda r: r.update(schema_version=0),
        lambda r: r["weight"].pop("log_u"),
        lambda r: r["pairs"][0].update(cosine="1"),
        lambda r: r["settings"].update(batch_size=0),
        lambda r: r["checks"][0].update(passed="yes"),
        lambda r: r["form"].update(kind="guess"),
    ],
)
def test_what_is_no_report_breaks_the_schema(report, change):
    wrong = copy.deepcopy(whole(report).to_dict())
    change(wrong)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, AUDIT_SCHEMA, cls=jsonschema.Draft202012Validator)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("field", "value"),
    [("scale", "1"), ("tolerance", float("nan")), ("verdict", "fine"), ("pairs", None), ("evaluations", 1.5)],
)
def test_a_report_whose_field_has_another_type_breaks_the_schema(report, field, value):
    wrong = dataclasses.replace(report, **{field: value}).to_dict()
    with pytest.raises(jsonschema.ValidationError) as caught:
        jsonschema.validate(wrong, AUDIT_SCHEMA, cls=jsonschema.Draft202012Validator)
    assert list(caught.value.absolute_path) == [field]


def test_the_published_schema_is_this_one():
    published = (ROOT / "docs" / "audit.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), (
        "regenerate with: python -m opdtheory.auditing.views.schema > docs/audit.schema.json"
    )


@dataclasses.dataclass(frozen=True)
class Inner:
    """A part.

    Attributes:
        share: of the whole,
            on two lines.
    """

    share: Finite


@dataclasses.dataclass(frozen=True)
class Record:
    """A throw-away record.

    Whose summary is its first paragraph.

    Attributes:
        name: what it is called.
        count: how many.
        kind: one of two.
        value: a number that may be infinite.
        ends: two numbers.
        inner: a part, or none.
        table: a curve.
        later: absent at first.
    """

    name: str
    count: Count
    kind: Literal["a", "b"] | None
    value: float
    ends: tuple[float, float]
    inner: list[Inner] | None
    table: Float[torch.Tensor, " points"]
    later: int | None = dataclasses.field(default=None, metadata=ABSENT)


def test_a_record_is_described_by_its_annotations_and_docstring():
    assert schema._object(Record) == {
        "type": "object",
        "description": "A throw-away record.",
        "properties": {
            "name": {"type": "string", "description": "what it is called."},
            "count": {"type": "integer", "minimum": 0, "description": "how many."},
            "kind": {"enum": ["a", "b", None], "description": "one of two."},
            "value": {"type": ["number", "null"], "description": "a number that may be infinite."},
            "ends": {
                "type": "array",
                "items": {"type": ["number", "null"]},
                "minItems": 2,
                "maxItems": 2,
                "description": "two numbers.",
            },
            "inner": {
                "type": ["array", "null"],
                "items": {
                    "type": "object",
                    "description": "A part.",
                    "properties": {"share": {"type": "number", "description": "of the whole, on two lines."}},
                    "required": ["share"],
                },
                "description": "a part, or none.",
            },
            "table": {"type": "array", "items": {"type": ["number", "null"]}, "description": "a curve."},
            "later": {"type": "integer", "description": "absent at first."},
        },
        "required": ["name", "count", "kind", "value", "ends", "inner", "table"],
    }
    assert "value" not in schema._object(Record, ("value",))["properties"]


RECORD = Record("x", 1, None, float("inf"), (0.0, 1.0), [Inner(0.5)], torch.zeros(2), None)


@pytest.mark.parametrize(
    ("wrong", "where"),
    [
        ({"name": 1}, ["name"]),
        ({"count": -1}, ["count"]),
        ({"count": 1.5}, ["count"]),
        ({"kind": "c"}, ["kind"]),
        ({"value": "1"}, ["value"]),
        ({"ends": (0.0, 1.0, 2.0)}, ["ends"]),
        ({"inner": [Inner(float("nan"))]}, ["inner", 0, "share"]),
        ({"table": torch.zeros(2, 2)}, ["table", 0]),
        ({"later": "soon"}, ["later"]),
    ],
    ids=lambda value: "-".join(map(str, value)) if isinstance(value, list) else "",
)
def test_a_field_of_another_type_breaks_the_derived_schema(wrong, where):
    validator = jsonschema.Draft202012Validator(schema._object(Record))
    # A field that is absent is left out by the records of an audit.
    kept = {key: value for key, value in plain(RECORD).items() if key != "later"}
    validator.validate(kept)
    changed = {**kept, **plain({key: value for key, value in wrong.items()})}
    with pytest.raises(jsonschema.ValidationError) as caught:
        validator.validate(changed)
    assert list(caught.value.absolute_path) == where


def test_a_new_field_appears_in_the_schema_and_must_be_described():
    def new(doc: str) -> type:
        return dataclasses.make_dataclass("New", [("name", str), ("added", bool)], namespace={"__doc__": doc})

    found = schema._object(new("New.\n\nAttributes:\n    name: n.\n    added: it."))
    assert found["properties"]["added"] == {"type": "boolean", "description": "it."} and "added" in found["required"]
    with pytest.raises(KeyError, match="added"):
        schema._object(new("New.\n\nAttributes:\n    name: n."))
