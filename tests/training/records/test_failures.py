"""What a failed step leaves."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import TrainingError
from tests.training.runs import (
    TASK,
    config,
    model,
)


@pytest.mark.parametrize("checked", [True, False])
def test_nan_saves_the_batch_and_leaves_the_parameters(tmp_path: Path, checked: bool) -> None:
    student, teacher = model(0), model(1, 24)
    before = {name: value.clone() for name, value in student.state_dict().items()}
    with torch.no_grad():
        next(teacher.parameters())[5] = float("nan")
    settings = config(out=str(tmp_path), check_rollouts=checked)
    with pytest.raises(TrainingError, match="step 1: .*prompts and tokens are in") as caught:
        opd.train(settings, student=student, teacher=teacher, task=TASK)
    assert caught.value.path is not None and caught.value.path.parent == tmp_path
    record = json.loads(caught.value.path.read_text())
    assert record["step"] == 1 and len(record["rows"]) == 6
    row = record["rows"][0]
    assert not row["teacher_logits_finite"] and row["student_logits_finite"]
    assert TASK.vocabulary.decode(row["prompt_tokens"]) == row["prompt"]
    assert len(row["tokens"]) == len(row["mask"])
    assert all(torch.equal(before[name], value) for name, value in student.state_dict().items())
