"""Write docs/sampled_tail.md: `python docs/generate_sampled_tail.py`. Every number is a closed form of seeded rows.

`--smollm2` measures the rows of SmolLM2-135M again (a minute, 2 GB, the extra `lm`) and keeps them in
docs/sampled_tail.json; without it those of that file are shown.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from opdtheory.divergences import divergence
from opdtheory.exact import tail_moments
from opdtheory.reproduction.validation_cases import small_prefixes, smollm2_prefixes

PAGE = Path(__file__).parent / "sampled_tail.md"
RECORD = PAGE.with_suffix(".json")

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "hellinger", "chi2", "skew_jsd(beta=0.1)")
SUMMED = (1, 2, 4, 8, 16)
SUMMED_OF_MANY = (4, 16, 64, 256)
MIDDLE = 15

# Rows of words that are as unequal as those of a language model: Zipf's law, and noise on the teacher's logits.
ROWS, WORDS, NOISE = 64, 4_096, 1.0


class Rows(NamedTuple):
    """Log-probabilities of a student and a teacher, and what they are."""

    name: str
    student: Tensor
    teacher: Tensor


def zipf() -> Rows:
    """Rows whose ranks follow Zipf's law in another order each, with Gaussian noise on the teacher's logits."""
    generator = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(WORDS, generator=generator) for _ in range(ROWS)]).double()
    student = -1.2 * (ranks + 1.0).log()
    teacher = student + NOISE * torch.randn(ROWS, WORDS, generator=generator, dtype=torch.float64)
    name = f"{ROWS} rows of {WORDS:,} words, Zipf's law with exponent 1.2, noise {NOISE:g} on the teacher's logits"
    return Rows(name, student, teacher)


def transformer() -> Rows:
    """The rows that two small transformers give after the student's own prefixes."""
    prefixes = small_prefixes()
    name = f"{len(prefixes):,} prefixes of a transformer of two layers, {prefixes.log_p.shape[-1]} words"
    return Rows(name, prefixes.log_p, prefixes.log_q)


def smollm2(layer: int | None) -> Rows:
    """The rows of SmolLM2 as teacher after the prefixes of a student that is made from it."""
    prefixes = smollm2_prefixes(layer=layer)
    student = "noise of a tenth in its weights" if layer is None else "one layer in the middle left out"
    name = f"{len(prefixes)} prefixes of SmolLM2-135M with {student}, {prefixes.log_p.shape[-1]:,} words"
    return Rows(name, prefixes.log_p.double(), prefixes.log_q.double())


def recorded() -> dict[str, list[str]]:
    """The tables of SmolLM2 by their titles; none if they were not measured."""
    return json.loads(RECORD.read_text(encoding="utf-8")) if RECORD.exists() else {}


def shown(relative: float) -> str:
    """Three digits; rounding is nothing."""
    return f"{relative:.3g}" if relative > 1e-20 else "0"


def table(rows: Rows, summed: Sequence[int] = SUMMED) -> list[str]:
    """Relative variances of each divergence, by the number of tokens that are summed."""
    summed = [k for k in summed if k < rows.student.shape[-1]]
    heads = [f"k = {k}" for k in summed]
    lines = [
        f"| divergence | OPD+ | OPD+, best constant | {' | '.join(heads)} |",
        f"|---|---|---|{'---|' * len(summed)}",
    ]
    for name in DIVERGENCES:
        d = divergence(name)
        plain = tail_moments(rows.student, rows.teacher, d)
        splits = [tail_moments(rows.student, rows.teacher, d, k) for k in summed]
        cells = [
            " / ".join(map(shown, (split.relative, split.rest_relative, split.least_relative))) for split in splits
        ]
        lines.append(f"| `{name}` | {plain.relative:.3g} | {plain.least_relative:.3g} | {' | '.join(cells)} |")
    return lines


def page() -> str:
    """The page."""
    parts = [
        "# Exact on k tokens, sampled on the rest",
        "<!-- Written by docs/generate_sampled_tail.py. -->",
        "`opd.estimator('topk_tail_sampled', divergence, k=k)` sums the terms of the teacher's `k` likeliest tokens\n"
        "and lets the sampled token stand for all others (T13). Its expected gradient is the exact one of any\n"
        "f-divergence, from what a teacher server sends: `k` log-probabilities and that of the sampled token.",
        "The tables show the variance that is left: the trace of one token's covariance in the logits, summed over\n"
        "all rows, over the sum of the squared gradients. Each cell of a `k` holds three numbers: without a constant;\n"
        "with the weight of all other tokens as one (`baseline='rest'`, T19b), which the same payload suffices for;\n"
        "and with the constant of least variance in each row (`baseline='optimal'`, which takes the whole\n"
        "distributions). The whole vocabulary leaves zero.",
    ]
    tables = {rows.name: table(rows) for rows in (zipf(), transformer())} | recorded()
    for name, lines in tables.items():
        parts += [f"## {name[0].upper()}{name[1:]}", "\n".join(lines)]
    if recorded():
        parts.append(
            "The rows of SmolLM2 are measured by `python docs/generate_sampled_tail.py --smollm2`, which needs the\n"
            "extra `lm`, and kept in `docs/sampled_tail.json`."
        )
    parts.append(
        "The rows are drawn from seeds, and each number is a closed form of its row\n"
        "(`opdtheory.exact.tail_moments`), which the tests compare with the estimators by enumeration.\n"
        "Regenerate the page with `python docs/generate_sampled_tail.py`."
    )
    return "\n\n".join(parts) + "\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the page, after measuring SmolLM2 if that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--smollm2", action="store_true", help="measure the rows of SmolLM2 again")
    if parser.parse_args(arguments).smollm2:
        measured = {rows.name: table(rows, SUMMED_OF_MANY) for rows in (smollm2(None), smollm2(MIDDLE))}
        RECORD.write_text(json.dumps(measured, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE.name}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
