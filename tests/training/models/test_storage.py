"""Tensors on disk: whole or absent, and refused when they were changed."""

from __future__ import annotations

import pytest
import torch

from opdtheory.errors import InvalidArgumentError
from opdtheory.training.models import storage
from opdtheory.training.pairs import load_model, train_supervised
from tests.training.recipes import TINY, parameters


def test_a_file_that_was_changed_is_refused(tmp_path):
    load_model(TINY, cache=tmp_path)
    path = tmp_path / f"{TINY.key}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(
        InvalidArgumentError, match=r"cache: .*safetensors must have the recorded SHA-256 [0-9a-f]{64}, got"
    ):
        load_model(TINY, cache=tmp_path)


def test_an_interrupted_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
    whole_file, calls = storage.whole_file, []

    def interrupted(path):
        calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole_file(path)

    monkeypatch.setattr(storage, "whole_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_model(TINY, cache=tmp_path)
    monkeypatch.undo()
    assert not storage.stored(tmp_path / f"{TINY.key}.safetensors")
    model, _ = load_model(TINY, cache=tmp_path)
    assert torch.equal(parameters(model), parameters(train_supervised(TINY)))
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{TINY.key}.record.json", f"{TINY.key}.safetensors"]


def test_the_cache_folder_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("OPDTHEORY_CACHE", str(tmp_path))
    assert storage.cache_folder() == tmp_path and storage.cache_folder(tmp_path / "x") == tmp_path / "x"
    monkeypatch.delenv("OPDTHEORY_CACHE")
    assert storage.cache_folder().parts[-2:] == (".cache", "opdtheory")
