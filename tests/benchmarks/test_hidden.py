"""The benchmark from hidden states, on small shapes: its tables, its marks and what it prints of a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import hidden
from benchmarks.peers.subjects import CHUNKED, EAGER, OURS
from benchmarks.peers.timing import Clock
from tests.benchmarks.test_gpu import stand_ins, without_liger

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (6, 8, 300)
TINY = ["--tokens", "6", "--width", "8", "--vocabulary", "300", "--errors", "6", "8", "300"]


def cells(text: str, columns: int) -> list[list[str]]:
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    return [row for row in rows if len(row) == columns and not row[0].startswith("-")]


def test_the_page_has_every_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_ins(monkeypatch)
    page = tmp_path / "page.md"
    page.write_text(f"before\n<!-- begin: {hidden.SCRIPT} -->\nold\n<!-- end: {hidden.SCRIPT} -->\nafter\n")
    assert hidden.main([*TINY, "--repeats", "5", "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    times = cells(text, 8)
    assert len(times) == 2 * (1 + 2 * (3 + 2))
    for divergence, by, head, *numbers in (row for row in times if row[0]):
        assert divergence in ("`jsd`", "`reverse_kl`") and head in ("trained", "frozen")
        if by == EAGER:
            assert numbers[1] == "1.00"
        assert by in (OURS, EAGER) or (by == CHUNKED and head == "trained")
    assert len(cells(text, 11)) == 1 + len(hidden.SCALED) * len(hidden.DIVERGENCES) * 2
    assert "bfloat16: ours 0.2" in text or "bfloat16: ours 0.1" in text


def test_a_peer_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_liger(monkeypatch)
    rows = cells("\n".join(hidden.timed(SHAPE, "float32", 1, Clock())), 8)
    assert [row[3] for row in rows if row[1] == CHUNKED] == ["not installed"] * len(hidden.TIMED)


def test_few_repeats_are_not_written() -> None:
    with pytest.raises(SystemExit):
        hidden.main([*TINY, "--repeats", "1", "--write", "page.md"])


@pytest.mark.parametrize("divergence", hidden.DIVERGENCES)
def test_errors_are_those_of_one_rounding_and_the_twin_misses_the_mark(divergence: str) -> None:
    for distance in hidden.DISTANCES:
        inputs = hidden.near(SHAPE, torch.bfloat16, distance)
        errors = dict(hidden.errors_of(inputs, divergence, 1))
        assert max(errors[OURS]) < 2**-8 < hidden.MARK
    assert min(errors[hidden.TWIN]) > hidden.MARK


def test_a_loss_scale_divides_out() -> None:
    inputs = hidden.near(SHAPE, torch.float64, 0.1)
    for scale in (1, 2**16):
        for _, errors in hidden.errors_of(inputs, "jsd", scale):
            assert max(errors) < 1e-12
    (_, right), _ = hidden.errors_of(inputs, "jsd", 4)
    inputs.forget()
    (4 * hidden._ours(inputs, "jsd")).backward()
    wrong = inputs.tensors["head"].grad
    inputs.forget()
    hidden._ours(inputs, "jsd").backward()
    assert max(right) < 1e-12 < hidden.off(wrong, inputs.tensors["head"].grad)


def test_in_float16_a_loss_scale_keeps_what_would_be_rounded_to_zero() -> None:
    """The twin rounds the gradient in the logits before the scale comes."""
    inputs = hidden.near(SHAPE, torch.float16, 0.003)
    (_, scaled), (_, twin) = hidden.errors_of(inputs, "jsd", 2**16)
    (_, plain), _ = hidden.errors_of(inputs, "jsd", 1)
    assert max(scaled) < 1e-3 < 1e-2 < min(max(plain), max(twin))


def test_the_worst_error_decides_and_nan_is_the_worst() -> None:
    found = {("float32", 1, "jsd", OURS): [[1e-7, 2e-3], [1e-3, 1e-4]], ("float16", 1, "jsd", OURS): [[0.5, 0.5]]}
    assert hidden._worst(found, "float32", 1, OURS) == 2e-3
    found["float32", 1, "reverse_kl", OURS] = [[float("nan"), 0.0]]
    assert hidden._worst(found, "float32", 1, OURS) == float("inf")


def test_the_page_on_the_gpu_says_what_the_model_prints(capsys: pytest.CaptureFixture[str]) -> None:
    assert hidden.main(["--model"]) == 0
    first, trained, frozen = capsys.readouterr().out.splitlines()
    page = " ".join((ROOT / "docs" / "gpu.md").read_text(encoding="utf-8").split())
    shape, rows = first.split(", ")[0], first.split(", on a GPU, ")[1].split()[0]
    told = f"prints {trained.split(' beyond')[0]} for {shape}, and {frozen.split(' beyond')[0]} with the head frozen"
    assert told in page and f"{rows} positions of 151,936 words" in page
    assert "the head trained" in trained
