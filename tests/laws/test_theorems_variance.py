"""T7 and T8 hold step by step, and hunts for counterexamples over random divergences, policies and horizons."""

from __future__ import annotations

import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from opdtheory import TabularPolicy, divergence, estimator, exact_gradient, expected_gradient
from opdtheory.exact import gradient_moments
from opdtheory.testing import divergences, gradient_gap, policies, policy_pairs
from opdtheory.theorems import theorems
from tests.tolerances import ENUMERATION

THEOREMS = [theorem for theorem in theorems() if theorem.number.startswith(("T7", "T8"))]
constants = st.integers(-30, 30).map(lambda n: n / 10)


def test_numbers_are_those_of_the_theory():
    assert [theorem.number for theorem in THEOREMS] == [*(f"T7{letter}" for letter in "abcdefgh"), "T8", "T8b", "T8c"]


def one_step(pair) -> tuple[TabularPolicy, TabularPolicy]:
    return tuple(TabularPolicy([policy.logits[0]]) for policy in pair)


def row(policy) -> torch.Tensor:
    return policy.logits[0][0].log_softmax(-1)


def close(actual: float, expected: float) -> bool:
    return abs(actual - expected) <= ENUMERATION * max(1.0, abs(actual), abs(expected))


def clear(actual: float, expected: float) -> bool:
    """Whether the two differ by far more than rounding: then a twin is refuted."""
    return abs(actual - expected) > 1e-6 * max(1.0, abs(actual), abs(expected))


# T7a and T7b: baselines keep the mean.


@given(policy_pairs(), divergences(), constants)
def test_a_constant_baseline_keeps_the_mean(pair, d, b):
    loss = estimator("opd_plus", d, baseline="constant", baseline_value=b)
    assert gradient_gap(expected_gradient(loss, *pair), exact_gradient(*pair, d)) <= ENUMERATION


@given(policy_pairs(), divergences())
def test_the_mean_given_the_history_keeps_the_mean(pair, d):
    loss = estimator("opd_plus", d, baseline="vocabulary")
    assert gradient_gap(expected_gradient(loss, *pair), exact_gradient(*pair, d)) <= ENUMERATION


@given(policy_pairs(distinct=True), divergences(smooth=True))
def test_a_baseline_that_reads_the_token_does_not(pair, d):
    def loss(r):
        advantage = d.weight(r.log_u.detach())
        return r.token_sum(-(advantage - advantage / 2) * r.student_logprobs)

    exact = exact_gradient(*pair, d)
    assume(max(float(level.abs().max()) for level in exact) > 1e-4)
    assert gradient_gap(expected_gradient(loss, *pair), exact) > 1e-6


# T7a: what a constant costs, and which is optimal.


def excess(pair, d, b) -> tuple[float, float]:
    """What the baseline b costs against the optimal one: found, and by T7a."""
    log_p, log_q = (row(policy) for policy in pair)
    p, w = log_p.exp(), d.weight(log_q - log_p)
    norms = 1 - 2 * p + p.square().sum()
    best = float((p * w * norms).sum() / (p * norms).sum())
    found, least = (
        gradient_moments(estimator("opd_plus", d, baseline="constant", baseline_value=value), *pair).variance
        for value in (b, best)
    )
    return found - least, (b - best) ** 2 * float((p * norms).sum())


@given(policy_pairs(horizon=1, eos=None), divergences(), constants)
def test_the_excess_is_a_parabola(pair, d, b):
    found, predicted = excess(pair, d, b)
    assert close(found, predicted)
    if predicted > 1e-4:
        assert clear(found, 2 * predicted)


# T7c: the whole vocabulary.


@given(policy_pairs(), divergences())
def test_the_whole_vocabulary_is_never_noisier_in_a_table(pair, d):
    sampled, whole = (gradient_moments(estimator(name, d), *pair) for name in ("opd_plus", "full_vocab"))
    assert gradient_gap(whole.mean, sampled.mean) <= ENUMERATION
    assert whole.variance <= sampled.variance + ENUMERATION * max(1.0, sampled.variance)
    if pair[0].horizon == 1:
        assert close(whole.variance, 0.0)


