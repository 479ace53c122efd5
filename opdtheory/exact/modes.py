"""The global modes of torch under which exact numbers are computed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["plain_modes"]


@contextmanager
def plain_modes() -> Iterator[None]:
    """Run a block as if no global mode were set, on one thread, and restore everything afterwards.

    Gradients are recorded even under `torch.no_grad` or `torch.inference_mode`, nothing is cast by `torch.autocast`,
    and new tensors are float32 on the CPU whatever the defaults. Thousands of operations on a few hundred numbers each
    gain nothing from threads, and waiting for threads on a busy machine can cost milliseconds per call.
    """
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    try:
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
                stack.enter_context(torch.autocast(device, enabled=False))
            if torch.get_default_device().type != "cpu":
                stack.enter_context(torch.device("cpu"))
            yield
    finally:
        torch.set_num_threads(threads)
        torch.set_default_dtype(dtype)
