"""`opdtheory audit-trainer`: exit status, text, JSON and page."""

from __future__ import annotations

import json

import pytest

from opdtheory.cli import main

SOURCE = """
import torch

def rows(pair, prompt, answer):
    ids = torch.tensor([prompt + answer])
    where = slice(len(prompt) - 1, -1)
    return [model(ids).logits[0, where].log_softmax(-1) for model in (pair.student, pair.teacher)]

def sound(pair, prompts, answers):
    for prompt, answer in zip(prompts, answers):
        p, q = rows(pair, prompt, answer)
        ((p.exp() * (p - q)).sum() / len(prompts)).backward()

def forward(pair, prompts, answers):
    for prompt, answer in zip(prompts, answers):
        p, q = rows(pair, prompt, answer)
        ((q.exp() * (q - p)).sum() / len(prompts)).backward()

def raises(pair, prompts, answers):
    raise RuntimeError("no such luck")

def no_trainer(pair):
    return 3
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def test_the_exit_status_follows_the_audit(source, capsys) -> None:
    assert main(["audit-trainer", f"{source}:sound", "--no-variants"]) == 0
    assert "EXACT" in capsys.readouterr().out
    assert main(["audit-trainer", f"{source}:forward", "--no-variants"]) == 1
    assert "descends forward_kl" in " ".join(capsys.readouterr().out.split())
    assert main(["audit-trainer", f"{source}:forward", "--no-variants", "--objective", "forward_kl"]) == 0


def test_json_and_page(source, tmp_path, capsys) -> None:
    page = tmp_path / "page.html"
    assert main(["audit-trainer", f"{source}:sound", "--json", "--html", str(page), "--prompts", "b,ab"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["verdict"] == "exact" and record["settings"]["prompts"] == ["b", "ab"] and record["passes"]
    assert len(record["variants"]) == 4 and "Audit of a trainer" in page.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["raises"], "no such luck"),
        (["no_trainer"], "must return a transformers.Trainer"),
        (["missing"], "missing"),
        (["sound", "--prompts", "xyz"], "letters"),
        (["sound", "--objective", "nothing"], "nothing"),
    ],
)
def test_what_cannot_be_audited_is_a_usage_error(source, capsys, arguments, message) -> None:
    assert main(["audit-trainer", f"{source}:{arguments[0]}", "--no-variants", *arguments[1:]]) == 2
    assert message in capsys.readouterr().err
