"""Time, memory and error of the whole-vocabulary losses compared with TRL's and with a floor, in one process.

`python benchmarks/fused.py` alternates: every repeat runs each subject once, forward and backward, so that a slower
machine slows all of them. It prints medians and plain ratios, and `--write docs/performance.md` puts them into that
page. The floor is what any whole-vocabulary loss must do: two log-softmaxes, row by row into buffers that
stay in the cache, and one gradient, allocated and written once; a row for each thread, as a row's softmax has one. On
a GPU (`--device cuda`) a chunk of rows takes the place of a row, and memory is what torch allocates there.
"""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from pathlib import Path

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from benchmarks.measure import operations, slope, write  # noqa: E402
from opdtheory.machine import Run, in_turn, machine, peak  # noqa: E402

DIVERGENCES = (
    "jsd",
    "skew_jsd(beta=0.1)",
    "forward_kl",
    "reverse_kl",
    "skew_forward_kl(lam=0.1)",
    "skew_reverse_kl(lam=0.1)",
    "jeffreys",
    "chi2",
    "neyman_chi2",
    "hellinger",
    "total_variation",
    "le_cam",
    "alpha(alpha=0.3)",
    "alpha(alpha=1.5)",
)
# The marks: against TRL, against the floor, and beyond the gradient in MB (1e6 bytes).
OF_TRL, OF_FLOOR, BEYOND = 0.08, 1.5, 8.0
# Logits on a GPU that the floor takes at a time.
CHUNK = 2**24


def logits(
    tokens: int, vocabulary: int, dtype: torch.dtype = torch.float32, device: str = "cpu"
) -> tuple[Tensor, Tensor]:
    """A student and a teacher near it, with the spread of a language model's logits."""
    generator = torch.Generator(device).manual_seed(0)
    student = torch.empty(tokens, vocabulary, dtype=dtype, device=device)
    teacher = torch.empty(tokens, vocabulary, dtype=dtype, device=device)
    for row in range(tokens):
        ours, noise = (torch.randn(vocabulary, generator=generator, device=device) for _ in range(2))
        student[row] = 3 * ours
        teacher[row] = 3 * ours + noise
    return student.requires_grad_(), teacher


def fused(student: Tensor, teacher: Tensor, name: str) -> Run:
    weights = torch.full(student.shape[:-1], 1 / len(student), device=student.device)

    def run() -> None:
        opd.fused_divergence(student, teacher, name, mask=weights).sum().backward()

    return run


def trl(student: Tensor, teacher: Tensor) -> Run:
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    return lambda: GKDTrainer.generalized_jsd_loss(student, teacher).backward()


