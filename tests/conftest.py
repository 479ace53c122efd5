"""Settings that every test shares."""

from __future__ import annotations

import os

import pytest

CHECKED = os.environ.get("OPDTHEORY_TYPECHECK", "") not in ("", "0")
if CHECKED:
    # Must come before the first import of opdtheory: the hook rewrites modules while they load.
    import jaxtyping

    jaxtyping.install_import_hook("opdtheory", "beartype.beartype")

import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# Workers share the cores among themselves; the tensors here are too small to gain from threads.
torch.set_num_threads(1)

# The mutation run draws more.
EXAMPLES = int(os.environ.get("OPDTHEORY_EXAMPLES", "15"))
settings.register_profile("default", max_examples=EXAMPLES, deadline=None, derandomize=True)
settings.register_profile("thorough", max_examples=1000, deadline=None)
settings.load_profile("default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notebooks first; skip the tests of the library's own messages where an annotation would be refused first."""
    # They share a kernel, so one worker runs them all: the others must have something left to do.
    items.sort(key=lambda item: "test_notebooks" not in item.nodeid)
    if CHECKED:
        # The run-time checker samples lists with `random`, which hypothesis warns of inside a strategy.
        random = pytest.mark.filterwarnings("ignore:Do not use the `random` module")
        skip = pytest.mark.skip(reason="OPDTHEORY_TYPECHECK: the annotation is refused before the library's check")
        for item in items:
            item.add_marker(random)
            if "bad_input" in item.keywords:
                item.add_marker(skip)
