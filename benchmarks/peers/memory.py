"""The memory of the loss from hidden states on a GPU, predicted, and what torch allocates, counted on any device."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opdtheory.kernels.products import chunk_rows, wide_dtype

__all__ = ["Allocations", "memory_of_hidden"]


def memory_of_hidden(
    tokens: int, width: int, words: int, dtype: torch.dtype, trained: bool = True, bias: bool = False
) -> int:
    """The most bytes beyond the inputs that `fused_linear_divergence` holds on a GPU at once, with the gradients.

    Two chunks of logits, and a row of sums for the bias, are held while the gradients of the head and of the bias are
    summed, in the dtype of the logits. They are freed before these gradients are rounded. The gradient of the hidden
    states is rounded chunk by chunk, of float16 in the backward pass, which rounds all. Other matrices of a chunk with
    `width` columns, and numbers for each position, are left out.
    """
    wide = wide_dtype(dtype)
    rows = min(tokens, chunk_rows(words, wide, torch.device("cuda")))
    chunk = wide.itemsize * words * (2 * rows + bias)
    summed = words * (width * trained + bias)
    rounded = 0 if dtype == wide else dtype.itemsize * summed
    states = (wide if dtype == torch.float16 else dtype).itemsize * tokens * width
    return wide.itemsize * summed + max(chunk, rounded) + states


class Allocations(TorchDispatchMode):
    """The bytes of tensors that operations make, as long as they live; views and what is written to count nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.most = 0
        self._known: set[int] = set()
        self._counts = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {_key(each) for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result) if self._counts else ():
            if isinstance(each, Tensor) and _key(each) not in given | self._known:
                self._add(each)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage, key = tensor.untyped_storage(), _key(tensor)
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        self.most = max(self.most, self.held)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that is made within."""
        before, self._counts = self._counts, False
        try:
            yield
        finally:
            self._counts = before


def _key(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
