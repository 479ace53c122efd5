"""The lines for each trainer, read by what they are for where that is at hand."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import shlex
from pathlib import Path
from typing import Any

import pytest

import opdtheory
from opdtheory import divergence, estimator
from opdtheory.commands import train
from opdtheory.monitoring.advice.candidates import candidates
from opdtheory.monitoring.advice.configs import train_options, trl_lines, verl_settings
from opdtheory.training.config import TrainConfig

NAMES = ("reverse_kl", "forward_kl", "jsd", "skew_jsd(beta=0.1)")


@pytest.mark.parametrize("name", NAMES)
def test_our_trainer_descends_the_same_loss(name: str) -> None:
    parser = argparse.ArgumentParser()
    train.add_parser(parser.add_subparsers())
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    for candidate in candidates(divergence(name), "vocabulary", 3, 4, False):
        loss = candidate.with_constant(-1.25).loss if candidate.best else candidate.loss
        words = shlex.split(train_options(loss, 4))
        assert words[0] == "opdtheory"
        given = vars(parser.parse_args(words[1:]))
        config = TrainConfig.from_dict({key: value for key, value in given.items() if key in fields})
        assert config.loss() == dataclasses.replace(loss, token_loss=config.loss().token_loss)
        assert config.rollouts_per_prompt == (4 if candidate.grouped else 1)


def trl_arguments(line: str) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """The trainer that a line makes, its arguments and those of its configuration."""
    seen: dict[str, Any] = {}

    def config(**given: Any) -> dict[str, Any]:
        return given

    def trainer(name: str) -> Any:
        def made(student: str, teacher: str, *, args: dict[str, Any], **given: Any) -> None:
            seen.update(name=name, given=given, args=args)

        return made

    known = {"OPDTrainer": trainer("OPDTrainer"), "OPDPlusTrainer": trainer("OPDPlusTrainer")}
    known |= {"GRPOConfig": config, "DistillationConfig": config, "student": "s", "teacher": "t", "divergence": "mine"}
    exec(line.replace(", ...)", ")").replace("(...)", "()"), known)
    return seen["name"], seen["given"], seen["args"]


def test_trl() -> None:
    def of(name: str, *arguments: Any, **options: Any) -> Any:
        line = trl_lines(estimator(name, *arguments, **options), 4)
        return None if line is None else trl_arguments(line)

    plain = {"loss_type": "dr_grpo"}
    assert of("full_vocab", "jsd") == ("OPDTrainer", {"divergence": "jsd"}, {})
    assert of("opd_plus", "jsd") == ("OPDPlusTrainer", {"divergence": "jsd"}, plain)
    centred = {"divergence": "reverse_kl", "centred": True}
    for line in (of("opd_plus_centred", "reverse_kl"), of("opd", "reverse_kl"), of("k2_loss")):
        assert line == ("OPDPlusTrainer", centred, plain)
    bounded = of("opd_plus", "jsd", clip_log_ratio=6.0)
    assert bounded == ("OPDPlusTrainer", {"divergence": "jsd", "clip_log_ratio": 6.0}, plain)
    grouped = of("opd_plus", "jsd", baseline="leave_one_out")
    assert grouped[1:] == ({"divergence": "jsd", "baseline": "leave_one_out"}, {**plain, "num_generations": 4})
    split = of("topk_tail_sampled", "jsd", k=3, baseline="constant", baseline_value=0.5)
    assert split[1] == {"divergence": "jsd", "top_k": 3, "baseline": "constant", "baseline_value": 0.5}
    for unknown in (
        of("opd", "jsd"),
        of("topk_tail", "jsd", k=3),
        of("topk_tail_sampled", "jsd", k=3, baseline="optimal"),
        of("opd_plus", "jsd", baseline="group_mean"),
        of("opd_plus", "jsd", baseline="optimal"),
        of("k3_loss"),
    ):
        assert unknown is None


def test_trl_arguments_are_those_of_the_plug_in() -> None:
    """Read from its source: importing it takes TRL."""
    root = Path(inspect.getfile(opdtheory)).parent
    tree = ast.parse((root / "integrations/trl/sampled.py").read_text(encoding="utf-8"))
    made = next(x for x in ast.walk(tree) if isinstance(x, ast.FunctionDef) and x.name == "__init__")
    known = {argument.arg for argument in made.args.kwonlyargs}
    assert {"divergence", "centred", "clip_log_ratio", "top_k", "baseline", "baseline_value"} <= known


def test_verl() -> None:
    plus = verl_settings(estimator("opd_plus_centred", "jsd"))
    assert plus is not None and 'verl.register("jsd", name="opd_plus_advised", centred=True)' in plus
    assert "loss_mode=opd_plus_advised" in plus and "loss_agg_mode=seq-mean-token-sum" in plus
    assert "loss_mode=k1\n" in (verl_settings(estimator("opd", "reverse_kl")) or "")
    assert "use_policy_gradient=false" in (verl_settings(estimator("k2_loss")) or "")
    assert "use_policy_gradient=true" in (verl_settings(estimator("k3_reward")) or "")
    for loss in (
        estimator("full_vocab", "jsd"),
        estimator("opd", "jsd"),
        estimator("k1_loss"),
        estimator("opd_plus", "jsd", clip_log_ratio=6.0),
        estimator("topk_tail_sampled", "jsd", k=2),
    ):
        assert verl_settings(loss) is None
