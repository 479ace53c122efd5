r"""`opdtheory bench`: whole-vocabulary losses against the textbook formula by autograd, on the machine at hand."""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import functools
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor

from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError, OpdTheoryError
from opdtheory.kernels import fused_divergence

__all__ = ["Comparison", "Run", "compare", "in_turn", "machine", "peak", "run", "seconds"]

Run: TypeAlias = Callable[[], object]

HOLDS, FAILS, USAGE = 0, 1, 2

_DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "total_variation")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
# Of a row's gradient in norm, over its norm: what the rounding of each dtype leaves, ten times over.
_ALLOWED = {torch.float64: 1e-11, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}


@dataclass(frozen=True)
class Comparison:
    """One divergence, forward and backward: `fused_divergence`, and the textbook formula that it replaces.

    Attributes:
        divergence: its label.
        milliseconds: of the fused loss, the median.
        textbook_milliseconds: of the formula.
        megabytes: what the fused loss takes beyond its inputs, at its peak; NaN if unknown.
        textbook_megabytes: the same of the formula.
        difference: the largest distance of a row's gradient from float64, over its norm.
        allowed: the largest difference that the dtype explains.
    """

    divergence: str
    milliseconds: float
    textbook_milliseconds: float
    megabytes: float
    textbook_megabytes: float
    difference: float
    allowed: float

    @property
    def agrees(self) -> bool:
        """Whether the gradient is right."""
        return self.difference <= self.allowed


