"""What the benchmarks share: the machine's name, alternated medians, the memory of a run, a section of a page."""

from __future__ import annotations

import ctypes
import math
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

Run = Callable[[], object]


def machine() -> str:
    """Processor, cores, torch and its threads."""
    name = platform.processor() or platform.machine()
    try:
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    except OSError:
        pass
    gpu = f"{torch.cuda.get_device_name()}, beside " if torch.cuda.is_initialized() else ""
    return f"{gpu}{name}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"


def seconds(run: Run) -> float:
    """Wall-clock time of one run, until a GPU in use has done what it was given."""
    _settle()
    start = time.perf_counter()
    run()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def in_turn(subjects: dict[str, Run], repeats: int, before: Run = lambda: None) -> dict[str, float]:
    """Medians of alternated repeats, after one run of each that is not counted; `before` each the clock stands."""
    taken: dict[str, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, run in subjects.items():
            before()
            spent = seconds(run)
            if repeat:
                taken[name].append(spent)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak(run: Run) -> float:
    """The memory, in MB, that a run takes at its peak beyond what there was before; NaN if unknown.

    Resident memory, or where a GPU is in use what torch has allocated there.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    try:
        # What the allocator keeps of freed memory would hide what a run takes.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1e6
    except (OSError, AttributeError):
        return math.nan


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return 1024 * int(line.split()[1])
    raise OSError(field)


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent of a power law, by least squares on logarithms."""
    x, y = ([math.log(pair[which]) for pair in points] for which in (0, 1))
    return statistics.linear_regression(x, y).slope


def write(page: Path, script: str, text: str) -> None:
    """Replace the section of a page that is between the two marks of a script."""
    begin, end = f"<!-- begin: {script} -->", f"<!-- end: {script} -->"
    old = page.read_text(encoding="utf-8")
    head, tail = old.split(begin)[0], old.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")
