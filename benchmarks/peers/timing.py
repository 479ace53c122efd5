"""Times and memory of all subjects of a kind, alternated, with the two limits that they are held to."""

from __future__ import annotations

import contextlib
import gc
import math
import sys
import time
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers.subjects import PRODUCTS, TRANSFERS, Inputs, Loss, subjects
from opdtheory.machine import in_turn, peak

__all__ = ["Clock", "Guarded", "copy_speed", "limit", "measured", "operations", "reason", "release"]

# Letters of an error that a table has room for.
_ROOM = 110


class Clock:
    """The seconds since the start, and whether the time that was granted is over."""

    def __init__(self, granted: float = math.inf) -> None:
        self._start, self.granted = time.perf_counter(), granted

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._start

    @property
    def over(self) -> bool:
        return self.seconds > self.granted

    @property
    def refusal(self) -> str:
        """Why no further subject is begun."""
        return f"not run: the {self.granted:.0f} s that were granted are over"

    def say(self, text: str) -> None:
        """Print a line of progress with the seconds so far."""
        print(f"[{self.seconds:.1f} s] {text}", file=sys.stderr, flush=True)


def reason(error: Exception) -> str:
    """An error's name and first line, cut short."""
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return text if len(text) <= _ROOM else text[: _ROOM - 3].rstrip() + "..."


class Guarded:
    """A subject's forward and backward pass, which after an error does nothing but remember it."""

    def __init__(self, name: str, build: Any, clock: Clock) -> None:
        self.name, self._build, self._clock = name, build, clock
        self._loss: Loss | None = None
        self.failed = ""

    def value(self) -> Tensor | None:
        """The loss, made at the first call; None after an error."""
        if not self.failed and self._loss is None and self._clock.over:
            self.failed = self._clock.refusal
        if self.failed:
            return None
        try:
            first = self._loss is None
            if self._loss is None:
                self._loss = self._build()
            found = self._loss()
            found.backward()
            if first and found.is_cuda:
                torch.cuda.synchronize()  # so that an error of a kernel is raised here
        except Exception as error:
            self.failed, self._loss = reason(error), None
            return None
        return found.detach()

    def __call__(self) -> None:
        self.value()


def measured(inputs: Inputs, repeats: int, clock: Clock) -> list[dict[str, Any]]:
    """A row for each subject: its time in ms and its memory beyond the inputs in MB, or why it has none."""
    guarded, memory = {}, {}
    for key, build in subjects(inputs).items():
        guarded[key] = subject = Guarded(" by ".join(key), build, clock)
        inputs.forget()
        subject()  # imports and compiles
        inputs.forget()
        memory[key] = peak(subject)
        if subject.failed:
            release()
        clock.say(f"  {subject.name}{': ' * bool(subject.failed)}{subject.failed}")
    running = {key: subject for key, subject in guarded.items() if not subject.failed}
    times = in_turn(running, repeats, inputs.forget)
    inputs.forget()
    rows = []
    for key, subject in guarded.items():
        row: dict[str, Any] = {"divergence": key[0], "by": key[1]}
        if subject.failed:
            row["failed"] = subject.failed
        else:
            row |= {"ms": 1e3 * times[key], "mb": None if math.isnan(memory[key]) else memory[key]}
        rows.append(row)
    return rows


def copy_speed(elements: int, repeats: int, device: str) -> float:
    """GB/s of a copy on the device, what it reads and what it writes together."""
    source = torch.zeros(elements, device=device)
    target = torch.empty_like(source)
    took = in_turn({"copy": lambda: target.copy_(source)}, repeats)["copy"]
    return 2 * source.numel() * source.element_size() / took / 1e9


def limit(inputs: Inputs, copied: float, repeats: int) -> dict[str, float]:
    """The limit in ms: the least traffic at the speed of a copy, or the matrix products on their own."""
    if inputs.kind in TRANSFERS:
        logits = inputs.tensors["student"]
        traffic = TRANSFERS[inputs.kind] * logits.numel() * logits.element_size()
        return {"limit_ms": traffic / copied / 1e6}
    with torch.no_grad():
        student, head = inputs.tensors["student"], inputs.tensors["head"]
        logits = student @ head.T
        products = {
            "logits": lambda: torch.mm(student, head.T),
            "states": lambda: torch.mm(logits, head),
            "head": lambda: torch.mm(logits.T, student),
        }
        took = in_turn(products, repeats)
    seconds = 2 * took["logits"] + took["states"] + (took["head"] if inputs.kind == "hidden" else 0.0)
    return {"limit_ms": 1e3 * seconds, "tflop_s": operations(inputs) / seconds / 1e12}


def operations(inputs: Inputs) -> float:
    """Additions and multiplications of the matrix products."""
    return 2.0 * PRODUCTS[inputs.kind] * inputs.rows * inputs.tensors["head"].numel()


def release(compiled: bool = False) -> None:
    """Give back the memory that nothing holds any more; `compiled` forgets what torch compiled, too."""
    if compiled and "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # a function is compiled for a few shapes only
    gc.collect()
    if torch.cuda.is_initialized():
        with contextlib.suppress(RuntimeError):  # after an error of a kernel nothing works, which the rows say
            torch.cuda.empty_cache()
