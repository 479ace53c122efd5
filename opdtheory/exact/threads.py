"""One torch thread for work on tiny tensors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["one_thread"]


@contextmanager
def one_thread() -> Iterator[None]:
    """Run a block with one intra-op thread and restore the number of threads afterwards.

    Thousands of operations on a few hundred numbers each gain nothing from threads, and waiting for threads on a busy
    machine can cost milliseconds per call.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
