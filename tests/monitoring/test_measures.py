"""What is measured of a weight: against closed forms over the vocabulary, and against the tokens one by one."""

from __future__ import annotations

import math

import pytest
import torch

import opdtheory as opd
from opdtheory.monitoring import diagnose
from opdtheory.monitoring.evidence import leave_one_out
from opdtheory.monitoring.measures import measured, quantiles, tail_index
from opdtheory.monitoring.monitor import metrics_of
from opdtheory.monitoring.sums import GROUPS, WIDTH, Sums, group_of
from opdtheory.monitoring.tokens import SampledTokens
from opdtheory.monitoring.weights import weight_of
from opdtheory.monitoring.whole_rows import row_sums
from tests.monitoring.runs import drawn, every_token, laws, tokens_of
from tests.tolerances import ALGEBRA

NAMES = [
    ("opd", "jsd"),
    ("opd", "forward_kl"),
    ("opd_plus", "hellinger"),
    ("opd_plus", "forward_kl"),
    ("k3_reward", None),
]
BINNED = WIDTH**2  # twice what a bin's width costs


def expected_sums(log_p, log_q) -> Sums:
    """The sums that infinitely many tokens would give, a token of each history weighted by its chance."""
    sums = Sums.empty()
    log_u, student, weight = every_token(log_p, log_q)
    p = log_p.exp()
    square = (1 - 2 * p + p.square().sum(-1, keepdim=True)).flatten()
    sums.add(log_u, student, torch.zeros(len(log_u), dtype=torch.int64), weight, square)
    return sums


@pytest.mark.parametrize(("name", "divergence"), NAMES)
def test_expectations_over_the_vocabulary(name, divergence):
    log_p, log_q = laws(60, 8, seed=0, apart=0.7)
    weight = weight_of(opd.estimator(name, divergence))
    found = measured(weight, expected_sums(log_p, log_q))
    p, q, log_u = log_p.exp(), log_q.exp(), log_q - log_p
    a, slope = weight(log_u), weight.slope(log_u)
    square = 1 - 2 * p + p.square().sum(-1, keepdim=True)
    mean = lambda x: float((p * x).sum(-1).mean())  # noqa: E731
    best = mean(square * a) / mean(square)
    noise = mean(square * (a - best).square())
    assert found.falls.value == pytest.approx(mean((slope < -1e-9).double()), abs=1e-3)
    assert found.slope.value == pytest.approx(mean(square * slope) / mean(square), rel=BINNED, abs=BINNED)
    assert found.best_constant.value == pytest.approx(best, rel=BINNED, abs=BINNED)
    assert found.noise.value == pytest.approx(noise, rel=2 * BINNED)
    towards = mean((a - mean(a)) * (q - p))
    assert found.towards.value == pytest.approx(towards, rel=BINNED, abs=BINNED)
    assert found.signal.value == pytest.approx(
        towards / (mean((q - p) * log_u.expm1()) * noise) ** 0.5, rel=BINNED, abs=BINNED
    )


def test_the_slope_is_not_that_of_a_neighbouring_estimator():
    sums = expected_sums(*laws(60, 8, seed=0, apart=0.7))
    slopes = [measured(weight_of(opd.estimator(*name)), sums).slope.value for name in NAMES]
    assert len({round(slope, 3) for slope in slopes}) == len(slopes)
    assert slopes[1] < 0 < slopes[2]


def test_metrics_of_a_step_are_the_measures_of_its_tokens():
    tokens = tokens_of(drawn(*laws(40, 10, seed=1), rollouts=64, length=30, seed=2), "entropy")
    weight = weight_of(opd.estimator("opd", "jsd"))
    sums = Sums.empty()
    sums.add(tokens.log_u, tokens.student, group_of(tokens.rollout))
    found, metrics = measured(weight, sums), metrics_of(weight, [tokens])
    for name in ("slope", "towards", "signal", "carried"):
        assert metrics[f"opd/{name}"] == pytest.approx(getattr(found, name).value, rel=1e-3, abs=1e-4), name
    assert metrics["opd/falls"] == pytest.approx(found.falls.value, abs=5e-3)
    assert metrics["opd/surprise"] == pytest.approx(float((-tokens.student - tokens.entropy).mean()), rel=ALGEBRA)
    assert "opd/sampler_kl" not in metrics


