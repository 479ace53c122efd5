"""Time and memory of calls on this machine, and the machine's name."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import TypeAlias, TypeVar

import torch

__all__ = ["Name", "Run", "cores", "in_turn", "machine", "peak", "processor", "seconds"]

Run: TypeAlias = Callable[[], object]


def machine() -> str:
    """The processor, cores, torch and its threads, and the GPU if one is in use."""
    gpu = f"{torch.cuda.get_device_name()}, beside " if torch.cuda.is_initialized() else ""
    return (
        f"{gpu}{processor()}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"
    )


def processor() -> str:
    """The processor's model, or the architecture where the system does not name it."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return name
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def seconds(call: Run) -> float:
    """The wall-clock time of one run, including the work that it leaves to a GPU in use."""
    _settle()
    start = time.perf_counter()
    call()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


Name = TypeVar("Name", bound=Hashable)


def in_turn(
    subjects: Mapping[Name, Run], repeats: int, before: Run = lambda: None, timer: Callable[[Run], float] = seconds
) -> dict[Name, float]:
    """The median time of each subject over alternating repeats, the first not counted; `before` is not timed."""
    taken: dict[Name, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, call in subjects.items():
            before()
            spent = timer(call)
            if repeat:
                taken[name].append(spent)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak(call: Run) -> float:
    """The peak memory of a run beyond what was in use before, in MB; NaN if unknown.

    It is resident memory, or what torch has allocated on a GPU in use.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    try:
        # Freed memory that the allocator keeps would hide what a run takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        call()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return math.nan


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(field)
