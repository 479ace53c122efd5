"""The kernels of our losses, with the traffic that they would make for so many readings of the logits."""

from __future__ import annotations

from typing import Any

from benchmarks.measure import shares, spent
from benchmarks.peers.subjects import OURS, TRANSFERS, Inputs, subjects
from benchmarks.peers.timing import Clock, Guarded

__all__ = ["READINGS", "profiled"]

# A program that reads both rows n times and writes the gradient once moves 2 n + 1 times the logits.
READINGS = (1, 2, 3)


def profiled(inputs: Inputs, divergences: tuple[str, ...], clock: Clock) -> list[dict[str, Any]]:
    """For each divergence the device's busy time in ms, its kernels' shares, and GB/s for each number of readings."""
    rows = []
    for divergence in divergences:
        subject = Guarded(divergence, subjects(inputs)[divergence, OURS], clock)
        row: dict[str, Any] = {"divergence": divergence, "by": OURS}
        inputs.forget()
        times = spent(subject, inputs.forget)
        if subject.failed:
            row["failed"] = subject.failed
        else:
            busy = sum(times.values())
            row |= {"busy_ms": busy / 1e3, "kernels": shares(times)}
            if inputs.kind in TRANSFERS and busy:
                logits = inputs.tensors["student"]
                size = logits.numel() * logits.element_size()
                row["gb_s"] = [(2 * n + 1) * size / busy / 1e3 for n in READINGS]
        inputs.forget()
        rows.append(row)
    return rows
