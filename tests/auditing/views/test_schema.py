"""The JSON schema of an audit."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
from pathlib import Path

import jsonschema
import pytest

from opdtheory.auditing.views.schema import AUDIT_SCHEMA, schema_text
from tests.auditing.views.parts import whole

ROOT = Path(__file__).resolve().parents[3]


def closed(schema):
    """The schema with every object held to the properties that it lists: a key that nobody described is an error."""
    if isinstance(schema, dict):
        found = {key: closed(value) for key, value in schema.items()}
        if "properties" in schema and "additionalProperties" not in schema:
            found["additionalProperties"] = False
        return found
    return [closed(value) for value in schema] if isinstance(schema, list) else schema


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


def test_the_published_schema_is_this_one():
    published = (ROOT / "docs" / "audit.schema.json").read_text(encoding="utf-8")
    assert published == schema_text(), (
        "regenerate with: python -m opdtheory.auditing.views.schema > docs/audit.schema.json"
    )
