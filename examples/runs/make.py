"""Make the runs on which a diagnosis is tested: some train, some collapse, and each for a reason that is known.

`python examples/runs/make.py --out FOLDER` trains one student a run, with the rollouts of every step in
`FOLDER/NAME/rollouts` and what became of the student in `FOLDER/NAME/outcome.json`. A run takes about half a minute on
one core; a teacher that the cache lacks takes minutes more, once.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from opdtheory.errors import OpdTheoryError, TrainingError
from opdtheory.reproduction.summary import verdict_of
from opdtheory.training.config import TrainConfig
from opdtheory.training.pairs import load_pair
from opdtheory.training.trainer import train

TASK = "arithmetic"
DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "hellinger", "chi2")
SETTINGS: dict[str, Any] = {
    "prompts_per_step": 128,
    "learning_rate": 2e-3,
    "clip_log_ratio": 6.0,
    "reduction": "token_mean",
    "eval_every": 0,
    "eval_examples": 256,
    "device": "cpu",
    "threads": 1,
    "progress": False,
    "record_every": 1,
    "checkpoint_every": 0,
}
STEPS, WARMUP = 120, 20

# Fields of `TrainConfig` by the name of the run: stop-gradient and corrected weights, a sampler that is not the
# student, and a clip of the log-ratio at half a nat.
RUNS: dict[str, dict[str, Any]] = {
    **{f"{form}_{d}": {"estimator": form, "divergence": d} for form in ("opd", "opd_plus") for d in DIVERGENCES},
    "mismatch": {"estimator": "opd", "divergence": "reverse_kl", "sampling_temperature": 0.7},
    "over_clipped": {"estimator": "opd_plus", "divergence": "forward_kl", "clip_log_ratio": 0.5},
}

# What is kept of an evaluation; distances are in nats per token.
MEASURES = ("step", "greedy_accuracy", "test_sampled_accuracy", "test_reverse_kl", "test_forward_kl", "test_entropy")


def config_of(
    name: str,
    out: Path,
    *,
    task: str = TASK,
    seed: int = 0,
    pair_seed: int = 0,
    steps: int = STEPS,
    cache: str | None = None,
    logits: bool = False,
) -> TrainConfig:
    """The configuration of a run, whose folder is below `out`."""
    own = {"task": task, "seed": seed, "pair_seed": pair_seed, "steps": steps, "warmup_steps": min(WARMUP, steps)}
    return TrainConfig(
        **{**SETTINGS, **own, "cache": cache, "record_logits": logits, "out": str(out / name), **RUNS[name]}
    )


def make(name: str, out: Path, **settings: Any) -> dict[str, Any]:
    """Train a run, write its outcome, and return it; a run that is already finished is only read."""
    config = config_of(name, out, **settings)
    found: dict[str, Any] = {"name": name, "loss": repr(config.loss()), "config": config.identity()}
    try:
        first, *_, last = train(config).evaluations
        row = {"start": first, "end": last, "identity": {"fields": config.identity()}}
        word, evidence = verdict_of([row])
        found |= {when: {key: row[when][key] for key in MEASURES} for when in ("start", "end")}
    except TrainingError as error:
        word, evidence = verdict_of([], failed=1)
        found["error"] = str(error)
    found |= {"word": word, "evidence": evidence}
    path = out / name / "outcome.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    return found


def make_all(names: Sequence[str], out: Path, workers: int = 1, **settings: Any) -> Iterator[dict[str, Any]]:
    """The outcomes of several runs, so many at a time."""
    # Before the workers start, or each of them would train a teacher that the cache lacks.
    load_pair(settings.get("task", TASK), settings.get("pair_seed", 0), cache=settings.get("cache"))
    one = partial(make, out=out, **settings)
    if workers == 1:
        yield from map(one, names)
        return
    with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(one, names)


def line_of(found: dict[str, Any]) -> str:
    """An outcome in one line."""
    if "error" in found:
        return f"{found['name']}: {found['word']}, {found['error']}"

    def from_to(name: str) -> str:
        return " to ".join("inf" if x is None else f"{x:.3f}" for x in (found[when][name] for when in ("start", "end")))

    accuracy, distance = from_to("test_sampled_accuracy"), from_to("test_reverse_kl")
    return f"{found['name']}: {found['word']}; sampled accuracy {accuracy}, reverse KL {distance}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the runs that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=RUNS, metavar="NAME", help=f"some of {', '.join(RUNS)}")
    parser.add_argument("--task", default=TASK, metavar="NAME", help=f"the task (default: {TASK})")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="seed of prompts and samples")
    parser.add_argument("--pair-seed", type=int, default=0, metavar="N", help="seed of the student before the run")
    parser.add_argument("--steps", type=int, default=STEPS, metavar="N", help="batches of rollouts of a run")
    parser.add_argument("--workers", type=int, default=2, metavar="N", help="runs at a time, each with one thread")
    parser.add_argument("--cache", metavar="FOLDER", help="folder of trained teachers and students")
    parser.add_argument("--logits", action="store_true", help="record whole rows of logits too")
    options = vars(parser.parse_args(arguments))
    try:
        for found in make_all(options.pop("only") or list(RUNS), **options):
            print(line_of(found), flush=True)
    except OpdTheoryError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
