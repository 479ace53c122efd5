"""Write docs/scale.md: `python docs/generate_scale.py`. Costs are counted, and gains computed exactly.

Nothing is timed, and only the logits of the example are sampled, from a seed, so the page is the same on every
machine. Timings are on the page of the benchmarks.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.kernels.products import CHUNK_BYTES

PAGE = Path(__file__).parent / "scale.md"

# The setting: words, tokens a day, width of the last hidden state, tokens of a micro-batch, ranks, bytes of a logit.
WORDS, A_DAY, WIDTH, TOKENS, RANKS, BYTES = 151_936, 10**9, 4_096, 8_192, 8, 2
KEPT = (16, 64, 256, 1_024)


class Cost(NamedTuple):
    """What one form of the loss costs per token.

    Attributes:
        name: the form.
        sent: bytes that the teacher sends to the trainer.
        held: bytes that the loss holds in addition to the student's logits, per token.
        once: bytes that it holds once, independent of the batch.
        exponentials: exponentials, logarithms and similar functions, per word of the vocabulary.
        reduced: bytes that ranks reduce.
    """

    name: str
    sent: float
    held: float
    once: float
    exponentials: str
    reduced: float = 0.0


def costs() -> list[Cost]:
    """The costs of every form; a chunk's buffers are rows of probabilities, ratios and weights in float32."""
    row, buffers = WORDS * BYTES, 4 * 4 * WORDS
    return [
        Cost("sampled token, autograd of `log_softmax`", 4, 2 * row, 0, "1 for the student"),
        Cost("teacher's top 64 with tail, `fused_top_k_divergence`", 64 * (4 + 4), row, buffers, "1 for the student"),
        Cost("whole vocabulary, logits sent, `fused_divergence`", row, row, buffers, "2, and at most 2 of the form"),
        Cost(
            "whole vocabulary, hidden states sent, `fused_linear_divergence`",
            WIDTH * BYTES,
            2 * WIDTH * BYTES,
            buffers + 4 * WORDS * WIDTH + CHUNK_BYTES,
            "2, and at most 2 of the form",
        ),
        Cost(
            f"whole vocabulary over {RANKS} ranks, `fused_parallel_divergence`",
            row / RANKS,
            row / RANKS,
            buffers / RANKS,
            f"6, and at most 4 of the form, over {RANKS}",
            3 * 2 * 8,
        ),
    ]


def size(count: float) -> str:
    """Bytes in decimal units."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}"
    return f"{count:.3g} B"


def cost_table() -> list[str]:
    """Bytes and operations of each form."""
    lines = [
        "| form | sent by the teacher, per token | per day | per second | held in addition to logits, per micro-batch "
        "| transcendental functions per word | reduced, per token |",
        "|---|---|---|---|---|---|---|",
    ]
    for cost in costs():
        held = cost.held * TOKENS + cost.once
        lines.append(
            f"| {cost.name} | {size(cost.sent)} | {size(cost.sent * A_DAY)} | {size(cost.sent * A_DAY / 86_400)} "
            f"| {size(held)} | {cost.exponentials} | {size(cost.reduced) if cost.reduced else 'none'} |"
        )
    return lines


def example() -> tuple[Tensor, Tensor]:
    """One position: a student whose word of rank r has a probability proportional to r^-1.6, and a teacher."""
    generator = torch.Generator().manual_seed(0)
    student = -1.6 * torch.arange(1, WORDS + 1, dtype=torch.float64).log()
    return student, student + torch.randn(WORDS, generator=generator, dtype=torch.float64)


class Bought(NamedTuple):
    """Bias and standard deviation of one token's gradient at a position, relative to the exact gradient's norm."""

    bias: float
    deviation: float


def at_a_position(name: str) -> list[tuple[str, Bought]]:
    """Bias and deviation of each form at the example's position, for one divergence."""
    student, teacher = example()
    d = opd.divergence(name)
    log_p, log_q = torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)
    p, weight = log_p.exp(), d.weight(log_q - log_p)
    exact = _centred(p, weight)
    found = [("sampled token, OPD+", _sampled(p, weight, exact))]
    norms = 1 - 2 * p + p.square().sum()
    best = float((p * weight * norms).sum() / (p * norms).sum())
    found.append(("sampled token, OPD+ with the best constant baseline (T7)", _sampled(p, weight - best, exact)))
    for kept in KEPT:
        inside = torch.zeros(WORDS, dtype=torch.bool)
        inside[p.topk(kept).indices] = True
        rest = _sampled(p, torch.where(inside, 0.0, weight), exact).deviation
        found.append((f"student's top {kept:,} summed, the rest sampled", Bought(0.0, rest)))
    for kept in KEPT:
        z = student.clone().requires_grad_()
        ids = teacher.topk(kept).indices
        opd.fused_top_k_divergence(z, ids, log_q[ids], d).backward()
        assert z.grad is not None
        # The exact gradient is the one to descend, minus the ascent direction of the weights.
        found.append((f"teacher's top {kept:,} with a tail bucket", Bought(_relative(z.grad + exact, exact), 0.0)))
    return [*found, ("whole vocabulary", Bought(0.0, 0.0))]


def _centred(p: Tensor, weight: Tensor) -> Tensor:
    return p * (weight - (p * weight).sum())


def _relative(difference: Tensor, exact: Tensor) -> float:
    return float(difference.norm() / exact.norm())


