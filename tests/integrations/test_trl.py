"""Two processes do what one does, and the scripts of the page run."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from opdtheory.end_to_end.pair import trainer_pair
from tests.integrations.trl.builders import quiet

SCRIPT = Path(__file__).with_name("trl") / "processes.py"
PAGE = SCRIPT.parents[3] / "docs" / "trl.md"

# What a script of the page names, and what a test has in its place.
HERE = {
    '"Qwen/Qwen2.5-0.5B-Instruct"': "pair.student",
    '"Qwen/Qwen2.5-1.5B-Instruct"': "pair.teacher",
    'load_dataset("trl-lib/tldr", split="train")': "pair.dataset",
    'output_dir="student"': 'output_dir="student", use_cpu=True, bf16=False, report_to="none"',
    "trainer.train()": "",
}


def launched(*launcher: str) -> dict[str, Any]:
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = str(SCRIPT.parents[3])
    command = [sys.executable, *launcher, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def apart(one: list[float], other: list[float]) -> float:
    """The distance of two lists of numbers, against the length of the first."""
    first, second = torch.tensor(one).double(), torch.tensor(other).double()
    return float((first - second).norm() / first.norm())


@pytest.mark.slow
def test_two_processes_equal_one() -> None:
    one = launched()
    two = launched("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    for name, found in one.items():
        assert len(found["losses"]) == 3
        limit = apart(found["parameters"], two[name]["parameters"])
        if name == "mean of means":
            assert limit > 1e-4  # the false twin
        else:
            assert limit < 1e-6 and apart(found["losses"], two[name]["losses"]) < 1e-6, name


@quiet
@pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
@pytest.mark.parametrize("name", ["whole_vocabulary.py", "sampled_tokens.py", "exact_top.py", "check.py"])
def test_the_scripts_of_the_page_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They build a trainer on the exactly known pair; the last one audits it."""
    monkeypatch.chdir(tmp_path)
    blocks = dict(re.findall(r'^```py title="([^"]+)"\n(.*?)^```$', PAGE.read_text(encoding="utf-8"), re.M | re.S))
    assert len(blocks) == 4
    code, pair = blocks[name], trainer_pair()
    for there, here in HERE.items():
        assert there in code or name == "check.py"
        code = code.replace(there, here)
    namespace: dict[str, Any] = {"pair": pair}
    exec(compile(code, name, "exec"), namespace)
    if name != "check.py":
        assert type(namespace["trainer"]).__name__ in code
        assert namespace["trainer"].model is pair.student
