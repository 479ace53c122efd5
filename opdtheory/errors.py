"""The exceptions of opdtheory, each of which is also the built-in one that a caller would catch."""

from __future__ import annotations

from numbers import Real
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pathlib import Path

# The public names; the checks below them are the library's own.
__all__ = [
    *("BudgetExceededError", "IntegrationError", "InvalidArgumentError", "LossError", "OpdTheoryError"),
    "TrainingError",
]


class OpdTheoryError(Exception):
    """Base class of every error that opdtheory raises on purpose."""

    def __reduce__(self) -> tuple[Any, ...]:
        # With its message and attributes as they are: a process pool hands errors on by pickle.
        return _restored, (type(self), self.args, vars(self))


def _restored(kind: type[OpdTheoryError], args: tuple[Any, ...], attributes: dict[str, Any]) -> OpdTheoryError:
    error = kind.__new__(kind)
    error.args = args
    vars(error).update(attributes)
    return error


class InvalidArgumentError(OpdTheoryError, ValueError):
    """An argument has a wrong shape, dtype, range or name; the message names the argument."""

    def __init__(self, argument: str, problem: str) -> None:
        super().__init__(f"{argument}: {problem}")
        self.argument = argument


class BudgetExceededError(OpdTheoryError, ValueError):
    """An exact enumeration would be larger than the budget; `count` and `budget` say by how much."""

    def __init__(self, what: str, count: int, budget: int, advice: str) -> None:
        super().__init__(f"{what} needs {count:,}, over the budget of {budget:,}; {advice}")
        self.count = count
        self.budget = budget


class IntegrationError(OpdTheoryError, ImportError):
    """A training framework is missing, or is of a version that its plug-in was not written for."""


class LossError(OpdTheoryError, ValueError):
    """A loss under audit is not a deterministic, differentiable scalar; the message names the cause."""


class NotFiniteError(LossError):
    """The value of a loss, or its gradient, is NaN or infinite; `shape` is that of the batch, `(B, T, V)`."""

    def __init__(self, message: str, shape: tuple[int, ...]) -> None:
        super().__init__(message)
        self.shape = shape


class TrainingError(OpdTheoryError, RuntimeError):
    """A training step cannot be taken: a loss, gradient or rollout is unusable; `path` is the file that holds it."""

    def __init__(self, message: str, path: Path | None = None) -> None:
        super().__init__(message)
        self.path = path


def check_integer(name: str, value: object, low: int = 1, high: int | None = None) -> None:
    """Raise unless a value is an integer of at least `low` and, if there is a `high`, at most that.

    Raises:
        InvalidArgumentError: the value is out of range or not an integer.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        wanted = f"of at least {low}" if high is None else f"in [{low}, {high}]"
        raise InvalidArgumentError(name, f"must be an integer {wanted}, got {value!r}")


def check_between(name: str, value: object, low: float = 0.0, high: float | None = None) -> None:
    """Raise unless a value is a number above `low` and, if there is a `high`, below that.

    Raises:
        InvalidArgumentError: the value is out of range or not a number.
    """
    number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else low
    if not low < number or (high is not None and not number < high):
        wanted = f"above {low:g}" if high is None else f"strictly between {low:g} and {high:g}"
        raise InvalidArgumentError(name, f"must be a number {wanted}, got {value!r}")
