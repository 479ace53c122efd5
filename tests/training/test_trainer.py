"""One training step: the estimator's own gradient, however the batch is split; its metrics; its failures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError, TrainingError
from opdtheory.training import trainer
from opdtheory.training.batches import parts, respond, step_examples, uniforms
from opdtheory.training.distributed import processes
from opdtheory.training.intervals import wilson
from opdtheory.training.measures import clipped, distances
from opdtheory.training.metrics import Metrics
from opdtheory.training.models.language_model import rollouts
from tests.tolerances import ALGEBRA
from tests.training_runs import GROUPED, TASK, config, gradients, model

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


def _name(case: dict[str, object]) -> str:
    return str(case.get("estimator", case.get("control")))


def _distance(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference, relative to the largest entry."""
    flat, other = (torch.cat([each.flatten() for each in some]) for some in (a, b))
    return float((flat - other).abs().max() / other.abs().max())


def _batch(settings):
    """The rollouts of the first step, by hand."""
    student, teacher = model(0), model(1, 24)
    examples = [example for example in step_examples(TASK, settings, 0) for _ in range(settings.rollouts_per_prompt)]
    draws = uniforms(
        settings.seed, 0, range(settings.prompts_per_step), settings.rollouts_per_prompt, TASK.max_response
    )
    samples = respond(student, TASK, examples, settings, draws)
    return student, teacher, samples


def _gradient(student, loss) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(student.parameters()), materialize_grads=True))


@pytest.mark.parametrize("case", CASES, ids=_name)
def test_accumulation_changes_nothing(case: dict[str, object]) -> None:
    for reduction in REDUCTIONS:
        settings = config(**case, reduction=reduction, clip_gradient=None, temperature=1.3)
        whole, report, _ = gradients(settings)
        split, again, _ = gradients(settings.replace(microbatch=2))
        assert _distance(split, whole) < ALGEBRA
        assert again == pytest.approx(report, rel=1e-11, abs=1e-12)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradient_is_that_of_the_estimator(reduction: str) -> None:
    settings = config(divergence="jsd", clip_log_ratio=3.0, reduction=reduction, clip_gradient=None)
    found, _, _ = gradients(settings.replace(microbatch=2))
    student, teacher, samples = _batch(settings)
    loss = opd.estimator("opd_plus", "jsd", clip_log_ratio=3.0, reduction=reduction)
    assert _distance(found, _gradient(student, loss(rollouts(student, teacher, samples)))) < ALGEBRA
    # The twin, a mean in each part, weights tokens of short parts more; only where tokens are counted is it wrong.
    pieces = list(parts(samples, 2))
    means = sum(loss(rollouts(student, teacher, piece)) for piece in pieces) / len(pieces)
    assert (_distance(_gradient(student, means), found) > 1e-3) == (reduction == "token_mean")


def test_group_statistics_are_taken_within_the_rollouts_of_one_prompt() -> None:
    settings = config(**GROUPED)
    found, _, _ = gradients(settings)
    student, teacher, samples = _batch(settings)
    loss = opd.estimator("opd_plus", "jsd", clip_log_ratio=4.0, baseline="leave_one_out")
    groups = [rollouts(student, teacher, samples.rows(slice(i, i + 3))) for i in range(0, 15, 3)]
    tokens = sum(group.mask.sum() for group in groups)
    right = sum(3 * loss(group) for group in groups) / tokens
    assert _distance(found, _gradient(student, right)) < ALGEBRA
    # The twin takes them over the batch, prompts mixed.
    batch = 15 * loss(rollouts(student, teacher, samples)) / tokens
    assert _distance(found, _gradient(student, batch)) > 1e-3


def test_rollouts_are_the_same_in_any_part_of_the_batch() -> None:
    whole = uniforms(3, 7, range(6), 2, 5)
    assert torch.equal(whole[4:8], uniforms(3, 7, range(2, 4), 2, 5))
    assert len(torch.unique(whole)) == whole.numel()
    for other in (uniforms(3, 8, range(6), 2, 5), uniforms(4, 7, range(6), 2, 5)):
        assert not (other == whole).any()


def test_later_updates_are_off_policy() -> None:
    base = config(importance="ppo", clip_range=1e-9, divergence="jsd", learning_rate=0.01)
    _, once, _ = gradients(base)
    _, twice, _ = gradients(base.replace(updates_per_batch=2))
    # Before the first update the sampler is the student itself; after it every ratio has moved.
    assert once["clip_fraction"] < 0.01
    assert twice["clip_fraction"] > 0.4
    assert twice["reverse_kl"] == once["reverse_kl"]


def test_constant_advantage_is_the_k1_loss() -> None:
    settings = config(estimator="k1_loss", clip_gradient=None)
    k1, _, _ = gradients(settings)
    constant, _, _ = gradients(settings.replace(estimator="opd_plus", control="constant_advantage", advantage=-1.0))
    assert _distance(constant, k1) < ALGEBRA
    reward, _, _ = gradients(settings.replace(estimator="k1_reward"))
    assert _distance(reward, k1) > 1e-3


