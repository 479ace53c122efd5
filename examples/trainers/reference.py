"""The library's own trainer, on a Hugging Face student, as an update that the audit can play."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from examples.trainers.entry import Entry
from opdtheory.end_to_end import TrainerPair
from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import Processes
from opdtheory.training.metrics import Metrics
from opdtheory.training.models.huggingface import HuggingFaceModel
from opdtheory.training.models.language_model import response_logits
from opdtheory.training.models.samples import Samples, left_pad
from opdtheory.training.run import Run
from opdtheory.training.tasks import Example
from opdtheory.training.tasks import task as task_of
from opdtheory.training.trainer import update_on

__all__ = ["ENTRIES", "reference_update"]


class _Still(torch.optim.SGD):
    """An optimizer that leaves the student as it is."""

    def step(self, *_: Any, **__: Any) -> None:  # type: ignore[override]
        """Nothing."""


def reference_update(
    estimator: str, **settings: Any
) -> Callable[[TrainerPair, list[list[int]], list[list[int]]], None]:
    """The update of `opdtheory train` with an estimator, and other fields of `TrainConfig`."""

    def update(pair: TrainerPair, prompts: list[list[int]], answers: list[list[int]]) -> None:
        plain = {"clip_gradient": None, "prompts_per_step": len(prompts), "microbatch": pair.batch_size, **settings}
        config = TrainConfig(estimator=estimator, eval_examples=0, progress=False, **plain)
        student, teacher = (HuggingFaceModel(model, pair.tokenizer) for model in (pair.student, pair.teacher))
        run = Run(
            config,
            Processes(0, 1, torch.device("cpu")),
            task_of(config.task),
            student,
            teacher,
            config.loss(),
            _Still([pair.student.model.table], lr=0.0),
            Metrics(None, 0),
        )
        update_on(run, 0, [Example("", "", "") for _ in prompts], _samples(pair, student, prompts, answers))

    return update


def _samples(
    pair: TrainerPair, student: HuggingFaceModel, prompts: list[list[int]], answers: list[list[int]]
) -> Samples:
    """The rollouts as the trainer samples them."""
    end = pair.tokenizer.eos_token_id
    left, left_mask = left_pad(prompts, pair.tokenizer.pad_token_id, dtype=torch.float64)
    longest = max(map(len, answers))
    tokens = torch.full((len(answers), longest), pair.tokenizer.pad_token_id)
    mask = torch.zeros(tokens.shape, dtype=torch.float64)
    for row, answer in enumerate(answers):
        tokens[row, : len(answer)] = torch.tensor(answer)
        mask[row, : len(answer)] = 1.0
    ended = torch.tensor([answer[-1] == end for answer in answers])
    empty = Samples(left, left_mask, tokens, mask, mask, torch.zeros_like(mask), ended)
    with torch.no_grad():
        law = response_logits(student, empty).log_softmax(-1)
        logprobs = law.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) * mask
    return Samples(left, left_mask, tokens, mask, mask, logprobs, ended)


def _entry(estimator: str, divergence: str, **settings: Any) -> Entry:
    options = "".join(f", {name}={value}" for name, value in settings.items())
    update = reference_update(estimator, divergence=divergence, reduction="token_sum", **settings)
    says = "the estimator's claim, as `opdtheory train` runs it with a Hugging Face student and reduction=token_sum"
    return Entry.of(
        f"opdtheory train, {estimator} of {divergence}{options}", "opdtheory", update, divergence, says, True
    )


ENTRIES: tuple[Entry, ...] = (
    _entry("full_vocab", "reverse_kl"),
    _entry("opd_plus", "forward_kl"),
    _entry("opd_plus", "jsd"),
    _entry("opd_plus", "chi2"),
    _entry("topk_tail_sampled", "jsd", k=1),
    Entry.of(
        "opdtheory train, opd of jsd",
        "opdtheory",
        reference_update("opd", divergence="jsd", reduction="token_sum"),
        "jsd",
        "the estimator claims a bias (T2)",
        True,
    ),
    Entry.of(
        "opdtheory train, opd_plus of jsd, default reduction",
        "opdtheory",
        reference_update("opd_plus", divergence="jsd"),
        "jsd",
        "the estimator's claim, with the trainer's default, reduction=token_mean",
        True,
        reduction="token_mean",
    ),
)
