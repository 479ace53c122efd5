r"""Which program does the rows of a batch, and with what numbers."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.kernels.programs.resident import COLUMNS, PEEK, resident_program
from opdtheory.kernels.programs.whole_row import whole_row_program

__all__ = [
    *("BLOCK", "BLOCK_WARPS", "HELD", "WARPS"),
    *("Group", "Program", "constants", "group_of", "program_of", "run_program", "splits"),
]

# Tokens that a member of a group holds: two members of four warps fill the registers of a processor.
HELD, WARPS, _PER_PROCESSOR = 8192, 4, 2
# A row takes no more members than this share of those that run at once: the others must not wait for an incomplete one.
_SHARE = 8
# Tokens that a program of a whole row processes together, and its warps.
BLOCK, BLOCK_WARPS = 2048, 8
_CROSS = ("forward_kl", "reverse_kl", "jeffreys")


class Program(NamedTuple):
    """What a program knows about its divergence: a kind, a parameter, and what `-inf` among the logits costs."""

    kind: str
    parameter: float
    at_zero: float
    slope_at_infinity: float


@functools.lru_cache(maxsize=256)
def program_of(label: str) -> Program:
    """The program of a divergence that has a fast form."""
    divergence = as_divergence(label)
    kind, parameter = divergence.name, next(iter(divergence.parameters.values()), 0.0)
    if kind == "jsd":
        kind, parameter = "skew_jsd", 0.5
    elif kind == "alpha" and parameter in (0.0, 1.0):
        kind = "forward_kl" if parameter else "reverse_kl"
    elif kind == "alpha":
        kind = "power_of_student" if parameter < 0.5 else "power_of_teacher"
    elif kind in ("skew_forward_kl", "skew_reverse_kl") and not parameter:
        kind = kind.removeprefix("skew_")
    slope = float(divergence.log_slope(torch.zeros((), dtype=torch.float64, device="cpu")))
    return Program(kind, parameter, divergence.at_zero + slope, divergence.slope_at_infinity - slope)


def constants(label: str, narrow: bool, interpreted: bool = False) -> dict[str, Any]:
    """What a program is compiled for, with weights and a gradient: a divergence, and logits of two bytes or more."""
    kind = program_of(label).kind
    return {
        "KIND": kind,
        "CROSS": kind in _CROSS,
        "NARROW": narrow,
        # Interpreted, and on other makers' GPUs, a program has no instructions of NVIDIA's.
        "COARSE": narrow and not interpreted and torch.version.hip is None,
        "WEIGHED": True,
        "WANTED": True,
        "FILLED": False,
    }


class Group(NamedTuple):
    """How many programs hold a row together, how many tokens each holds, and how many groups run at once."""

    members: int
    held: int
    groups: int


def group_of(rows: int, words: int, device: torch.device) -> Group | None:
    """The groups that hold rows of logits in registers, or None where a row is too long for the device."""
    if device.type == "cpu":
        # Interpreted one after the other, so that none can wait for another one.
        return Group(1, triton.next_power_of_2(words), rows) if words <= HELD else None
    if torch.version.hip is not None:
        return None
    members = -(-words // HELD)
    held = HELD if members > 1 else max(PEEK, triton.next_power_of_2(words))
    # Shorter blocks need fewer registers; more than 16 programs on a processor have no use.
    at_once = min(16, _PER_PROCESSOR * HELD // held)
    capacity = at_once * torch.cuda.get_device_properties(device).multi_processor_count
    return None if members * _SHARE > capacity else Group(members, held, min(rows, capacity // members))


def splits(rows: int, words: int, device: torch.device) -> bool:
    """Whether `run_program` can write a gradient in float32 as two numbers in bfloat16."""
    return group_of(rows, words, device) is not None


def run_program(
    divergence: Divergence,
    student: Tensor,
    teacher: Tensor,
    scale: float,
    weights: Tensor | None,
    values: Tensor,
    gradient: Tensor | None,
    rest: int | None = None,
    fill: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Fill in values and gradients as `sweep` does, for matrices and vectors.

    Args:
        divergence: the generator, which has a fast form.
        student: logits, `(N, V)`, of float32 or narrower.
        teacher: logits of the same shape.
        scale: the inverse temperature.
        weights: `(N,)`, or None for ones.
        values: `(N,)`, overwritten, of float32 or float64.
        gradient: `(N, V)`, or None; it may be `student` itself.
        rest: if not None, the gradient is bfloat16 and is followed at this distance by what its rounding took.
        fill: what rows get that are left to do, as value and gradient; if None, nothing is written to them.

    Returns:
        A state, `(1,)`, for `any_left`, and which rows are left to do, `(N,)`.
    """
    rows, words = student.shape
    program = program_of(divergence.label)
    left = torch.empty(rows, dtype=torch.bool, device=student.device)
    group = group_of(rows, words, student.device)
    # A flag and the tickets of programs in the first word, and then the boards of groups.
    board = 0 if group is None else 2 * COLUMNS * triton.next_power_of_2(group.members) * group.groups
    boards = torch.zeros(1 + board, dtype=torch.int64, device=student.device)
    state = boards[:1].view(torch.int32)
    slopes, factors = student if gradient is None else gradient, values if weights is None else weights
    tensors = (student, teacher, slopes, factors, values, left, state)
    strides = (*student.stride(), *teacher.stride(), *slopes.stride())
    empty = 0.0 if fill is None else fill
    numbers = (empty, scale, program.parameter, 1.0 - program.parameter, program.at_zero, program.slope_at_infinity)
    interpreted = student.device.type == "cpu"
    options = constants(divergence.label, student.itemsize == teacher.itemsize == 2, interpreted)
    options |= {"WEIGHED": weights is not None, "WANTED": gradient is not None, "FILLED": fill is not None}
    # Products and sums are fused only where the programs say so: at the teacher, q - p must be exactly zero.
    options |= {} if interpreted else {"enable_fp_fusion": False}
    narrow = options.pop("NARROW")
    if group is None:
        whole_row_program[(rows,)](*tensors, *strides, words, *numbers, BLOCK=BLOCK, num_warps=BLOCK_WARPS, **options)
        return state[:1], left
    resident_program[(group.groups * group.members,)](
        *tensors,
        boards[1:],
        *strides,
        0 if rest is None else rest,
        rows,
        words,
        *numbers,
        group.members,
        group.groups,
        NARROW=narrow,
        SPLIT=rest is not None,
        ALONE=group.members == 1,
        SLOTS=triton.next_power_of_2(group.members),
        BLOCK=group.held,
        num_warps=WARPS,
        **options,
    )
    return state[:1], left
