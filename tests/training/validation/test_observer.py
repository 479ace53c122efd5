"""The validation of a run while it trains."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.trainer import train
from tests.training.runs import TASK, config, model


def test_a_run_reports_its_validation() -> None:
    fields = {"estimator": "opd", "divergence": "forward_kl", "steps": 3, "clip_log_ratio": 1.0}
    rows = train(config(validate_every=2, **fields), student=model(0), teacher=model(1, 24), task=TASK).rows
    assert ["validation_z" in row for row in rows] == [False, True, True]
    assert rows[1]["validation_agrees"] == 1.0 and rows[1]["validation_bias"] > 0.1
    plain = train(config(**fields), student=model(0), teacher=model(1, 24), task=TASK).rows
    assert [row["loss"] for row in plain] == [row["loss"] for row in rows]
    for wrong in ({"estimator": "sequence_opd_plus", "divergence": "jsd"}, {"control": "supervised"}):
        with pytest.raises(InvalidArgumentError, match="validate_every"):
            config(validate_every=1, **wrong)
