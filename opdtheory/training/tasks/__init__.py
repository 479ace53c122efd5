"""Tasks with exact verifiers: addition by columns, calculator calls, chains of definitions modulo ten."""

from __future__ import annotations

from collections.abc import Callable

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.tasks.addition import Addition
from opdtheory.training.tasks.modular import Modular
from opdtheory.training.tasks.task import Example, Split, Task, split_of
from opdtheory.training.tasks.tools import Calculator, Tools

__all__ = ["TASKS", "Addition", "Calculator", "Example", "Modular", "Split", "Task", "Tools", "split_of", "task"]

TASKS: dict[str, Callable[[], Task]] = {"arithmetic": Addition, "tools": Tools, "modular": Modular}


def task(name: str) -> Task:
    """A task by its name.

    Raises:
        InvalidArgumentError: no task has that name.
    """
    if name not in TASKS:
        raise InvalidArgumentError("task", f"is {name!r}; one of {', '.join(TASKS)} is needed")
    return TASKS[name]()
