"""`opdtheory audit`: targets, claims, files, exit statuses."""

from __future__ import annotations

import inspect
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import opdtheory as opd
from opdtheory import cli
from opdtheory.commands.audit import SETTINGS

SOURCE = """
import opdtheory as opd

def k3(r):
    return r.token_sum(r.log_u.expm1() - r.log_u)

def k2(r):
    return r.token_sum(r.log_u.square() / 2)

def estimate(teacher, student):
    return (teacher - student).expm1() - (teacher - student)

class Losses:
    @staticmethod
    def right(r):
        return k2(r)

claimed = opd.estimator("return_to_go", "jsd", gamma=1.0)
number = 3
"""


@pytest.fixture
def losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    path = tmp_path / "my_losses.py"
    path.write_text(SOURCE)
    # No settings of this repository or of the machine.
    monkeypatch.chdir(tmp_path)
    yield str(path)
    # The tutorial, which other tests run in this process, has a module of this name too.
    sys.modules.pop(path.stem, None)


def test_audit_of_a_file(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3"]) == 1
    assert "forward_kl" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:k3", "--objective", "forward_kl"]) == 0
    assert cli.main(["audit", f"{losses}:Losses.right"]) == 0


def test_audit_of_several(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k9", f"{losses}:k3"]) == 2
    said = capsys.readouterr()
    assert "has no 'k9'" in said.err and "k3: OTHER OBJECTIVE" in said.out
    assert cli.main(["audit", f"{losses}:k3", f"{losses}:k2", "--json"]) == 2
    assert "--json and --html take one loss, got 2" in capsys.readouterr().err


def test_audit_of_a_module(losses: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(Path(losses).parent))
    assert cli.main(["audit", "my_losses:k2"]) == 0
    capsys.readouterr()


def test_audit_of_another_kind_of_function(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:estimate"]) == 2
    assert "--call" in capsys.readouterr().err
    call = "r.token_sum(f(r.teacher_logprobs, r.student_logprobs))"
    assert cli.main(["audit", f"{losses}:estimate", "--call", call]) == 1
    assert "forward_kl" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:estimate", "--call", "r.token_sum("]) == 2
    assert "call: must be an expression of f and r, got 'r.token_sum('" in capsys.readouterr().err


def test_audit_as_json(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--json", "--seed", "1"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["descends"] == "forward_kl"
    assert record["settings"]["seed"] == 1


@pytest.mark.slow
def test_audit_takes_the_claim_of_an_estimator(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:claimed"]) == 0
    assert "jsd (token_return)" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:claimed", "--granularity", "token_local"]) == 1


def test_audit_of_a_parameterised_divergence(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--objective", "alpha(alpha=1)"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("nothing", "PATH.py:FUNCTION"),
        ("nowhere.py:loss", "no file"),
        ("no_such_module_at_all:loss", "cannot be imported"),
        ("{losses}:k4", "it has k2, k3"),
        ("{losses}:number", "must be a function of rollouts, got int"),
    ],
)
def test_wrong_targets_are_usage_errors(
    losses: str, target: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = target.replace("{losses}", losses)
    assert cli.main(["audit", target]) == 2
    if "k4" in target:
        message = "has no 'k4'"
    assert message in capsys.readouterr().err


def test_wrong_names_are_usage_errors(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--objective", "nonsense"]) == 2
    assert "nonsense" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exit_:
        cli.main(["audit", f"{losses}:k3", "--granularity", "nonsense"])
    assert exit_.value.code == 2


def test_audit_writes_a_page(losses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "deep" / "audit.html"
    assert cli.main(["audit", f"{losses}:k3", "--html", str(page)]) == 1
    assert f"wrote {page}" in capsys.readouterr().out
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert cli.main(["audit", f"{losses}:k3", "--html", str(page), "--json"]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["verdict"] == "other_objective" and "wrote" in captured.err


@pytest.mark.slow
def test_a_recorded_bias_holds_and_a_new_one_fails(
    losses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = str(tmp_path / "known.json")
    assert cli.main(["audit", f"{losses}:k3", "--write-baseline", known]) == 0
    out = capsys.readouterr().out
    assert f"wrote {known}" in out and "known: other objective" in out
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known, "--json"]) == 0
    assert "known:" in capsys.readouterr().err
    # Another claim of the same loss, another seed and another loss are not on record.
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known, "--objective", "jsd"]) == 1
    assert "new:" in capsys.readouterr().out
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known, "--seed", "1"]) == 1
    assert cli.main(["audit", f"{losses}:k2", "--baseline", known, "--objective", "jsd"]) == 1
    assert cli.main(["audit", f"{losses}:k2", "--baseline", known]) == 0
    Path(losses).write_text(SOURCE.replace("r.log_u.expm1() - r.log_u)\n\ndef k2", "r.log_u.square() / 2)\n\ndef k2"))
    capsys.readouterr()
    assert cli.main(["audit", f"{losses}:k3", "--baseline", known]) == 0
    assert "vanished:" in capsys.readouterr().out


def test_files_of_the_audit_that_are_wrong_are_usage_errors(
    losses: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", f"{losses}:k2", "--baseline", str(tmp_path / "none.json")]) == 2
    assert "cannot be read" in capsys.readouterr().err
    wrong = tmp_path / "wrong.json"
    wrong.write_text("{}")
    assert cli.main(["audit", f"{losses}:k2", "--write-baseline", str(wrong)]) == 2
    assert "baseline_version" in capsys.readouterr().err
    assert cli.main(["audit", f"{losses}:k2", "--html", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["audit", "--help"])
    assert "exit status: 0" in capsys.readouterr().out


HARD = """
import os, sys
import torch
import opdtheory as opd

print("imported")
sys.__stdout__.write("imported, past the redirection\\n")

def k2(r):
    print("called")
    os.write(1, b"called, past Python\\n")
    os.system("echo called, by another process")
    return r.token_sum(r.log_u.square() / 2)

def raises(r):
    raise KeyError("of the user")

def exits(r):
    sys.exit(0)

def vector(r):
    return r.log_u

def not_finite(r):
    return r.token_sum(r.log_u) * float("nan")

def of_a_group(r):
    rewards = (r.log_u.detach() * r.mask).sum(-1)
    spread = ((rewards - rewards.mean()) ** 2).sum() / float("nan" if len(rewards) == 1 else len(rewards))
    return r.token_sum(-(rewards / (spread + 1e-6)).unsqueeze(-1) * r.student_logprobs)

def interrupts(r):
    raise KeyboardInterrupt

def wrong_sum(r):
    return r.token_sum(r.mask[0])

def k2_that_claims(r):
    return r.token_sum(r.log_u.square() / 2)

k2_that_claims.claim = "the best loss"

class Stop(BaseException):
    pass

def stops(teacher, student):
    raise Stop

def of_log_u(log_u):
    return log_u.square() / 2

class Module(torch.nn.Module):
    def forward(self, student_logits, teacher_logits):
        log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)

module = Module()

class Trainer:
    def loss(self, policy_logps, ref_logps):
        return self.scale * (ref_logps - policy_logps).square()

def of_labels(student_logits, teacher_logits, labels):
    log_p, log_q = student_logits.log_softmax(-1), teacher_logits.log_softmax(-1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)

def of_top_k(student_logits, topk_ids, topk_logprobs):
    log_p = student_logits.log_softmax(-1).gather(-1, topk_ids)
    return (topk_logprobs.exp() * (topk_logprobs - log_p)).sum(-1)

def of_all(student_logps, old_logps, teacher_logps, mask):
    return -((teacher_logps - student_logps).detach() * (student_logps - old_logps).exp() * mask).sum() / len(mask)
"""


@pytest.fixture
def hard(losses: str) -> str:
    path = Path(losses).with_name("hard.py")
    path.write_text(HARD.replace("\\\\n", "\\n"))
    return str(path)


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("raises", "KeyError: 'of the user'", 'raise KeyError("of the user")'),
        ("exits", "SystemExit: it exits with status 0", "sys.exit(0)"),
        ("vector", "the loss must return a scalar tensor, got shape (4, 3)", "(B, T, V) = (4, 3, 4)"),
        (
            "not_finite",
            "must be finite, got nan on a batch of shape (B, T, V) = (4, 3, 4), on the pair 'sharp",
            "found",
        ),
        ("wrong_sum", "values: must have one value per token", "return r.token_sum(r.mask[0])"),
        ("of_log_u", "has no attribute 'square'", "--call 'r.token_sum(f(r.log_u))'"),
        ("module", "TypeError: ", "--call 'r.token_sum(f(r.student_logits, r.teacher_logits))'"),
    ],
)
def test_a_loss_that_fails_is_refused_in_two_lines(
    hard: str, name: str, first: str, second: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", f"{hard}:{name}", "--json"]) == 2
    captured = capsys.readouterr()
    told = captured.err[captured.err.index("opdtheory audit: ") :].splitlines()
    assert captured.out == "" and len(told) == 2
    assert first in told[0] and second in told[1] and "--traceback" in told[1]
    assert "Traceback" not in captured.err
    assert cli.main(["audit", f"{hard}:{name}", "--traceback"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("Traceback (most recent call last)") and first in err.split("opdtheory audit: ")[-1]


def test_a_file_that_exits_is_refused_and_an_interrupt_passes(hard: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(hard).with_name("exits.py").write_text(SOURCE + "import sys\nsys.exit(0)\n")
    assert cli.main(["audit", str(Path(hard).with_name("exits.py")) + ":k2"]) == 2
    assert "SystemExit: it exits with status 0\nat exits.py:" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        cli.main(["audit", f"{hard}:interrupts"])


def test_a_function_that_stops_when_it_is_tried_is_told_how_to_call_it(
    hard: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", f"{hard}:stops"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert err[0] == "opdtheory audit: stops(teacher, student) does not take rollouts alone"
    assert err[1].startswith("say how to call it, though this failed when it was tried: --call 'r.token_sum(f(")


def test_a_claim_of_another_kind_is_none(hard: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{hard}:k2_that_claims"]) == 0
    assert "reverse_kl" in capsys.readouterr().out


def test_json_is_alone_on_standard_output(hard: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{hard}:k2", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out)["verdict"] == "exact"
    for words in ("imported", "past the redirection", "called", "past Python", "by another process"):
        assert words in err
    assert cli.main(["audit", f"{hard}:k2"]) == 0
    out, _ = capfd.readouterr()
    assert "imported" in out and "by another process" in out and "EXACT" in out


def test_a_module_that_takes_standard_output_away_does_not_hide_the_audit(
    losses: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = Path(losses).with_name("quiet.py")
    path.write_text("import io, sys\nsys.stdout = io.StringIO()\n" + SOURCE)
    assert cli.main(["audit", f"{path}:k2"]) == 0
    assert "EXACT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "adapter", "call"),
    [
        (
            "Trainer.loss",
            "bind",
            "r.token_sum(opdtheory.bind(f, scale=0.5)(r.student_logprobs, r.teacher_logprobs))",
        ),
        ("of_labels", "from_logits", "opdtheory.from_logits(f)(r)"),
        ("of_all", "", "f(r.student_logprobs, r.behavior_logprobs, r.teacher_logprobs, r.mask)"),
        ("Module", "", "r.token_sum(f()(r.student_logits, r.teacher_logits))"),
    ],
)
def test_the_call_that_is_suggested_is_one_that_works(
    hard: str, name: str, adapter: str, call: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["audit", f"{hard}:{name}"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert adapter in told
    (suggested,) = shlex.split(told.partition("--call ")[2])
    assert suggested.replace("...", "0.5") == call
    assert cli.main(["audit", f"{hard}:{name}", "--call", call]) == 0


def test_a_loss_of_the_likeliest_tokens_is_told_of_its_adapter(hard: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{hard}:of_top_k"]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    (suggested,) = shlex.split(told.partition("--call ")[2])
    assert suggested == 'opdtheory.from_top_k(f, 2, names=("student_logits", "topk_ids", "topk_logprobs", None))(r)'
    assert cli.main(["audit", f"{hard}:of_top_k", "--call", suggested, "--objective", "forward_kl"]) == 1


def test_an_expression_that_fails_is_refused_in_two_lines(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    for call, words in {
        "r.token_sum(g(r))": "NameError: name 'g' is not defined\nat --call:1",
        "f(r) + 1 / 0": "ZeroDivisionError: division by zero\nat --call:1",
        "exit(0)": "SystemExit: it exits with status 0",
        "f(r).no_such": "has no attribute 'no_such'",
    }.items():
        assert cli.main(["audit", f"{losses}:k2", "--call", call]) == 2
        assert words in capsys.readouterr().err


def test_every_setting_of_an_audit_is_an_option(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--prompts 2 --environment 1 --shared-prompt --method exact --batch-size 2 --eos 0 --off-policy 0.1"
    assert cli.main(["audit", f"{losses}:k2", "--json", *options.split()]) == 1
    settings = json.loads(capsys.readouterr().out)["settings"]
    stated = {"prompts": 2, "environment": [1], "shared_prompt": True, "batch_size": 2, "eos": 0, "off_policy": 0.1}
    assert {name: settings[name] for name in stated} == stated
    assert cli.main(["audit", f"{losses}:k2", "--json", "--method", "monte_carlo"]) == 0
    assert json.loads(capsys.readouterr().out)["monte_carlo"] is not None


def test_options_and_their_defaults_are_the_arguments_of_the_audit() -> None:
    arguments = {
        name: argument.default
        for name, argument in inspect.signature(opd.audit).parameters.items()
        if name not in ("loss", "name", "details")
    }
    # A gate that called every token mean biased would be noise.
    assert {each.name: each.default for each in SETTINGS} == {**arguments, "reduction": "any"}


@pytest.mark.parametrize("text", ["x", "0,x", "1.5", "0;2"])
def test_positions_that_are_no_numbers_are_usage_errors(losses: str, text: str) -> None:
    with pytest.raises(SystemExit) as exit_:
        cli.main(["audit", f"{losses}:k2", "--environment", text])
    assert exit_.value.code == 2


@pytest.mark.slow
def test_options_win_over_claims_and_claims_over_the_project(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    project = Path(losses).with_name("pyproject.toml")
    project.write_text('[tool.opdtheory]\nobjective = "forward_kl"\neos = 0\nseed = 3\nshared_prompt = true\n')

    def settings(*arguments: str) -> dict[str, object]:
        cli.main(["audit", *arguments, "--json"])
        told = json.loads(capsys.readouterr().out)
        return {"objective": told["objective"], "granularity": told["granularity"], **told["settings"]}

    of_project = settings(f"{losses}:k3")
    assert of_project == {**of_project, "objective": "forward_kl", "eos": 0, "seed": 3, "shared_prompt": True}
    given = settings(f"{losses}:k3", "--objective", "jsd", "--eos", "none", "--seed", "1", "--no-shared-prompt")
    assert given == {**given, "objective": "jsd", "eos": None, "seed": 1, "shared_prompt": False}
    claimed = settings(f"{losses}:claimed", "--eos", "none")
    assert claimed == {**claimed, "objective": "jsd", "granularity": "token_return", "seed": 3, "eos": None}


def test_a_wrong_project_file_is_a_usage_error(losses: str, capsys: pytest.CaptureFixture[str]) -> None:
    project = Path(losses).with_name("pyproject.toml")
    project.write_text("[tool.opdtheory]\nobjetive = 'jsd'\n")
    assert cli.main(["audit", f"{losses}:k3"]) == 2
    err = capsys.readouterr().err
    assert "objetive: is not a setting" in err and str(project) in err and "did you mean 'objective'" in err


@pytest.mark.parametrize("value", ["99999999999999999999999", "-1"])
def test_seeds_out_of_range_are_usage_errors(losses: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["audit", f"{losses}:k3", "--seed", value]) == 2
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["copy", *(pytest.param(name, marks=pytest.mark.slow) for name in ("torch", "statistics"))]
)
@pytest.mark.slow
def test_a_file_named_after_a_module_is_audited_by_python_m_too(name: str, losses: str) -> None:
    folder = Path(losses).parent
    (folder / f"{name}.py").write_text(f"import {name} as real\nassert real.__file__ != __file__\n{SOURCE}")
    done = subprocess.run(
        [sys.executable, "-m", "opdtheory", "audit", f"{name}.py:k2", "--json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(opd.__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "exact"
