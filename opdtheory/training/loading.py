"""The student and the teacher of a configuration, on its device, in its dtype, with one vocabulary."""

from __future__ import annotations

import torch

from opdtheory.training.batches import task_prompts
from opdtheory.training.config import TrainConfig
from opdtheory.training.distributed import Processes
from opdtheory.training.models.language_model import LanguageModel, check_same_vocabulary
from opdtheory.training.pairs import load_pair
from opdtheory.training.progress import Display
from opdtheory.training.tasks import Task

__all__ = ["load_models"]


def load_models(
    config: TrainConfig,
    task: Task,
    team: Processes,
    student: LanguageModel | None,
    teacher: LanguageModel | None,
    display: Display,
) -> tuple[LanguageModel, LanguageModel]:
    """The given models, else those that the configuration names, else the task's own pair.

    A display is told of what takes long.

    Raises:
        InvalidArgumentError: a model cannot be found, the two vocabularies differ, or the student cannot encode the
            task's prompts.
    """
    if student is None and config.student is not None:
        student = _named("student", config.student, config, display)
    if teacher is None and config.teacher is not None:
        teacher = _named("teacher", config.teacher, config, display)
    if student is None or teacher is None:
        own = _pair(config, task, team, display)
        student, teacher = own[0] if student is None else student, own[1] if teacher is None else teacher
    check_same_vocabulary(student, teacher)
    task_prompts(student, task.examples("train", 1, 0))  # raises if the student cannot encode prompts
    dtype = getattr(torch, config.dtype)
    return student.to(team.device, dtype), teacher.to(team.device, dtype).requires_grad_(False)


def _named(role: str, name: str, config: TrainConfig, display: Display) -> LanguageModel:
    from opdtheory.training.models.huggingface import HuggingFaceModel, smollm2

    display.say(f"Loading the {role} {name}.")
    dtype = getattr(torch, config.dtype)
    if name == "smollm2":
        return smollm2(cache=config.cache, dtype=dtype)
    return HuggingFaceModel.from_pretrained(name, dtype=dtype)


def _pair(config: TrainConfig, task: Task, team: Processes, display: Display) -> tuple[LanguageModel, LanguageModel]:
    # A model that is not in the cache is trained once, by the first process.
    pair = load_pair(task, config.pair_seed, cache=config.cache, making=display.making) if team.is_first else None
    team.wait()
    return load_pair(task, config.pair_seed, cache=config.cache) if pair is None else pair
