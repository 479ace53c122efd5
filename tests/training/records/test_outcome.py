"""What a finished run says: each word where its intervals allow it, and not where they do not."""

from __future__ import annotations

from typing import Any

import pytest

import opdtheory as opd
from opdtheory.monitoring import CollapseWarning, Monitor
from opdtheory.training.intervals import wilson
from opdtheory.training.records.outcome import Outcome, change_of, outcome_of, pull_of
from opdtheory.training.run import TrainResult
from tests.monitoring.runs import drawn, laws

COUNT = 256


def row(step: int, greedy: float, sampled: float = 0.2, count: int = COUNT, **more: Any) -> dict[str, Any]:
    """An evaluation of so many problems."""
    found: dict[str, Any] = {"step": step, "test_reverse_kl": 0.5, "test_forward_kl": 0.25, "test_entropy": 0.3}
    for name, share in (("greedy", greedy), ("test_sampled", sampled)):
        correct = round(share * count)
        low, high = wilson(correct, count)
        found |= {f"{name}_accuracy": correct / count, f"{name}_low": low, f"{name}_high": high}
    return found | more


def said(*rows: dict[str, Any], watching: Monitor | None = None, **fields: Any) -> Outcome:
    config = opd.TrainConfig(**{"divergence": "jsd", **fields})
    return outcome_of(TrainResult(None, config, list(rows)), watching)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("before", "after", "count", "word"),
    [
        (0.48, 0.60, 256, "rose"),
        (0.48, 0.55, 256, "unresolved"),  # a rise of the numbers alone
        (0.48, 0.55, 2560, "rose"),
        (0.48, 0.48, 256, "unresolved"),
        (0.48, 0.42, 256, "unresolved"),  # a fall of the numbers alone
        (0.48, 0.36, 256, "fell"),
        (0.48, 0.14, 256, "fell"),  # less than a third is left, but no quarter is excluded
        (0.48, 0.05, 256, "collapsed"),
        (0.48, 0.00, 256, "collapsed"),
        (0.48, 0.00, 10, "fell"),  # ten problems do not say how little is left
        (0.01, 0.00, 256, "unresolved"),  # hardly anything was there to collapse
        (0.00, 0.48, 256, "rose"),
    ],
)
def test_a_word_is_what_the_intervals_allow(before: float, after: float, count: int, word: str) -> None:
    first, last = row(0, before, count=count), row(9, after, count=count)
    change = change_of("greedy", first, last)
    assert change.word == word
    assert (change.low > 0) == (word == "rose") and (change.high < 0) == (word in ("fell", "collapsed"))
    words = {"rose": "rose from", "fell": "fell from", "collapsed": "is a collapse", "unresolved": "did not change"}
    assert [each for each in words if words[each] in change.sentence] in ([word], ["fell", "collapsed"])
    assert ("collapse" in change.sentence) == (word == "collapsed")


def test_the_issues_run_is_a_collapse_in_words() -> None:
    sentences = said(row(0, 0.48), row(5, 0.0, 0.0, test_reverse_kl=3.2)).sentences
    assert sentences[0].startswith("Greedy accuracy fell from 0.480 to 0.000 (-0.480, 95 %: ")
    assert sentences[0].endswith("this is a collapse.")
    assert "KL(p|q) went from 0.500 to 3.200" in sentences[2] and "no interval" in sentences[2]


def test_both_accuracies_have_their_own_word() -> None:
    found = said(row(0, 0.5, 0.5), row(9, 0.52, 0.3))
    assert [each.word for each in found.changes] == ["unresolved", "fell"]
    record = found.to_dict()
    assert (record["greedy"], record["test_sampled"]) == ("unresolved", "fell")
    assert record["sentences"] == list(found.sentences)


