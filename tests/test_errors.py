"""Errors: what each says, and the checks of numbers."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest

from opdtheory import errors
from opdtheory.errors import (
    BudgetExceededError,
    InvalidArgumentError,
    LossError,
    OpdTheoryError,
    TrainingError,
    check_between,
    check_integer,
)


def test_errors_are_the_built_in_ones_too() -> None:
    wrong = InvalidArgumentError("k", "must be positive, got 0")
    assert str(wrong) == "k: must be positive, got 0" and wrong.argument == "k"
    large = BudgetExceededError("enumerating", 12_345, 1_000, "use fewer tokens")
    assert str(large) == "enumerating needs 12,345, over the budget of 1,000; use fewer tokens"
    assert (large.count, large.budget) == (12_345, 1_000)
    assert TrainingError("NaN", Path("x.pt")).path == Path("x.pt") and TrainingError("NaN").path is None
    for error in (wrong, large, LossError("x")):
        assert isinstance(error, OpdTheoryError) and isinstance(error, ValueError)
    assert issubclass(TrainingError, RuntimeError) and issubclass(TrainingError, OpdTheoryError)


@pytest.mark.parametrize("value", [0, -1, True, 1.0, "1", None])
def test_what_is_no_positive_integer_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^n: must be an integer of at least 1, got {value!r}$"):
        check_integer("n", value)


def test_integers_in_a_range() -> None:
    for value in (0, 2):
        check_integer("n", value, 0, 2)
    for value in (-1, 3):
        with pytest.raises(InvalidArgumentError, match=rf"^n: must be an integer in \[0, 2\], got {value}$"):
            check_integer("n", value, 0, 2)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), True, "1", None])
def test_what_is_no_number_above_zero_is_refused(value: object) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^x: must be a number above 0, got {value!r}$"):
        check_between("x", value)


def test_numbers_between_bounds() -> None:
    for fine in (1e-300, 0.5, np.float32(0.5), 1, float("inf")):
        check_between("x", fine)
    check_between("x", 0.5, 0.0, 1.0)
    for wrong in (0.0, 1.0, 2.0, float("nan")):
        with pytest.raises(InvalidArgumentError, match=f"^x: must be a number strictly between 0 and 1, got {wrong}$"):
            check_between("x", wrong, 0.0, 1.0)


@pytest.mark.parametrize(
    "error",
    [
        errors.InvalidArgumentError("eos", "must be a token"),
        errors.BudgetExceededError("batches", 10, 5, "audit fewer"),
        errors.LossError("the loss has no gradient"),
        errors.IntegrationError("trl is missing"),
        errors.NotFiniteError("the loss is NaN", (2, 3, 4)),
        errors.TrainingError("the loss is NaN"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_pass_between_processes(error):
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is type(error) and str(again) == str(error) and vars(again) == vars(error)