def _sampled(p: Tensor, weight: Tensor, exact: Tensor) -> Bought:
    """The deviation of the estimator w(u_a) s_a: the mean of |s_a|^2 w^2 minus the squared mean."""
    second = float((p * weight.square() * (1 - 2 * p + p.square().sum())).sum())
    variance = second - float(_centred(p, weight).square().sum())
    return Bought(0.0, math.sqrt(max(variance, 0.0)) / float(exact.norm()))


def position_table(names: tuple[str, ...]) -> list[str]:
    """Bias and deviation of each form at the example's position."""
    lines = [
        "| form | " + " | ".join(f"`{name}`: bias | deviation | tokens for 10 %" for name in names) + " |",
        "|---" * (1 + 3 * len(names)) + "|",
    ]
    columns = [at_a_position(name) for name in names]
    for row in zip(*columns, strict=True):
        cells = []
        for _, bought in row:
            tokens = "never" if bought.bias > 0.1 else f"{max(1, math.ceil(100 * bought.deviation**2)):,}"
            cells.append(f"{bought.bias:.3g} | {bought.deviation:.3g} | {tokens}")
        lines.append(f"| {row[0][0]} | " + " | ".join(cells) + " |")
    return lines


def horizon_table() -> list[str]:
    """Deviation of one rollout's gradient against the horizon, for two random chains of 16 tokens."""
    d = opd.divergence("jsd")
    forms = (
        ("sampled token", {}),
        ("top 4 summed, the rest sampled", {"summed_tokens": 4}),
        ("whole vocabulary", {"summed_tokens": 16}),
        ("return-to-go, sampled", {"cost": d.generator}),
        ("return-to-go at gamma = 0.9, sampled", {"cost": d.generator, "gamma": 0.9}),
    )
    horizons = (10, 100, 1_000)
    lines = ["| form | " + " | ".join(f"T = {T:,}" for T in horizons) + " |", "|---" * (1 + len(horizons)) + "|"]
    for label, options in forms:
        cells = []
        for horizon in horizons:
            student, teacher = (opd.MarkovPolicy.random(16, horizon, scale=0.7, seed=s) for s in (0, 1))
            moments = opd.rollout_moments(student, teacher, d.weight, **options)
            norm = sum(float(g.square().sum()) for g in moments.mean)
            cells.append(f"{math.sqrt(moments.variance / norm):.3g}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return lines


def entropy() -> float:
    """The entropy of the example's student, in nats."""
    log_p = torch.log_softmax(example()[0], -1)
    return -float((log_p.exp() * log_p).sum())


def page() -> str:
    """The page's text."""
    head, passes = 2 * WORDS * WIDTH, 30 * WORDS
    costs, rollouts = "\n".join(cost_table()), "\n".join(horizon_table())
    positions = "\n".join(position_table(("reverse_kl", "jsd", "forward_kl")))
    return f"""# Scale

What on-policy distillation costs at {A_DAY:,} tokens a day with a vocabulary of {WORDS:,} words, and how precise a
gradient it buys. `python docs/generate_scale.py` writes this page. Costs are counted from what the functions hold and
send, gains are exact expectations, and nothing is timed; for timings see [Performance](performance.md).

## What it costs

Logits and hidden states take {BYTES} bytes per number, log-probabilities and token ids 4. Hidden states have width
{WIDTH:,}. A micro-batch has {TOKENS:,} tokens, whose logits alone take {size(WORDS * BYTES * TOKENS)}. {A_DAY:,} tokens
a day are {A_DAY / 86_400:,.0f} a second.

{costs}

The output layer takes {head / 1e9:.2f} GFLOP per token in the forward pass, for the student and for the teacher, with
every loss: even one log-probability of the teacher needs the whole normaliser. Some thirty elementary operations per
word for the loss are {passes / head:.1%} of that. So the choice is about bytes, not operations. The sampled token is
cheap because the teacher sends one number. The whole vocabulary is cheap because the gradient is the only tensor of the
logits' size that is held, and with hidden states there is none. `fused_linear_divergence` holds the gradient of the
output layer in float32 ({size(4 * WORDS * WIDTH)}), as any training of that layer does, and {size(CHUNK_BYTES)} of
logits.

## What it buys at one position

The student's word of rank $r$ has a probability proportional to $r^{{-1.6}}$ (entropy {entropy():.2f} nats); the
teacher's logits add standard normal noise. The table shows bias and standard deviation of one token's gradient in the
logits, relative to the norm of the exact gradient, and the number of tokens at such a position for which the relative
error of the mean is 10 %.

{positions}

A tail bucket has no variance, but a bias that more tokens do not remove (T9: it descends the divergence of coarser
distributions, a lower bound). Summing the student's likeliest words and sampling only the rest has no bias. The teacher
must then score the student's top k, which takes as many bytes but a second message, after the rollout.

## What it buys over a rollout

Student and teacher are random Markov chains of 16 tokens (logits of standard deviation 0.7), and the loss is OPD+ for
the JSD. The table shows the standard deviation of one rollout's gradient relative to the norm of its mean, by the
recursion of `rollout_moments`.

{rollouts}

The noise that remains with the whole vocabulary comes from the choice of the prefix (T7c); only more rollouts reduce
it. The return-to-go follows another objective (T6), and its noise grows with the horizon faster than its signal; a
discount bounds this growth.
"""


def main() -> int:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
