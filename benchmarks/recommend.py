"""How `opd.recommend` ranks estimators, beside the errors of their gradients in the parameters of real models.

`python benchmarks/recommend.py [--smollm2]` samples histories of a student once and holds them fixed, so that the exact
gradient is that of the whole vocabulary at them; what follows a token does not matter to a token-local objective. A
batch draws a new token at every history, and each estimator's own code makes a gradient of it in the parameters; its
squared distance from the exact one is the error, the same draws for all. Beside the mean over batches stands the
expectation: the bias, and the variance along random directions with a sum over the vocabulary, which sees rare tokens
that no batch drew. Intervals are of a bootstrap over batches, or over directions.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from scipy import stats
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import opdtheory as opd  # noqa: E402
from opdtheory.monitoring.advice import Advice, Choice, recommend  # noqa: E402
from opdtheory.monitoring.tokens import SampledTokens  # noqa: E402
from opdtheory.reproduction.validation_cases import smollm2_prefixes  # noqa: E402
from opdtheory.training.batches import longest, task_prompts  # noqa: E402
from opdtheory.training.config import TrainConfig  # noqa: E402
from opdtheory.training.objective import group_losses  # noqa: E402
from opdtheory.training.pairs import load_pair  # noqa: E402
from opdtheory.training.tasks import task as task_of  # noqa: E402
from opdtheory.training.validation.comparison import predicted_logit_gradient, predicted_sensitivity  # noqa: E402
from opdtheory.training.validation.expectation import Singles  # noqa: E402
from opdtheory.training.validation.prefixes import Prefixes  # noqa: E402
from opdtheory.training.validation.vectors import difference, norm  # noqa: E402

SEED, GROUP = 20261128, 2
RESAMPLED, ALPHA = 1000, 0.05

_HEAD = """# What `recommend` was held against

`python benchmarks/recommend.py --smollm2 --write docs/recommend.md` writes this page.
[`opdtheory.recommend`](api/monitoring.md) ranks estimators by the error of their gradient: the square of the bias and
the variance of a batch, both over the square of the exact gradient. Here the errors are measured in the parameters of
real models, at fixed histories. A cell is Spearman's rank correlation between the stated errors and the measured
ones, with a 95 % interval from a bootstrap.

- *expected*: bias and variance along random directions, with an exact sum over the vocabulary.
- *sampled*: the mean over batches that were drawn, each with the estimator's own code. Of a weight with a heavy tail,
  few batches show the rare tokens that make most of its variance. With `batches` given, `recommend` leaves out what
  so many batches do not show.
- *without logits*: the proxies that log-probabilities of sampled tokens allow, which leave some estimators unjudged.
  The constant in them was set on the arithmetic pair.

