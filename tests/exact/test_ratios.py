"""Twelve digits at the borders: nearly equal policies, powers near the KL divergences, discounts of zero."""

from __future__ import annotations

import math

import pytest
import torch

import opdtheory as opd
from opdtheory import MarkovPolicy, TabularPolicy, divergence, exact_gradient, exact_value
from opdtheory.errors import InvalidArgumentError
from opdtheory.testing import gradient_gap
from tests.exact.precise import nearby, precise
from tests.sparse import some
from tests.tolerances import ENUMERATION

DISTANCES = (1e-6, 1e-8, 1e-10)
SIZES = [(2, 1, None), (3, 3, None), (2, 4, 1), (4, 2, 0)]
POWERS = [
    *("reverse_kl", "forward_kl", "jeffreys", "chi2", "neyman_chi2", "hellinger"),
    *(f"alpha(alpha={alpha})" for alpha in (-1.5, 0.0, 1e-9, 0.4, 1.0, 3.0)),
]
OTHERS = ["jsd", "le_cam", *("skew_jsd(beta=0.1)", "skew_forward_kl(lam=0.3)", "skew_reverse_kl(lam=0.3)")]


def relative_gap(found, expected):
    """The largest error over the largest entry."""
    scale = max(float(level.abs().max()) for level in expected)
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale


def hold(student, teacher, name, objective, gamma=1.0, routes=("chain", "table")):
    """Both routes against sixty digits."""
    table, scores = student.tabulate(), teacher.tabulate()
    value, gradient = precise(table, scores, divergence(name), objective, gamma)
    for route in routes:
        pair = (student, teacher) if route == "chain" else (table, scores)
        found = float(exact_value(*pair, name, objective, gamma))
        assert found == pytest.approx(value, rel=ENUMERATION, abs=0.0), (route, "value")
        expected = student.pull_back(gradient) if route == "chain" else gradient
        assert relative_gap(exact_gradient(*pair, name, objective, gamma), expected) <= ENUMERATION, (route, "gradient")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("size", "horizon", "eos"), SIZES)
@pytest.mark.parametrize("name", POWERS)
def test_sequences_of_nearly_equal_chains(name, size, horizon, eos, distance):
    student = MarkovPolicy.random(size, horizon, eos=eos, seed=size)
    hold(student, nearby(student, distance), name, "sequence")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("objective", "gamma"), [("token_local", 1.0), ("token_return", 1.0), ("token_return", 0.6)])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "chi2", *OTHERS])
def test_tokens_of_nearly_equal_policies(name, objective, gamma, distance):
    student = MarkovPolicy.random(3, 3, eos=1, seed=4)
    hold(student, nearby(student, distance), name, objective, gamma)


@pytest.mark.parametrize("name", OTHERS)
def test_sequences_of_nearly_equal_tables(name):
    student = MarkovPolicy.random(3, 3, seed=4)
    hold(student, nearby(student, 1e-8), name, "sequence", routes=("table",))


@pytest.mark.parametrize("shift", [1.0, -40.0, 1e3])
@pytest.mark.parametrize("name", ["reverse_kl", "alpha(alpha=0.4)"])
def test_a_constant_in_the_logits_costs_no_digits(name, shift):
    student = MarkovPolicy.random(3, 2, seed=3)
    hold(student, nearby(student, 1e-8, shift=shift), name, "sequence")


def test_one_rare_token_that_differs_leaves_the_others_their_digits():
    rows = torch.tensor([[0.3, -0.2, -30.0], [0.1, 0.4, -28.0], [0.0, 0.0, -29.0], [1.0, -1.0, -30.0]]).double()
    student = MarkovPolicy(rows[0], rows[1:], 2)
    moved = rows.clone()
    moved[:, 2] += 5.0
    for name in ("reverse_kl", "forward_kl", "hellinger"):
        hold(student, MarkovPolicy(moved[0], moved[1:], 2), name, "sequence")


@pytest.mark.parametrize("scale", [1.0, 1e-7])
@pytest.mark.parametrize("alpha", [1e-6, 1e-9, 1e-12, 1e-17, -1e-8, -1e-14, 1 - 1e-9, 1 + 1e-12, 1 + 1e-6, 0.999])
def test_powers_near_the_kl_divergences(alpha, scale):
    student = MarkovPolicy.random(3, 3, seed=0)
    teacher = MarkovPolicy.random(3, 3, seed=1) if scale == 1.0 else nearby(student, scale)
    hold(student, teacher, f"alpha(alpha={alpha!r})", "sequence")


