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
    """The task of this name.

    Raises:
        InvalidArgumentError: no task has this name.
    """
    if name not in TASKS:
        raise InvalidArgumentError("task", f"must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]()
