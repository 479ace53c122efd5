"""Whose samples the tokens are: how often the tests are wrong, and what they see."""

from __future__ import annotations

import math

import pytest
import torch

import opdtheory as opd
from opdtheory.monitoring import diagnose
from opdtheory.monitoring.evidence import Evidence
from opdtheory.monitoring.findings import setting_of
from opdtheory.monitoring.findings.samplers import log_winnings, own_probabilities
from opdtheory.monitoring.report import Diagnosis
from opdtheory.monitoring.sums import Sums
from opdtheory.monitoring.weights import weight_of
from tests.monitoring.runs import drawn, laws, tokens_of


def named(found: Diagnosis, name: str):
    return next((each for each in found.findings if each.name == name), None)


def read(rows, *, entropy: bool = False, behavior: bool = False, **options) -> Diagnosis:
    given = rows["behavior"] if behavior else None
    more = {"entropy": rows["entropy"]} if entropy else {}
    return diagnose(rows["student"], rows["teacher"], given, estimator="opd_plus", divergence="jsd", **more, **options)


def bets(seed: int, hotter: float) -> float:
    """The winnings on 300 tokens of a law with a very heavy tail of u, tokens drawn with `hotter` in its exponent."""
    generator = torch.Generator().manual_seed(seed)
    log_p = (-1.2 * torch.arange(12, dtype=torch.float64)).log_softmax(-1)
    log_q = torch.full((12,), -math.log(12), dtype=torch.float64)
    token = torch.multinomial((log_p * hotter).softmax(-1), 300, replacement=True, generator=generator)
    sums = Sums.empty()
    sums.add((log_q - log_p)[token], log_p[token], torch.zeros(300, dtype=torch.int64))
    return log_winnings(sums)


def test_bets_on_the_students_own_samples_win_as_rarely_as_they_say():
    won = torch.tensor([bets(seed, 1.0) for seed in range(1000)])
    for alpha in (0.1, 0.01, 0.001):
        assert float((won > math.log(1 / alpha)).double().mean()) <= alpha
    # The twin: samples of a flatter law.
    assert sum(bets(seed, 0.4) > math.log(1000) for seed in range(50)) > 45


def test_a_law_of_thin_tail_is_told_apart_too():
    rows = drawn(*laws(100, 10, seed=0, apart=0.5), rollouts=200, length=50, seed=1, temperature=1.5)
    found = named(read(rows), "not_own_probabilities")
    assert found is not None and found.number.value > 1.02


@pytest.mark.parametrize("temperature", [0.7, 0.9, 1.2])
def test_entropies_tell_the_temperature_of_the_sampler(temperature):
    rows = drawn(*laws(100, 10, seed=0, apart=0.5), rollouts=100, length=40, seed=2, temperature=temperature)
    found = read(rows, entropy=True)
    warning = named(found, "not_own_probabilities")
    assert warning is not None and found.verdict == "other_samples"
    assert ("less" if temperature < 1 else "more") in warning.sentence


def test_entropies_are_wrong_as_rarely_as_they_say():
    """At most once in a thousand runs of the student's own samples: in 200, more than two are one in a thousand."""
    log_p, log_q = laws(100, 10, seed=0, apart=0.5)
    wrong = 0
    for seed in range(200):
        tokens = tokens_of(drawn(log_p, log_q, rollouts=64, length=20, seed=seed), "entropy")
        evidence = Evidence(weight_of(opd.estimator("opd_plus", "jsd")))
        evidence.add(tokens)
        found = list(own_probabilities(setting_of(opd.estimator("opd_plus", "jsd"), evidence, 1280.0)))
        wrong += found[0].level == "warning"
        assert found[0].level == "warning" or "would have shown" in found[0].sentence
    assert wrong <= 2


def test_ratios_alone_say_that_they_cannot_say():
    rows = drawn(*laws(100, 10, seed=0, apart=2.0), rollouts=64, length=20, seed=3, temperature=0.7)
    assert "cannot be said" in named(read(rows), "own_probabilities").sentence


