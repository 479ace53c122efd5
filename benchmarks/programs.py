"""What the programs of a GPU cost, counted without one: registers, instructions and bytes of the compiled code.

`python benchmarks/programs.py` compiles every program for an architecture (H200: 90) by Triton alone, and reads what
its assembler made. It prints, for each divergence and dtype, the registers of a thread, what it spills, and the
instructions for a logit, without those that only rows with a token of probability zero take. From these follow three
times that no run of a program can beat on a GPU: its bytes at the speed of a copy, its instructions at one for each
scheduler and cycle, and its exponentials and logarithms at eight cycles for a warp. `--write docs/gpu.md` puts
the table into that page.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from opdtheory.divergences import names as catalogue  # noqa: E402

# An H200: processors, cycles a second, schedulers of 32 lanes, and the speed of a copy [measured].
PROCESSORS, CYCLES, SCHEDULERS, COPY = 132, 1.98e9, 4, 4.238e12
TOKENS, WORDS = 4_096, 151_936
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
NUMBERS = ("empty", "scale", "a", "b", "at_zero", "slope_at_infinity")
# What programs point to, but logits.
POINTERS = {
    "weights": "*fp32",
    "values": "*fp32",
    "left": "*i1",
    "state": "*i32",
    "boards": "*i64",
    "ids": "*i64",
    "tops": "*fp32",
    "sums": "*fp64",
    "factors": "*fp32",
    "found": "*fp64",
    "numbers": "*fp32",
    "results": "*fp64",
}
FAMILIES = {
    "alpha": ("alpha(alpha=0.3)", "alpha(alpha=1.5)"),
    "skew_jsd": ("skew_jsd(beta=0.1)",),
    "skew_forward_kl": ("skew_forward_kl(lam=0.1)",),
    "skew_reverse_kl": ("skew_reverse_kl(lam=0.1)",),
}


def labels() -> list[str]:
    """A member of the catalogue for each program."""
    return [label for name in catalogue() for label in FAMILIES.get(name, (name,)) if label != "jsd"]


class Compiled(NamedTuple):
    """What the assembler made of a program: registers and spilled bytes of a thread, and its instructions by name."""

    registers: int
    spilled: int
    instructions: Counter[str]


def resident(label: str, dtype: torch.dtype, architecture: int, **changes: Any) -> Compiled:
    """The program that holds rows of logits together, with weights and a gradient."""
    from opdtheory.kernels.programs.launch import HELD, WARPS, constants
    from opdtheory.kernels.programs.resident import resident_program

    fixed = {
        **constants(label, dtype.itemsize == 2),
        "SPLIT": False,
        "ALONE": False,
        "SLOTS": 32,
        "BLOCK": HELD,
        **changes,
    }
    return compiled(resident_program, fixed, dtype, architecture, WARPS)


def whole_row(label: str, dtype: torch.dtype, architecture: int, **changes: Any) -> Compiled:
    """The program that reads a row several times, with weights and a gradient."""
    from opdtheory.kernels.programs.launch import BLOCK, BLOCK_WARPS, constants
    from opdtheory.kernels.programs.whole_row import whole_row_program

    fixed = {**constants(label, dtype.itemsize == 2), "BLOCK": BLOCK, **changes}
    return compiled(whole_row_program, fixed, dtype, architecture, BLOCK_WARPS)


def compiled(program: Any, fixed: dict[str, Any], dtype: torch.dtype, architecture: int, warps: int) -> Compiled:
    """A program compiled by Triton for tensors of contiguous rows."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    logits = dict.fromkeys(("student", "teacher", "logits", "gradient"), f"*{DTYPES[dtype]}")
    pointers = POINTERS | logits | ({"gradient": "*bf16"} if fixed.get("SPLIT") else {})
    fixed = fixed | {name: 1 for name in program.arg_names if name.endswith("_word")}
    fixed = {name: each for name, each in fixed.items() if name in program.arg_names}
    types = pointers | dict.fromkeys(NUMBERS, "fp32") | dict.fromkeys(fixed, "constexpr")
    aligned = {*pointers, "words", "span", "gradient_rest"}
    attributes = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(program.arg_names)
        if name in aligned or name.endswith("_row")
    }
    source = ASTSource(program, {name: types.get(name, "i32") for name in program.arg_names}, fixed, attributes)
    made = triton.compile(
        source, target=GPUTarget("cuda", architecture, 32), options={"num_warps": warps, "enable_fp_fusion": False}
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        usage = _output(tools / "cuobjdump", "-res-usage", file.name)
        listing = _output(tools / "nvdisasm", "-gi", "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return Compiled(int(found[1]), int(found[2]), Counter(_usual(listing, program)))


def _output(*command: object) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def _usual(listing: str, program: Any) -> Iterator[str]:
    """The instructions, without those of lines that only rows with a token of probability zero reach."""
    seldom = set(_seldom(program))
    place: set[tuple[str, int]] = set()
    marked = False
    for line in listing.splitlines():
        # Before an instruction of another line: that line, and those that it is inlined at.
        mark = re.match(r'\s*//## File "(.*?)", line (\d+)', line)
        if mark:
            place = (place if marked else set()) | {(Path(mark[1]).name, int(mark[2]))}
        found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9]+)", line)
        if found and not seldom & place:
            yield found[1]
        marked = bool(mark)


