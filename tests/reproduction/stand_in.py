"""Processes that stand for the arms, and the plan that they run."""

from __future__ import annotations

import dataclasses
import json
import sys

import pytest

from opdtheory.reproduction import runner as reproduce_runner
from opdtheory.reproduction.plan import FULL
from tests.reproduction.rows import WORLD, row

# What stands for an arm or a model here: it writes the row at once, or does what the job's name says.
STAND_IN = """
import json, pathlib, sys, time
job = json.load(sys.stdin)
where = pathlib.Path(sys.argv[1])
with open(where / "order", "a") as order:
    order.write(f"{job.get('role', '')}{job.get('arm', {}).get('name', '')}\\n")
name = job.get("arm", {}).get("name", "")
if name == "jsd/opd":
    sys.exit("out of memory")
if name == "jsd/full_vocab":
    time.sleep(60)
if "role" not in job:
    path = pathlib.Path(job["out"])
    row = json.loads((where / "rows" / path.name).read_text())
    path.write_text(json.dumps(row))
"""


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Processes that write made-up rows, and the plan of which they are."""
    (tmp_path / "rows").mkdir()
    plan = dataclasses.replace(
        FULL,
        seeds=1,
        control_seeds=1,
        tasks=("arithmetic",),
        divergences=("reverse_kl", "jsd"),
        forms=("opd_plus",),
        controls=("jsd/opd",),
        tuned=(),
    )
    for arm in plan.arms():
        made = {**row(arm.name, WORLD[arm.name]), "identity": arm.identity}
        (tmp_path / "rows" / f"{arm.key}.json").write_text(json.dumps(made))
    monkeypatch.setattr(reproduce_runner, "COMMAND", (sys.executable, "-c", STAND_IN, str(tmp_path)))
    return plan
