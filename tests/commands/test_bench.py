"""`opdtheory bench`: what it tells of gradients, its output and its refusals; no time is asserted."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

import opdtheory as opd
from opdtheory.cli import main
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import comparison

SMALL = ["--tokens", "3", "--vocabulary", "50", "--repeats", "1"]
NAMES = ("reverse_kl", "jsd", "alpha(alpha=1.5)")


@pytest.mark.parametrize("dtype", ("float64", "float32", "bfloat16", "float16"))
def test_every_gradient_is_right(dtype: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *NAMES, *SMALL, "--dtype", dtype, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [row["divergence"] for row in told["rows"]] == list(NAMES)
    for row in told["rows"]:
        assert row["agrees"] and 0 <= row["difference"] <= row["allowed"]
        assert row["milliseconds"] > 0 and row["textbook_milliseconds"] > 0
    assert "torch" in told["machine"]


@pytest.mark.parametrize("twin", ("scale", "sign", "divergence"))
def test_a_wrong_gradient_is_told(
    twin: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(student: torch.Tensor, teacher: torch.Tensor, name: Any) -> torch.Tensor:
        if twin == "divergence":
            return opd.fused_divergence(student, teacher, "forward_kl")
        return {"scale": 1.001, "sign": -1.0}[twin] * opd.fused_divergence(student, teacher, name)

    monkeypatch.setattr(comparison, "fused_divergence", wrong)
    assert main(["bench", "jsd", *SMALL]) == 1
    assert "WRONG: more than 1e-05" in capsys.readouterr().out


def test_the_table_names_the_divergences(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *SMALL]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "3 x 50 words, float32, forward and backward"
    assert [line.split()[0] for line in lines[4:]] == list(comparison.DIVERGENCES)


@pytest.mark.parametrize(
    ("arguments", "named"),
    (
        (["nope"], "divergence"),
        (["--tokens", "0"], "tokens"),
        (["--vocabulary", "-1"], "vocabulary"),
        (["--repeats", "0"], "repeats"),
        (["--device", "nowhere", *SMALL], "device"),
    ),
)
def test_what_is_wrong_is_named(arguments: list[str], named: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *arguments]) == 2
    assert f"opdtheory bench: {named}: " in capsys.readouterr().err


@pytest.mark.bad_input
def test_numbers_are_counts() -> None:
    with pytest.raises(InvalidArgumentError, match="tokens"):
        comparison.compare(tokens=True)
    with pytest.raises(InvalidArgumentError, match="dtype"):
        comparison.compare(dtype=torch.int64)
