"""Small training runs in float64, shared by the tests of the trainer and by the processes that they start."""

from __future__ import annotations

import sys
from pathlib import Path

import torch

from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import processes
from opdtheory.training.models.transformer import Transformer, TransformerConfig
from opdtheory.training.run import Run
from opdtheory.training.tasks import Addition
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


def main(what: str, out: str) -> None:
    """What a process started by a test does."""
    torch.set_num_threads(1)
    if what == "gradients":
        with processes("cpu") as team:
            found, report, _ = gradients(config(**GROUPED, microbatch=6))
            torch.save((found, report), f"{out}/rank_{team.rank}.pt")
            state = trained(f"{out}/run", **GROUPED, eval_examples=7)
            torch.save(state, f"{out}/state_{team.rank}.pt")
    else:
        trained(out, steps=int(what), eval_every=4, eval_examples=5)


if __name__ == "__main__":
    main(*sys.argv[1:])