@pytest.mark.parametrize("clip", [None, 0.5])
def test_exact_opd_is_the_expectation_of_opd(clip: float | None) -> None:
    settings = config(estimator="opd", divergence="forward_kl", clip_log_ratio=clip)
    logits = torch.randn(2, 1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student, teacher = logits[0].requires_grad_(), logits[1]

    def gradient(settings: opd.TrainConfig, token: int) -> torch.Tensor:
        rollouts = opd.Rollouts.from_logits(torch.tensor([[token]]), student, teacher)
        return torch.autograd.grad(settings.loss()(rollouts), student)[0]

    p = student.detach().softmax(-1).flatten()
    expected = sum(p[a] * gradient(settings, a) for a in range(5))
    exact = [gradient(settings.replace(control="exact_opd"), a) for a in (0, 3)]
    assert torch.equal(exact[0], exact[1])
    assert float((exact[0] - expected).abs().max()) < 1e-15
    # Of the same tokens the same ones are clipped.
    rollouts = opd.Rollouts.from_logits(torch.arange(5).unsqueeze(0), student.expand(1, 5, 5), teacher.expand(1, 5, 5))
    counts = [int(clipped(each.loss(), rollouts)) for each in (settings, settings.replace(control="exact_opd"))]
    assert counts[0] == counts[1] and (counts[0] > 0) == (clip is not None)
    corrected = gradient(settings.replace(estimator="full_vocab", clip_log_ratio=None), 0)
    assert float((exact[0] - corrected).abs().max()) > 1e-2


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


def test_distances_are_those_of_the_whole_vocabulary() -> None:
    student, teacher, samples = _batch(config())
    scored = rollouts(student, teacher, samples)
    sums = distances(scored)
    for name in ("reverse_kl", "forward_kl"):
        value = opd.estimator("full_vocab", name).token_loss(scored)
        assert float(sums[name]) == pytest.approx(float((value.detach() * scored.mask).sum()), rel=ALGEBRA)
    p = torch.distributions.Categorical(logits=scored.student_logits.detach())
    assert float(sums["entropy"]) == pytest.approx(float((p.entropy() * scored.mask).sum()), rel=ALGEBRA)
    log_u = scored.log_u.detach()
    bound = float(log_u.abs().median())
    expected = int(((log_u.abs() > bound) & (scored.mask > 0)).sum())
    assert int(clipped(opd.estimator("k2_loss", clip_log_ratio=bound), scored)) == expected > 0
    low, high = -bound, bound
    assert int(clipped(opd.estimator("k1_reward", clip_weight=(low, high)), scored)) == expected
    assert int(clipped(opd.estimator("k1_reward"), scored)) == 0


def test_evaluation_counts_and_brackets() -> None:
    settings = config(eval_examples=9, eval_every=2, steps=3, prompts_per_step=4)
    result = opd.train(settings, student=model(0), teacher=model(1, 24), task=TASK)
    assert [row["step"] for row in result.evaluations] == [0, 2, 3]
    row = result.evaluations[0]
    assert (row["greedy_low"], row["greedy_high"]) == wilson(round(9 * row["greedy_accuracy"]), 9)
    assert row["test_reverse_kl"] > 0


def test_wilson_interval() -> None:
    # Newcombe, Statistics in Medicine 17 (1998) 857, table I, method 3.
    assert wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)
    assert wilson(29, 29) == pytest.approx((0.8830, 1.0), abs=5e-5)
    with pytest.raises(InvalidArgumentError, match="correct"):
        wilson(3, 2)


@pytest.mark.parametrize("checked", [True, False])
def test_nan_saves_the_batch_and_leaves_the_parameters(tmp_path: Path, checked: bool) -> None:
    student, teacher = model(0), model(1, 24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        next(teacher.parameters())[5] = float("nan")
    settings = config(out=str(tmp_path), check_rollouts=checked)
    with pytest.raises(TrainingError, match="step 1: .*prompts and tokens are in") as caught:
        opd.train(settings, student=student, teacher=teacher, task=TASK)
    assert caught.value.path is not None and caught.value.path.parent == tmp_path
    record = json.loads(caught.value.path.read_text())
    assert record["step"] == 1 and len(record["rows"]) == 6
    row = record["rows"][0]
    assert not row["teacher_logits_finite"] and row["student_logits_finite"]
    assert TASK.vocabulary.decode(row["prompt_tokens"]) == row["prompt"]
    assert len(row["tokens"]) == len(row["mask"])
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())


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
    with pytest.raises(TrainingError, match="1 of 6 rollouts hold no token of the student, the first to the prompt '"):
        gradients(config(out=str(tmp_path)))


def test_more_processes_than_prompts_are_refused() -> None:
    from opdtheory.training.distributed import Processes

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


def test_tensorboard_is_asked_for_by_its_extra(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    try:
        import tensorboard  # noqa: F401
    except ImportError:
        with pytest.raises(InvalidArgumentError, match=r"opdtheory\[tensorboard\]"):
            Metrics(tmp_path, 0, 1, tensorboard=True)
    else:
        metrics = Metrics(tmp_path, 0, 1, tensorboard=True)
        metrics.add({"step": 1, "loss": 0.5})
        metrics.close()
        assert list((tmp_path / "tensorboard").glob("events*"))
