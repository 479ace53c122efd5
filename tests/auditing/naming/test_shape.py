"""What follows from a formula: other fixed points, limits, growth, and whether it ever falls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import sympy
import torch

import opdtheory as opd
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.naming.shape import _growth, _growth_at, _leading, _mpmath
from opdtheory.auditing.naming.weight_form import WeightForm, describe
from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import symbol
from opdtheory.rollouts import Rollouts
from tests.auditing.naming.weights import form_of, reward
from tests.labels import label


def test_genuine_looks_beyond_the_grid() -> None:
    """log u - u/1000 rises on the whole grid of |log u| <= 4 and falls beyond u = 1000 (T4)."""
    recovered = recover_weight(reward(lambda t: t - 1e-3 * t.exp()), Scenario())
    assert recovered.non_decreasing
    form = describe(recovered)
    assert form.label == "1000 * reverse_kl - forward_kl" or form.kind == "combination"
    assert not form.genuine
    assert form_of(opd.estimator("opd_plus", "jsd")).genuine


def test_stability_and_other_fixed_points() -> None:
    """T5: the teacher attracts iff the slope is positive; a weight that turns has other distributions at rest."""
    reverse, forward = opd.estimator("opd", "reverse_kl"), opd.estimator("opd", "forward_kl")
    assert form_of(reverse).attracts and form_of(reverse).fixed_points == []
    assert not form_of(forward).attracts
    assert form_of(forward).slope_at_teacher == pytest.approx(-1.0, rel=1e-6)
    assert not form_of(opd.estimator("opd", "jsd")).attracts
    found = form_of(opd.estimator("opd", "chi2")).fixed_points
    assert "p = (0.5, 0.5) for the teacher q = (0.25, 0.75): w is equal at u = 0.5 and 1.5" in found
    # The distribution named is at rest indeed, and its neighbour is not.
    loss = opd.estimator("opd", "chi2")

    def gradient(q: float) -> float:
        student = opd.TabularPolicy([torch.zeros(1, 2, dtype=torch.float64)])
        teacher = opd.TabularPolicy([torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64)])
        return float(opd.expected_gradient(loss, student, teacher)[0].abs().max())

    assert gradient(0.25) < 1e-15
    cubic = form_of(reward(lambda t: t**3 - t)).fixed_points
    assert cubic and all("w is equal" in text for text in cubic)


@pytest.mark.parametrize(
    ("loss", "zero", "infinity", "words", "moment"),
    [
        (opd.estimator("k3_loss"), -1.0, math.inf, "like u as u -> inf", "1 + chi2(q||p): can be infinite"),
        (opd.estimator("k2_loss"), -math.inf, math.inf, "like log u as u -> 0", "E_p[log^2 u]: can be infinite"),
        (opd.estimator("opd_plus", "jsd"), -math.log(2) / 2, math.inf, "like log u as u -> inf", "finite for every"),
        (opd.estimator("opd_plus", "hellinger"), -1.0, math.inf, "like u^0.5 as u -> inf", "finite for every pair"),
        (opd.estimator("sign"), -1.0, 1.0, "tends to 1 as u -> inf", "bounded for every pair"),
        (opd.estimator("opd", "forward_kl"), 0.0, -math.inf, "falls without bound like u log u", "can be infinite"),
        (opd.estimator("opd_plus", "neyman_chi2"), -math.inf, 2.0, "like u^-1 as u -> 0", "teacher's probability"),
    ],
    ids=label,
)
def test_limits_and_growth(
    loss: Callable[[Rollouts], torch.Tensor], zero: float, infinity: float, words: str, moment: str
) -> None:
    form = form_of(loss)
    at_zero = form.limits["0"]
    assert at_zero == zero or at_zero == pytest.approx(zero * form_scale(form), rel=1e-9)
    at_infinity = form.limits["inf"]
    assert at_infinity == infinity or at_infinity == pytest.approx(infinity * form_scale(form), rel=1e-9)
    assert words in form.growth and moment in form.second_moment


def form_scale(form: WeightForm) -> float:
    """The sign estimator's weight is twice the total variation's, which the table above does not know."""
    return 1.0 if form.label != "total_variation" else form.terms["total_variation"] / 2


@pytest.mark.parametrize(
    ("weight", "inf"),
    [
        # Exactly zero, or nearly, where growth could be measured.
        (lambda t: t - t.square() / 100, "w falls without bound like log^2 u as u -> inf"),
        (lambda t: t - t.square() / 101, "w falls without bound like log^2 u as u -> inf"),
        (lambda t: t - t.square() / 200, "w falls without bound like log^2 u as u -> inf"),
        (lambda t: 20 * t + t.square() / 10, "w grows without bound like log^2 u as u -> inf"),
        (lambda t: t.exp() * (t - 100), "w grows without bound like u log u as u -> inf"),
    ],
)
def test_growth_is_that_of_the_leading_term_however_small(
    weight: Callable[[torch.Tensor], torch.Tensor], inf: str
) -> None:
    form = form_of(reward(weight))
    assert inf in form.growth
    assert not (form.genuine and "falls" in inf)


def test_a_leading_term_is_read_off_a_sum_and_measured_otherwise() -> None:
    u = symbol()
    for expr in (u * sympy.log(u) - u, sympy.sqrt(u) - 3 * sympy.log(u), 5 - 1 / u):
        for end in ("0", "inf"):
            read = _leading(expr, end)
            measured = _growth_at(_mpmath(expr), 1 if end == "inf" else -1, 1000)
            assert read is not None and measured is not None
            assert read.limit == pytest.approx(measured.limit) and read.text == measured.text
    assert _leading(sympy.log(1 + u), "inf") is None
    assert _growth(sympy.log(1 + u) - sympy.log(1 + u) ** 2 / 100, "inf").text == "log^2 u"
