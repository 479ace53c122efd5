"""Small training runs in float64, shared by the tests of the trainer and by the processes that they start."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from opdtheory.estimators import Estimator
from opdtheory.training import trainer
from opdtheory.training.batches import respond, step_examples, uniforms
from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import processes
from opdtheory.training.models.samples import Samples
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.run import Run
from opdtheory.training.tasks import Addition, Task
from opdtheory.training.trainer import started, train, training_step

TASK = Addition(2)
SMALL = {
    "dtype": "float64",
    "prompts_per_step": 6,
    "steps": 6,
    "warmup_steps": 2,
    "learning_rate": 1e-3,
    "eval_examples": 0,
    "progress": False,
    "device": "cpu",
}
GROUPED = {
    "divergence": "jsd",
    "clip_log_ratio": 4.0,
    "baseline": "leave_one_out",
    "rollouts_per_prompt": 3,
    "prompts_per_step": 5,
    "clip_gradient": None,
}
_PAIRS = {"rollouts_per_prompt": 2}

# An estimator of each kind; with options that tie the rollouts of a group together.
CASES = [
    {"estimator": "opd", "divergence": "forward_kl", "clip_log_ratio": 3.0},
    {"estimator": "opd_plus", "divergence": "jsd", "baseline": "vocabulary", "clip_weight": (-0.5, 0.5)},
    {"estimator": "opd_plus_centred", "divergence": "chi2", "clip_log_ratio": 3.0, "importance": "ppo"},
    {"estimator": "opd", "divergence": "reverse_kl", "zscore": True, **_PAIRS},
    {"estimator": "sequence_opd_plus", "divergence": "hellinger", "clip_log_ratio": 3.0, "importance": "sequence"},
    {
        "estimator": "return_to_go",
        "divergence": "jsd",
        "gamma": 0.9,
        "baseline": "group_mean",
        "rollouts_per_prompt": 2,
    },
    {"estimator": "k2_loss", "importance": "prefix"},
    {"estimator": "k3_loss"},
    {"estimator": "k1_reward", "baseline": "constant", "baseline_value": 0.3},
    {"estimator": "box_cox", "alpha": 0.5},
    {"estimator": "power", "alpha": 0.5, "importance": "token"},
    {"estimator": "sign"},
    {"estimator": "full_vocab", "divergence": "u*log(u) - 7*(u - 1)"},
    {"estimator": "topk_truncated", "divergence": "reverse_kl", "k": 3},
    {"estimator": "topk_renormalised", "divergence": "jsd", "k": 3, "support": "student"},
    {"estimator": "topk_tail", "divergence": "forward_kl", "k": 3},
    {
        "estimator": "topk_reward",
        "divergence": "forward_kl",
        "k": 3,
        "baseline": "leave_one_out",
        "rollouts_per_prompt": 2,
    },
    {"control": "constant_advantage", "advantage": -1.0},
    {"control": "supervised"},
    {"control": "exact_opd", "divergence": "jsd", "clip_log_ratio": 2.0},
]

REDUCTIONS = ("token_mean", "token_sum", "sequence_mean")


class Watcher:
    """A monitor that remembers what it gets, and counts tokens."""

    def __init__(self, loss: Estimator, *, together: int = 1) -> None:
        self.loss, self.together = loss, together
        self.added: list[dict[str, torch.Tensor]] = []
        self.steps: list[int | None] = []

    def add(self, student_logprobs, teacher_logprobs, behavior_logprobs=None, mask=None, *, entropy=None) -> None:
        """Remember the tensors by name."""
        names = ("student_logprobs", "teacher_logprobs", "behavior_logprobs", "mask", "entropy")
        values = (student_logprobs, teacher_logprobs, behavior_logprobs, mask, entropy)
        self.added.append(dict(zip(names, values, strict=True)))

    def step(self, number: int | None = None) -> dict[str, float]:
        """The number of tokens of the last batch."""
        self.steps.append(number)
        return {"opd/tokens": float(self.added[-1]["mask"].sum())}


def model(seed: int, width: int = 16) -> Transformer:
    """An untrained transformer, but with logits wide enough for rollouts of different lengths and log-ratios."""
    built = Transformer(TransformerConfig(width, 1, 2, 64), TASK.vocabulary, seed=seed).double()
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, dtype=torch.float64, generator=noise)
    return built


def config(**fields: object) -> TrainConfig:
    """A small run of reverse-KL OPD, with some fields changed."""
    defaults = {**SMALL, "estimator": "opd_plus"}
    if not {"estimator", "divergence", "control"} & set(fields):
        fields["divergence"] = "reverse_kl"
    return TrainConfig(**{**defaults, **fields})


def trained(out: str | Path | None = None, **fields: object) -> dict[str, torch.Tensor]:
    """The parameters after a run from the same student."""
    settings = config(out=None if out is None else str(out), **fields)
    return train(settings, student=model(0), teacher=model(1, 24), task=TASK).student.state_dict()


def gradients(settings: TrainConfig) -> tuple[list[torch.Tensor], dict[str, float], Run]:
    """The student's gradient in the first step, with the step's metrics."""
    with processes("cpu") as team, started(settings, team, model(0), model(1, 24), TASK) as (run, _):
        report = training_step(run, 0)
        return [parameter.grad.clone() for parameter in run.student.parameters()], report, run


def name_of(case: dict[str, object]) -> str:
    """The name of a case."""
    return str(case.get("estimator", case.get("control")))


def distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    flat, other = (torch.cat([each.flatten() for each in some]) for some in (a, b))
    return float((flat - other).abs().max() / other.abs().max())


def first_batch(settings: TrainConfig) -> tuple[Transformer, Transformer, Samples]:
    """The rollouts of the first step, by hand."""
    student, teacher = model(0), model(1, 24)
    examples = [example for example in step_examples(TASK, settings, 0) for _ in range(settings.rollouts_per_prompt)]
    draws = uniforms(
        settings.seed, 0, range(settings.prompts_per_step), settings.rollouts_per_prompt, TASK.max_response
    )
    samples = respond(student, TASK, examples, settings, draws)
    return student, teacher, samples


def gradient(student: Transformer, loss: torch.Tensor) -> list[torch.Tensor]:
    """The gradient of a loss in the student's parameters."""
    return list(torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True))


def untrained(task: Task, seed: int) -> Transformer:
    """A transformer for a task."""
    return Transformer(TransformerConfig(16, 1, 2, 64), task.vocabulary, seed=seed)


def main(what: str, out: str) -> None:
    """What a process started by a test does."""
    torch.set_num_threads(1)
    if what == "gradients":
        with processes("cpu") as team:
            found, report, _ = gradients(config(**GROUPED, microbatch=6))
            torch.save((found, report), f"{out}/rank_{team.rank}.pt")
            trainer.monitor_of = lambda settings: Watcher(settings.loss())
            state = trained(f"{out}/run", **GROUPED, eval_examples=7, record_every=3, monitor=True)
            torch.save(state, f"{out}/state_{team.rank}.pt")
    else:
        trained(out, steps=int(what), eval_every=4, eval_examples=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
