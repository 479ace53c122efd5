"""TOML files: their values, or one sentence that says why not."""

from __future__ import annotations

from pathlib import Path

import pytest

from opdtheory.errors import InvalidArgumentError
from opdtheory.toml import read_toml


def test_the_values_are_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text('name = "é"\n[table]\nnumbers = [1, 2.5]\n', encoding="utf-8")
    assert read_toml("config", path) == {"name": "é", "table": {"numbers": [1, 2.5]}}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"steps =", "is not valid TOML: "),
        (b"steps = 1\0", "is not valid TOML: "),
        (b"name = '\xff'", "is not valid TOML: "),
        (b"a = " + b"[" * 20_000, "is not valid TOML: it is nested too deeply"),
        (b"a = 1" + b"0" * 5_000, "is not valid TOML: "),
    ],
)
def test_what_is_not_toml_is_refused_in_one_line(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_bytes(content)
    with pytest.raises(InvalidArgumentError) as caught:
        read_toml("config", path)
    assert caught.value.argument == "config"
    assert f"config: {path} {words}" in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    for path, words in {
        tmp_path: "cannot be read: Is a directory",
        tmp_path / "none.toml": "cannot be read: No such file",
        tmp_path / ("a" * 300): "cannot be read: File name too long",
        Path("a\0b"): "must be the path of a file, got 'a\\x00b'",
    }.items():
        with pytest.raises(InvalidArgumentError) as caught:
            read_toml("config", path)
        assert words in str(caught.value)
