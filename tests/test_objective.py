"""Objectives: their labels, what is refused, and sums as text."""

from __future__ import annotations

import math

import pytest

from opdtheory import divergences
from opdtheory.errors import InvalidArgumentError
from opdtheory.objective import Objective, check_discount, check_objective, label_of_terms, simple_ratios

KL, FORWARD, JSD = (divergences.divergence(name) for name in ("reverse_kl", "forward_kl", "jsd"))


def test_one_divergence_prints_with_its_granularity():
    assert str(Objective.of(JSD)) == repr(Objective.of(JSD)) == "jsd (token_local)"
    assert str(Objective.of(divergences.alpha(0.5), "sequence")) == "alpha(alpha=0.5) (sequence)"
    assert Objective.of(JSD).divergence is JSD and Objective.of(JSD) == Objective(((1.0, JSD),))
    assert Objective.of(JSD) != Objective.of(JSD, "sequence")


def test_a_discount_is_shown_where_it_applies():
    discounted = Objective.of(JSD, "token_return", 0.25)
    assert discounted.discounted and discounted.where == "token_return, gamma=0.25"
    assert str(discounted) == "jsd (token_return, gamma=0.25)"
    whole = Objective.of(JSD, "token_return")
    assert not whole.discounted and whole.where == "token_return"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("token",), "objective: must be one of token_local, token_return, sequence, got 'token'"),
        (("token_local", 0.5), "gamma: must be 1 for token_local, which has no discount, got 0.5"),
        (("sequence", 0.0), "gamma: must be 1 for sequence, which has no discount, got 0.0"),
        (("token_return", 1.5), r"gamma: must be a number in \[0, 1\], got 1.5"),
        (("token_return", math.nan), r"gamma: must be a number in \[0, 1\], got nan"),
        (("token_return", True), r"gamma: must be a number in \[0, 1\], got True"),
        (("token_return", "1"), r"gamma: must be a number in \[0, 1\], got '1'"),
    ],
)
@pytest.mark.bad_input
def test_what_makes_no_sense_is_refused(arguments, message):
    for make in (check_objective, lambda *given: Objective.of(JSD, *given)):
        with pytest.raises(InvalidArgumentError, match=f"^{message}$"):
            make(*arguments)


def test_discounts_of_both_ends_are_fine():
    for gamma in (0, 0.0, 1, 1.0):
        check_discount(gamma)
    check_objective("token_return", 0.0)


def test_sums_are_labelled_by_simple_ratios():
    assert Objective(((2.0, KL), (4.0, FORWARD))).label == "reverse_kl + 2 * forward_kl"
    assert str(Objective(((-0.5, KL), (1.5, JSD)), "sequence")) == "3 * jsd - reverse_kl (sequence)"
    assert label_of_terms({"a": -1.0, "b": -1.0}) == "-a - b"
    # Not simple: as they are.
    assert label_of_terms({"a": 1.0, "b": math.pi}) == "a + 3.14159 * b"


def test_simple_ratios_are_of_small_numbers_only():
    assert simple_ratios([0.3, -0.1]) == [3, -1]
    assert [float(f) for f in simple_ratios([1.0, 1.25])] == [1.0, 1.25]
    assert simple_ratios([1.0, 1.0 + 1e-3]) is None
    assert simple_ratios([1.0, 0.0]) is None
