"""A recovered weight as a formula: names, generators, and weights that must not be named."""

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
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.naming.weight_form import describe
from opdtheory.auditing.scenario import Scenario
from opdtheory.divergences import symbol
from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from tests.auditing.naming.weights import GRID, evaluated, form_of, reward
from tests.labels import label
from tests.sparse import some


@pytest.mark.parametrize(
    ("loss", "kind", "label"),
    some(
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
        ]
    ),
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
    assert form.kind == "numeric" and "not a function of the ratio" in form.label
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


@pytest.mark.slow
def test_larger_batches_name_families_and_sums() -> None:
    for batch_size, loss, named in (
        (4, opd.estimator("opd_plus", opd.divergences.alpha(0.3), baseline="group_mean"), "alpha(alpha=0.3)"),
        (3, opd.estimator("k3_reward", baseline="leave_one_out"), "reverse_kl - forward_kl"),
    ):
        form = form_of(loss, batch_size=batch_size)
        assert form.label == named and form.error < 1e-12
    zscore = recover_weight(opd.estimator("opd_plus", "reverse_kl", zscore=True), Scenario(3))
    assert not zscore.depends_on_ratio_only


@pytest.mark.parametrize("batch_size", [4])
def test_coarse_grids_name_single_entries(batch_size: int) -> None:
    form = form_of(opd.estimator("opd_plus", "jsd", baseline="leave_one_out"), batch_size=batch_size)
    assert (form.kind, form.label) == ("catalogue", "jsd")
    other = form_of(opd.estimator("opd_plus", "jsd", zscore=True), batch_size=batch_size)
    assert other.kind == "numeric"


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
