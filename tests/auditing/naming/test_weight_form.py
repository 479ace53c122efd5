"""A recovered weight as a formula: names, generators, stability, growth, and weights that must not be named."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable

import numpy as np
import pytest
import sympy
import torch

import opdtheory as opd
from opdtheory.auditing.naming.atoms import PARAMETRIC, Atom, catalogue_atom, catalogue_atoms, fixed_atoms
from opdtheory.auditing.naming.recover import RecoveredWeight, recover_weight
from opdtheory.auditing.naming.sparse import Curve, best_subset, fit_parameter, snap
from opdtheory.auditing.naming.weight_form import WeightForm, describe
from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import implied_generator_values, symbol
from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from tests.labels import label

GRID = torch.linspace(-2.0, 2.0, 9, dtype=torch.float64)


def form_of(loss: Callable[[Rollouts], torch.Tensor], scale: float = 1.0, batch_size: int = 1) -> WeightForm:
    return describe(recover_weight(lambda r: scale * loss(r), Scenario(batch_size)), 1e-9)


def reward(function: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Rollouts], torch.Tensor]:
    return lambda r: r.token_sum(-function(r.log_u).detach() * r.student_logprobs)


def evaluated(expr: sympy.Expr, log_u: torch.Tensor) -> np.ndarray:
    u = symbol()
    return np.array([complex(expr.subs(u, sympy.exp(sympy.Float(t))).evalf()).real for t in log_u.tolist()])


ATOMS = [
    *fixed_atoms(),
    *catalogue_atoms(),
    *(make(0.3) for make, _, _ in PARAMETRIC.values()),
    catalogue_atom(opd.divergence("skew_forward_kl", lam=0.3)),
]


@pytest.mark.parametrize("atom", ATOMS, ids=lambda atom: atom.label)
def test_generator_and_expression_of_an_atom(atom: Atom) -> None:
    """The closed form beside the integral that it is, and the expression beside the values, up to a constant."""
    values = atom.values(GRID.numpy())
    constant = evaluated(atom.expr(), GRID) - values
    np.testing.assert_allclose(constant, constant[0], atol=1e-12)
    if atom.generator() is None:
        return
    integral = implied_generator_values(lambda t: torch.from_numpy(atom.values(t.numpy())), GRID, breaks=(0.0,)).numpy()
    np.testing.assert_allclose(evaluated(atom.generator(), GRID), integral, atol=1e-11)
    wrong = evaluated(atom.generator(), GRID) * 1.001
    assert np.abs(wrong - integral).max() > 1e-5


@pytest.mark.parametrize(
    ("loss", "kind", "label"),
    [
        (opd.estimator("k1_loss"), "zero", "zero"),
        (opd.estimator("k2_loss"), "catalogue", "reverse_kl"),
        (opd.estimator("k3_loss"), "catalogue", "forward_kl"),
        (opd.estimator("k3_reward"), "combination", "reverse_kl - forward_kl"),
        (opd.estimator("sign"), "catalogue", "total_variation"),
        (opd.estimator("k2_reward"), "expression", "-log^2 u"),
        (opd.estimator("opd", "forward_kl"), "expression", "-u log u"),
        (opd.estimator("opd", "jsd"), "expression", "(1 + u) log((1 + u)/2) - u log u"),
        (opd.estimator("opd", "chi2"), "combination", "2 * forward_kl - chi2"),
        (opd.estimator("box_cox", alpha=0.3), "catalogue", "alpha(alpha=0.3)"),
        (opd.estimator("opd_plus", opd.divergences.skew_jsd(0.1)), "catalogue", "skew_jsd(beta=0.1)"),
        (opd.estimator("opd", opd.divergences.alpha(0.3)), "expression", "3.33333 * u^0.3 - u"),
        (
            opd.estimator("opd_plus", "jsd", clip_log_ratio=0.6),
            "expression",
            "jsd of u with log u clamped to [-0.6, 0.6]",
        ),
        (
            opd.estimator("opd_plus", "forward_kl", clip_weight=(0.5, 1.5)),
            "expression",
            "forward_kl of u with log u clamped to [-0.693147, 0.405465]",
        ),
        (reward(lambda t: (1.7 * t).tanh()), "expression", "tanh(1.7 log u)"),
        (reward(lambda t: t + 2 * t.exp() + (2 * t).exp()), "combination", "reverse_kl + 2 * forward_kl + chi2"),
        (reward(lambda t: -t), "combination", "-reverse_kl"),
        (reward(lambda t: t.clamp(max=1.3)), "expression", "reverse_kl of u with log u clamped to at most 1.3"),
        (reward(lambda t: t + t.exp() / (0.3 * t.exp() + 0.7)), "expression", "u/(0.3 u + 0.7) + log u"),
    ],
    ids=label,
)
def test_names(loss: Callable[[Rollouts], torch.Tensor], kind: str, label: str) -> None:
    form = form_of(loss, 2.3717)
    assert (form.kind, form.label) == (kind, label)
    assert form.error < 1e-12
    json.dumps(dataclasses.asdict(form))


@pytest.mark.parametrize(
    "function",
    [lambda t: (3 * t).sin(), lambda t: t + 1e-6 * (3 * t).sin(), lambda t: t.sinh().asinh() + 0.1 * (t * t + 1).log()],
    ids=["sine", "log u and a millionth of a sine", "no dictionary"],
)
def test_what_no_formula_fits_is_numeric(function: Callable[[torch.Tensor], torch.Tensor]) -> None:
    form = form_of(reward(function))
    assert form.kind == "numeric"
    assert form.expr is None and form.generator is None and len(form.generator_values) == 37
    assert form.error > 1e-9 and math.isnan(form.limits["inf"])


def test_a_weight_of_p_and_q_is_not_named() -> None:
    form = form_of(opd.estimator("power", alpha=0.5))
    assert form.kind == "numeric" and "no function of the ratio" in form.label
    assert form.generator_values == [] and not form.genuine


def test_expression_and_generator_are_those_of_the_recovered_weight() -> None:
    u = symbol()
    for loss in (opd.estimator("k3_reward"), opd.estimator("opd", "jsd"), opd.estimator("opd", "forward_kl")):
        recovered = recover_weight(loss, Scenario())
        form = describe(recovered)
        assert form.expr is not None and form.generator is not None
        weight = sympy.sympify(form.expr, locals={"u": u})
        values = evaluated(weight, recovered.log_u) - evaluated(weight, torch.zeros(1))
        np.testing.assert_allclose(values, recovered.weight.numpy(), rtol=1e-9, atol=1e-9)
        # V'' = w'/u, and the gauge.
        generator = sympy.sympify(form.generator, locals={"u": u})
        gap = generator.diff(u, 2) - weight.diff(u) / u
        assert np.abs(evaluated(gap, GRID)).max() < 1e-12
        assert abs(evaluated(generator, torch.zeros(1))[0]) < 1e-12
        assert abs(evaluated(generator.diff(u), torch.zeros(1))[0]) < 1e-12
        np.testing.assert_allclose(form.generator_values, evaluated(generator, recovered.log_u), rtol=1e-9, atol=1e-9)


def test_clamped_generator_is_the_integral_of_the_clamped_weight() -> None:
    for low, high in ((0.5, 1.5), (1.05, 6.0), (0.1, 0.9)):
        form = form_of(opd.estimator("opd_plus", "forward_kl", clip_weight=(low, high)))
        assert form.generator is not None
        edges = (math.log(low), math.log(high))
        integral = implied_generator_values(lambda t, a=low, b=high: t.exp().clamp(a, b), GRID, breaks=edges)  # type: ignore[misc]
        generator = sympy.sympify(form.generator, locals={"u": symbol()})
        np.testing.assert_allclose(evaluated(generator, GRID), integral.numpy(), atol=1e-11)
        assert form.genuine and "bounded for every pair" in form.second_moment


def test_a_bound_on_a_round_log_ratio() -> None:
    """No grid point lies on it, where rounding would decide on which side a token falls."""
    for bound in (0.5, 1.0, 2.0):
        recovered = recover_weight(opd.estimator("k2_loss", clip_log_ratio=bound), Scenario())
        assert recovered.depends_on_ratio_only
        form = describe(recovered)
        assert form.kind == "numeric" and form.label.startswith("reverse_kl for log u between")
        assert "constant outside with a jump" in form.label
        clamped = form_of(opd.estimator("opd_plus", "jsd", clip_log_ratio=bound))
        assert clamped.label == f"jsd of u with log u clamped to [-{bound:g}, {bound:g}]"


@pytest.mark.parametrize("bound", [4.5, 6.0, 10.0])
def test_a_bound_beyond_the_grid_is_named(bound: float) -> None:
    """Seen on |log u| <= 4 alone both are the reverse KL, as they are with a bound that no log-ratio seen reaches."""
    for loss, named in (
        (reward(lambda t: t.clamp(-bound, bound)), f"reverse_kl of u with log u clamped to [-{bound:g}, {bound:g}]"),
        (
            opd.estimator("k2_loss", clip_log_ratio=bound),
            f"reverse_kl for log u between -{bound:g} and {bound:g}, constant outside with a jump",
        ),
    ):
        recovered = recover_weight(loss, Scenario())
        assert describe(recovered).label == named
        none = torch.zeros(0, dtype=torch.float64)
        short = describe(dataclasses.replace(recovered, far_log_u=none, far_weight=none))
        assert (short.label, short.seen_to) == ("reverse_kl", 4.0)
    beyond = form_of(opd.estimator("k2_loss", clip_log_ratio=bound + 8.0))
    assert (beyond.label, beyond.seen_to) == ("reverse_kl", 12.0)


def test_a_clamp_of_the_value_ends_where_the_value_does() -> None:
    """0.5 log^2 u and u - 1 - log u held at 10 or below: no gradient beyond (OpenRLHF's k2, verl's k3)."""
    k2 = form_of(lambda r: r.token_sum((r.log_u.square() / 2).clamp(max=10.0)))
    assert k2.label == "reverse_kl for log u between -4.472 and 4.472, constant outside with a jump"
    assert math.sqrt(20.0) == pytest.approx(4.472, abs=5e-4) and not k2.genuine
    k3 = form_of(lambda r: r.token_sum((r.log_u.expm1() - r.log_u).clamp(-10.0, 10.0)))
    assert k3.label == "forward_kl for log u between -11 and 2.611, constant outside with a jump"
    assert math.exp(2.611) - 1.0 - 2.611 == pytest.approx(10.0, abs=0.01)


def test_what_fits_on_the_grid_alone_is_not_named() -> None:
    """A bend at 7, and a term too small to be seen on the grid."""
    for function in (lambda t: t + (t - 7.0).clamp(min=0.0), lambda t: t + 1e-12 * (2 * t).exp()):
        form = form_of(reward(function))
        assert form.kind == "numeric" and form.label.endswith("another function beyond")


def test_larger_batches_name_families_and_sums() -> None:
    for batch_size, loss, named in (
        (4, opd.estimator("opd_plus", opd.divergences.alpha(0.3), baseline="group_mean"), "alpha(alpha=0.3)"),
        (3, opd.estimator("k3_reward", baseline="leave_one_out"), "reverse_kl - forward_kl"),
    ):
        form = form_of(loss, batch_size=batch_size)
        assert form.label == named and form.error < 1e-12
    zscore = recover_weight(opd.estimator("opd_plus", "reverse_kl", zscore=True), Scenario(3))
    assert not zscore.depends_on_ratio_only


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
    assert "p = (0.5, 0.5) for the teacher q = (0.25, 0.75): w is alike at u = 0.5 and 1.5" in found
    # The distribution named is at rest indeed, and its neighbour is not.
    loss = opd.estimator("opd", "chi2")

    def gradient(q: float) -> float:
        student = opd.TabularPolicy([torch.zeros(1, 2, dtype=torch.float64)])
        teacher = opd.TabularPolicy([torch.tensor([[math.log(q), math.log(1 - q)]], dtype=torch.float64)])
        return float(opd.expected_gradient(loss, student, teacher)[0].abs().max())

    assert gradient(0.25) < 1e-15
    cubic = form_of(reward(lambda t: t**3 - t)).fixed_points
    assert cubic and all("alike" in text for text in cubic)


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


@pytest.mark.parametrize("batch_size", [4])
def test_coarse_grids_name_single_entries(batch_size: int) -> None:
    form = form_of(opd.estimator("opd_plus", "jsd", baseline="leave_one_out"), batch_size=batch_size)
    assert (form.kind, form.label) == ("catalogue", "jsd")
    other = form_of(opd.estimator("opd_plus", "jsd", zscore=True), batch_size=batch_size)
    assert other.kind == "numeric"


def test_few_points_are_not_overfitted() -> None:
    """Seven points and three coefficients would fit anything nearly; nothing of the sort is tried."""
    log_u = torch.tensor([-4.0, -0.02, -0.01, 0.0, 0.01, 0.02, 4.0], dtype=torch.float64)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.randn(3, generator=generator, dtype=torch.float64).tolist()
        weight = a * log_u + b * log_u**2 + c * torch.sin(log_u)
        form = describe(RecoveredWeight(log_u, weight, 0.0, True, False, a + c))
        assert form.kind == "numeric"


def test_stop_gradient_is_recognised_in_any_gauge() -> None:
    def shifted(t: torch.Tensor) -> torch.Tensor:
        return -opd.divergence("jsd").generator(t) + 0.3466 * t.expm1()

    assert form_of(reward(shifted)).stop_gradient_of == "jsd"
    assert form_of(opd.estimator("opd", "chi2")).stop_gradient_of == "chi2"
    assert form_of(opd.estimator("opd_plus", "forward_kl")).stop_gradient_of is None


def test_single_precision_is_held_to_its_own_rounding() -> None:
    def loss(r: Rollouts) -> torch.Tensor:
        advantage = (r.log_u.float() - r.log_u.float().exp()).detach()
        return r.token_sum(-advantage * r.student_logprobs.float())

    recovered = recover_weight(loss, Scenario(), 1e-4)
    assert describe(recovered, 1e-4).label == "reverse_kl - forward_kl"
    assert describe(recovered, 1e-12).kind == "numeric"


def test_bad_tolerance() -> None:
    recovered = recover_weight(opd.estimator("k2_loss"), Scenario())
    with pytest.raises(InvalidArgumentError, match="tolerance"):
        describe(recovered, 0.0)


def test_sparse_search_and_its_false_twin() -> None:
    points = np.linspace(-2, 2, 25)
    curve = Curve(points, 2 * np.sin(points) - 6 * np.cos(points), np.ones(25))
    columns = np.column_stack([np.sin(points), points, np.cos(points), points**2])
    subset = best_subset(curve, columns, 2)
    assert subset is not None and subset.indices == (0, 2) and subset.error < 1e-14
    assert snap(curve, columns, subset, 1e-9).coefficients.tolist() == [2.0, -6.0]
    without = best_subset(curve, columns[:, [0, 1, 3]], 2)
    assert without is not None and without.error > 1e-2
    # Twice the same column: no coefficients mean anything.
    assert best_subset(curve, columns[:, [0, 0]], 2) is None
    assert fit_parameter(curve, lambda v: np.exp(v * points), -3.0, 3.0, np.empty((25, 0)), 1e-9) is None
