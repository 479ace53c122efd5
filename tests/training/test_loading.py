"""The models of a run fit each other and the task."""

from __future__ import annotations

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.training.tasks import Addition, Tools
from tests.training.runs import config, model, untrained


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        opd.train(config(), student=model(0), teacher=untrained(Addition(), 0), task=Addition(2))
    with pytest.raises(InvalidArgumentError, match="task: must have prompts in the student's vocabulary"):
        opd.train(config(), student=model(0), teacher=model(1), task=Tools())