Trust ranks more than values."""


@dataclasses.dataclass(frozen=True)
class Subject:
    """A pair of models, and how much is drawn.

    Attributes:
        title: what is shown.
        prefixes: makes the histories; rollouts of one prompt stand next to each other.
        divergences: the targets.
        k: the number of likeliest tokens.
        group: rollouts of a prompt.
        batches: batches that are drawn.
        directions: random directions.
    """

    title: str
    prefixes: Callable[[], Prefixes]
    divergences: tuple[str, ...]
    k: int
    group: int
    batches: int
    directions: int


def arithmetic(cache: str | None) -> Prefixes:
    """Two answers to each of 16 problems by the student of seed 0, in float64."""
    task = task_of("arithmetic")
    config = TrainConfig(divergence="jsd", cache=cache)
    student, teacher = (model.double() for model in load_pair(task, 0, cache=cache))
    prompts = [p for p in task_prompts(student, task.examples("test", 16, SEED)) for _ in range(GROUP)]
    return Prefixes.sample(student, teacher, prompts, max_new_tokens=longest(task, config), seed=SEED)


def rollouts(prefixes: Prefixes, tokens: Tensor, student: Tensor) -> opd.Rollouts:
    """The rollouts with other tokens at the same histories."""
    whole = torch.zeros(prefixes.live.shape, dtype=torch.int64)
    whole[prefixes.live] = tokens
    return opd.Rollouts.from_logits(whole, student, prefixes.grids[1], prefixes.live.double())


def sampled(prefixes: Prefixes, choices: Sequence[Choice], subject: Subject, exact: list[Tensor]) -> Tensor:
    """The relative squared error of each estimator in each batch, `(choices, batches)`."""
    count, unit = len(prefixes), norm(exact)
    generator = torch.Generator().manual_seed(SEED)
    found = torch.zeros(len(choices), subject.batches, dtype=torch.float64)
    for batch in range(subject.batches):
        tokens = torch.multinomial(prefixes.log_p.exp(), 1, generator=generator).squeeze(-1)
        for number, choice in enumerate(choices):
            if batch and choice.variance == 0:
                found[number, batch] = found[number, 0]
                continue
            leaf = prefixes.grids[0].clone().requires_grad_()
            drawn = rollouts(prefixes, tokens, leaf)
            values = group_losses(choice.loss, drawn, subject.group)
            (gradient,) = torch.autograd.grad((values * drawn.mask).sum() / count, leaf)
            if choice.options.get("baseline") == "group_mean":
                gradient = gradient * subject.group / (subject.group - 1)  # the scale that the theory states
            moved = prefixes.pull_back(gradient[prefixes.live])
            found[number, batch] = (norm(difference(moved, exact)) / unit) ** 2
    return found


def expected(prefixes: Prefixes, choices: Sequence[Choice], subject: Subject, exact: list[Tensor]) -> Tensor:
    """The expected squared error by direction, `(choices, directions)`; NaN for baselines over a group."""
    count, unit, p = len(prefixes), norm(exact), prefixes.log_p.exp()
    images = [prefixes.push_forward(prefixes.random(i, SEED)) for i in range(subject.directions)]
    found = torch.full((len(choices), subject.directions), torch.nan, dtype=torch.float64)
    for number, choice in enumerate(choices):
        if choice.options.get("baseline") in ("leave_one_out", "group_mean"):
            continue
        mean = prefixes.pull_back(predicted_logit_gradient(choice.loss, prefixes) / count)
        bias = (norm(difference(mean, exact)) / unit) ** 2
        kappa = predicted_sensitivity(choice.loss, prefixes)
        for which, image in enumerate(images):
            noise = 0.0 if kappa is None else float(Singles(p, p, kappa).variance(image).sum())
            found[number, which] = bias + noise * prefixes.dimension / count**2 / unit**2
    return found


def correlation(stated: Sequence[float], measured: Tensor) -> str:
    """Spearman's rank correlation with the mean over columns, and its interval."""
    known = ~measured.isnan().any(-1)
    measured, ranks = measured[known], torch.tensor(stated, dtype=torch.float64)[known]

    def of(columns: Tensor) -> float:
        # What rounding tells apart is the same.
        return float(stats.spearmanr(rounded(ranks), rounded(measured[:, columns].mean(-1)))[0])

    generator = torch.Generator().manual_seed(SEED)
    size = measured.shape[1]
    again = [of(torch.randint(size, (size,), generator=generator)) for _ in range(RESAMPLED)]
    low, high = (float(torch.tensor(again).nanquantile(x)) for x in (ALPHA / 2, 1 - ALPHA / 2))
    return f"{of(torch.arange(size)):.2f} [{low:.2f}, {high:.2f}]"


def rounded(values: Tensor) -> list[float]:
    return [float(f"{x:.5e}") if x > 1e-10 else 0.0 for x in values.tolist()]


def errors(advice: Advice, choices: Sequence[Choice]) -> list[float]:
    """What an advice states of these estimators; NaN of those that it leaves out. The best constants differ."""
    stated = {key(choice): choice.error for choice in advice.choices}
    return [stated.get(key(choice), float("nan")) for choice in choices]


