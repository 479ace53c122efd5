"""The result of reading a run: its verdict, its values, its text and its page."""

from __future__ import annotations

import io
import json
import re
import shutil
import subprocess
import sys

import pytest
import torch

from opdtheory.monitoring import Diagnosis, Monitor, diagnose
from opdtheory.monitoring.page import render_diagnosis, write_diagnosis
from opdtheory.monitoring.report import VERDICTS
from opdtheory.monitoring.terminal import print_diagnosis
from tests.monitoring.runs import drawn, laws

CHROMIUM = shutil.which("chromium")


@pytest.fixture(scope="module")
def run() -> Diagnosis:
    """A run whose weight falls, sampled by a hotter engine."""
    log_p, log_q = laws(200, 10, seed=0, apart=0.5)
    monitor = Monitor("opd", "forward_kl", reduction="token_mean")
    with pytest.warns(match="a collapse is to be expected"):
        for step in range(6):
            rows = drawn(log_p, log_q, rollouts=64, length=20, seed=step, temperature=1.3)
            mask = torch.ones(64, 20)
            mask[:20, 7:] = 0
            monitor.add(rows["student"], rows["teacher"], rows["behavior"], mask)
            monitor.step(10 * (step + 1))
    return monitor.diagnosis("<script>run.jsonl")


@pytest.fixture(scope="module")
def sound() -> Diagnosis:
    log_p, log_q = laws(60, 8, seed=1, apart=0.5)
    rows = drawn(log_p, log_q, rollouts=64, length=20, seed=2)
    z = (log_p[rows["history"]], log_q[rows["history"]])
    given = {"student_logits": z[0], "teacher_logits": z[1], "entropy": rows["entropy"]}
    return diagnose(rows["student"], rows["teacher"], estimator="opd_plus", divergence="jsd", **given)


def test_the_gravest_warning_is_the_verdict(run, sound):
    assert [each.name for each in run.warnings] == ["collapse", "mismatch"] and run.verdict == "collapse"
    assert run.first_warning == 10 and run.foresees_collapse and "heads for a collapse" in run.headline
    assert sound.warnings == () and sound.verdict == "nothing_found" and sound.first_warning is None
    assert set(VERDICTS) >= {run.verdict, sound.verdict}


def test_values_are_plain_and_whole(run, sound):
    for found in (run, sound):
        record = json.loads(json.dumps(found.to_dict(), allow_nan=False))
        assert record["verdict"] == found.verdict and len(record["findings"]) == len(found.findings)
        assert record["schema_version"] == 1 and record["tokens"] == found.tokens
        assert all(each["theorem"] and each["sentence"] for each in record["findings"])
        assert len(record["steps"]) == len(found.steps) and len(record["zoo"]) == len(found.zoo)
    assert len(run.to_dict()["steps"]) == 6 and run.to_dict()["steps"][0]["number"] == 10


def test_whole_distributions_give_an_exact_signal(run, sound):
    assert run.signal == {} and set(sound.signal) == {row.name for row in sound.zoo}
    text = str(sound)
    assert "exact signal to noise" in text and "exact signal to noise" not in str(run)
    own = sound.signal["opd_plus(jsd)"]
    assert own.low < own.value < own.high


def test_text_says_the_verdict_first_and_its_limits_last(run):
    lines = str(run).splitlines()
    assert "heads for a collapse" in lines[0] and "WARNING" in str(run)
    assert "A collapse is foreseen from step 10 on." in str(run)
    assert "learning rate" in " ".join(lines[-6:]) and all(len(line) <= 130 for line in lines)


def test_the_page_stands_alone_and_escapes(run, sound, tmp_path):
    for found, figures in ((run, 5), (sound, 1)):
        page = render_diagnosis(found)
        assert page.count("<svg") == figures and "http://" not in page.split("<svg")[0]
        assert "<script" not in page and "src=" not in page and "@import" not in page
        assert all(each.theorem in page for each in found.findings)
    assert "&lt;script&gt;run.jsonl" in render_diagnosis(run).replace("<wbr>", "")
    written = write_diagnosis(run, tmp_path / "deep" / "run.html")
    assert written.read_text(encoding="utf-8") == render_diagnosis(run)


def test_ids_of_figures_are_apart(run):
    page = render_diagnosis(run)
    ids = [part.split('"')[0] for part in page.split(' id="')[1:]]
    assert len(ids) == len(set(ids)) > 10


def test_without_matplotlib_there_are_no_figures(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    page = render_diagnosis(run)
    assert "<svg" not in page and "heads for a collapse" in page


def test_a_diagnosis_is_repeatable():
    rows = drawn(*laws(60, 8, seed=1), rollouts=32, length=20, seed=2)
    first, second = (str(diagnose(rows["student"], rows["teacher"], estimator="opd", divergence="jsd")) for _ in "ab")
    assert first == second


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on PATH")
@pytest.mark.parametrize("width", [1400, 400])
def test_a_browser_shows_the_page_within_its_width(run, tmp_path, width):
    """The page sets its own width as its title, by a script that only the test adds."""
    page = render_diagnosis(run)
    probe = "<script>document.title = document.documentElement.scrollWidth + ' ' + document.images.length</script>"
    policy = page[page.index("<meta http-equiv") : page.index(">", page.index("<meta http-equiv")) + 1]
    path = tmp_path / "page.html"
    path.write_text(page.replace(policy, "").replace("</body>", f"{probe}</body>"), encoding="utf-8")
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom"]
    command = [str(CHROMIUM), *flags, f"--window-size={width},900", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    shown = done.stdout.partition("<title>")[2].partition("</title>")[0].split()
    # Chromium's own window is at least 500 wide.
    assert int(shown[0]) <= max(width, 500) and done.stdout.count("<svg") == 5
    assert "heads for a collapse" in done.stdout


def test_a_terminal_shows_the_same_in_colour(run, sound, capsys):
    rich = pytest.importorskip("rich.console")
    for found, word in ((run, "COLLAPSE"), (sound, "NOTHING FOUND")):
        buffer = io.StringIO()
        print_diagnosis(found, rich.Console(file=buffer, force_terminal=True, width=120))
        shown = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", buffer.getvalue()).split())
        assert "\x1b[" in buffer.getvalue() and word in shown
        assert all(" ".join(each.sentence.split()) in shown for each in found.findings)
    print_diagnosis(run, rich.Console(file=io.StringIO()))
    assert capsys.readouterr().out.strip() == str(run).strip()