@pytest.mark.parametrize("rows", [[], [row(0, 0.5)], [{"step": 1, "loss": 1.0}]])
def test_one_evaluation_says_nothing_of_a_change(rows: list[dict[str, Any]]) -> None:
    found = said(*rows)
    assert found.changes == () and "nothing is said of the accuracy" in found.sentences[0]
    assert not any("went from" in sentence for sentence in found.sentences)


@pytest.mark.parametrize(
    ("fields", "pull", "words"),
    [
        ({"estimator": "opd_plus", "divergence": "reverse_kl"}, 1.0, "attracts the student: w'(1) = 1 (T5)"),
        ({"estimator": "opd", "divergence": "forward_kl"}, -1.0, "repels the student: w'(1) = -1 (T5)"),
        ({"estimator": "opd", "divergence": "jsd"}, 0.0, "no first-order pull"),
        ({"estimator": "return_to_go", "divergence": "jsd", "gamma": 0.9}, None, ""),
        ({"divergence": None, "control": "supervised"}, None, ""),
    ],
)
def test_theory_is_told_of_the_estimator_in_use(fields: dict[str, Any], pull: float | None, words: str) -> None:
    steady, collapsed = (said(row(0, 0.5), row(9, after), **fields).sentences for after in (0.5, 0.0))
    config = opd.TrainConfig(**{"divergence": "jsd", **fields})
    assert pull_of(config.loss()) == (None if pull is None else pytest.approx(pull, abs=1e-6))
    assert any(words in sentence for sentence in steady)
    assert any("near the teacher" in sentence.lower() for sentence in steady) == (pull is not None)
    told = [sentence for sentence in collapsed if "The collapse" in sentence]
    assert not any("The collapse" in sentence for sentence in steady)
    expected = {1.0: "does not follow from that", -1.0: "agrees with that"}.get(pull or 0.0)
    assert len(told) == (expected is not None) and all(expected is not None and expected in each for each in told)
    assert any("In theory" in sentence for sentence in steady) == (fields.get("control") is None)


def test_a_claim_is_not_stretched_to_rollouts_of_another_policy() -> None:
    for fields, is_said in (({}, False), ({"updates_per_batch": 2}, True), ({"sampling_temperature": 0.7}, True)):
        sentences = said(row(0, 0.5), row(9, 0.5), **fields).sentences
        assert any("Not all updates of this run were on-policy" in each for each in sentences) == is_said


def test_the_monitors_findings_are_told() -> None:
    quiet = [row(0, 0.5), row(9, 0.5, **{"opd/collapse_foreseen": 0.0})]
    config = {"estimator": "opd", "divergence": "forward_kl", "monitor": True}
    assert "The monitor foresaw no collapse." in said(*quiet, **config).sentences
    monitor = Monitor("opd", "forward_kl")
    log_p, log_q = laws(200, 10, seed=0, apart=0.5)
    drawing = drawn(log_p, log_q, rollouts=64, length=20, seed=0)
    monitor.add(drawing["student"], drawing["teacher"])
    with pytest.warns(CollapseWarning):
        metrics = monitor.step(3)
    rows = [row(0, 0.5), row(3, 0.5, **metrics)]
    sentences = said(*rows, watching=monitor, **config).sentences
    assert "The monitor foresaw a collapse from step 3 on." in sentences
    assert any("a collapse is to be expected" in sentence for sentence in sentences)
    assert not any("monitor" in sentence for sentence in said(*rows, **{**config, "monitor": False}).sentences)


def test_the_next_command_fits_the_run() -> None:
    recorded = said(row(0, 0.5), row(9, 0.5), record_every=3, out="runs/my run").sentences
    assert recorded[-1].endswith("opdtheory diagnose 'runs/my run'")
    plain = said(row(0, 0.5), row(9, 0.5)).sentences
    assert "--record-every 10" in plain[-1]
    # No diagnosis reads an estimator without a weight of the token's own ratio.
    ahead = said(row(0, 0.5), row(9, 0.5), estimator="return_to_go", gamma=0.9).sentences
    assert not any("diagnose" in sentence for sentence in ahead)