# T7d: second moments.


@given(policy_pairs(horizon=1, eos=None, distinct=True))
def test_second_moments(pair):
    log_p, log_q = (row(policy) for policy in pair)
    p, log_u = log_p.exp(), log_q - log_p
    forward = float((p * divergence("forward_kl").weight(log_u).square()).sum())
    chi2 = float((p * divergence("chi2").generator(log_u)).sum())
    assert close(forward, 1 + chi2)
    if chi2 > 1e-4:
        assert clear(forward, 1 + 2 * chi2)
    jsd = divergence("jsd").weight(log_u)
    assert float(jsd.min()) >= -0.5 * torch.tensor(2.0, dtype=torch.float64).log()
    assert float((p * jsd.square()).sum()) <= 0.2403


# T7e and T7f: groups.


@given(policy_pairs(vocab_size=(2, 3), horizon=(1, 2), eos=None), divergences())
def test_group_baselines(pair, d):
    count = pair[0].vocab_size ** pair[0].horizon
    assume(count <= 4)
    size = 3 if count == 2 else 2
    exact = exact_gradient(*pair, d)
    for baseline, factor in (("leave_one_out", 1.0), ("group_mean", (size - 1) / size)):
        mean = expected_gradient(estimator("opd_plus", d, baseline=baseline), *pair, batch_size=size)
        assert gradient_gap(mean, [factor * level for level in exact]) <= ENUMERATION
        if max(float(level.abs().max()) for level in exact) > 1e-4:
            other = 1.0 if baseline == "group_mean" else (size - 1) / size
            assert gradient_gap(mean, [other * level for level in exact]) > 1e-6


@given(policy_pairs(vocab_size=(2, 3), horizon=1, eos=None), divergences())
def test_two_rollouts_have_half_the_variance(pair, d):
    # Spelled out over pairs, as the library itself divides by the size.
    p = row(pair[0]).exp()
    w = d.weight(row(pair[1]) - row(pair[0]))
    rows = -w.unsqueeze(-1) * (torch.eye(len(p), dtype=p.dtype) - p)
    mean = (p.unsqueeze(-1) * rows).sum(0)
    both = (rows.unsqueeze(0) + rows.unsqueeze(1)) / 2
    spelled = float((p.outer(p).unsqueeze(-1) * (both - mean).square()).sum())
    one = gradient_moments(estimator("opd_plus", d), *pair).variance
    assert close(spelled, one / 2)
    if one > 1e-4:
        assert clear(spelled, one / 4)


# T7g and T7h: bounds.


@given(policy_pairs(horizon=1, eos=None, vocab_size=(2, 4), distinct=True), constants)
def test_no_constant_beats_the_bound(pair, b):
    p, q = (row(policy).exp() for policy in pair)
    count, chi2 = len(p), float(((q - p).square() / p).sum())
    apart = float((p - q).square().sum())
    found = gradient_moments(
        estimator("opd_plus_centred", "forward_kl", baseline="constant", baseline_value=b), *pair
    ).variance
    centred = gradient_moments(estimator("opd_plus_centred", "forward_kl"), *pair).variance
    norm = float(p.square().sum())
    assert close(centred, chi2 * (1 + norm) - 3 * apart)
    bound = count / (count - 1) * (1 - float(p.max())) ** 2 * chi2 - apart
    assert found >= bound - ENUMERATION * max(1.0, chi2)


def tilted_bound(p, q) -> float:
    moment = (q - p).square() / p
    r = moment / moment.sum()
    return float(moment.sum() * (1 - r.square().sum()))


