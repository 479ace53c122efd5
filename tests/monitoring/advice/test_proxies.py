"""Proxies from sums over tokens, against the distributions that the sums were made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opdtheory import divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.advice.candidates import candidates
from opdtheory.monitoring.advice.proxies import Proxies, surely_listed
from opdtheory.monitoring.sums import Sums
from opdtheory.monitoring.weights import weight_of
from tests.monitoring.advice import brute

# A bin is 0.02 nats wide.
BINS = 1e-3


def summed(student: Tensor, teacher: Tensor, *, true_squares: bool = False) -> Sums:
    """The sums of every token, each as often as the student writes it."""
    log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
    p = log_p.exp()
    square = (1 - 2 * p + p.square().sum(-1, keepdim=True)).flatten() if true_squares else None
    sums = Sums.empty()
    group = torch.zeros(p.numel(), dtype=torch.int64)
    sums.add((log_q - log_p).flatten(), log_p.flatten(), group, weight=p.flatten(), square=square)
    return sums


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd"])
def test_noise_is_the_second_moment_within_a_factor_of_two(name: str) -> None:
    student, teacher = brute.pair(20, 7, seed=1, scale=1.0)
    d = divergence(name)
    p, log_u = student.softmax(-1), teacher.log_softmax(-1) - student.log_softmax(-1)
    norms = 1 - 2 * p + p.square().sum(-1, keepdim=True)
    for candidate in candidates(d, "sampled", 2, 1, False):
        if candidate.best:
            continue
        weight = weight_of(candidate.loss)(log_u.flatten()).view_as(log_u)
        true = float((p * weight.square() * norms).sum(-1).mean())
        shares = []
        for true_squares in (False, True):
            proxies = Proxies(d, summed(student, teacher, true_squares=true_squares), 1, 0.0)
            shares.append(proxies._of(candidate)[1] / true)
        assert 0.5 - BINS <= shares[0] <= 1.0 + BINS, candidate.loss.label
        assert shares[1] == pytest.approx(1.0, rel=BINS), candidate.loss.label


def test_a_gradient_of_one_history_is_its_own() -> None:
    """With one history the mean over tokens is that of the history, and nothing is left to a proxy but the bins."""
    student, teacher = brute.pair(1, 40, seed=2, scale=1.0)
    proxies = Proxies(divergence("jsd"), summed(student, teacher), 1, 0.0)
    target = brute.exact("jsd", student, teacher)
    found = {
        c.loss.label: bias for c, bias, _ in proxies.measure(candidates(divergence("jsd"), "sampled", 2, 1, False))
    }
    assert found["opd_plus(jsd)"] == 0.0
    loss = next(c.loss for c in candidates(divergence("jsd"), "sampled", 2, 1, False) if c.loss.label == "opd(jsd)")
    mean, _, _ = brute.mean_and_spread(loss, student, teacher)
    true = float((mean - target).square().sum() / target.square().sum())
    assert found["opd(jsd)"] == pytest.approx(true, rel=2e-2)


def test_a_token_above_one_over_k_plus_one_is_listed_and_a_lower_one_may_not_be() -> None:
    generator = torch.Generator().manual_seed(0)
    q = torch.rand(2000, 6, generator=generator, dtype=torch.float64).pow(3)
    q = q / q.sum(-1, keepdim=True)
    for k in (1, 2, 3):
        listed = torch.zeros_like(q).scatter(-1, q.topk(k).indices, 1.0) > 0
        assert bool(listed[q > 1 / (k + 1)].all())
        assert not bool(listed[q > 1 / (k + 2)].all())


def test_what_is_surely_listed_is_a_lower_bound() -> None:
    generator = torch.Generator().manual_seed(1)
    for trial in range(300):
        p = torch.rand(1 + trial % 7, generator=generator, dtype=torch.float64)
        k, log_u = 1 + trial % 4, torch.randn(1, generator=generator, dtype=torch.float64)
        x = 1 - p
        bound = float(surely_listed(x.mean()[None], x.square().mean()[None], log_u, k))
        inside = p * log_u.exp() > 1 / (k + 1)
        true = float((x.square() * inside).mean())
        assert 0.0 <= bound <= true + 1e-12
    alike = torch.full((1,), 0.3, dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert float(surely_listed(alike, alike.square(), zero, 1)) == pytest.approx(0.09, rel=1e-9)
    assert float(surely_listed(alike, alike.square(), zero - 3.0, 1)) == 0.0


def test_the_split_is_bounded_by_the_tokens_that_may_be_drawn() -> None:
    student, teacher = brute.pair(30, 6, seed=3)
    d = divergence("jsd")
    proxies = Proxies(d, summed(student, teacher, true_squares=False), 1, 0.0)
    listed = [c for c in candidates(d, "top_k", 2, 1, False) if c.loss.label == "topk_tail_sampled(jsd, k=2)"]
    noise = proxies._of(listed[0])[1]
    p, q = student.softmax(-1), teacher.softmax(-1)
    weight = d.weight(teacher.log_softmax(-1) - student.log_softmax(-1)).square() * (1 - p).square()
    outside = torch.ones_like(q).scatter(-1, q.topk(2).indices, 0.0)
    truly = float((p * weight * outside).sum(-1).mean())
    everything = float((p * weight).sum(-1).mean())
    assert truly <= noise * (1 + BINS) and noise < everything * (1 - BINS)


def test_equal_laws_have_no_gradient() -> None:
    student, _ = brute.pair(3, 4)
    with pytest.raises(InvalidArgumentError, match="found_or_rollouts: must not have a gradient of zero"):
        Proxies(divergence("jsd"), summed(student, student), 1, 0.0).measure([])
