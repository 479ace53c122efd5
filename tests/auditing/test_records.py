"""Records: fields by attribute and by key, round trips of an identified objective, and plain JSON values."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from opdtheory import divergences
from opdtheory.auditing.records import ABSENT, Identified, Keyed, VariableLengths, plain
from opdtheory.objective import Objective


@dataclasses.dataclass(frozen=True, eq=False)
class Found(Keyed):
    value: float
    name: str | None = None
    extra: float | None = dataclasses.field(default=None, metadata=ABSENT)


def test_fields_are_keys_too():
    found = Found(2.0, extra=0.0)
    assert (found.value, found["value"], found["extra"]) == (2.0, 2.0, 0.0)
    assert dict(found) == {"value": 2.0, "name": None, "extra": 0.0} and len(found) == 3
    assert "name" in found and found.get("name", "default") is None
    assert list(VariableLengths("biased", 0.5).items()) == [("verdict", "biased"), ("relative_bias", 0.5)]


def test_an_absent_field_is_no_key():
    found = Found(2.0)
    assert found.extra is None and "extra" not in found and dict(found) == {"value": 2.0, "name": None}
    for key in ("extra", "no_such", "items"):
        with pytest.raises(KeyError, match=key):
            found[key]
    assert json.loads(json.dumps(plain(found))) == {"value": 2.0, "name": None}
    assert plain(Found(2.0, extra=math.inf)) == {"value": 2.0, "name": None, "extra": None}


@pytest.mark.parametrize(
    ("objective", "scale", "keys"),
    [
        (Objective.of(divergences.divergence("jsd")), 2.0, {"objective": "jsd", "parameters": {}, "scale": 2.0}),
        (Objective.of(divergences.alpha(0.3), "sequence"), 0.5, {"objective": "alpha", "parameters": {"alpha": 0.3}}),
        (Objective.of(divergences.divergence("chi2"), "token_return", 0.9), 1.0, {"objective": "chi2", "gamma": 0.9}),
        (
            Objective(((1.0, divergences.divergence("reverse_kl")), (-1.0, divergences.divergence("forward_kl")))),
            3.0,
            {"objective": "reverse_kl - forward_kl", "terms": {"reverse_kl": 3.0, "forward_kl": -3.0}, "scale": 1.0},
        ),
    ],
    ids=["one", "family", "discount", "signed sum"],
)
def test_an_identified_objective_is_read_back(objective, scale, keys):
    found = Identified.of(objective, scale, 1e-3)
    assert {key: found[key] for key in keys} == keys
    assert found.granularity == objective.granularity and found.error == 1e-3
    assert ("gamma" in found) == objective.discounted and ("terms" in found) == (len(objective.terms) > 1)
    assert "evidence" not in found and "fitted" not in found and "fitted_range" not in found
    back = found.read()
    # The coefficients of a sum include the scale.
    factor = scale if len(objective.terms) > 1 else 1.0
    assert back == dataclasses.replace(objective, terms=tuple((factor * c, d) for c, d in objective.terms))
    assert found.label == objective.label and found.where == objective.where
    wrong = dataclasses.replace(found, granularity="token_local" if objective.granularity == "sequence" else "sequence")
    assert wrong.gamma is not None or wrong.read() != back


def test_labels_show_parameters():
    assert Identified("alpha", "token_local", {"alpha": 0.25}, 1.0, 0.0).label == "alpha(alpha=0.25)"


def test_plain_values_are_json():
    values = {
        "tensor": torch.tensor([1.0, math.inf, math.nan]),
        "scalar": torch.tensor(2.0),
        "tuple": (1, (2.0, -math.inf)),
        "record": VariableLengths("exact", math.nan),
        1: [True, None, "x"],
    }
    assert json.loads(json.dumps(plain(values), allow_nan=False)) == {
        "tensor": [1.0, None, None],
        "scalar": 2.0,
        "tuple": [1, [2.0, None]],
        "record": {"verdict": "exact", "relative_bias": None},
        "1": [True, None, "x"],
    }
