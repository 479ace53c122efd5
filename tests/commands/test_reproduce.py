"""`opdtheory reproduce`: the page that it writes, its refusals, a termination."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import threading
import time

from opdtheory.cli import main


def test_a_termination_ends_the_processes_too(stand_in, tmp_path, monkeypatch, capsys):
    plan = dataclasses.replace(stand_in, forms=("full_vocab",), divergences=("jsd",), controls=())
    monkeypatch.setattr("opdtheory.commands.reproduce.plan_of", lambda *_, **__: plan)
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGTERM))
    timer.start()
    started = time.perf_counter()
    assert main(["reproduce", "--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]) == 1
    assert time.perf_counter() - started < 30
    assert "stopped" in capsys.readouterr().err and signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_the_command_writes_the_page_of_what_is_there(stand_in, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("opdtheory.commands.reproduce.plan_of", lambda *_, **__: stand_in)
    out = ["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")]
    assert main(["reproduce", "--no-run", *out]) == 1
    assert "no row" in capsys.readouterr().err
    assert main(["reproduce", "--workers", "2", *out]) == 1  # one arm fails
    printed = capsys.readouterr()
    assert "-0.010, not resolved" in printed.out and "out of memory" in printed.err
    assert "3 of the 4 runs" in (tmp_path / "out" / "reproduction.md").read_text(encoding="utf-8")
    assert main(["reproduce", "--no-run", "--json", *out]) == 0
    assert [each["name"] for each in json.loads(capsys.readouterr().out)][0] == "reverse_kl/opd"
    monkeypatch.undo()
    assert main(["reproduce", "--seeds", "0", *out]) == 2


def test_a_file_of_rows_that_is_not_there_is_a_usage_error(tmp_path, capsys):
    missing = str(tmp_path / "none.jsonl")
    assert main(["reproduce", "--no-run", "--adopt", missing, "--out", str(tmp_path / "out")]) == 2
    assert missing in capsys.readouterr().err
