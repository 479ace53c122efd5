"""Files of known biases: a known bias passes, a new one fails, one that vanished is reported."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from opdtheory.auditing import Audit
from opdtheory.auditing.known_biases import STATUSES, KnownVerdict, judge, read_known, write_known
from opdtheory.errors import InvalidArgumentError
from tests.auditing.verdicts import audit
from tests.losses import k2, k3

RECORD = (
    '{"baseline_version": 1, "losses": {"k3": {"objective": "jsd", "granularity": "token_local", "verdict": "biased", '
    '"descends": null, "relative_bias": %s, "cosine": %s, "settings": %s}}}'
)


@pytest.fixture(scope="module")
def faithful() -> Audit:
    return audit(k2, "reverse_kl")


@pytest.fixture(scope="module")
def other() -> Audit:
    return audit(k3, "reverse_kl")


def biased(by: float) -> Audit:
    """The audit of a loss whose bias grows with `by`."""
    return audit(lambda r: r.token_sum(r.log_u.square() / 2 + by * r.log_u**3), "reverse_kl", name="biased")


def test_without_a_record_the_claim_decides(faithful, other):
    assert judge(faithful).status == "as_claimed" and judge(faithful).passes
    assert judge(other).status == "new" and not judge(other).passes
    assert judge(other, met=lambda verdict: verdict == "other_objective").status == "as_claimed"
    assert judge(faithful, met=lambda verdict: verdict == "biased").status == "new"


@pytest.mark.slow
def test_a_known_bias_passes_and_any_growth_fails():
    known = KnownVerdict.of(biased(0.1))
    assert judge(biased(0.1), known).status == "known"
    grown = judge(biased(0.1 + 1e-6), known)
    assert grown.status == "grew" and not grown.passes
    assert f"{known.relative_bias:.3g}" in grown.detail
    less = judge(biased(0.05), known)
    assert less.status == "known" and "tightened" in less.detail and less.passes


def test_a_turn_counts_as_growth_though_the_length_stays():
    found = biased(0.1)
    known = dataclasses.replace(KnownVerdict.of(found), cosine=found.cosine + 1e-4)
    assert judge(found, known).status == "grew"


def test_a_bias_that_vanished_is_reported_and_passes(faithful, other):
    known = dataclasses.replace(KnownVerdict.of(other))
    gone = judge(faithful, known)
    assert gone.status == "vanished" and gone.passes and "update" in gone.detail
    # A claim of the bias itself is broken by its absence, whatever the record says.
    assert judge(other, KnownVerdict.of(other), met=lambda verdict: verdict == "other_objective").passes


def test_another_verdict_than_the_recorded_one_fails(other):
    known = dataclasses.replace(KnownVerdict.of(other), verdict="biased", descends=None)
    assert judge(other, known).status == "changed" and not judge(other, known).passes
    known = dataclasses.replace(KnownVerdict.of(other), descends="chi2 (token_local)")
    assert judge(other, known).status == "changed"
    # A faithful loss that turned is no known bias.
    known = dataclasses.replace(KnownVerdict.of(other), verdict="exact", descends="reverse_kl (token_local)")
    assert judge(other, known).status == "changed"


def test_a_record_of_another_claim_or_setting_does_not_count(other):
    known = KnownVerdict.of(other)
    for change in ({"granularity": "sequence"}, {"objective": "jsd"}, {"settings": {**known.settings, "seed": 1}}):
        found = judge(other, dataclasses.replace(known, **change))
        assert found.status == "new" and "another claim" in found.detail
    older = {key: value for key, value in known.settings.items() if key != "gamma"}
    assert judge(other, dataclasses.replace(known, settings=older)).status == "known"


def test_a_file_gives_back_what_it_was_given(tmp_path, faithful, other):
    path = tmp_path / "deep" / "known.json"
    write_known(path, {"k3": KnownVerdict.of(other)})
    first = path.read_text(encoding="utf-8")
    found = read_known(path)
    assert judge(other, found["k3"]).status == "known"
    # Another loss joins; the same one changes nothing.
    write_known(path, {"k2": KnownVerdict.of(faithful)})
    assert list(read_known(path)) == ["k2", "k3"] and read_known(path)["k3"] == found["k3"]
    write_known(path, {"k2": KnownVerdict.of(faithful)})
    assert json.loads(path.read_text(encoding="utf-8"))["losses"]["k3"] == json.loads(first)["losses"]["k3"]
    assert read_known(path)["k2"].relative_bias == 0.0  # rounding is no part of a record


def test_an_infinite_bias_is_recorded(tmp_path, other):
    endless = dataclasses.replace(other, relative_bias=float("inf"))
    path = write_known(tmp_path / "known.json", {"a": KnownVerdict.of(endless)})
    assert read_known(path)["a"].relative_bias == float("inf")
    assert judge(endless, read_known(path)["a"]).status == "known"
    assert judge(other, read_known(path)["a"]).status == "known"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("{", "is not JSON"),
        ("[]", "must have baseline_version 1, got None"),
        ('{"baseline_version": 99, "losses": {}}', "must have baseline_version 1, got 99"),
        ('{"baseline_version": 1}', "must have an object 'losses', got None"),
        ('{"baseline_version": 1, "losses": {"k3": {"objective": "jsd"}}}', "'k3' is incomplete"),
        ('{"baseline_version": 1, "losses": {"k3": []}}', "'k3' is incomplete"),
        ('{"baseline_version": true, "losses": {}}', "must have baseline_version 1, got True"),
        (RECORD % ("true", "1.0", "{}"), "True is not a number"),
        (RECORD % ("0.5", '"1.0"', "{}"), "'1.0' is not a number"),
        (RECORD % ("1" + "0" * 400, "1.0", "{}"), "'k3' is incomplete"),
        (RECORD % ("0.5", "[1.0]", "{}"), "is not a number"),
        (RECORD % ("0.5", "1.0", "3"), "'k3' is incomplete"),
        ("[" * 100_000, "is not JSON"),
    ],
)
def test_what_is_no_file_of_known_biases_is_refused(tmp_path, text, message, other):
    path: Path = tmp_path / "known.json"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InvalidArgumentError, match=message):
        read_known(path)
    if text is not None:
        with pytest.raises(InvalidArgumentError, match=message):
            write_known(path, {"k3": KnownVerdict.of(other)})
        assert path.read_text(encoding="utf-8") == text


def test_every_status_is_explained():
    assert set(STATUSES) == {"as_claimed", "known", "recorded", "vanished", "new", "grew", "changed"}
