"""Helpers that the benchmarks share: profiles, exponents, and sections of a page."""

from __future__ import annotations

import math
import statistics
from pathlib import Path
from typing import Any

import torch

from opdtheory.machine import Run


def operations(run: Run, before: Run = lambda: None, most: int = 8) -> str:
    """The operations that take the time of a run, with their shares; on a GPU in use, its kernels."""
    return shares(spent(run, before), most)


def spent(run: Run, before: Run = lambda: None) -> dict[str, float]:
    """The microseconds of each operation of a run, after one that is not looked at; on a GPU in use, of its kernels."""
    run()
    before()
    with torch.profiler.profile() as profile:
        run()
    return _self_times(profile.key_averages())


def shares(times: dict[str, float], most: int = 8) -> str:
    """The longest operations with their shares of the whole time."""
    total = sum(times.values())
    longest = sorted(times, key=lambda key: -times[key])[:most]
    return ", ".join(f"{key} {times[key] / total:.0%}" for key in longest)


def _self_times(events: list[Any]) -> dict[str, float]:
    if not torch.cuda.is_initialized():
        return {event.key.removeprefix("aten::"): event.self_cpu_time_total for event in events}
    kernels = {event.key: event.self_device_time_total for event in events if event.device_type.name == "CUDA"}
    times: dict[str, float] = {}
    for key, time in kernels.items():
        name = key.split("<")[0].split("(")[0].removeprefix("void ")
        times[name] = times.get(name, 0.0) + time
    return times


def slope(points: list[tuple[float, float]]) -> float:
    """The exponent of a power law, by least squares on logarithms."""
    x, y = ([math.log(pair[which]) for pair in points] for which in (0, 1))
    return statistics.linear_regression(x, y).slope


def write(page: Path, script: str, text: str) -> None:
    """Replace the section of a page between the two marks of a script."""
    begin, end = f"<!-- begin: {script} -->", f"<!-- end: {script} -->"
    old = page.read_text(encoding="utf-8")
    head, tail = old.split(begin)[0], old.split(end)[1]
    page.write_text(f"{head}{begin}\n\n{text}\n\n{end}{tail}", encoding="utf-8")
