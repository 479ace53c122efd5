"""Time, memory and errors of the loss from hidden states on a CPU, beside autograd and Liger's chunked loss.

`python benchmarks/hidden.py` alternates: every repeat runs each subject once, forward and backward, so that a slower
machine slows all of them. It prints medians and plain ratios, and `--write docs/performance.md` puts them into that
page. A peer that is not installed is named in its row. On a machine that other programs use, `--shared` takes one
thread and its processor time. `--model` prints what the loss holds on a GPU, by the formula in
`benchmarks/peers/memory.py`, and measures nothing.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from benchmarks.measure import write  # noqa: E402
from benchmarks.peers.errors import exact, off  # noqa: E402
from benchmarks.peers.memory import memory_of_hidden  # noqa: E402
from benchmarks.peers.page import number  # noqa: E402
from benchmarks.peers.subjects import CHUNKED, EAGER, OURS, Inputs, inputs_of, subject  # noqa: E402
from benchmarks.peers.timing import Clock, Guarded  # noqa: E402
from opdtheory.kernels.products import chunk_rows, wide_dtype  # noqa: E402
from opdtheory.machine import Run, in_turn, machine, peak, seconds  # noqa: E402

SCRIPT = "benchmarks/hidden.py"
PARTS = ("time", "errors")
TIMED, DIVERGENCES = ("reverse_kl", "jsd"), ("reverse_kl", "forward_kl", "jsd")
DTYPES = ("float32", "bfloat16")
# How far the teacher's hidden states are from the student's, of unit variance, and the mark of the errors.
DISTANCES, MARK = (1.0, 0.1, 0.03, 0.003), 1e-2
# The dtypes of the errors, each with a loss scale.
SCALED = (("float32", 1), ("bfloat16", 1), ("float16", 1), ("float16", 2**16))
TWIN = "logits rounded"
# What the model is printed for: tokens, width and words.
LARGE = (4_096, 1_024, 151_936)


def processor_seconds(call: Run) -> float:
    """The processor time of one run, which other programs do not lengthen by their turns."""
    start = time.process_time()
    call()
    return time.process_time() - start


def timed(shape: tuple[int, int, int], dtype: str, repeats: int, clock: Clock, shared: bool = False) -> list[str]:
    """The table of a dtype."""
    rows, width, words = shape
    trained = inputs_of("hidden", rows, words, width, getattr(torch, dtype), "cpu")
    frozen = Inputs("frozen", {name: each.detach() for name, each in trained.tensors.items()}, ("student",))
    frozen.tensors["student"].requires_grad_()
    both = {"trained": trained, "frozen": frozen}

    def forget() -> None:
        for inputs in both.values():
            inputs.forget()

    guarded: dict[tuple[str, str, str], Guarded] = {}
    memory: dict[tuple[str, str, str], float] = {}
    for divergence in TIMED:
        for head, inputs in both.items():
            # Liger computes the gradient of the head whether or not it is asked for.
            for by in (OURS, EAGER, CHUNKED) if head == "trained" else (OURS, EAGER):
                key = divergence, by, head
                guarded[key] = Guarded(" ".join(key), subject(inputs, divergence, by), clock)
                guarded[key]()  # imports and compiles
                forget()
                memory[key] = peak(guarded[key])
                forget()
                clock.say(f"{' '.join(key)}, {dtype} {guarded[key].failed}")
    running = {key: each for key, each in guarded.items() if not each.failed}
    times = in_turn(running, repeats, forget, processor_seconds if shared else seconds)
    forget()
    gradients = {head: sum(each.tensors[name].nbytes for name in each.leaves) / 1e6 for head, each in both.items()}
    how = f"medians of {repeats} alternated repeats{', of processor time' * shared}"
    lines = [
        f"{rows} tokens x {width:,} states x {words:,} words, {dtype}, forward and backward; {how}; the gradients take "
        f"{gradients['trained']:.0f} MB, with a frozen head {gradients['frozen']:.1f} MB.",
        "",
        "| | by | head | ms | of eager's time | extra MB | of eager's memory | beyond the gradients, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key, each in guarded.items():
        divergence, by, head = key
        first = f"| `{divergence}` | {by} | {head} |"
        if each.failed:
            missing = each.failed.startswith("ModuleNotFoundError")
            lines.append(f"{first} {'not installed' if missing else each.failed} | – | – | – | – |")
            continue
        eager = divergence, EAGER, head
        lines.append(
            f"{first} {1e3 * times[key]:.0f} | {times[key] / times[eager]:.2f} | {memory[key]:.0f} "
            f"| {memory[key] / memory[eager]:.2f} | {memory[key] - gradients[head]:.0f} |"
        )
    return lines


def near(shape: tuple[int, int, int], dtype: torch.dtype, distance: float) -> Inputs:
    """A teacher whose hidden states are the student's plus noise, with the student's head; all rounded to the dtype."""
    rows, width, words = shape
    generator = torch.Generator().manual_seed(0)
    hidden, noise, head = (torch.randn(*s, generator=generator) for s in ((rows, width), (rows, width), (words, width)))
    student, head = hidden.to(dtype), (0.05 * head).to(dtype)
    teacher = (student.float() + distance * noise).to(dtype)
    held = {"student": student.requires_grad_(), "head": head.requires_grad_()}
    return Inputs("hidden", held | {"teacher": teacher, "teacher_head": head.detach()}, ("student", "head"))


def errors_of(inputs: Inputs, divergence: str, scale: int) -> Iterator[tuple[str, list[float]]]:
    """By whom, and the errors of the gradients in the hidden states and in the head."""
    _, wanted = exact(inputs, divergence)
    for by, loss in ((OURS, _ours), (TWIN, _twin)):
        inputs.forget()
        (scale * loss(inputs, divergence)).backward()
        yield by, [_unscaled(inputs.tensors[name].grad, scale, each) for name, each in wanted.items()]
    inputs.forget()


def _ours(inputs: Inputs, divergence: str) -> Tensor:
    return opd.fused_linear_divergence(*inputs.tensors.values(), divergence, mask=_weights(inputs)).sum()


def _twin(inputs: Inputs, divergence: str) -> Tensor:
    """The false twin: logits have the dtype of the hidden states."""
    student, head, teacher, teacher_head = inputs.tensors.values()
    z, other = student @ head.T, teacher @ teacher_head.T
    return opd.fused_divergence(z, other, divergence, mask=_weights(inputs)).sum()


def _weights(inputs: Inputs) -> Tensor:
    return torch.full((inputs.rows,), 1 / inputs.rows, dtype=torch.float64)


def _unscaled(found: Tensor | None, scale: int, wanted: Tensor) -> float:
    assert found is not None
    return off(found if scale == 1 else found.double() / scale, wanted)


def errors(shape: tuple[int, int, int], clock: Clock) -> list[str]:
    """The table of errors, and whether the mark is met."""
    rows, width, words = shape
    found: dict[tuple[str, int, str, str], list[list[float]]] = {}
    for dtype, scale in SCALED:
        for distance in DISTANCES:
            inputs = near(shape, getattr(torch, dtype), distance)
            for divergence in DIVERGENCES:
                for by, each in errors_of(inputs, divergence, scale):
                    found.setdefault((dtype, scale, divergence, by), []).append(each)
            clock.say(f"errors, {dtype}, {scale}, {distance}")
    heads = "".join(f" states, {distance:g} | head, {distance:g} |" for distance in DISTANCES)
    lines = [
        f"Of the gradients in the hidden states and in the head, in norm over the norm, against float64 autograd of "
        f"the textbook formula on the same rounded inputs: the mean over {rows} tokens, {width:,} states, {words:,} "
        "words. The teacher has the student's head, and its hidden states are the student's plus noise, times 1, 0.1, "
        "0.03 or 0.003; the states are of unit variance. The false twin rounds the logits to the dtype before "
        "`fused_divergence`.",
        "",
        f"| dtype | | by |{heads}",
        f"|---|---|---|{'---|' * 2 * len(DISTANCES)}",
    ]
    for (dtype, scale, divergence, by), each in found.items():
        cells = " | ".join(f"{value:.0e}" for pair in each for value in pair)
        lines.append(f"| {_named(dtype, scale)} | `{divergence}` | {by} | {cells} |")
    lines += ["", f"Mark: at most {MARK:.0%} in norm at every distance."]
    for dtype, scale in SCALED:
        worst = {by: _worst(found, dtype, scale, by) for by in (OURS, TWIN)}
        told = "; ".join(
            f"{by} {number(100 * value)}%, {'met' if value <= MARK else 'missed'}" for by, value in worst.items()
        )
        lines.append(f"{_named(dtype, scale)}: {told}.")
    return lines


def _worst(found: dict[tuple[str, int, str, str], list[list[float]]], dtype: str, scale: int, by: str) -> float:
    some = [each for key, each in found.items() if key[:2] == (dtype, scale) and key[3] == by]
    # NaN, which a maximum may lose, is the worst of all.
    return max(value if value == value else float("inf") for each in some for pair in each for value in pair)


def _named(dtype: str, scale: int) -> str:
    return dtype if scale == 1 else f"{dtype}, loss times {scale:,}"


def model(shape: tuple[int, int, int] = LARGE, dtype: torch.dtype = torch.bfloat16) -> Iterator[str]:
    """What the loss holds on a GPU at most, by the formula, with the head trained and frozen."""
    tokens, width, words = shape
    rows = min(tokens, chunk_rows(words, wide_dtype(dtype), torch.device("cuda")))
    yield (
        f"{tokens:,} tokens x {width:,} states x {words:,} words, {str(dtype)[6:]}, on a GPU, {rows} rows a chunk; "
        "predicted, not measured:"
    )
    for head, trained in (("trained", True), ("frozen", False)):
        most = memory_of_hidden(*shape, dtype, trained) / 1e6
        yield f"{most:,.0f} MB beyond the inputs at most, gradients included, with the head {head}"


def installed() -> str:
    """Which version of Liger there is."""
    try:
        return f"Liger is version {metadata.version('liger-kernel')}."
    except metadata.PackageNotFoundError:
        return "Liger is not installed."


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, metavar="N")
    parser.add_argument("--width", type=int, default=1_024, metavar="H", help="of the hidden states (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=151_936, metavar="V")
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=DTYPES, metavar="DTYPE", help="that are timed")
    parser.add_argument("--repeats", type=int, default=5, metavar="N", help="alternated, at least 5 for the page")
    parser.add_argument("--shared", action="store_true", help="one thread, and processor time")
    parser.add_argument(
        "--errors", type=int, nargs=3, default=[64, 1_024, 37_984], metavar=("N", "H", "V"), help="shape of the errors"
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    parser.add_argument("--model", action="store_true", help="print what a GPU would hold, and measure nothing")
    options = parser.parse_args(arguments)
    if options.model:
        print("\n".join(model()))
        return 0
    if options.write and options.repeats < 5:
        parser.error("--write needs --repeats of at least 5")
    if options.shared:
        torch.set_num_threads(1)
    clock, shape = Clock(), (options.tokens, options.width, options.vocabulary)
    command = f"python {SCRIPT}{' --shared' * options.shared}"
    for name in ("tokens", "width", "vocabulary"):
        given = getattr(options, name)
        command += f" --{name} {given}" if given != parser.get_default(name) else ""
    sections = [f"On {machine()}, by `{command}`. {installed()}"]

    def add(*lines: str) -> None:
        sections.append("\n".join(lines))
        print(sections[-1], end="\n\n", flush=True)

    if "time" in options.parts:
        add("### Time and memory from hidden states")
        for dtype in options.dtypes:
            add(*timed(shape, dtype, options.repeats, clock, options.shared))
    if "errors" in options.parts:
        add("### Errors from hidden states", "", *errors(tuple(options.errors), clock))
    if options.write:
        write(options.write, SCRIPT, "\n\n".join(sections))
    return 0


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
