"""The JSON Schema (draft 2020-12) of `Audit.to_dict()`; `python -m opdtheory.auditing.views.schema` prints it.

Within one `schema_version` keys are only ever added, so a reader ignores those that it does not know.
"""

from __future__ import annotations

import json
from typing import Any

from opdtheory.auditing.report import SCHEMA_VERSION, VERDICTS

__all__ = ["AUDIT_SCHEMA", "schema_text"]

_GRANULARITIES = ["token_local", "token_return", "sequence"]

_NUMBER = {"type": "number"}
# An infinite number is null.
_EXTENDED = {"type": ["number", "null"]}
_TEXT = {"type": "string"}
_TEXT_OR_NULL = {"type": ["string", "null"]}
_FLAG = {"type": "boolean"}
_FLAG_OR_NULL = {"type": ["boolean", "null"]}
_COUNT = {"type": "integer", "minimum": 0}


def _says(schema: dict[str, Any], description: str) -> dict[str, Any]:
    return {**schema, "description": description}


def _object(description: str, properties: dict[str, Any], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    return {
        "type": "object",
        "description": description,
        "properties": properties,
        "required": [name for name in properties if name not in optional],
    }


def _array(items: dict[str, Any], description: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {"type": "array", "items": items}
    return _says(found, description) if description else found


def _or_null(schema: dict[str, Any]) -> dict[str, Any]:
    return {**schema, "type": [schema["type"], "null"]}


_IDENTIFIED = _object(
    "the catalogue objective, or signed sum of a few, that matches best; null if none points the same way",
    {
        "objective": _says(_TEXT, "its catalogue name"),
        "granularity": {"enum": _GRANULARITIES},
        "parameters": {"type": "object", "additionalProperties": _NUMBER},
        "scale": _says(_EXTENDED, "the multiple of its gradient"),
        "error": _says(_EXTENDED, "relative to the loss's gradient, at that scale"),
        "gamma": _says(_NUMBER, "the discount, where one was fitted"),
        "terms": {
            "type": "object",
            "additionalProperties": _NUMBER,
            "description": "catalogue name to coefficient, where it is a signed sum",
        },
        "evidence": _says(_TEXT, "of a sampled audit: where the name is from and what confirms it"),
        "fitted": _says(_TEXT, "of a sampled audit: the number in it that was fitted"),
        "fitted_range": _array(_NUMBER, "of a sampled audit: the values around it that no direction excludes"),
    },
    optional=("gamma", "terms", "evidence", "fitted", "fitted_range"),
)

_WEIGHT = _object(
    "the weight that the loss puts on a token at the batch size asked for, on one-step policies, zero at u = 1; "
    "empty where it was not looked for",
    {
        "log_u": _array(_NUMBER, "log-ratios, teacher over student"),
        "weight": _array(_NUMBER, "the weight at each"),
        "residual": _says(_EXTENDED, "disagreement between policies that differ in p alone, relative to the range"),
        "depends_on_ratio_only": _FLAG,
        "non_decreasing": _says(_FLAG, "then a genuine f-divergence is minimised (T4)"),
        "slope_at_teacher": _says(_EXTENDED, "dw/dlog u at u = 1; positive: the teacher attracts (T5)"),
        "explains_panel": _says(_FLAG_OR_NULL, "whether it gives the gradient over several tokens; null: cannot tell"),
        "far_log_u": _array(_NUMBER, "log-ratios beyond the grid, and close to where a plateau begins"),
        "far_weight": _array(_NUMBER, "the weight at each"),
        "low": _array(_EXTENDED, "of a sampled audit: the lower ends of intervals that hold jointly"),
        "high": _array(_EXTENDED, "likewise, the upper end"),
    },
    optional=("explains_panel", "far_log_u", "far_weight", "low", "high"),
)

_PAIR = _object(
    "one student-teacher pair",
    {
        "label": _TEXT,
        "relative_bias": _says(_EXTENDED, "|E g - exact| / |exact|"),
        "cosine": _EXTENDED,
        "variance": _says(_EXTENDED, "trace of the covariance of one batch's gradient"),
        "full_vocabulary_variance": _says(_EXTENDED, "the same of the whole-vocabulary estimator of the claim"),
    },
)

_LENGTHS = _object(
    "the same when rollouts may end early; null if not looked at",
    {"verdict": {"enum": list(VERDICTS)}, "relative_bias": _says(_EXTENDED, "at best scale")},
)

_FORM = _object(
    "the recovered weight as a formula; null if not looked for",
    {
        "kind": {"enum": ["zero", "catalogue", "combination", "expression", "numeric"]},
        "label": _TEXT,
        "terms": {"type": "object", "additionalProperties": _EXTENDED, "description": "catalogue label to coefficient"},
        "expr": _says(_TEXT_OR_NULL, "w(u), sympy"),
        "latex": _says(_TEXT_OR_NULL, "w(u)"),
        "error": _EXTENDED,
        "generator": _says(_TEXT_OR_NULL, "the implied generator V[w](u), sympy (T4)"),
        "generator_latex": _says(_TEXT_OR_NULL, "V[w](u)"),
        "genuine": _says(_FLAG, "whether w never falls"),
        "fixed_points": _array(_TEXT, "distributions other than the teacher's where the expected gradient vanishes"),
        "slope_at_teacher": _EXTENDED,
        "attracts": _says(_FLAG_OR_NULL, "whether the teacher is an attracting fixed point (T5)"),
        "limits": {"type": "object", "additionalProperties": _EXTENDED, "description": "of w at u to 0 and to inf"},
        "growth": _says(_TEXT, "where it blows up, in words"),
        "second_moment": _says(_TEXT, "E_p[w^2], in words"),
        "generator_values": _array(_EXTENDED, "V[w] at the log-ratios of the recovered weight"),
        "stop_gradient_of": _says(
            _TEXT_OR_NULL, "the catalogue generator f with w = -f + c(u - 1), as plain OPD has it"
        ),
        "seen_to": _says(_NUMBER, "the largest |log u| at which the weight was seen"),
    },
    optional=("generator_values", "stop_gradient_of", "seen_to"),
)

_DEPENDENCE = _object(
    "on what the weight of a token depends; null if not looked at",
    {
        "ratio_only": _FLAG,
        "position": _or_null(_array(_EXTENDED, "relative weights by position; null if alike")),
        "position_label": _TEXT_OR_NULL,
        "batch": _FLAG,
        "other_tokens": _FLAG,
        "sampling_policy": _FLAG,
        "top_k": {"type": ["integer", "null"]},
        "student_and_teacher": _says(_TEXT_OR_NULL, "the divergence of a weight of both probabilities (T4)"),
        "words": _array(_TEXT),
    },
)

_CHECK = _object(
    "one thing that must hold",
    {
        "name": _TEXT,
        "passed": _says(_FLAG_OR_NULL, "null: information, no verdict"),
        "value": _EXTENDED,
        "limit": _EXTENDED,
        "detail": _TEXT,
    },
)

_DTYPE = _object(
    "the same loss in lower precision, against float64",
    {
        "dtype": _TEXT,
        "regime": {"enum": ["realistic", "adversarial"]},
        "overflow": _says({"type": ["array", "null"], "items": _EXTENDED}, "log-ratios"),
        "lost_gradient": _says({"type": ["array", "null"], "items": _EXTENDED}, "log-ratios"),
        "sign_changed": _says({"type": ["array", "null"], "items": _EXTENDED}, "log-ratios"),
        "worst_error": _EXTENDED,
        "words": _TEXT,
    },
)

_REMEDY = _object(
    "a change that would make the loss do what it claims",
    {
        "kind": _TEXT,
        "text": _TEXT,
        "verdict": _says(_TEXT_OR_NULL, "of the changed loss"),
        "relative_bias": _EXTENDED,
        "verified": _says(_FLAG, "whether the changed loss was audited"),
    },
)

_INTERVAL = {"type": "array", "items": _EXTENDED, "minItems": 2, "maxItems": 2}

_MONTE_CARLO = _object(
    "intervals and sample sizes where the expectation was estimated; null if it is exact",
    {
        "verdict": _says(_TEXT, "on the claim alone, certain at the joint confidence or `undecided`"),
        "relative_bias": _says(_INTERVAL, "for |E g - exact| / |exact| of the worst pair, at scale one"),
        "cosine": _says(_INTERVAL, "for the smallest cosine"),
        "scale": _says({**_INTERVAL, "type": ["array", "null"]}, "multiples of the claim that no direction excludes"),
        "follows": _or_null(_IDENTIFIED),
        "directions": _COUNT,
        "identical": _says(_FLAG, "whether every observation was one combination of library estimators"),
        "hidden": _says(_NUMBER, "bound on the probability of an observation that is not"),
        "batches": _COUNT,
        "rollouts": _COUNT,
        "separable": _FLAG,
        "confidence": _says(_NUMBER, "joint, asymptotic"),
        "margin": _says(_NUMBER, "relative bias that counts as none"),
        "seed": {"type": "integer"},
        "seconds": _NUMBER,
        "words": _TEXT,
    },
)

_SETTINGS = {
    "type": "object",
    "description": "how the audit was made",
    "properties": {
        "batch_size": {"type": "integer", "minimum": 1},
        "eos": {"type": ["integer", "null"]},
        "off_policy": _NUMBER,
        "gamma": _NUMBER,
        "seed": {"type": "integer"},
        "prompts": {"type": "integer", "minimum": 1},
        "environment": _array({"type": "integer", "minimum": 0}, "positions that an environment writes"),
        "shared_prompt": _FLAG,
    },
    # Every argument of the audit is here, and later versions have more.
    "additionalProperties": True,
    "required": ["batch_size", "eos", "off_policy", "gamma", "seed"],
}

AUDIT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "opdtheory audit",
    **_object(
        "What a loss really does: the result of opdtheory.audit. Infinite numbers are null.",
        {
            "schema_version": {"const": SCHEMA_VERSION},
            "name": _TEXT,
            "objective": _says(_TEXT, "the claimed divergence"),
            "granularity": {"enum": _GRANULARITIES, "description": "the claimed one"},
            "verdict": {"enum": list(VERDICTS)},
            "faithful": _says(_FLAG, "whether the loss does what it claims, up to a constant factor"),
            "descends": _says(_TEXT_OR_NULL, "the catalogue objective that it follows"),
            "relative_bias": _says(_EXTENDED, "worst over the pairs, at scale one"),
            "cosine": _says(_EXTENDED, "worst over the pairs"),
            "scale": _says(_EXTENDED, "best common multiple of the claimed gradient"),
            "tolerance": _says(_NUMBER, "relative error that counts as rounding"),
            "identified": _or_null(_IDENTIFIED),
            "weight": _WEIGHT,
            "pairs": _array(_PAIR),
            "variable_lengths": _or_null(_LENGTHS),
            "form": _or_null(_FORM),
            "dependence": _or_null(_DEPENDENCE),
            "checks": _array(_CHECK),
            "numerics": _array(_DTYPE),
            "remedies": _array(_REMEDY),
            "monte_carlo": _or_null(_MONTE_CARLO),
            "settings": _SETTINGS,
            "evaluations": _says(_COUNT, "how often the loss was called"),
            "seconds": _NUMBER,
        },
        optional=("form", "dependence", "checks", "numerics", "remedies", "monte_carlo"),
    ),
}


def schema_text() -> str:
    """The schema as the text of `docs/audit.schema.json`."""
    return json.dumps(AUDIT_SCHEMA, indent=2) + "\n"


if __name__ == "__main__":
    print(schema_text(), end="")
