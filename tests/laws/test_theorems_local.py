"""Hunting counterexamples to T2, T3 and T4 over random divergences, policies and horizons."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from opdtheory import exact_gradient, expected_gradient, random_pair
from opdtheory.divergences import divergence, implied_generator_values
from opdtheory.estimators import estimator
from opdtheory.rollouts import Rollouts
from opdtheory.testing import divergences, gradient_gap, policy_pairs
from tests.tolerances import ENUMERATION

GAUGES = st.sampled_from((-2.0, -0.5, 0.3, 1.0))
WEIGHTS = st.lists(st.integers(-3, 3), min_size=3, max_size=5)


def same(actual, expected) -> bool:
    return gradient_gap(actual, expected) <= ENUMERATION


def score_loss(weight):
    """The loss whose expected gradient is $-E_p[w(log u) s]$."""
    return lambda r: r.token_sum(-weight(r.log_u.detach()) * r.student_logprobs)


def minus(left, right):
    return [a - b for a, b in zip(left, right, strict=True)]


# T2.


def bias_is(predicted, d, pair) -> bool:
    stopped = expected_gradient(estimator("opd", d), *pair)
    bias = minus(stopped, exact_gradient(*pair, d))
    return same(bias, expected_gradient(score_loss(lambda log_u: -predicted(d, log_u)), *pair))


@given(policy_pairs(), divergences())
def test_bias_of_stop_gradient(pair, d):
    assert bias_is(lambda d, log_u: d.log_slope(log_u), d, pair)


def test_its_twin_is_refuted():
    pair = random_pair(3, 2, seed=1)
    assert not bias_is(lambda d, log_u: d.weight(log_u), divergence("forward_kl"), pair)
    assert not bias_is(lambda d, log_u: torch.zeros_like(log_u), divergence("jsd"), pair)


# T3.


def gauged_return(d, c, shift):
    def loss(r: Rollouts) -> torch.Tensor:
        log_u = r.log_u.detach()
        reward = torch.where(r.mask > 0, d.generator(log_u) + c * shift(log_u), 0.0)
        later = reward.flip(-1).cumsum(-1).flip(-1) - reward
        return r.token_sum(-(d.weight(log_u) + c - later) * r.student_logprobs)

    return loss


def gauge_is_free(pair, d, c, shift) -> bool:
    return same(expected_gradient(gauged_return(d, c, shift), *pair), exact_gradient(*pair, d, "token_return"))


def stop_gradient_moves(pair, d, c, target) -> bool:
    gauged = score_loss(lambda log_u: -(d.generator(log_u) + c * torch.expm1(log_u)))
    moved = minus(expected_gradient(gauged, *pair), expected_gradient(estimator("opd", d), *pair))
    return same(moved, [-c * level for level in exact_gradient(*pair, target)])


@given(policy_pairs(), divergences(), GAUGES)
def test_gauge_is_free_under_the_exact_weight_and_moves_stop_gradient(pair, d, c):
    assert gauge_is_free(pair, d, c, torch.expm1)
    assert stop_gradient_moves(pair, d, c, "forward_kl")


def test_their_twins_are_refuted():
    pair, d = random_pair(3, 2, seed=1), divergence("jsd")
    assert not gauge_is_free(pair, d, 0.3, lambda log_u: log_u)
    assert not stop_gradient_moves(pair, d, 0.3, "reverse_kl")


# T4.


def staircase(heights):
    """A weight that is linear in log u between random heights at -2, -1, 0, ... and constant beyond."""
    knots = [float(k - len(heights) // 2) for k in range(len(heights))]

    def weight(log_u):
        place = (log_u - knots[0]).clamp(0, len(heights) - 1)
        levels = torch.tensor(heights, dtype=log_u.dtype)
        left = place.floor().long().clamp(max=len(heights) - 2)
        return levels[left] + (place - left) * (levels[left + 1] - levels[left])

    return weight, knots


def descends(pair, weight, generator) -> bool:
    """The loss of a weight follows central differences of $E_p[V(u)]$ on one-step policies, to their accuracy."""
    (z,), (teacher,) = pair[0].logits, pair[1].logits
    log_q = teacher.log_softmax(-1)

    def value(logits):
        log_p = logits.log_softmax(-1)
        return float((log_p.exp() * generator(log_q - log_p)).sum())

    step = 1e-5
    moves = [step * row.reshape(z.shape) for row in torch.eye(z.numel(), dtype=z.dtype)]
    slopes = torch.tensor([(value(z + move) - value(z - move)) / (2 * step) for move in moves]).reshape(z.shape)
    (found,) = expected_gradient(score_loss(weight), *pair)
    return gradient_gap([found], [slopes.double()]) <= 1e-4


def convex_on(log_u, values) -> bool:
    u = log_u.exp()
    return bool(((values.diff() / u.diff()).diff() >= -1e-9).all())


@given(policy_pairs(horizon=1, eos=None), WEIGHTS)
def test_any_weight_descends_its_implied_generator(pair, heights):
    weight, knots = staircase([float(h) for h in heights])
    assert descends(pair, weight, lambda log_u: implied_generator_values(weight, log_u, knots))


@given(WEIGHTS)
def test_implied_generators_are_convex_exactly_if_the_weight_never_falls(heights):
    weight, knots = staircase([float(h) for h in heights])
    grid = torch.linspace(knots[0] - 1, knots[-1] + 1, 41, dtype=torch.float64)
    values = implied_generator_values(weight, grid, knots)
    assert convex_on(grid, values) == (sorted(heights) == heights)


def test_the_twins_of_t4_are_refuted():
    weight, knots = staircase([-1.0, 0.0, 2.0])
    pair = random_pair(3, 1, seed=1)
    assert not descends(pair, weight, lambda log_u: -implied_generator_values(weight, log_u, knots))
    assert not descends(pair, weight, lambda log_u: -log_u)
    grid = torch.linspace(-2, 2, 41, dtype=torch.float64)
    assert not convex_on(grid, -implied_generator_values(weight, grid, knots))


@given(policy_pairs(), divergences(), st.sampled_from((0.1, 0.7, math.e)))
def test_a_clipped_weight_still_has_the_teacher_for_a_fixed_point(pair, d, bound):
    # At p = q the log-ratios are zero, whatever is clipped; the mean of a constant times the score is none.
    clipped = estimator("opd_plus", d, clip_log_ratio=bound)
    at_teacher = expected_gradient(clipped, pair[1], pair[1])
    assert same(at_teacher, [torch.zeros_like(level) for level in at_teacher])
