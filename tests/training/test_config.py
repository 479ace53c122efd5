"""The configuration of a run: every field checked, TOML, the schedule."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

import pytest

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.training.config import TrainConfig
from tests.training.runs import config


def test_estimator_is_the_librarys_own() -> None:
    loss = TrainConfig(divergence="jsd", baseline="vocabulary", reduction="token_sum", clip_log_ratio=6.0).loss()
    assert repr(loss) == repr(opd.estimator("opd_plus", "jsd", baseline="vocabulary", clip_log_ratio=6.0))
    assert opd.TrainConfig is TrainConfig


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
        ({"sampling_temperature": 0.0}, "sampling_temperature"),
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


HUGE = 10**400


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("out", "a\0b", "must be a string without NUL that UTF-8 can encode, got 'a\\x00b'"),
        ("cache", "\0", "must be a string without NUL"),
        ("student", "smollm2\0", "must be a string without NUL"),
        ("out", "a\ud800b", "must be a string without NUL that UTF-8 can encode"),
        ("task", "\udcff", "must be a string without NUL that UTF-8 can encode"),
        ("steps", HUGE, "must be at most 4294967295, got 1000"),
        ("steps", 10**5000, "must be at most 4294967295, got a huge integer"),
        ("seed", 2**32, "must be at most 4294967295, got 4294967296"),
        ("pair_seed", 10**30, "must be at most 4294967295"),
        ("k", 10**30, "must be at most 4294967295"),
        ("threads", 10**6, "must be at most 1024, got 1000000"),
        ("learning_rate", HUGE, "must be a finite number, got 1000"),
        ("temperature", HUGE, "must be a finite number"),
        ("baseline_value", -HUGE, "must be a finite number"),
        ("clip_weight", [HUGE, 1], "must be a finite number"),
        ("clip_weight", [True, 1], "must be a finite number, got True"),
        ("clip_weight", ["a", 1], "must be a finite number, got 'a'"),
        ("clip_weight", [[1, 2], [3, 4]], "must be a finite number, got [1, 2]"),
        ("clip_weight", {"low": 1}, "must be a pair"),
        ("clip_weight", "ab", "must be a pair"),
        ("learning_rate", True, "must be a finite number, got True"),
        ("alpha", False, "must be a finite number, got False"),
        ("k", True, "must be an integer, got True"),
        ("steps", 2.0, "must be an integer, got 2.0"),
        ("gamma", "0.5", "must be a finite number, got '0.5'"),
        ("dtype", 32, "must be one of float32, float64, got 32"),
        ("reduction", ["token_sum"], "must be one of"),
        ("task", {"name": "arithmetic"}, "must be a non-empty string"),
        ("progress", "yes", "must be True or False"),
    ],
    # Python prints no integer of thousands of digits.
    ids=lambda value: value if isinstance(value, str) and value.isidentifier() else "",
)
def test_values_at_the_borders_are_refused_in_one_short_line(field: str, value: object, words: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        TrainConfig.from_dict({"divergence": "jsd", field: value})
    said = str(caught.value)
    assert caught.value.argument == field and words in said
    assert "\n" not in said and len(said) < 300 and "\0" not in said


@pytest.mark.parametrize("name", ["a\x7fb", "ü/日本", "emoji \U0001f600", 'quotes " and \\ and \t', "plain"])
def test_every_usable_name_survives_toml(name: str, tmp_path: Path) -> None:
    before = TrainConfig(divergence="jsd", out=name, learning_rate=1e-5, seed=2**32 - 1)
    path = tmp_path / "run.toml"
    path.write_text(before.to_toml(), encoding="utf-8")
    assert TrainConfig.from_toml(path) == before


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
    with pytest.raises(InvalidArgumentError, match="is not valid TOML"):
        TrainConfig.from_toml(path)
    with pytest.raises(InvalidArgumentError, match="cannot be read"):
        TrainConfig.from_toml(tmp_path / "missing.toml")


# Digests of identities from before there was a sampling temperature.
IDENTITIES = [
    ({"divergence": "jsd"}, "8e7d5af10fa5e08cefb5edd175bbb1789e5b05a1e300f7bc1e32112609fccb78"),
    (
        {"divergence": "forward_kl", "estimator": "opd", "clip_log_ratio": 6.0, "temperature": 1.3},
        "0f9f3d7ca0a28ab22740b1eec85b619214406a8314ee1039cc48b0a21a6e97eb",
    ),
]


@pytest.mark.parametrize(("fields", "digest"), IDENTITIES, ids=["jsd", "forward_kl"])
def test_a_run_without_a_sampling_temperature_is_the_run_that_it_was(fields: dict[str, object], digest: str) -> None:
    def digest_of(settings: TrainConfig) -> str:
        return hashlib.sha256(json.dumps(settings.identity(), sort_keys=True).encode()).hexdigest()

    before = TrainConfig(**fields)
    assert digest_of(before) == digest
    same = dataclasses.replace(before, sampling_temperature=before.temperature, out="x", record_every=3, monitor=True)
    assert digest_of(same) == digest and same.samples_itself
    other = before.replace(sampling_temperature=0.7)
    assert digest_of(other) != digest and other.identity()["sampling_temperature"] == 0.7
    assert (before.rollout_temperature, other.rollout_temperature) == (before.temperature, 0.7)


def test_schedule_rises_and_falls_in_lines() -> None:
    settings = config(steps=10, warmup_steps=4, learning_rate=1.0)
    rates = [settings.learning_rate_at(step) for step in range(10)]
    assert rates == pytest.approx([0.25, 0.5, 0.75, 1, 1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert config(steps=5, warmup_steps=5).learning_rate_at(4) == config().learning_rate


def test_a_warm_up_that_is_not_given_fits_the_steps(tmp_path: Path) -> None:
    assert [TrainConfig(divergence="jsd", steps=steps).warmup_steps for steps in (1, 5, 19, 20, 200)] == [
        *(1, 5, 19),
        *(20, 20),
    ]
    short = TrainConfig(divergence="jsd").replace(steps=5)
    assert short.warmup_steps == 5 and short.replace(steps=100).warmup_steps == 20
    assert short.replace(steps=100) == TrainConfig(divergence="jsd", steps=100, warmup_steps=20)
    path = tmp_path / "run.toml"
    path.write_text(short.to_toml())
    assert "warmup" not in short.to_toml() and TrainConfig.from_toml(path, steps=3).warmup_steps == 3


def test_a_warm_up_that_is_given_is_kept_or_refused(tmp_path: Path) -> None:
    given = TrainConfig(divergence="jsd", warmup_steps=20)
    path = tmp_path / "run.toml"
    path.write_text(given.to_toml())
    for shortened in (
        lambda: TrainConfig(divergence="jsd", warmup_steps=20, steps=5),
        lambda: given.replace(steps=5),
        lambda: TrainConfig.from_toml(path, steps=5),
    ):
        with pytest.raises(InvalidArgumentError, match="warmup_steps: must be at most steps=5, got 20"):
            shortened()
    assert given.replace(steps=100, warmup_steps=7).replace(steps=50).warmup_steps == 7