def test_a_sampler_of_its_own_is_a_mismatch_unless_it_is_close():
    log_p, log_q = laws(100, 10, seed=0, apart=0.5)
    far, near = (drawn(log_p, log_q, 100, 40, seed=4, temperature=t) for t in (0.7, 0.999))
    found = read(far, behavior=True)
    warning = named(found, "mismatch")
    assert (
        found.verdict == "other_samples" and "Nothing corrects" in warning.sentence and "importance" in warning.remedy
    )
    # KL(mu|p) over the vocabulary.
    log_mu = (log_p / 0.7).log_softmax(-1)
    exact = float((log_mu.exp() * (log_mu - log_p)).sum(-1)[far["history"]].mean())
    assert warning.number.low < exact < warning.number.high
    corrected = read(far, behavior=True, importance="token")
    assert "Nothing corrects" not in named(corrected, "mismatch").sentence
    quiet = read(near, behavior=True)
    assert quiet.verdict == "nothing_found" and named(quiet, "sampler") is not None and named(quiet, "mismatch") is None


def test_importance_weights_give_the_students_expectations():
    log_p, log_q = laws(30, 6, seed=5, apart=0.5)
    rows = drawn(log_p, log_q, 2000, 20, seed=6, temperature=0.8)
    exact = float((log_p.exp() * (log_p - log_q)).sum(-1)[rows["history"]].mean())
    corrected, plain = read(rows, behavior=True).reverse_kl, read(rows).reverse_kl
    assert corrected.low < exact < corrected.high
    assert not plain.low < exact < plain.high


def test_what_the_teacher_cannot_write_is_counted():
    rows = drawn(*laws(20, 6, seed=7), 32, 10, seed=8)
    rows["teacher"][0, :3] = -torch.inf
    found = read(rows)
    assert named(found, "support").number.value == pytest.approx(3 / 320)
    assert all(math.isfinite(each.number.value) for each in found.findings)
    assert named(read(drawn(*laws(20, 6, seed=7), 32, 10, seed=8)), "support") is None


def test_cut_ratios_want_the_centred_gauge():
    rows = drawn(*laws(50, 6, seed=9, apart=0.5), 64, 20, seed=10, temperature=0.8)
    given = (rows["student"], rows["teacher"], rows["behavior"])
    for importance in ("tis", "mask"):
        wrong = diagnose(*given, estimator="opd_plus", divergence="forward_kl", importance=importance)
        right = diagnose(*given, estimator="opd_plus_centred", divergence="forward_kl", importance=importance)
        assert named(wrong, "gauge").number.value == pytest.approx(1.0) and named(right, "gauge") is None
    assert named(diagnose(*given, estimator="opd_plus", divergence="forward_kl", importance="token"), "gauge") is None


def test_cuts_are_those_of_the_estimator():
    """The share that TIS at 2 and the mask of [0.5, 5] cut is that of the library's own importance weights."""
    from opdtheory.estimators.offpolicy import importance_weight

    rows = drawn(*laws(50, 6, seed=11, apart=0.5), 64, 20, seed=12, temperature=0.5)
    rolled = opd.Rollouts.unchecked(
        tokens=torch.zeros(64, 20, dtype=torch.int64),
        mask=torch.ones(64, 20, dtype=torch.float64),
        student_logprobs=rows["student"],
        teacher_logprobs=rows["teacher"],
        behavior_logprobs=rows["behavior"],
    )
    rho = (rows["student"] - rows["behavior"]).exp()
    cut = float((importance_weight(rolled, "tis", 2.0) < rho).double().mean())
    masked = float((importance_weight(rolled, "mask", keep_range=(0.5, 5.0)) == 0).double().mean())
    sentence = named(read(rows, behavior=True), "mismatch").sentence
    assert f"TIS at 2 cuts {100 * cut:.2g} %" in sentence and f"mask of [0.5, 5] {100 * masked:.2g} %" in sentence
