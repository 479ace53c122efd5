"""Compile every program for a GPU that need not be there; run by a test as a process of its own, not interpreted."""

from __future__ import annotations

import sys
from typing import Any

NUMBERS = ("scale", "a", "b", "at_zero", "slope_at_infinity")


def source(kind: str, dtype: str, contiguous: bool) -> Any:
    """The program of a kind with weights and a gradient."""
    from triton.compiler import ASTSource

    from opdtheory.kernels.gpu import _program

    constants = {"KIND": kind, "WEIGHED": True, "WANTED": True, "BLOCK": 1024}
    types = {"weights": "*fp32", "values": "*fp64", "left": "*i1", "words": "i32"}
    types |= dict.fromkeys(("student", "teacher", "gradient"), f"*{dtype}") | dict.fromkeys(NUMBERS, "fp32")
    for name in ("student", "teacher", "gradient"):
        types[f"{name}_row"] = "i32"
        types[f"{name}_word"] = "constexpr" if contiguous else "i32"
        if contiguous:
            constants[f"{name}_word"] = 1
    types |= dict.fromkeys(("KIND", "WEIGHED", "WANTED", "BLOCK"), "constexpr")
    return ASTSource(_program, {name: types[name] for name in _program.arg_names}, constants)


def main(labels: list[str]) -> None:
    """Print a line for each program that compiles."""
    # Not above: the suite collects this module where there is no Triton.
    import triton
    from triton.backends.compiler import GPUTarget

    from opdtheory.kernels.gpu import program_of

    kinds = sorted({program_of(label).kind for label in labels})
    cases = [(kind, "fp32", True) for kind in kinds] + [("skew_jsd", "bf16", True), ("skew_jsd", "fp32", False)]
    for case in cases:
        compiled = triton.compile(
            source(*case), target=GPUTarget("cuda", 90, 32), options={"num_warps": 8, "enable_fp_fusion": False}
        )
        print("compiled", *case, len(compiled.asm["cubin"]))


if __name__ == "__main__":
    main(sys.argv[1:])