@given(policy_pairs(horizon=1, eos=None, vocab_size=(3, 4), distinct=True), st.integers(0, 10**6))
def test_no_vector_baseline_beats_the_tilted_bound(pair, seed):
    p, q = (row(policy).exp() for policy in pair)
    scores = torch.eye(len(p), dtype=p.dtype) - p
    moment = (q - p).square() / p
    best = (moment.unsqueeze(-1) * scores).sum(0) / moment.sum()
    noise = torch.randn(len(p), generator=torch.Generator().manual_seed(seed), dtype=p.dtype)
    at_best, elsewhere = (float((moment * (scores - k).square().sum(-1)).sum()) for k in (best, best + noise))
    assert close(at_best, tilted_bound(p, q))
    assert elsewhere >= tilted_bound(p, q) * (1 - ENUMERATION)
    # A false twin, chi2 itself, is no bound.
    assert at_best < float(moment.sum())


# T8: off-policy.


@given(policy_pairs(vocab_size=(2, 3), horizon=(1, 2)), divergences(), st.data())
def test_the_prefix_ratio_is_exact(pair, d, data):
    student, teacher = pair
    mu = data.draw(policies(student.vocab_size, student.horizon, student.eos), label="behavior")
    exact = exact_gradient(student, teacher, d)
    weighted = expected_gradient(estimator("opd_plus", d, importance="prefix"), student, teacher, behavior=mu)
    assert gradient_gap(weighted, exact) <= ENUMERATION


@given(policy_pairs(horizon=1, eos=None), divergences(), st.data())
def test_the_bias_without_a_ratio(pair, d, data):
    student, teacher = pair
    mu = data.draw(policies(student.vocab_size, 1, None), label="behavior")
    log_p, log_q, log_mu = (row(policy) for policy in (student, teacher, mu))
    p, w = log_p.exp(), d.weight(log_q - log_p)
    values = ((log_mu - log_p).exp() - 1) * w
    predicted = -p * (values - (p * values).sum())
    plain = expected_gradient(estimator("opd_plus", d), student, teacher, behavior=mu)
    bias = [level - exact for level, exact in zip(plain, exact_gradient(student, teacher, d), strict=True)]
    assert gradient_gap(bias, [predicted.unsqueeze(0)]) <= ENUMERATION
    if float(predicted.abs().max()) > 1e-4:
        assert gradient_gap(bias, [-predicted.unsqueeze(0)]) > 1e-6


@given(policies(horizon=1, eos=None), divergences(), st.data())
def test_only_a_centred_weight_stays_at_the_teacher(teacher, d, data):
    mu = data.draw(policies(teacher.vocab_size, 1, None), label="behavior")
    drift = row(mu).exp() - row(teacher).exp()
    at_one = float(d.weight(torch.zeros(1, dtype=torch.float64)))
    for name, constant in (("opd_plus", at_one), ("opd_plus_centred", 0.0)):
        found = expected_gradient(estimator(name, d), teacher, teacher, behavior=mu)
        assert gradient_gap(found, [-constant * drift.unsqueeze(0)]) <= ENUMERATION


@given(policy_pairs(horizon=1, eos=None), divergences(), st.data())
def test_what_ppo_keeps(pair, d, data):
    student, teacher = pair
    mu = data.draw(policies(student.vocab_size, 1, None), label="behavior")
    log_p, log_q, log_mu = (row(policy) for policy in (student, teacher, mu))
    p, w, rho = log_p.exp(), d.weight(log_q - log_p), (log_p - log_mu).exp()
    assume(float((rho - 1.2).abs().min()) > 1e-9 and float((rho - 0.8).abs().min()) > 1e-9)
    dropped = ((w > 0) & (rho > 1.2)) | ((w < 0) & (rho < 0.8))
    values = torch.where(dropped, 0.0, w)
    predicted = -p * (values - (p * values).sum())
    found = expected_gradient(estimator("opd_plus", d, importance="ppo"), student, teacher, behavior=mu)
    assert gradient_gap(found, [predicted.unsqueeze(0)]) <= ENUMERATION
    if not bool(dropped.any()):
        assert gradient_gap(found, exact_gradient(student, teacher, d)) <= ENUMERATION
