"""Errors of values and gradients, of every subject, against float64 autograd of the textbook formula."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.subjects import FORMULA, WHOLE, Inputs, subjects
from benchmarks.peers.timing import Clock, Guarded, release

__all__ = ["errors", "exact", "off"]

# Logits in float64 that the reference holds at a time.
_BLOCK = 2**23


def errors(inputs: Inputs, clock: Clock) -> list[dict[str, Any]]:
    """A row for each subject: its error of the value, relative, and of each gradient, in norm over the norm."""
    rows: list[dict[str, Any]] = []
    references: dict[str, tuple[float, dict[str, Tensor]]] = {}
    for (divergence, by), build in subjects(inputs).items():
        row: dict[str, Any] = {"divergence": divergence, "by": by}
        inputs.forget()
        subject = Guarded(f"{divergence} by {by}", build, clock)
        found = subject.value()
        if found is None:
            row["failed"] = subject.failed
        else:
            if divergence not in references:
                references = {divergence: exact(inputs, divergence)}  # one at a time, as they are large
            wanted, gradients = references[divergence]
            row["value"] = abs(float(found) - wanted) / abs(wanted)
            row["gradient"] = {name: off(inputs.tensors[name].grad, each) for name, each in gradients.items()}
        rows.append(row)
    inputs.forget()
    release()
    return rows


def exact(inputs: Inputs, divergence: str) -> tuple[float, dict[str, Tensor]]:
    """The mean over the positions and its gradients in float64, of inputs as they were rounded, rows at a time."""
    wide = {name: _wide(each) for name, each in inputs.tensors.items() if name in WHOLE}
    total, gradients = (
        0.0,
        {name: torch.zeros_like(inputs.tensors[name], dtype=torch.float64) for name in inputs.leaves},
    )
    for rows in torch.arange(inputs.rows).split(max(1, _BLOCK // inputs.words)):
        part = slice(int(rows[0]), int(rows[-1]) + 1)
        tensors = {name: wide[name] if name in wide else _wide(each[part]) for name, each in inputs.tensors.items()}
        leaves = [tensors[name].requires_grad_() for name in inputs.leaves]
        value = FORMULA[inputs.kind](divergence, **tensors).sum() / inputs.rows
        total += float(value.detach())
        for name, found in zip(inputs.leaves, torch.autograd.grad(value, leaves), strict=True):
            (gradients[name] if name in WHOLE else gradients[name][part]).add_(found)
    return total, gradients


def _wide(tensor: Tensor) -> Tensor:
    return tensor.detach().double() if tensor.is_floating_point() else tensor


def off(found: Tensor | None, wanted: Tensor) -> float:
    """The error of a gradient in norm, over the norm of what is wanted."""
    assert found is not None
    return float((found.double() - wanted).norm() / wanted.norm())