def compare(
    divergences: Sequence[str] = _DIVERGENCES,
    *,
    tokens: int = 64,
    vocabulary: int = 151_936,
    repeats: int = 5,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> list[Comparison]:
    r"""Time, memory and error of $\sum_n D_f(q_n \| p_n)$ and its gradient, side by side with the textbook formula.

    The formula is two log-softmaxes and $\sum_a p_a f(q_a/p_a)$ by autograd, `f` as it is written. Each repeat runs
    every subject once, so that a machine that slows down slows all of them; what is told are medians.

    Args:
        divergences: names or labels of the catalogue.
        tokens: rows of logits.
        vocabulary: words of a row.
        repeats: of each subject, after one run that is not counted.
        dtype: of the logits.
        device: where the losses are computed.
        seed: of the logits, Gaussian with the spread of a language model's.

    Raises:
        InvalidArgumentError: an unknown divergence, dtype or device, or a number that is not positive.
    """
    for name, number in (("tokens", tokens), ("vocabulary", vocabulary), ("repeats", repeats)):
        if isinstance(number, bool) or not isinstance(number, int) or number < 1:
            raise InvalidArgumentError(name, f"is {number!r}; a positive integer is needed")
    if dtype not in _ALLOWED:
        raise InvalidArgumentError("dtype", f"is {dtype}; one of {', '.join(_DTYPES)} is needed")
    members = [as_divergence(name) for name in divergences]
    generator = torch.Generator().manual_seed(seed)
    ours, noise = (torch.randn(tokens, vocabulary, generator=generator) for _ in range(2))
    try:
        student, teacher = ((3 * ours + x).to(device, dtype) for x in (torch.zeros(1), noise))
    except (RuntimeError, AssertionError) as error:  # torch's words for a device that it does not know, or has not
        raise InvalidArgumentError("device", f"is {device!r}: {str(error).splitlines()[0]}") from None
    student.requires_grad_()

    def fused(name: str) -> Run:
        return lambda: fused_divergence(student, teacher, name).sum().backward()

    def textbook(name: str) -> Run:
        return lambda: _textbook(name, student, teacher).backward()

    kinds = {"fused": fused, "textbook": textbook}
    subjects = {(d.label, kind): make(d.label) for d in members for kind, make in kinds.items()}

    def forget() -> None:
        student.grad = None

    times = in_turn(subjects, repeats, forget)
    memory = {}
    for key, call in subjects.items():
        forget()
        memory[key] = peak(call)
    return [
        Comparison(
            d.label,
            1e3 * times[d.label, "fused"],
            1e3 * times[d.label, "textbook"],
            memory[d.label, "fused"],
            memory[d.label, "textbook"],
            _difference(d.label, student, teacher),
            _ALLOWED[dtype],
        )
        for d in members
    ]


def _textbook(name: str, student: Tensor, teacher: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    return (log_p.exp() * _generator(name)(torch.exp(log_q - log_p))).sum()


@functools.lru_cache
def _generator(name: str) -> Callable[[Tensor], Tensor]:
    """The generator as its formula says, not as the library evaluates it."""
    import sympy

    from opdtheory.divergences.transform import symbol

    functions = {"log": torch.log, "exp": torch.exp, "sqrt": torch.sqrt, "Abs": torch.abs}
    formula: Callable[[Tensor], Tensor] = sympy.lambdify(symbol(), as_divergence(name).expr, [functions])
    return formula


def _difference(name: str, student: Tensor, teacher: Tensor, rows: int = 8) -> float:
    """Of the fused gradient of the first rows from the textbook's in float64."""
    some = student.detach()[:rows].requires_grad_()
    wide = some.detach().double().requires_grad_()
    (found,) = torch.autograd.grad(fused_divergence(some, teacher[:rows], name).sum(), some)
    (exact,) = torch.autograd.grad(_textbook(name, wide, teacher[:rows].double()), wide)
    norms = exact.norm(dim=-1).clamp_min(torch.finfo(torch.float64).tiny)
    return float(((found.double() - exact).norm(dim=-1) / norms).max())


def machine() -> str:
    """Processor, cores, torch and its threads, and the GPU if one is in use."""
    name = platform.processor() or platform.machine()
    try:
        models = [x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")]
        name = models[0].split(":")[1].strip() if models else name
    except OSError:
        pass
    gpu = f"{torch.cuda.get_device_name()}, beside " if torch.cuda.is_initialized() else ""
    return f"{gpu}{name}, {os.cpu_count()} cores, torch {torch.__version__} with {torch.get_num_threads()} threads"


def seconds(call: Run) -> float:
    """Wall-clock time of one run, until a GPU in use has done what it was given."""
    _settle()
    start = time.perf_counter()
    call()
    _settle()
    return time.perf_counter() - start


def _settle() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


Name = TypeVar("Name", bound=Hashable)


def in_turn(subjects: Mapping[Name, Run], repeats: int, before: Run = lambda: None) -> dict[Name, float]:
    """Medians of alternated repeats, after one run of each that is not counted; `before` each the clock stands."""
    taken: dict[Name, list[float]] = {name: [] for name in subjects}
    for repeat in range(repeats + 1):
        for name, call in subjects.items():
            before()
            spent = seconds(call)
            if repeat:
                taken[name].append(spent)
    return {name: statistics.median(times) for name, times in taken.items()}


def peak(call: Run) -> float:
    """The memory, in MB, that a run takes at its peak beyond what there was before; NaN if unknown.

    Resident memory, or where a GPU is in use what torch has allocated there.
    """
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        call()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    try:
        # What the allocator keeps of freed memory would hide what a run takes.
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


def run(options: argparse.Namespace) -> int:
    """Compare as the options say, print the table; the exit status is 1 if a gradient is wrong."""
    try:
        rows = compare(
            options.divergences or _DIVERGENCES,
            tokens=options.tokens,
            vocabulary=options.vocabulary,
            repeats=options.repeats,
            dtype=_DTYPES[options.dtype],
            device=options.device,
        )
    except OpdTheoryError as error:
        print(f"opdtheory bench: {error}", file=sys.stderr)
        return USAGE
    if options.json:
        print(json.dumps({"machine": machine(), "rows": [_as_json(row) for row in rows]}, indent=2))
    else:
        print(f"{options.tokens} x {options.vocabulary:,} words, {options.dtype}, forward and backward")
        print(machine(), end="\n\n")
        print(_as_text(rows))
    return HOLDS if all(row.agrees for row in rows) else FAILS


def _as_json(row: Comparison) -> dict[str, Any]:
    # JSON has no NaN.
    values = {name: None if value != value else value for name, value in dataclasses.asdict(row).items()}
    return {**values, "agrees": row.agrees}


_COLUMNS = ("divergence", "ms", "textbook", "of its time", "MB", "textbook", "of its memory", "gradient off by", "")


def _as_text(rows: Sequence[Comparison]) -> str:
    table = [_COLUMNS]
    for row in rows:
        table.append(
            (
                row.divergence,
                f"{row.milliseconds:.2f}",
                f"{row.textbook_milliseconds:.2f}",
                f"{row.milliseconds / row.textbook_milliseconds:.3f}",
                f"{row.megabytes:.0f}",
                f"{row.textbook_megabytes:.0f}",
                f"{row.megabytes / row.textbook_megabytes:.3f}" if row.textbook_megabytes else "-",
                f"{row.difference:.0e}",
                "" if row.agrees else f"WRONG: more than {row.allowed:.0e}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join(lines)
