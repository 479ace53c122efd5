"""The files of a run are read in the order of their numbers, and their names tell the step."""

from __future__ import annotations

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.files.paths import in_order, sources


def test_numbers_are_sorted_as_numbers():
    names = ["step_10.pt", "step_2.pt", "step_2_b.pt", "step_02.pt", "a.pt"]
    assert in_order(names) == ["a.pt", "step_02.pt", "step_2.pt", "step_2_b.pt", "step_10.pt"]


@pytest.mark.parametrize(
    ("names", "steps"),
    [
        (["step_2.pt", "step_10.pt"], [2, 10]),
        (["train_data_step7.jsonl"], [7]),
        (["12.jsonl", "3.jsonl"], [3, 12]),
        (["7.jsonl"], [7]),
        # slime: the rollout, then the rank.
        (["train_4_0.pt", "train_5_0.pt"], [4, 5]),
        (["train_4_0.pt", "train_4_8.pt", "train_5_0.pt"], [4, 4, 5]),
        (["rank_0_4.pt", "rank_1_5.pt"], [4, 5]),
        (["token_exports/step_9/rank_0.jsonl", "token_exports/step_10/rank_0.jsonl"], [9, 10]),
        (["checkpoint-500/batch.parquet"], [500]),
        (["qwen3_run.jsonl"], [None]),
        (["qwen3_1.pt", "qwen3_2.pt"], [1, 2]),
        (["part-00000.parquet", "part-00001.parquet"], [None, None]),
        (["writer3.pt"], [None]),
        (["global_step_3.jsonl.gz", "other.json"], [3, None]),
    ],
)
def test_the_step_in_a_name(names, steps, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    assert [source.step for source in sources(tmp_path)] == steps


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(InvalidArgumentError, match="there is no file or folder"):
        sources(tmp_path / "absent.jsonl")
    with pytest.raises(InvalidArgumentError, match="holds no file that ends in .jsonl"):
        sources(tmp_path)
    (tmp_path / "log.txt").touch()
    with pytest.raises(InvalidArgumentError, match="must end in .*, got 'log.txt'"):
        sources(tmp_path / "log.txt")
    with pytest.raises(InvalidArgumentError, match="no file was given"):
        sources([])


def test_hidden_files_and_other_kinds_are_passed_over(tmp_path):
    for name in (".cache/step_1.pt", "STABLE", "log.txt", "step_1.pt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert [source.name for source in sources(tmp_path)] == ["step_1.pt"]
