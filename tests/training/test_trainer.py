"""One training step: the estimator's own gradient, however the batch is split; what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError, TrainingError
from opdtheory.training import trainer
from opdtheory.training.batches import parts, respond
from opdtheory.training.distributed import Processes, processes
from opdtheory.training.models.language_model import rollouts
from tests.sparse import some
from tests.tolerances import ALGEBRA
from tests.training.runs import (
    CASES,
    GROUPED,
    REDUCTIONS,
    TASK,
    config,
    distance,
    first_batch,
    gradient,
    gradients,
    model,
    name_of,
)


@pytest.mark.parametrize("case", some(CASES, 5, ids=map(name_of, CASES)))
def test_accumulation_changes_nothing(case: dict[str, object]) -> None:
    for reduction in REDUCTIONS:
        settings = config(**case, reduction=reduction, clip_gradient=None, temperature=1.3)
        whole, report, _ = gradients(settings)
        split, again, _ = gradients(settings.replace(microbatch=2))
        assert distance(split, whole) < ALGEBRA
        assert again == pytest.approx(report, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_is_that_of_the_estimator(reduction: str) -> None:
    settings = config(divergence="jsd", clip_log_ratio=3.0, reduction=reduction, clip_gradient=None)
    found, _, _ = gradients(settings.replace(microbatch=2))
    student, teacher, samples = first_batch(settings)
    loss = opd.estimator("opd_plus", "jsd", clip_log_ratio=3.0, reduction=reduction)
    assert distance(found, gradient(student, loss(rollouts(student, teacher, samples)))) < ALGEBRA
    # The twin, a mean in each part, weights tokens of short parts more; only where tokens are counted is it wrong.
    pieces = list(parts(samples, 2))
    means = sum(loss(rollouts(student, teacher, piece)) for piece in pieces) / len(pieces)
    assert (distance(gradient(student, means), found) > 1e-3) == (reduction == "token_mean")


def test_group_statistics_are_taken_within_the_rollouts_of_one_prompt() -> None:
    settings = config(**GROUPED)
    found, _, _ = gradients(settings)
    student, teacher, samples = first_batch(settings)
    loss = opd.estimator("opd_plus", "jsd", clip_log_ratio=4.0, baseline="leave_one_out")
    groups = [rollouts(student, teacher, samples.rows(slice(i, i + 3))) for i in range(0, 15, 3)]
    tokens = sum(group.mask.sum() for group in groups)
    right = sum(3 * loss(group) for group in groups) / tokens
    assert distance(found, gradient(student, right)) < ALGEBRA
    # The twin takes them over the batch, prompts mixed.
    batch = 15 * loss(rollouts(student, teacher, samples)) / tokens
    assert distance(found, gradient(student, batch)) > 1e-3


def test_later_updates_are_off_policy() -> None:
    base = config(importance="ppo", clip_range=1e-9, divergence="jsd", learning_rate=0.01)
    _, once, _ = gradients(base)
    _, twice, _ = gradients(base.replace(updates_per_batch=2))
    # Before the first update the sampler is the student itself; after it every ratio has moved.
    assert once["clip_fraction"] < 0.01
    assert twice["clip_fraction"] > 0.4
    assert twice["reverse_kl"] == once["reverse_kl"]


def test_rollouts_at_another_temperature_are_off_policy() -> None:
    settings = config(divergence="jsd", importance="token", clip_gradient=None, sampling_temperature=0.6)
    found, _, _ = gradients(settings)
    # By hand: the sampler is the student at 0.6, and p/mu weights its tokens.
    student, teacher, samples = first_batch(settings.replace(temperature=0.6))
    scored = rollouts(student, teacher, samples)
    loss = opd.estimator("opd_plus", "jsd", importance="token", reduction="token_mean")
    assert distance(found, gradient(student, loss(scored))) < ALGEBRA
    # The twin takes the student's own log-probabilities for those of the sampler.
    student, teacher, samples = first_batch(settings.replace(temperature=0.6))
    own = rollouts(student, teacher, samples)
    blind = dataclasses.replace(own, behavior_logprobs=own.student_logprobs.detach())
    assert distance(gradient(student, loss(blind)), found) > 1e-2


def test_an_evaluation_samples_the_student_itself() -> None:
    settings = config(eval_examples=16, steps=1, warmup_steps=0)
    plain, mismatched = (
        opd.train(each, student=model(0), teacher=model(1, 24), task=TASK).rows[0]
        for each in (settings, settings.replace(sampling_temperature=0.3))
    )
    assert plain == mismatched


def test_more_supervision_learns_the_demonstrations() -> None:
    settings = config(control="supervised", steps=40, learning_rate=0.02, prompts_per_step=16)
    result = opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK)
    losses = [row["loss"] for row in result.rows]
    assert losses[-1] < 0.75 * losses[0]
    assert "reverse_kl" not in result.rows[0]


def test_training_nears_the_teacher_and_stop_gradient_leaves_it() -> None:
    def last(estimator: str, divergence: str) -> tuple[float, float]:
        settings = config(
            estimator=estimator, divergence=divergence, steps=40, learning_rate=3e-3, prompts_per_step=32,
            clip_log_ratio=6.0, max_new_tokens=10,
        )  # fmt: skip
        rows = opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK).rows
        return rows[0]["reverse_kl"], rows[-1]["reverse_kl"]

    before, after = last("opd", "reverse_kl")
    assert after < 0.5 * before
    before, after = last("opd", "forward_kl")
    assert after > 1.5 * before


def test_infinite_loss_is_no_step(tmp_path: Path) -> None:
    student, teacher = model(0), model(1, 24)
    logits = teacher.logits
    ruled_out = torch.zeros(TASK.vocabulary.size).index_fill(0, torch.tensor([3]), -torch.inf)
    # The teacher rules out what the student writes: the reverse KL is infinite.
    teacher.logits = lambda *inputs, **options: logits(*inputs, **options) + ruled_out
    settings = config(out=str(tmp_path), estimator="full_vocab", divergence="reverse_kl")
    with pytest.raises(TrainingError, match="the loss is inf"):
        opd.train(settings, student=student, teacher=teacher, task=TASK)


def test_empty_rollout_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def silent(*arguments, **options):
        samples = respond(*arguments, **options)
        samples.mask[2] = 0.0
        return samples

    monkeypatch.setattr(trainer, "respond", silent)
    with pytest.raises(TrainingError, match="1 of 6 rollouts have no token of the student, the first for the prompt '"):
        gradients(config(out=str(tmp_path)))


def test_more_processes_than_prompts_are_refused() -> None:
    with processes("cpu") as team:
        many = Processes(0, 9, team.device)
        with pytest.raises(InvalidArgumentError, match="prompts_per_step"):
            with trainer.started(config(), many, model(0), model(1, 24), TASK):
                pass


def test_observers_join_the_metrics() -> None:
    seen = []

    def observer(run, finished):
        seen.append(finished)
        return {"parameters": float(sum(p.numel() for p in run.student.parameters()))}

    settings = config(steps=2)
    result = opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK, observers=[observer])
    assert seen == [1, 2] and result.rows[0]["parameters"] > 0


@pytest.mark.parametrize("name", ["out", "cache"])
def test_a_file_in_the_place_of_a_folder_is_refused_before_anything_is_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_models(*_: object) -> None:
        raise AssertionError("no model should be loaded")

    monkeypatch.setattr(trainer, "load_models", load_models)
    file = tmp_path / "file"
    file.write_text("kept")
    for path in (file, file / "below", file / "deep" / "below"):
        with pytest.raises(InvalidArgumentError, match=f"^{name}: must be a folder, got .* where .*file is a file"):
            opd.train(config(**{name: str(path)}))
    with pytest.raises(InvalidArgumentError, match=f"^{name}: must be a folder, .*: File name too long"):
        opd.train(config(**{name: str(tmp_path / ("a" * 300))}))
    assert file.read_text() == "kept"
