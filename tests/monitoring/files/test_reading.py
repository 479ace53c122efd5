"""Runs written in each trainer's way are read back to the last bit; what cannot be used is named and counted."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.runs import formats
from examples.runs.formats import WRITERS, run, write_lines
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.files import reading
from opdtheory.monitoring.files.reading import read_run


def by_step(path, **options):
    """The columns of each step, and the reader."""
    reader, found = read_run(path, **options), {}
    for chunk in reader:
        columns = {role: getattr(chunk.tokens, role) for role in ("student", "teacher", "behavior", "entropy")}
        columns["lengths"] = torch.bincount(chunk.tokens.rollout)
        found.setdefault(chunk.step, []).append((columns, chunk.trainer))
    merged = {
        step: {
            name: None if parts[0][0][name] is None else torch.cat([columns[name] for columns, _ in parts])
            for name in parts[0][0]
        }
        | {"trainer": {trainer for _, trainer in parts}}
        for step, parts in found.items()
    }
    return merged, reader


def matches(found, steps):
    """Whether what was read is the run to the last bit: all three columns, the lengths and, if there, the entropy."""
    if list(found) != list(range(len(steps))):
        return False
    for step, columns in zip(steps, found.values(), strict=True):
        mask = step["mask"]
        if not torch.equal(columns["lengths"], mask.sum(-1)):
            return False
        for role in ("student", "teacher", "behavior", "entropy"):
            value = columns[role]
            if value is None and role == "entropy":
                continue
            if value is None or not torch.equal(value, step[role][mask].double()):
                return False
    return True


@pytest.mark.parametrize("name", WRITERS)
def test_a_trainers_files_are_read_to_the_last_bit(name, tmp_path):
    trainer, write = WRITERS[name]
    steps = run(steps=12)
    found, reader = by_step(write(tmp_path, steps))
    assert matches(found, steps)
    assert {each for columns in found.values() for each in columns["trainer"]} == {trainer}
    assert set(reader.left_out.counts) <= ({"empty"} if name == "NeMo-RL" else set())
    assert reader.left_out.tokens == sum(int(step["mask"].sum()) for step in steps)


@pytest.mark.parametrize("name", WRITERS)
def test_swapped_roles_an_inverted_mask_and_another_order_are_seen(name, tmp_path):
    steps = run()
    swapped = [step | {"student": step["teacher"], "teacher": step["student"]} for step in steps]
    inverted = [step | {"mask": ~step["mask"]} for step in steps]
    for number, twin in enumerate((swapped, inverted, steps[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        found, _ = by_step(WRITERS[name][1](folder, twin))
        assert not matches(found, steps)
        assert matches(found, twin)


@pytest.mark.parametrize("write", [formats.own_jsonl, formats.slime_pt])
def test_processes_that_share_the_work_read_the_same(write, tmp_path, monkeypatch):
    steps = run(steps=5, rollouts=40, longest=60)
    path = write(tmp_path, steps)
    monkeypatch.setattr(reading, "_SHARED", 1)
    monkeypatch.setattr(reading, "cores", lambda: 2)
    monkeypatch.setattr("opdtheory.monitoring.files.lines.pieces.__defaults__", (10_000,))
    found, reader = by_step(path)
    assert matches(found, steps)
    assert reader.left_out.records == (200 if write is formats.own_jsonl else 5)


def test_a_reader_that_is_closed_early_leaves_no_process(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "_SHARED", 1)
    monkeypatch.setattr(reading, "cores", lambda: 2)
    monkeypatch.setattr("opdtheory.monitoring.files.chunks._TOGETHER", 10)
    started = []

    class Recorded(reading.Workers):
        def __init__(self, count):
            super().__init__(count)
            started.extend(self._processes)

    monkeypatch.setattr(reading, "Workers", Recorded)
    with read_run(formats.own_jsonl(tmp_path, run())) as reader:
        next(reader)
        assert len(started) == 2
    assert list(reader) == []
    assert all(process.poll() is not None for process in started)


def test_progress_ends_at_all_bytes_and_never_falls(tmp_path):
    for name, (_, write) in WRITERS.items():
        seen = []
        folder = tmp_path / name.replace(" ", "_")
        folder.mkdir()
        reader = read_run(write(folder, run()), progress=lambda done, total, seen=seen: seen.append((done, total)))
        list(reader)
        done = [each for each, _ in seen]
        assert done == sorted(done), name
        assert seen[-1][0] == seen[-1][1] == sum(source.size for source in reader.sources), name


LINE = {"student_logprobs": [-1.0, -2.0], "teacher_logprobs": [-1.5, -0.5], "step": 4}


def lines(tmp_path, *texts, end="\n"):
    path = tmp_path / "run.jsonl"
    path.write_text("\n".join(text if isinstance(text, str) else json.dumps(text) for text in texts) + end)
    return path


def left_out(path, **options):
    reader = read_run(path, **options)
    chunks = list(reader)
    return chunks, reader.left_out


def test_a_last_line_that_is_cut_off_is_no_damage(tmp_path):
    chunks, found = left_out(lines(tmp_path, LINE, LINE, '{"student_logprobs": [-1.0, -2', end=""))
    assert found.counts == {"truncated": 1}
    assert sum(len(chunk.tokens) for chunk in chunks) == 4
    assert "the run may still be writing (first: run.jsonl, line 3)" in str(found)


def test_a_damaged_line_is_named_by_its_number(tmp_path):
    _, found = left_out(lines(tmp_path, LINE, "", "{oops", LINE, "[1, 2]", LINE))
    assert found.counts == {"damaged": 2}
    assert found.first["damaged"] == "run.jsonl, line 3"


def test_line_numbers_go_on_over_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("opdtheory.monitoring.files.lines.pieces.__defaults__", (100,))
    _, found = left_out(lines(tmp_path, *[LINE] * 20, "{oops", *[LINE] * 3))
    assert found.first["damaged"] == "run.jsonl, line 21"
    assert found.tokens == 46


def test_ragged_rows_are_counted_by_their_longest_column(tmp_path):
    short = LINE | {"teacher_logprobs": [-1.0, -1.0, -1.0]}
    _, found = left_out(lines(tmp_path, LINE, short))
    assert found.counts == {"ragged": 3}
    assert found.tokens == 2


def test_numbers_that_are_none_are_counted_by_reason(tmp_path):
    record = {
        "student_logprobs": [-1.0, None, math.nan, -math.inf, 0.5, -1.0, -1.0],
        "teacher_logprobs": [-1.0, -1.0, -1.0, -1.0, -1.0, -math.inf, None],
    }
    (chunk,), found = left_out(lines(tmp_path, record))
    assert found.counts == {"nan": 3, "impossible": 1, "above_zero": 1}
    assert chunk.tokens.teacher.tolist() == [-1.0, -math.inf]
    assert chunk.step is None


def test_records_without_a_teacher_or_any_field_and_empty_ones_are_counted(tmp_path):
    empty = {"student_logprobs": [], "teacher_logprobs": []}
    masked = LINE | {"mask": [0, 0]}
    nothing = {"loss": 0.1, "step": 4}
    words = LINE | {"student_logprobs": ["a", "b"]}
    alone = {"student_logprobs": [-1.0]}
    null = LINE | {"teacher_logprobs": None}
    _, found = left_out(lines(tmp_path, LINE, empty, masked, nothing, words, alone, null))
    assert found.counts == {"missing": 2, "unrecognised": 1, "not_numbers": 1, "empty": 2}
    assert found.records == 7


def test_a_rollout_of_placeholder_zeros_is_left_out(tmp_path):
    good = {"student_logprobs": [-1.0] * 10, "teacher_logprobs": [-1.5] * 10}
    _, found = left_out(lines(tmp_path, good, good | {"teacher_logprobs": [0.0] * 10}))
    assert found.counts == {"all_zero": 10}
    # Certain tokens are zero in both.
    zeros = {"student_logprobs": [0.0] * 10, "teacher_logprobs": [0.0] * 10}
    _, found = left_out(lines(tmp_path, good, zeros))
    assert found.counts == {}
    assert found.unmasked_zeros == 10
    assert "may be padding" in str(found)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ([0.0, 0.0, 0.0], "are zero throughout"),
        ([0.2, 1.0, 0.0], "as probabilities do"),
        ([0.2, 3.0, 0.1], "negated"),
    ],
)
@pytest.mark.parametrize("role", ["student", "teacher", "behavior"])
def test_columns_that_are_no_log_probabilities_are_refused(values, problem, role, tmp_path):
    record = {f"{each}_logprobs": [-1.0, -2.0, -3.0] for each in ("student", "teacher", "behavior")}
    path = lines(tmp_path, record | {f"{role}_logprobs": values})
    with pytest.raises(InvalidArgumentError, match=problem) as caught:
        list(read_run(path))
    assert caught.value.argument == role
    list(read_run(lines(tmp_path, record)))


def test_probabilities_are_refused_before_the_end_of_a_long_run(tmp_path):
    record = {"student_logprobs": [-1.0] * 60_000, "teacher_logprobs": [0.5] * 60_000}
    for step in range(4):
        write_lines(tmp_path / f"step_{step}.jsonl", [record])
    (tmp_path / "step_3.jsonl").write_text("never read")
    reader = read_run(tmp_path)
    with pytest.raises(InvalidArgumentError, match="120,000 values lie in"):
        list(reader)
    assert "damaged" not in reader.left_out.counts


def test_a_run_without_a_teacher_says_how_to_name_one(tmp_path):
    formats.prime_rl(tmp_path / "prime", run(), teacher=None)
    with pytest.raises(
        InvalidArgumentError, match="are prime-rl.s, but no field holds .* teacher .*leave the teacher out"
    ):
        list(read_run(tmp_path / "prime"))
    formats.nemo_rl(tmp_path / "nemo", run(), teacher=None)
    with pytest.raises(InvalidArgumentError, match="Name one with teacher=. Fields found: .*generation_logprobs"):
        list(read_run(tmp_path / "nemo"))


def test_the_placeholder_of_nemo_rl_is_refused_and_the_engines_field_may_be_named(tmp_path):
    """With `force_on_policy_ratio`, `prev_logprobs` are zeros."""
    steps = [step | {"student": torch.zeros_like(step["student"])} for step in run()]
    path = formats.nemo_rl(tmp_path, steps)
    with pytest.raises(InvalidArgumentError, match="student: .* zero throughout: a placeholder"):
        list(read_run(path))
    found, _ = by_step(path, student="generation_logprobs")
    assert torch.equal(found[0]["student"], steps[0]["behavior"][steps[0]["mask"]].double())
    assert found[0]["behavior"] is None


def test_the_users_names_win(tmp_path):
    steps = run()
    path = formats.nemo_rl(tmp_path, steps, teacher="scored_by_the_large_model")
    found, _ = by_step(path, teacher="scored_by_the_large_model")
    assert matches(found, steps)
    found, _ = by_step(path, teacher="generation_logprobs", student="scored_by_the_large_model")
    assert not matches(found, steps)
    assert torch.equal(found[0]["teacher"], steps[0]["behavior"][steps[0]["mask"]].double())


def test_a_named_mask_is_the_only_one(tmp_path):
    record = LINE | {"mask": [1, 0], "mine": [0, 1]}
    (chunk,), _ = left_out(lines(tmp_path, record), mask="mine")
    assert chunk.tokens.student.tolist() == [-2.0]
    (chunk,), _ = left_out(lines(tmp_path, record))
    assert chunk.tokens.student.tolist() == [-1.0]


@pytest.mark.parametrize("role", ["student", "teacher", "behavior", "mask"])
def test_a_named_field_that_is_absent_is_an_error_with_the_nearest_name(role, tmp_path):
    path = formats.own_jsonl(tmp_path, run())
    near = "mask" if role == "mask" else f"{role}_logprobs"
    with pytest.raises(
        InvalidArgumentError, match=f"did you mean '{near}'.*Fields found: .*teacher_logprobs"
    ) as caught:
        list(read_run(path, **{role: near + "s"}))
    assert caught.value.argument == role


def test_records_that_lack_a_named_field_are_left_out(tmp_path):
    """Without the mask that the user named, masked tokens would count."""
    _, found = left_out(lines(tmp_path, LINE | {"mine": [1, 0]}, LINE), mask="mine")
    assert found.counts == {"missing": 1}
    assert found.tokens == 1


def test_nothing_usable_is_an_error_with_the_counts(tmp_path):
    bad = {"student_logprobs": [None, None], "teacher_logprobs": [-1.0, -1.0]}
    with pytest.raises(InvalidArgumentError, match="no token that can be used. 2 tokens have .* not a number"):
        list(read_run(lines(tmp_path, bad)))
    with pytest.raises(InvalidArgumentError, match="1 lines are not JSON objects .first: run.jsonl, line 1"):
        list(read_run(lines(tmp_path, "oops")))
    with pytest.raises(InvalidArgumentError, match="there is no record"):
        list(read_run(lines(tmp_path, "", end="")))


def test_a_batch_of_trl_without_old_logps_takes_the_engines_and_says_so(tmp_path):
    record = {"sampling_per_token_logps": [-1.0, -2.0], "ref_per_token_logps": [-1.5, -2.5], "completion_mask": [1, 1]}
    (chunk,), found = left_out(lines(tmp_path, record))
    assert chunk.trainer == "TRL"
    assert chunk.tokens.student.tolist() == [-1.0, -2.0]
    assert chunk.tokens.behavior is None
    assert "a mismatch between the two cannot be seen" in str(found)


def test_masks_of_one_trainer_count_together(tmp_path):
    record = {"old_per_token_logps": [-1.0, -2.0, -3.0], "ref_per_token_logps": [-1.0, -1.0, -1.0]}
    for masks in ({"completion_mask": [1, 1, 0], "tool_mask": [0, 1, 1]}, {"tool_mask": [0, 1, 0]}):
        (chunk,), _ = left_out(lines(tmp_path, record | masks))
        assert chunk.tokens.student.tolist() == [-2.0]


def test_steps_that_are_mixed_are_sorted_apart(tmp_path):
    records = [LINE | {"step": number % 3} for number in range(30)]
    chunks, _ = left_out(lines(tmp_path, *records))
    assert [(chunk.step, chunk.tokens.rollouts) for chunk in chunks] == [(0, 10), (1, 10), (2, 10)]


@pytest.mark.parametrize("shared", [False, True])
def test_files_in_a_folder_that_cannot_be_read_are_counted(shared, tmp_path, monkeypatch):
    if shared:
        monkeypatch.setattr(reading, "_SHARED", 1)
        monkeypatch.setattr(reading, "cores", lambda: 2)
    formats.own_jsonl(tmp_path, run())
    (tmp_path / "optimizer.pt").write_bytes(b"not a file of torch")
    (tmp_path / "config.json").write_text("{")
    _, found = left_out(tmp_path)
    assert found.counts == {"unreadable": 2}
    assert found.first["unreadable"].startswith("config.json")
    for name in ("optimizer.pt", "config.json"):
        with pytest.raises(InvalidArgumentError, match=name):
            list(read_run(tmp_path / name))


def test_several_files_are_read_in_the_order_given(tmp_path):
    for step in (1, 2):
        write_lines(tmp_path / f"step_{step}.jsonl", [{k: v for k, v in LINE.items() if k != "step"}])
    chunks = list(read_run([tmp_path / "step_2.jsonl", tmp_path / "step_1.jsonl"]))
    assert [chunk.step for chunk in chunks] == [2, 1]


DATA = Path(__file__).parents[1] / "data"


def test_a_batch_of_verls_engine_is_read_without_mapping():
    """Its teacher's log-probabilities are over prompt and response, each one place before its token."""
    batch = torch.load(DATA / "verl_batch.pt", weights_only=True)
    (chunk,) = read_run(DATA / "verl_batch.pt")
    mask = batch["response_mask"] > 0
    assert chunk.trainer == "verl" and len(chunk.tokens) == int(mask.sum()) == 7
    assert torch.allclose(chunk.tokens.student, batch["old_log_probs"][mask].double())
    # The reference model was the teacher itself.
    assert torch.allclose(chunk.tokens.teacher, batch["ref_log_prob"][mask].double(), atol=1e-6)
    (by_name,) = read_run(DATA / "verl_batch.pt", teacher="ref_log_prob")
    assert torch.allclose(by_name.tokens.teacher, chunk.tokens.teacher, atol=1e-6)


def test_rows_over_prompt_and_response_are_cut_by_their_own_lengths():
    from opdtheory.monitoring.files.blocks import Rows, of_responses

    values = np.arange(11.0)  # rows of 5 and 6
    found = of_responses(Rows(values, np.array([5, 6])), np.array([2, 3]))
    assert found.values.tolist() == [2.0, 3.0, 7.0, 8.0, 9.0] and found.lengths.tolist() == [2, 3]
    same = Rows(np.arange(5.0), np.array([2, 3]))
    assert of_responses(same, np.array([2, 3])) is same


@pytest.mark.parametrize("name", ["trl_grpo_engine.pt", "trl_grpo_record.jsonl"])
def test_objects_of_trls_grpo_trainer_are_read_without_mapping(name):
    (chunk,) = [chunk for chunk in read_run(DATA / name)][:1]
    assert chunk.trainer == "TRL" and len(chunk.tokens) > 3 and (chunk.tokens.teacher <= 0).all()


def test_trls_batch_without_the_students_log_probabilities_says_why():
    with pytest.raises(InvalidArgumentError, match="old_per_token_logps` is absent"):
        list(read_run(DATA / "trl_grpo.pt"))
