"""The configuration of a run: every field checked, TOML and the command line, divergences as text."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory import cli
from opdtheory.divergences import symbol
from opdtheory.errors import InvalidArgumentError
from opdtheory.training import loading
from opdtheory.training.config import TrainConfig
from opdtheory.training.objective import divergence_text, parse_divergence
from tests.tolerances import ALGEBRA
from tests.training_runs import config, model


def test_estimator_is_the_librarys_own() -> None:
    loss = TrainConfig(divergence="jsd", baseline="vocabulary", reduction="token_sum", clip_log_ratio=6.0).loss()
    assert repr(loss) == repr(opd.estimator("opd_plus", "jsd", baseline="vocabulary", clip_log_ratio=6.0))
    assert opd.TrainConfig is TrainConfig


@pytest.mark.parametrize("shift", [-7.0, -2.0, 0.5])
def test_regauged_generators_are_read_from_text(shift: float) -> None:
    log_u = torch.linspace(-6, 6, 41, dtype=torch.float64)
    found = parse_divergence(f"u*log(u) + {shift}*(u - 1)").generator(log_u)
    expected = log_u.exp() * log_u + shift * log_u.expm1()
    assert torch.allclose(found, expected, rtol=ALGEBRA, atol=ALGEBRA)
    # The twin, in the usual gauge, is another stop-gradient estimator.
    assert not torch.allclose(found, opd.divergences.forward_kl.generator(log_u), rtol=1e-3)


def test_numbers_in_a_generator_are_exact() -> None:
    assert parse_divergence("-log(u) + 0.1*(u-1)").expr.subs(symbol(), 1) == 0
    given = opd.Divergence.from_expr(symbol() ** 2 - symbol())
    assert parse_divergence(divergence_text(given)).expr == given.expr


@pytest.mark.bad_input  # the field is a text; an object becomes one
def test_a_divergence_is_kept_as_its_text() -> None:
    assert TrainConfig(divergence=opd.divergence("alpha", alpha=0.5)).divergence == "alpha(alpha=0.5)"


@pytest.mark.parametrize(
    "text", ["jds", "__import__('os').system('u')", "u.__class__", "u +", "u[0]", "lambda u: u", "u**2", "-u*log(u)"]
)
def test_what_is_no_divergence_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgumentError, match="divergence|expr"):
        TrainConfig(divergence=text)


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"steps": "3"}, "steps"),
        ({"steps": 0}, "steps"),
        ({"steps": True}, "steps"),
        ({"learning_rate": float("nan")}, "learning_rate"),
        ({"learning_rate": 0.0}, "learning_rate"),
        ({"temperature": -1.0}, "temperature"),
        ({"beta2": 1.0}, "beta2"),
        ({"dtype": "float16"}, "dtype"),
        ({"zscore": 1}, "zscore"),
        ({"task": None}, "task"),
        ({"out": ""}, "out"),
        ({"warmup_steps": 300}, "warmup_steps"),
        ({"baseline": "group_mean"}, "rollouts_per_prompt"),
        ({"rollouts_per_prompt": 4, "microbatch": 6}, "microbatch"),
        ({"clip_weight": (2.0, 1.0)}, "clip_weight"),
        ({"gamma": 0.5}, "gamma"),
        ({"estimator": "topk_tail"}, "k"),
        ({"advantage": -1.0}, "advantage"),
        ({"divergence": None, "control": "constant_advantage"}, "advantage"),
        ({"divergence": None, "control": "supervised", "clip_log_ratio": 6.0}, "clip_log_ratio"),
        ({"divergence": "jsd", "control": "supervised"}, "divergence"),
        ({"divergence": None, "control": "exact_opd"}, "divergence"),
        ({"divergence": "jsd", "control": "exact_opd", "zscore": True, "rollouts_per_prompt": 2}, "zscore"),
        ({"divergence": 3}, "divergence"),
    ],
)
def test_wrong_fields_are_named(fields: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        TrainConfig(**{"divergence": "jsd", **fields})
    assert caught.value.argument == named


def test_toml_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    before = TrainConfig(divergence="u*log(u)-7*(u-1)", estimator="opd", clip_weight=(-1.0, 2.0), clip_gradient=None)
    path.write_text(before.to_toml())
    after = TrainConfig.from_toml(path, steps=30)
    assert after == before.replace(steps=30)
    path.write_text("stepz = 3")
    with pytest.raises(InvalidArgumentError, match="did you mean 'steps'"):
        TrainConfig.from_toml(path)
    path.write_text("steps =")
    with pytest.raises(InvalidArgumentError, match="no TOML"):
        TrainConfig.from_toml(path)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        TrainConfig.from_toml(tmp_path / "missing.toml")


def test_schedule_rises_and_falls_in_lines() -> None:
    settings = config(steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert config(steps=5, warmup_steps=5).learning_rate_at(4) == config().learning_rate


@pytest.fixture
def small_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "load_pair", lambda task, seed, cache: (_small(task, seed), _small(task, seed + 1)))


def _small(task, seed):
    from opdtheory.training.models.transformer import Transformer, TransformerConfig

    return Transformer(TransformerConfig(16, 1, 2, 64), task.vocabulary, seed=seed)


OPTIONS = "--steps 2 --warmup-steps 1 --prompts-per-step 4 --eval-examples 4 --device cpu --max-new-tokens 6".split()


def test_command_trains_and_reports(small_pair: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--task", "arithmetic", "--divergence", "jsd", "--estimator", "opd_plus", *OPTIONS]
    out = tmp_path / "run"
    assert cli.main([*command, "--json", "--out", str(out), "--clip-gradient", "none"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["last"]["step"] == 2 and [row["step"] for row in record["evaluations"]] == [0, 2]
    assert record["config"]["divergence"] == "jsd" and record["config"]["clip_gradient"] is None
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3
    # The same from the file that the run left; it is finished, so nothing is trained again.
    assert cli.main(["train", "--config", str(out / "config.toml")]) == 0
    assert "estimator('opd_plus', 'jsd'" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options", [["--divergence", "jds"], ["--estimator", "sign", "--k", "3"], [], ["--config", "missing.toml"]]
)
def test_command_refuses_wrong_options(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *options]) == 2
    assert "opdtheory train:" in capsys.readouterr().err


def test_command_fails_where_a_step_cannot_be_taken(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(task, seed, cache):
        student, teacher = _small(task, 0), _small(task, 1)
        next(teacher.parameters()).data.fill_(float("nan"))
        return student, teacher

    monkeypatch.setattr(loading, "load_pair", broken)
    command = ["train", "--divergence", "jsd", *OPTIONS, "--eval-examples", "0", "--out", str(tmp_path)]
    assert cli.main(command) == 1
    assert str(tmp_path / "failure_step_00000001_rank_0.json") in capsys.readouterr().err


def test_models_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InvalidArgumentError, match="vocabulary"):
        opd.train(config(), student=model(0), teacher=_small(opd_task(), 0), task=opd_task(2))
    with pytest.raises(InvalidArgumentError, match="cannot read the prompts"):
        opd.train(config(), student=model(0), teacher=model(1), task=_tools())


def opd_task(digits: int = 4):
    from opdtheory.training.tasks import Addition

    return Addition(digits)


def _tools():
    from opdtheory.training.tasks import task

    return task("tools")
