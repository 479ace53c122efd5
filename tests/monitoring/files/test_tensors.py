"""Files of torch: what is loaded, what is refused, and large tensors by their rows."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.files import tensors
from opdtheory.monitoring.files.fields import Mapped
from opdtheory.monitoring.files.tensors import read_tensors


def columns(path, mapped=None):
    parts = [found for _, found in read_tensors(path, 5, mapped or Mapped())]
    blocks = [block for found in parts for block in found.blocks]
    return blocks, parts


def data(rows=4, length=6):
    generator = torch.Generator().manual_seed(0)
    return {name: -torch.rand(rows, length, generator=generator) for name in ("student_logprobs", "teacher_logprobs")}


def test_large_tensors_are_taken_by_their_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(tensors, "_SLICE", 12)
    whole = data(rows=7) | {"mask": torch.arange(42).view(7, 6) % 5 > 0}
    torch.save(whole, tmp_path / "a.pt")
    blocks, parts = columns(tmp_path / "a.pt")
    assert len(parts) > 3
    assert sum(found.records for found in parts) == 1
    found = np.concatenate([block.columns["teacher"] for block in blocks])
    assert np.array_equal(found, whole["teacher_logprobs"][whole["mask"]].double().numpy())
    assert np.concatenate([block.lengths for block in blocks]).tolist() == whole["mask"].sum(-1).tolist()
    assert {block.key.step for block in blocks} == {5}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_numbers_of_any_width_are_kept(dtype, tmp_path):
    whole = {name: value.to(dtype) for name, value in data().items()}
    torch.save(whole, tmp_path / "a.pt")
    (block,), _ = columns(tmp_path / "a.pt")
    assert np.array_equal(block.columns["student"], whole["student_logprobs"].double().flatten().numpy())


def test_nested_tensors_arrays_and_a_last_dimension_of_one(tmp_path):
    rows = [torch.tensor([-1.0, -2.0]), torch.tensor([-3.0])]
    jagged = torch.nested.nested_tensor(rows, layout=torch.jagged)
    torch.save({"student_logprobs": jagged, "teacher_logprobs": [row.numpy() for row in rows]}, tmp_path / "a.pt")
    (block,), _ = columns(tmp_path / "a.pt")
    assert block.lengths.tolist() == [2, 1]
    assert block.columns["student"].tolist() == block.columns["teacher"].tolist() == [-1.0, -2.0, -3.0]
    whole = data()
    torch.save(whole | {"teacher_logprobs": whole["teacher_logprobs"].unsqueeze(-1)}, tmp_path / "b.pt")
    (block,), _ = columns(tmp_path / "b.pt")
    assert np.array_equal(block.columns["teacher"], whole["teacher_logprobs"].double().flatten().numpy())


def test_several_numbers_for_a_token_are_no_rows(tmp_path):
    torch.save(data() | {"teacher_logprobs": torch.zeros(4, 6, 3)}, tmp_path / "a.pt")
    blocks, (found,) = columns(tmp_path / "a.pt")
    assert not blocks
    assert found.faults == {"not_numbers": 1}


def test_a_list_of_records_and_the_old_format(tmp_path):
    records = [data(rows=1) | {"step": step} for step in (1, 2)]
    torch.save(records, tmp_path / "a.pt", _use_new_zipfile_serialization=False)
    blocks, _ = columns(tmp_path / "a.pt")
    assert [block.key.step for block in blocks] == [1, 2]


@dataclasses.dataclass
class Thing:
    x: int = 0


def test_what_needs_classes_is_refused_by_name_and_never_run(tmp_path):
    torch.save(data() | {"config": Thing()}, tmp_path / "a.pt")
    with pytest.raises(InvalidArgumentError, match=r"needs the Python class \S*Thing, which is not loaded"):
        columns(tmp_path / "a.pt")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "run"), "w"))

    torch.save({"x": Evil()}, tmp_path / "b.pt")
    with pytest.raises(InvalidArgumentError, match="needs the Python class"):
        columns(tmp_path / "b.pt")
    assert not (tmp_path / "run").exists()


def test_a_tensordict_is_refused_with_the_way_to_save_it(tmp_path):
    tensordict = pytest.importorskip("tensordict")
    whole = tensordict.TensorDict(data(), batch_size=[4])
    torch.save(whole, tmp_path / "a.pt")
    with pytest.raises(InvalidArgumentError, match="to_dict"):
        columns(tmp_path / "a.pt")
    torch.save(whole.to_dict(), tmp_path / "a.pt")
    assert len(columns(tmp_path / "a.pt")[0]) == 1


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_off_is_refused(share, tmp_path):
    torch.save(data(rows=64), tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InvalidArgumentError, match=r"a\.pt (is damaged|was not written by torch\.save)"):
        columns(tmp_path / "a.pt")
