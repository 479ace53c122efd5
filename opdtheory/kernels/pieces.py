"""Batches of any shape as matrices."""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

__all__ = ["matrices"]


def matrices(wide: list[Tensor], narrow: list[Tensor]) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Views of tensors `(..., V)` and `(...)` as matrices and vectors, in as few pieces as possible without a copy."""
    try:
        pieces = [each.view(-1, each.shape[-1]) for each in wide], [each.view(-1) for each in narrow]
    except RuntimeError:
        for index in range(wide[0].shape[0]):
            yield from matrices([each[index] for each in wide], [each[index] for each in narrow])
    else:
        yield pieces
