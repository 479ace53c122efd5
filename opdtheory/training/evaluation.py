"""Evaluation of a student: accuracy on the test split, greedy and sampled, and distance from the teacher there."""

from __future__ import annotations

import torch

from opdtheory.training.batches import longest, parts, respond, uniforms
from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import Processes
from opdtheory.training.intervals import wilson
from opdtheory.training.measures import Tally, distances
from opdtheory.training.models.language_model import LanguageModel, rollouts
from opdtheory.training.tasks import Task

__all__ = ["evaluate"]

_SPLIT_SEED = 0  # all runs and seeds are tested on the same problems
_SUMS = ("greedy", "sampled", "count", "tokens", "reverse_kl", "forward_kl", "entropy")


@torch.no_grad()
def evaluate(
    student: LanguageModel, teacher: LanguageModel, task: Task, config: TrainConfig, processes: Processes
) -> dict[str, float]:
    r"""Test accuracy with 95 % Wilson intervals, and the KLs to the teacher on the student's own test prefixes.

    Returns:
        `greedy_accuracy`, `greedy_low`, `greedy_high`, the same for `test_sampled`, and in nats per token
        `test_reverse_kl`, `test_forward_kl` and `test_entropy`.
    """
    examples = task.examples("test", config.eval_examples, _SPLIT_SEED)
    mine = processes.share(len(examples))
    tally = Tally.empty(processes.device, _SUMS)
    size = max(1, config.microbatch or config.batch_size)
    for start in range(mine.start, mine.stop, size):
        some = range(start, min(start + size, mine.stop))
        chosen = [examples[number] for number in some]
        draws = uniforms(config.seed, "evaluation", some, 1, longest(task, config))
        for name, noise in (("greedy", None), ("sampled", draws)):
            samples = respond(student, task, chosen, config, noise)
            tally.add(**{name: sum(task.correct(chosen, samples, student.vocabulary))})
        tally.add(count=len(chosen))
        for piece in parts(samples, size):
            scored = rollouts(student, teacher, piece, temperature=config.temperature)
            tally.add(tokens=scored.mask.sum(), **distances(scored))
    processes.total(tally.sums)
    report = {}
    for name, label in (("greedy", "greedy"), ("sampled", "test_sampled")):
        report[f"{label}_accuracy"] = tally[name] / tally["count"]
        report[f"{label}_low"], report[f"{label}_high"] = wilson(round(tally[name]), round(tally["count"]))
    return report | {f"test_{name}": tally[name] / tally["tokens"] for name in ("reverse_kl", "forward_kl", "entropy")}
