"""`opdtheory.validate`: names, texts, some parameters."""

from __future__ import annotations

import json

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.training.validation import Validation
from tests.training.validation.pairs import STALE, STUDENT, TEACHER, E, transformer


def test_validate_takes_names_and_texts_and_some_parameters() -> None:
    settings = {"max_new_tokens": 3, "draws": 50, "directions": 2, "parameters": lambda name: "head" in name}
    found = opd.validate(STUDENT, TEACHER, ["1+2=", "4"], "opd_plus", "reverse_kl", clip_log_ratio=0.2, **settings)
    assert found.parameters == STUDENT.head.weight.numel() and found.agrees and found.bias > 0.1
    assert "agree with theory" in str(found) and Validation.from_dict(json.loads(json.dumps(found.to_dict()))) == found
    warm = opd.validate(STUDENT, TEACHER, ["1+2=", "4"], "opd", "jsd", temperature=0.7, behavior=STALE, **settings)
    assert warm.agrees and warm.seed == 0
    student, teacher = (transformer(seed).float() for seed in (0, 1))
    single = opd.validate(student, teacher, ["1+2="], "opd", "jsd", max_new_tokens=3, draws=50)
    assert single.agrees and single.tolerance == 1e-4


def test_a_divergence_of_an_estimator_that_has_one_is_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="divergence"):
        opd.validate(STUDENT, TEACHER, ["1+"], E("k1_loss"), "jsd")