@pytest.mark.parametrize(("name", "divergence"), NAMES)
def test_whole_rows_are_the_moments_of_a_tokens_gradient(name, divergence):
    """By autograd of the estimator's own loss at every token, weighted by its chance: another route."""
    log_p, log_q = laws(5, 4, seed=3)
    loss = opd.estimator(name, divergence)
    weight = weight_of(loss)
    tokens = SampledTokens(log_p[:, 0], log_q[:, 0], torch.arange(5), None, None, log_p, log_q)
    sums = row_sums(tokens, [weight], torch.zeros(5, dtype=torch.int64))[weight.name][0]
    signal = noise = 0.0
    for row in range(5):
        rolled = opd.Rollouts.from_logits(
            torch.arange(4).unsqueeze(-1),
            log_p[row].expand(4, 1, 4).clone().requires_grad_(),
            log_q[row].expand(4, 1, 4),
        )
        (gradients,) = torch.autograd.grad(4 * loss(rolled), rolled.student_logits)
        gradients, p = gradients[:, 0], log_p[row].exp().unsqueeze(-1)
        scores = torch.eye(4, dtype=torch.float64) - log_p[row].exp()
        expected = (p * gradients).sum(0)
        # The least variance over constants c that the weight may be less.
        lengths = scores.square().sum(-1, keepdim=True)
        best = (p * (gradients * scores).sum(-1, keepdim=True)).sum() / (p * lengths).sum()
        centred = gradients - best * scores
        signal += float(expected.square().sum())
        noise += float((p * centred.square()).sum() - expected.square().sum())
    assert sums[0] == 5
    assert float(sums[1]) == pytest.approx(signal, rel=ALGEBRA)
    assert float(sums[2]) == pytest.approx(noise, rel=1e-10)


def test_quantiles_are_right_to_a_bin():
    tokens = tokens_of(drawn(*laws(40, 10, seed=4), rollouts=64, length=50, seed=5))
    sums = Sums.empty()
    sums.add(tokens.log_u, tokens.student, group_of(tokens.rollout))
    shares = torch.tensor([0.01, 0.25, 0.5, 0.9], dtype=torch.float64)
    assert torch.allclose(quantiles(sums, shares), torch.quantile(tokens.log_u, shares), atol=2 * WIDTH)


@pytest.mark.parametrize("index", [0.8, 1.5, 3.0])
def test_hills_index_of_a_pareto_law(index):
    generator = torch.Generator().manual_seed(int(10 * index))
    uniform = torch.rand(200_000, dtype=torch.float64, generator=generator)
    log_size = -uniform.log() / index  # P(size > t) = t^-index
    sums = Sums.empty()
    sums.add(log_size, torch.full_like(log_size, -1.0), group_of(torch.arange(len(log_size)) // 50))
    points, tables = sums.occupied()
    found = tail_index(points.exp(), tables[:, 0])
    assert found is not None and found.low < index < found.high and found.high - found.low < 0.4 * index


def test_a_small_or_level_tail_has_no_index():
    counts = torch.ones(GROUPS + 1, 100, dtype=torch.float64)
    assert tail_index(torch.arange(1.0, 101.0, dtype=torch.float64), counts) is None
    assert tail_index(torch.ones(100, dtype=torch.float64), 1000 * counts) is None


def test_leaving_out_a_group_leaves_the_others():
    sums = torch.arange(8.0).view(4, 2)
    sums[0] = 0.0
    found = leave_one_out(sums)
    assert found.tolist() == [[12.0, 15.0], [10.0, 12.0], [8.0, 10.0], [6.0, 8.0]]


def test_certain_tokens_have_no_score_and_no_nan():
    """Of a token with p = 1, 1 - 2p + sum p^2 is zero, and rounding may leave less."""
    logits = torch.zeros(400, 50, dtype=torch.float64)
    logits[:, 0] = torch.linspace(20, 60, 400)
    # As trainers log them, rounded to float32.
    log_p = logits.log_softmax(-1)[:, 0].float().view(20, 20)
    log_q = torch.full((20, 20), -0.5, dtype=torch.float64)
    whole = {"student_logits": logits.view(20, 20, 50), "teacher_logits": torch.zeros(20, 20, 50)}
    found = diagnose(log_p, log_q, estimator="opd_plus", divergence="jsd", clip_log_ratio=0.2, **whole)
    assert all(math.isfinite(each.number.value) for each in found.findings)
    assert all(math.isfinite(number.value) for number in found.signal.values())
