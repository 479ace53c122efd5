"""T5, T5b and T5c hold, their twins fall, and random divergences, policies and horizons hold no counterexample."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import Phase, assume, find, given, settings
from hypothesis import strategies as st

from opdtheory import TabularPolicy, divergence, estimator, exact_gradient, expected_gradient
from opdtheory.divergences import symbol
from opdtheory.exact.tree import Tree
from opdtheory.testing import divergences, gradient_gap, policies, policy_pairs
from opdtheory.theorems import theorems
from opdtheory.theorems.instances.flows import TEACHER, distance, far_students, flow
from opdtheory.theorems.stability.checks import local_weight, symbolic_weight
from tests.tolerances import ALGEBRA, FINITE_DIFFERENCE

THEOREMS = theorems("T5", "T5b", "T5c")
# The first counterexample will do; shrinking it takes long.
HUNT = settings(max_examples=200, phases=[Phase.generate], database=None, derandomize=True)

AT_TEACHER = torch.zeros(1, dtype=torch.float64)


def test_every_theorem_is_told_whole():
    assert [theorem.number for theorem in THEOREMS] == ["T5", "T5b", "T5c"]
    for theorem in THEOREMS:
        assert theorem.hypotheses and theorem.source and theorem.advice and theorem.derivation
        assert {identity.kind for identity in theorem.identities} == {"exact", "rigorous", "numeric"}


# T5: the sampled estimators beside the teacher, as black boxes.


def linear_response_gap(teacher, d, name, direction, slope) -> float:
    """How far the gradient's response to a small step is from `w'(1) P(h) (diag q - q q^T)` times the step."""
    h = 1e-4
    sides = []
    for sign in (1, -1):
        moved = [z + sign * h * x for z, x in zip(teacher.logits, direction, strict=True)]
        sides.append(expected_gradient(estimator(name, d), TabularPolicy(moved, eos=teacher.eos), teacher))
    found = [(a - b) / (2 * h) for a, b in zip(*sides, strict=True)]
    tree, claimed = Tree.build(teacher, teacher), []
    for n, x in enumerate(direction):
        q = tree.log_q[n].exp()
        centred = x - (q * x).sum(-1, keepdim=True)
        claimed.append(slope(name, d) * tree.reach(n).unsqueeze(-1) * q * centred)
    return gradient_gap(found, claimed)


def slope_at_teacher(name, d) -> float:
    return float(d.curvature(AT_TEACHER) if name == "opd_plus" else -d.log_slope(AT_TEACHER))


@pytest.mark.parametrize("name", ["opd", "opd_plus"])
def test_the_symbolic_weight_is_that_of_the_estimator(name):
    u = symbol()
    weight = symbolic_weight(name, divergence("jsd").expr, u)
    log_u = torch.tensor([-1.5, 0.5, 2.0], dtype=torch.float64)
    symbolic = [float(weight.subs(u, x)) for x in log_u.exp().tolist()]
    numeric = local_weight(name, divergence("jsd"))(log_u).tolist()
    assert symbolic == pytest.approx(numeric, abs=ALGEBRA)
    # The estimator itself: on one step its expected gradient is -p (w - E_p w).
    student, teacher = (TabularPolicy.random(3, 1, seed=seed) for seed in (0, 1))
    p, q = (policy.logits[0].softmax(-1).flatten() for policy in (student, teacher))
    w = torch.tensor([float(weight.subs(u, x)) for x in (q / p).tolist()], dtype=torch.float64)
    (found,) = expected_gradient(estimator(name, "jsd"), student, teacher)
    assert float((found.flatten() + p * (w - (p * w).sum())).abs().max()) < ALGEBRA


def false_slope(name, d) -> float:
    return float(d.curvature(AT_TEACHER))


responses = st.tuples(
    policies(vocab_size=(2, 3), horizon=(1, 2)), divergences(smooth=True), st.sampled_from(("opd", "opd_plus"))
)


def directions(teacher, seed: int):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(z.shape, generator=generator, dtype=torch.float64) / 2 for z in teacher.logits]


@given(responses, st.integers(0, 99))
def test_the_response_at_the_teacher_is_the_slope_of_the_weight(case, seed):
    teacher, d, name = case
    # The third derivative of the flow, times the step squared.
    assert linear_response_gap(teacher, d, name, directions(teacher, seed), slope_at_teacher) < 10 * FINITE_DIFFERENCE


def test_that_assertion_refutes_one_slope_for_both_estimators():
    def refuted(case) -> bool:
        teacher, d, name = case
        return linear_response_gap(teacher, d, name, directions(teacher, 0), false_slope) >= 10 * FINITE_DIFFERENCE

    find(responses, refuted, settings=HUNT)


# T5b: no slope of a generator exceeds its limit.


def weight_falls(d, log_u: float, c: float) -> bool:
    """Whether the slope of `-(f + c(u-1))` is negative at a ratio, beyond rounding."""
    t = torch.tensor([log_u], dtype=torch.float64)
    slope = float(d.log_slope(t) * (-t).exp())
    return -slope - c < -ALGEBRA * max(1.0, abs(slope), abs(c))


ratios = st.floats(-30.0, 30.0)


@given(divergences(), ratios, st.floats(0.0, 10.0))
def test_a_curing_gauge_leaves_no_falling_weight(d, log_u, below):
    assume(math.isfinite(d.slope_at_infinity))
    assert not weight_falls(d, log_u, -d.slope_at_infinity - below)


@given(divergences(), st.floats(-30.0, 10.0), st.floats(0.0, 10.0))
def test_a_curing_gauge_under_a_clip(d, clip, below):
    at = torch.tensor([clip], dtype=torch.float64)
    c = -float(d.log_slope(at) * (-at).exp())
    assert not weight_falls(d, clip - below, c)


@given(divergences(smooth=True), st.floats(0.01, 2.0))
def test_a_larger_gauge_lets_the_weight_fall(d, above):
    limit = d.slope_at_infinity
    c = 100.0 if math.isinf(limit) else above - limit
    at = torch.tensor([700.0], dtype=torch.float64)
    assume(math.isinf(limit) or limit - float(d.log_slope(at) * (-at).exp()) < above / 2)  # slow towards its limit
    assert any(weight_falls(d, log_u, c) for log_u in (0.0, 30.0, 700.0))


def test_that_assertion_refutes_the_slope_at_the_teacher():
    def refuted(case) -> bool:
        d, log_u = case
        return weight_falls(d, log_u, -float(d.log_slope(AT_TEACHER)))

    find(st.tuples(divergences(smooth=True), ratios), refuted, settings=HUNT)


# T5c: the distance to the teacher falls along the exact descent, row by row.


def pull(student, teacher, gradient) -> list[torch.Tensor]:
    r"""$\langle z - \log q, \nabla\rangle$ of every row: minus the slope of half the squared distance."""
    tree = Tree.build(student, teacher)
    return [((tree.log_p[n] - tree.log_q[n]) * g).sum(-1) for n, g in enumerate(gradient)]


def covariance(student, teacher, d) -> list[torch.Tensor]:
    tree, found = Tree.build(student, teacher), []
    for n in range(tree.horizon):
        p, log_u = tree.log_p[n].exp(), tree.log_q[n] - tree.log_p[n]
        w = d.weight(log_u)
        mean = (p * w).sum(-1, keepdim=True)
        found.append(tree.reach(n) * (p * log_u * (w - mean)).sum(-1))
    return found


def comes_nearer(student, teacher, gradient) -> bool:
    return all(
        bool((row >= -ALGEBRA * max(1.0, float(row.abs().max()))).all()) for row in pull(student, teacher, gradient)
    )


@given(policy_pairs(), divergences())
def test_exact_descent_comes_nearer_to_the_teacher(pair, d):
    gradient = exact_gradient(*pair, d)
    assert gradient_gap(pull(*pair, gradient), covariance(*pair, d)) < ALGEBRA
    assert comes_nearer(*pair, gradient)


@given(policy_pairs(vocab_size=(2, 3), horizon=(1, 2)), st.sampled_from(("reverse_kl", "forward_kl", "jsd", "chi2")))
def test_clipped_weights_never_lead_away(pair, name):
    for options in ({"clip_weight": (-0.5, 0.5)}, {"clip_log_ratio": 0.5}):
        loss = estimator("opd_plus", divergence(name), **options)
        assert comes_nearer(*pair, expected_gradient(loss, *pair))


def test_that_assertion_refutes_stop_gradient():
    def refuted(case) -> bool:
        pair, d = case
        return not comes_nearer(*pair, expected_gradient(estimator("opd", d), *pair))

    cases = st.tuples(policy_pairs(vocab_size=(2, 3), horizon=(1, 2), distinct=True), divergences())
    find(cases, refuted, settings=HUNT)


@given(policy_pairs(vocab_size=(2, 3), horizon=(1, 2)))
def test_it_does_not_refute_stop_gradient_for_the_reverse_kl(pair):
    assert comes_nearer(*pair, expected_gradient(estimator("opd", "reverse_kl"), *pair))


def test_the_simulated_flow_is_of_the_fourth_order():
    start, log_q = far_students()[:3], torch.tensor(TEACHER, dtype=torch.float64).log()
    ends = [flow(start, log_q, lambda t: t, 4.0, steps)[-1] for steps in (16, 32, 64)]
    ratio = (ends[0] - ends[1]).norm() / (ends[1] - ends[2]).norm()
    assert 13 < float(ratio) < 20


def test_distances_ignore_a_constant_and_collapsed_students_rest():
    log_q = torch.tensor(TEACHER, dtype=torch.float64).log()
    assert float(distance(log_q + 3.0, log_q)) < 1e-15
    error = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    assert float(distance(log_q + error + 3.0, log_q)) == pytest.approx(2.0)
    # Whose log-ratio passes 10 on a token that the teacher wants; a teacher that wants it little does not count.
    gone = torch.tensor([[-15.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    assert torch.equal(flow(gone, log_q, lambda t: t, 1.0, 2)[-1], gone)
    rare = torch.tensor([1e-6, 0.4, 0.4, 0.2], dtype=torch.float64).log()
    assert not torch.equal(flow(gone, rare, lambda t: t, 1.0, 2)[-1], gone)