def _seldom(program: Any) -> Iterator[tuple[str, int]]:
    """The lines for tokens of probability zero, for rows of weight zero, and before the loop over rows."""
    file = Path(program.fn.__code__.co_filename)
    lines = file.read_text(encoding="utf-8").splitlines()
    begins = next(number for number, line in enumerate(lines) if line.startswith(f"def {program.fn.__name__}("))
    loop = next((number for number, line in enumerate(lines) if line.startswith("    while row < rows:")), begins)
    depth = None
    for number, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if depth is not None and line.strip() and indent <= depth:
            depth = None
        if depth is not None or begins <= number < loop:
            yield file.name, number + 1
        if line.strip() in ("if holes:", "while weight == 0.0:"):
            depth = indent


def rows(architecture: int) -> Iterator[str]:
    """A row of the table for each program and dtype."""
    from opdtheory.kernels.programs.launch import HELD, WARPS

    for label in labels():
        for dtype in DTYPES:
            found = resident(label, dtype, architecture)
            each = HELD / (32 * WARPS)
            total = sum(found.instructions.values()) / each
            special = found.instructions["MUFU"] / each
            logits = TOKENS * WORDS
            lanes = PROCESSORS * CYCLES * SCHEDULERS
            times = (3 * logits * dtype.itemsize / COPY, logits * total / 32 / lanes, logits * special / 4 / lanes)
            cells = [f"{1e3 * time:.2f}" for time in times]
            yield (
                f"| `{label}` | {str(dtype)[6:]} | {found.registers} | {found.spilled} | {total:.0f} | {special:.1f} | "
                f"{' | '.join(cells)} | {times[0] / max(times):.0%} |"
            )


def others(architecture: int) -> Iterator[str]:
    """A line for each program and way of compiling that is not in the table."""
    for label in labels():
        found = whole_row(label, torch.float32, architecture)
        yield f"whole row, {label}, float32: {found.registers} registers, {found.spilled} bytes spilled"
    found = whole_row("jsd", torch.bfloat16, architecture)
    yield f"whole row, jsd, bfloat16: {found.registers} registers, {found.spilled} bytes spilled"
    ways: dict[str, dict[str, Any]] = {
        "alone": {"ALONE": True, "SLOTS": 1},
        "in two halves": {"SPLIT": True},
        "without a gradient": {"WANTED": False},
        "without weights": {"WEIGHED": False},
        "in a graph": {"FILLED": True},
    }
    for way, changes in ways.items():
        found = resident("jsd", torch.float32, architecture, **changes)
        yield f"resident, jsd, float32, {way}: {found.registers} registers, {found.spilled} bytes spilled"


def of_few(architecture: int) -> Iterator[str]:
    """The programs for a few tokens of each row, and for a vocabulary in parts."""
    from opdtheory.kernels.programs.few_tokens import shares_program, sums_program
    from opdtheory.kernels.programs.launch import constants
    from opdtheory.kernels.programs.launch_few import BLOCK, WARPS
    from opdtheory.kernels.programs.parts import part_slopes_program, part_sums_program, part_terms_program

    for dtype, name in DTYPES.items():
        cases = [("", program) for program in (sums_program, shares_program)]
        cases += [
            (label, program)
            for label in labels()
            for program in (part_sums_program, part_terms_program, part_slopes_program)
        ]
        for label, program in cases:
            fixed = constants(label or "jsd", dtype.itemsize == 2)
            if program is part_terms_program and fixed["CROSS"]:
                # The first pass finds all.
                continue
            found = compiled(program, {**fixed, "SLOTS": 64, "BLOCK": BLOCK}, dtype, architecture, WARPS)
            yield f"{program.__name__} {label} {name}: {found.registers} registers, {found.spilled} bytes spilled"


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--architecture", type=int, default=90, metavar="SM", help="as Triton numbers it (%(default)s)")
    parser.add_argument("--all", action="store_true", help="compile the other programs and ways too")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the table into this page")
    options = parser.parse_args(arguments)
    import triton

    lines = [
        f"By `python benchmarks/programs.py`, Triton {triton.__version__}, for architecture {options.architecture}; "
        f"times in milliseconds for {TOKENS:,} tokens x {WORDS:,} words on an H200 ({PROCESSORS} processors, "
        f"{CYCLES / 1e9:g} GHz, {COPY / 1e9:,.0f} GB/s). Counted, not measured.",
        "",
        "| | dtype | registers | spilled bytes | instructions a logit | of these exponentials and the like | "
        "time of the bytes | of the instructions | of the exponentials | share of the limit at most |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows(options.architecture):
        print(row, file=sys.stderr, flush=True)
        lines.append(row)
    text = "\n".join(lines)
    print(text)
    for kind in (others, of_few) if options.all else ():
        for line in kind(options.architecture):
            print(line)
    if options.write:
        from benchmarks.measure import write

        write(options.write, "benchmarks/programs.py", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