def key(choice: Choice) -> str:
    return f"{choice.name} {sorted((k, str(v)) for k, v in choice.options.items() if k != 'baseline_value')}"


def report(subject: Subject, *, detail: bool) -> list[str]:
    """The lines of a subject: rank correlations, and with `detail` the errors."""
    prefixes = subject.prefixes()
    generator = torch.Generator().manual_seed(SEED + 1)
    tokens = torch.multinomial(prefixes.log_p.exp(), 1, generator=generator).squeeze(-1)
    given = rollouts(prefixes, tokens, prefixes.grids[0])
    logged = SampledTokens.of(given.student_logprobs, given.teacher_logprobs, mask=given.mask)
    lines = [
        f"## {subject.title}",
        f"{len(prefixes):,} histories, {prefixes.log_p.shape[-1]:,} words, {prefixes.dimension:,} parameters, "
        f"{subject.batches} batches, {subject.directions} directions.",
        "| divergence | estimators | expected | sampled | sampled, `batches` given | without logits, expected | "
        "without logits, sampled |",
        "|---|---|---|---|---|---|---|",
    ]
    tables = []
    for name in subject.divergences:
        options = {"k": subject.k, "group": subject.group}
        advice = recommend(given, "vocabulary", name, **options)
        seen = recommend(given, "vocabulary", name, **options, batches=subject.batches)
        blind = recommend(logged, "vocabulary", name, **options)
        choices = advice.choices
        exact = prefixes.pull_back(prefixes.exact(opd.divergence(name)) / len(prefixes))
        drawn, means = (measure(prefixes, choices, subject, exact) for measure in (sampled, expected))
        stated, short, proxy = ([*errors(each, choices)] for each in (advice, seen, blind))
        judged = [i for i, x in enumerate(proxy) if x == x]
        cells = [
            correlation(stated, means),
            correlation(stated, drawn),
            correlation(short, drawn),
            *(correlation([proxy[i] for i in judged], found[judged]) for found in (means, drawn)),
        ]
        lines.append(f"| `{name}` | {len(choices)} | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
        tables += ["", f"### `{name}`", "", "| estimator | stated | expected | `batches` given | sampled | without |"]
        tables.append("|---|---|---|---|---|---|")
        columns = zip(choices, stated, means.mean(-1), short, drawn.mean(-1), proxy, strict=True)
        for choice, *numbers in columns:
            tables.append(f"| `{choice.loss.label}` | {' | '.join(f'{float(x):.3g}' for x in numbers)} |")
    return lines + tables if detail else lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the correlations."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cache", help="folder of trained models")
    parser.add_argument("--smollm2", action="store_true", help="also of SmolLM2-135M, which needs the extra lm")
    parser.add_argument("--only-smollm2", action="store_true", help="of SmolLM2-135M alone")
    parser.add_argument("--batches", type=int, help="batches to draw")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write the correlations as a page")
    parser.add_argument("--detail", action="store_true", help="print every error")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    every = ("reverse_kl", "forward_kl", "jsd", "hellinger", "chi2")
    small = Subject("Arithmetic pair", lambda: arithmetic(options.cache), every, 4, GROUP, 64, 48)
    cut = "SmolLM2-135M against itself without a layer"
    large = Subject(cut, lambda: smollm2_prefixes(tokens=12, layer=15), every[:3], 16, 1, 5, 12)
    subjects = [large] if options.only_smollm2 else [small, *([large] if options.smollm2 else [])]
    page = [_HEAD]
    for subject in subjects:
        if options.batches is not None:
            subject = dataclasses.replace(subject, batches=options.batches)
        began = time.process_time()
        lines = report(subject, detail=options.detail)
        page.append("\n".join([*lines[:1], "", *lines[1:2], "", *lines[2:]]))
        print("\n".join(lines))
        print(f"\n{time.process_time() - began:.0f} s of one core\n")
    if options.write is not None:
        options.write.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