def floor(student: Tensor, teacher: Tensor) -> Run:
    rows = torch.get_num_threads() if student.device.type == "cpu" else max(1, CHUNK // student.shape[-1])
    first, second = (torch.empty(rows, student.shape[-1], device=student.device) for _ in range(2))

    def run() -> None:
        with torch.no_grad():
            gradient = torch.empty_like(student)
            for part in (slice(row, row + rows) for row in range(0, len(student), rows)):
                count = len(student[part])
                torch.log_softmax(student[part], -1, out=first[:count])
                torch.log_softmax(teacher[part], -1, out=second[:count])
                torch.add(first[:count], second[:count], out=gradient[part])

    return run


def copied(student: Tensor, teacher: Tensor) -> Run:
    """No loss: the cost of reading the logits and writing a gradient."""

    def run() -> None:
        with torch.no_grad():
            torch.add(student, teacher)

    return run


def fresh(student: Tensor) -> Run:
    """Clear the gradient before each run."""

    def forget() -> None:
        student.grad = None

    return forget


def compared(
    tokens: int, vocabulary: int, repeats: int, names: tuple[str, ...], device: str
) -> tuple[list[str], list[str]]:
    """The table of all subjects, and the divergences that miss a mark."""
    student, teacher = logits(tokens, vocabulary, device=device)
    subjects: dict[str, Run] = {"TRL": trl(student, teacher), "floor": floor(student, teacher)}
    subjects["read and write"] = copied(student, teacher)
    subjects |= {name: fused(student, teacher, name) for name in names}
    times = in_turn(subjects, repeats, fresh(student))
    memory = {}
    for name, run in subjects.items():
        student.grad = None
        memory[name] = peak(run)
    gradient = student.numel() * student.element_size() / 1e6
    lines = [
        f"{tokens} tokens x {vocabulary:,} words, float32, forward and backward; medians of {repeats} alternated "
        f"repeats; the gradient takes {gradient:.0f} MB.",
        "",
        "| | ms | of TRL's time | of the floor's | extra MB | of TRL's memory | beyond the gradient, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    missed = []
    for name, took in times.items():
        more = memory[name] - gradient
        digits = 0 if took > 0.05 else 2
        lines.append(
            f"| {_shown(name)} | {1e3 * took:.{digits}f} | {took / times['TRL']:.3f} | {took / times['floor']:.2f} "
            f"| {memory[name]:.0f} | {memory[name] / memory['TRL']:.3f} | {more:.1f} |"
        )
        if name in names and (took > OF_TRL * times["TRL"] or took > OF_FLOOR * times["floor"] or more > BEYOND):
            missed.append(name)
    verdict = f"Missed by: {', '.join(missed)}." if missed else "Met by every divergence."
    marks = f"Marks: at most {OF_TRL} of TRL's time, {OF_FLOOR} of the floor's, {BEYOND:g} MB beyond the gradient. "
    return [*lines, "", marks + verdict], missed


def scaling(repeats: int, vocabulary: int, largest: int, device: str) -> list[str]:
    """The time of the JSD by tokens and by vocabulary, and the exponents of both."""
    lines = ["| tokens | words | dtype | ms | ns per logit |", "|---|---|---|---|---|"]
    points: dict[str, list[tuple[float, float]]] = {"tokens": [], "vocabulary": []}
    shapes = [(tokens, vocabulary, "tokens") for tokens in _doublings(64, largest, 4)]
    shapes += [(256, words, "vocabulary") for words in (9_496, 37_984, 151_936) if words <= vocabulary]
    for tokens, words, axis in shapes:
        dtype = torch.float32 if 3 * 4 * tokens * words < 0.6 * _memory(device) else torch.bfloat16
        student, teacher = logits(tokens, words, dtype, device)
        run = fused(student, teacher, "jsd")
        took = in_turn({"jsd": run}, repeats, fresh(student))["jsd"]
        if dtype == torch.float32:
            points[axis].append((tokens if axis == "tokens" else words, took))
        logit = 1e9 * took / student.numel()
        lines.append(f"| {tokens:,} | {words:,} | {str(dtype)[6:]} | {1e3 * took:.1f} | {logit:.2f} |")
        del student, teacher, run
    exponents = ", ".join(f"{slope(found):.2f} in the {axis}" for axis, found in points.items() if len(found) > 1)
    return [*lines, "", f"Time grows with the power {exponents} (float32; least squares on logarithms)."]


def _doublings(first: int, last: int, factor: int) -> list[int]:
    found = []
    while first < last:
        found.append(first)
        first *= factor
    return [*found, last]


def _memory(device: str) -> int:
    """The available memory in bytes, or 8 GB if unknown."""
    if torch.device(device).type == "cuda":
        return int(torch.cuda.mem_get_info()[0])
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return 1024 * int(line.split()[1])
    except OSError:
        pass
    return 8_000_000_000


def accuracy(names: tuple[str, ...], device: str, tokens: int = 16, vocabulary: int = 20_000) -> list[str]:
    """Worst errors against float64 of the same logits."""
    lines = [
        "| | value | gradient | value near the teacher | gradient in bfloat16 | value by autograd |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        student, teacher = logits(tokens, vocabulary, device=device)
        near = (student.detach() + 1e-2 * (teacher - student.detach())).requires_grad_(False)
        wide, narrow = _errors(student, teacher, name), _errors(student.bfloat16(), teacher.bfloat16(), name)
        plain = _plain_error(student, teacher, name)
        close = _errors(student, near, name)[0]
        lines.append(
            f"| {_shown(name)} | {wide[0]:.0e} | {wide[1]:.0e} | {close:.0e} | {narrow[1]:.0e} | {plain:.0e} |"
        )
    return [
        f"Worst errors in float32 over {tokens} rows of {vocabulary:,} words, against float64 of the same logits: of "
        "the value, over one plus the value, also where the log-ratios are a hundredth (values there are about 1e-4 of "
        "what they were); of a row's gradient in norm, over its norm, also for logits and gradient in bfloat16; and of "
        "the value by the textbook formula (log-softmax, p f(q/p), sum).",
        "",
        *lines,
    ]


def _errors(student: Tensor, teacher: Tensor, name: str) -> tuple[float, float]:
    found = []
    for dtype in (student.dtype, torch.float64):
        z = student.detach().to(dtype).requires_grad_()
        values = opd.fused_divergence(z, teacher.to(dtype), name)
        values.sum().backward()
        found.append((values.detach().double(), z.grad.double()))  # type: ignore[union-attr]
    (values, slope), (exact, wanted) = found
    norm = (slope - wanted).norm(dim=-1) / wanted.norm(dim=-1)
    return float(((values - exact).abs() / (1 + exact)).max()), float(norm.max())


def _plain_error(student: Tensor, teacher: Tensor, name: str) -> float:
    log_p, log_q = torch.log_softmax(student.detach(), -1), torch.log_softmax(teacher, -1)
    exact = opd.fused_divergence(student.detach().double(), teacher.double(), name)
    plain = (log_p.exp() * opd.divergence(name).generator(log_q - log_p)).sum(-1)
    return float(((plain - exact).abs() / (1 + exact)).max())


def profiled(names: list[str], tokens: int, vocabulary: int, device: str) -> list[str]:
    """Which operations take the time, for each of some divergences."""
    lines = ["| | operations, with their share of the time |", "|---|---|"]
    student, teacher = logits(tokens, vocabulary, device=device)
    for name in names:
        run = fused(student, teacher, name)
        lines.append(f"| {_shown(name)} | {operations(run, fresh(student))} |")
    return lines


def _shown(name: str) -> str:
    return f"`{name}`" if name in DIVERGENCES else name


def main(arguments: list[str] | None = None) -> int:
    assert __doc__
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=256, metavar="N")
    parser.add_argument("--vocabulary", type=int, default=151_936, metavar="V")
    parser.add_argument("--repeats", type=int, default=7, metavar="N", help="alternated, at least 5 for the page")
    parser.add_argument("--only", nargs="+", choices=DIVERGENCES, default=DIVERGENCES, metavar="DIVERGENCE")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--largest", type=int, default=8_192, metavar="N", help="tokens of the largest batch")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="put the tables into this page")
    parser.add_argument("--device", default="cpu", metavar="NAME", help="where the losses are computed (%(default)s)")
    options = parser.parse_args(arguments)
    if options.write and options.repeats < 5:
        parser.error("--write needs --repeats of at least 5")
    names = tuple(options.only)
    torch.empty(1, device=options.device)  # a GPU is in use from here on
    command = "benchmarks/fused.py" + ("" if options.device == "cpu" else f" --device {options.device}")
    sections, missed = [[f"On {machine()}, by `python {command}`."]], []
    if "time" in options.parts:
        table, missed = compared(options.tokens, options.vocabulary, options.repeats, names, options.device)
        sections.append(["### Time and memory", "", *table])
    if "profile" in options.parts:
        some = list(dict.fromkeys(("jsd", *missed)))
        rows = profiled(some, min(options.tokens, 64), options.vocabulary, options.device)
        sections.append(["### Where the time goes", "", *rows])
    if "scaling" in options.parts:
        rows = scaling(max(3, options.repeats // 2), options.vocabulary, options.largest, options.device)
        sections.append(["### Scaling of the JSD", "", *rows])
    if "accuracy" in options.parts:
        sections.append(["### Errors", "", *accuracy(names, options.device)])
    text = "\n\n".join("\n".join(section) for section in sections)
    print(text)
    if options.write:
        write(options.write, command, text)
    return 0


PARTS = ("time", "profile", "scaling", "accuracy")

if __name__ == "__main__":
    warnings.simplefilter("ignore")
    sys.exit(main())
