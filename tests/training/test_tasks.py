"""Tasks by name."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.tasks import TASKS, task


def test_tasks_have_names():
    assert [task(name).name for name in TASKS] == list(TASKS) == ["arithmetic", "tools", "modular"]
    with pytest.raises(InvalidArgumentError, match="task: must be one of arithmetic, tools, modular, got 'poetry'"):
        task("poetry")