@pytest.mark.parametrize("horizon", some([200, 1, 7]))
@pytest.mark.parametrize("distance", some([1e-8, 0.0, 1e-4, 1e-12], 4))
def test_no_divergence_of_chains_is_negative(horizon, distance):
    for seed in range(5):
        student = MarkovPolicy.random(4, horizon, seed=seed)
        teacher = nearby(student, distance, seed=seed + 1)
        for name in POWERS:
            assert float(exact_value(student, teacher, name, "sequence")) >= 0.0


def test_long_chains_have_the_second_order_of_their_distance():
    # Every f with f''(1) = 1 is half of chi2 up to third order, whose size the two distances show.
    student = MarkovPolicy.random(3, 500, seed=2)
    for distance in (1e-7, 1e-9):
        teacher = nearby(student, distance)
        values = [
            float(exact_value(student, teacher, f"alpha(alpha={a})", "sequence")) for a in (-1.0, 0.0, 0.5, 1.0, 2.0)
        ]
        assert max(values) / min(values) - 1 <= 1e3 * distance


def test_equal_policies_have_no_divergence_and_no_gradient():
    student = MarkovPolicy.random(3, 4, seed=2)
    for name in POWERS:
        for pair in ((student, student), (student.tabulate(), student.tabulate())):
            assert float(exact_value(*pair, name, "sequence")) == 0.0
            assert not any(g.any() for g in exact_gradient(*pair, name, "sequence"))


# Nothing times infinity.


def late_infinity(horizon=2, token=1, name="reverse_kl"):
    """A pair, as tables and as chains, that agrees on the support of the first token but not on that of the second."""
    initial, transition = torch.zeros(2).double(), torch.zeros(2, 2).double()
    first, second = torch.tensor([0.0, 1.0]).double(), torch.zeros(2, 2).double()
    second[0, token] = -math.inf
    pair = [MarkovPolicy(initial, transition, horizon), MarkovPolicy(first, second, horizon)]
    if name in ("forward_kl", "chi2"):
        pair.reverse()
    return pair, [policy.tabulate() for policy in pair]


@pytest.mark.parametrize("horizon", [2, 3])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "chi2", "neyman_chi2", "jeffreys"])
def test_at_discount_zero_a_later_infinity_does_not_count(name, horizon):
    for student, teacher in late_infinity(horizon, name=name):
        bandits = [TabularPolicy([policy.tables()[0]]) for policy in (student, teacher)]
        value = float(exact_value(student, teacher, name, "token_return", 0.0))
        assert value == pytest.approx(float(exact_value(*bandits, name)), rel=ENUMERATION)
        gradient = exact_gradient(student, teacher, name, "token_return", 0.0)
        assert gradient_gap([gradient[0].flatten()], [exact_gradient(*bandits, name)[0].flatten()]) <= ENUMERATION
        assert not any(level.any() for level in gradient[1:])


@pytest.mark.parametrize("gamma", [0.5, 1e-9, 1e-200, 5e-324])
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "neyman_chi2"])
def test_any_discount_above_zero_makes_it_count(name, gamma):
    for student, teacher in late_infinity(4, name=name):
        assert float(exact_value(student, teacher, name, "token_return", gamma)) == math.inf
        with pytest.raises(InvalidArgumentError, match="infinite"):
            exact_gradient(student, teacher, name, "token_return", gamma)


def test_trees_in_parts_treat_a_later_infinity_alike(monkeypatch):
    from opdtheory.exact import subtrees

    _, (student, teacher) = late_infinity(3)
    expected = exact_value(student, teacher, "reverse_kl", "token_return", 0.0)
    monkeypatch.setattr(subtrees, "_AT_ONCE", 2)
    assert float(exact_value(student, teacher, "reverse_kl", "token_return", 0.0)) == float(expected)
    assert not any(g.any() for g in exact_gradient(student, teacher, "reverse_kl", "token_return", 0.0)[1:])


# The forms in the gauge of slope zero.


def test_a_custom_generator_keeps_its_digits_too():
    u = opd.u
    import sympy

    student = MarkovPolicy.random(3, 2, seed=4)
    teacher = nearby(student, 1e-8)
    custom = opd.Divergence.from_expr(u * sympy.log(u) + sympy.log(u) * -3 + 2 * (u - 1))
    table, scores = student.tabulate(), teacher.tabulate()
    value, gradient = precise(table, scores, custom, "sequence")
    assert float(exact_value(table, scores, custom, "sequence")) == pytest.approx(value, rel=ENUMERATION, abs=0.0)
    assert relative_gap(exact_gradient(table, scores, custom, "sequence"), gradient) <= ENUMERATION
