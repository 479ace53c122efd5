"""Write docs/truncation.md: `python docs/generate_truncation.py`. Every number is where an exact gradient flow ends."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.divergences import divergence

PAGE = Path(__file__).parent / "truncation.md"

DIVERGENCES = ("reverse_kl", "forward_kl", "skew_reverse_kl(lam=0.3)", "skew_forward_kl(lam=0.3)", "jsd")
SAMPLERS = ("stale", "engine")
SEEDS, WORDS = 8, 6
CAP = 1.2
STEPS, REST, NEAR = 3_000, 1e-13, 1e-6


class Rows(NamedTuple):
    """Logits of students near their teachers, the teachers' log-probabilities, and how far the samplers are off."""

    student: Tensor
    teacher: Tensor
    offset: Tensor

    def sampler(self, student: Tensor, kind: str) -> Tensor:
        """Log-probabilities of a stale student that is never refreshed, or of an engine that follows the student."""
        return ((self.student if kind == "stale" else student) + self.offset).log_softmax(-1)


class Flow(NamedTuple):
    """Where gradient descent from the students ends: logits, and how large the gradient still is in each row."""

    logits: Tensor
    gradient: Tensor


def rows() -> Rows:
    """One row for each seed."""
    normal = [
        torch.randn(3, WORDS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for seed in range(SEEDS)
    ]
    teacher, error, offset = torch.stack(normal, 1)
    return Rows(teacher + 0.3 * error, teacher.log_softmax(-1), 0.5 * offset)


def gradient(name: str, constant: float, given: Rows, student: Tensor, kind: str) -> Tensor:
    r"""The expected gradient of `importance="tis"` with the weight $w_f - c$, in closed form (T14)."""
    log_p = student.log_softmax(-1)
    p = log_p.exp()
    kept = (math.log(CAP) + given.sampler(student, kind) - log_p).clamp(max=0.0).exp()
    advantage = kept * (divergence(name).weight(given.teacher - log_p) - constant)
    return -p * (advantage - (p * advantage).sum(-1, keepdim=True))


def at_one(name: str) -> float:
    """$w_f(1)$, which centring takes away."""
    return float(divergence(name).weight(torch.zeros((), dtype=torch.float64)))


def slope_at_one(name: str) -> float:
    """$w_f'(1)$, the curvature that every direction has at the teacher."""
    log_u = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(divergence(name).weight(log_u), log_u)
    return float(slope)


def flow(name: str, constant: float, given: Rows, kind: str) -> Flow:
    """Gradient descent with a step of one over the curvature at the teacher, until it rests."""
    z, step = given.student, 1.0 / slope_at_one(name)
    for _ in range(STEPS):
        g = gradient(name, constant, given, z, kind)
        if float(g.abs().max()) < REST:
            break
        z = z - step * g
    return Flow(z, gradient(name, constant, given, z, kind).abs().amax(-1))


def distance(logits: Tensor, given: Rows) -> Tensor:
    """Total variation distance to the teacher."""
    return 0.5 * (logits.softmax(-1) - given.teacher.exp()).abs().sum(-1)


def shown(values: Tensor) -> str:
    """The range of a column; what is below `NEAR` is nothing."""
    low, high = (f"{float(x):.3f}" if float(x) > NEAR else "0" for x in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def table(given: Rows, kind: str) -> list[str]:
    """Distances to the teacher at the start and at the end, over the seeds."""
    lines = [
        "| divergence | $w_f(1)$ | start | centred: end | not centred: end | farther than at the start |",
        "|---|---|---|---|---|---|",
    ]
    start = distance(given.student, given)
    for name in DIVERGENCES:
        centre = at_one(name)
        centred, own = (distance(flow(name, c, given, kind).logits, given) for c in (centre, 0.0))
        worse = f"{int((own > start).sum())} of {SEEDS}"
        lines.append(f"| `{name}` | {centre:g} | {shown(start)} | {shown(centred)} | {shown(own)} | {worse} |")
    return lines


def page() -> str:
    """The page."""
    given = rows()
    parts = [
        "# Truncated ratios need a centred weight",
        "<!-- Written by docs/generate_truncation.py. -->",
        "A truncated importance ratio leaves the teacher a fixed point for every sampler only if the weight is\n"
        "centred, $w_f(u) - w_f(1)$ (T14). The tables show what that means for training. A student that is already\n"
        "near its teacher descends the exact expected gradient of `opd.estimator(name, divergence, importance='tis',\n"
        f"clip_range={CAP})`, with `opd_plus_centred` and with `opd_plus`, until it rests, for\n"
        f"{STEPS:,} steps at most. There is no noise of sampling and no optimizer's state: what is left is the bias.",
        f"Each number is a total variation distance to the teacher, over {SEEDS} seeds: a row of {WORDS} words each,\n"
        "the student's logits off the teacher's by noise of 0.3, the sampler's off the student's by noise of 0.5.\n"
        f"0 stands for less than {NEAR:g}.",
        "## A stale sampler: the student at the start, perturbed",
        "\n".join(table(given, "stale")),
        "## An engine: the student at every step, perturbed in the same way",
        "\n".join(table(given, "engine")),
        "The centred weight ends at the teacher, whatever the sampler. A flow rests where $F\\,(w_f(u) - c)$ is the\n"
        "same for all tokens, with the factors $F = \\min(1, C/\\rho) > 0$ that truncation leaves. Unless all ratios\n"
        "are one, some are above one and some below; a centred weight of a strictly convex $f$ has both signs then,\n"
        "and no such balance. A weight that is not centred can have it, and rests away from the teacher. The JSD's\n"
        "weight is centred as it is.",
        "A sampler that is refreshed and computes the student's own probabilities has no ratio left to truncate at\n"
        "the end, and no bias there; an engine that differs from the trainer keeps its bias for good.",
        "The tests compare the closed form of the gradient with the estimators by enumeration, at the start and at\n"
        "the end of each flow. Regenerate the page with `python docs/generate_truncation.py`.",
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}", file=sys.stderr)
