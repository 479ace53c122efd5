"""The curves and figures of an audit."""

from __future__ import annotations

import dataclasses

import torch

import opdtheory as opd
from opdtheory.auditing.views import render_audit
from opdtheory.auditing.views.figures import curves, figures
from tests.losses import k3


def test_curves_are_the_theory_s():
    """k3 follows the forward KL: weight u, generator u log u in the gauge of zero slope (T4)."""
    found = curves(opd.audit(k3, "forward_kl"))
    torch.testing.assert_close(found.weight, found.log_u.expm1(), rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(found.claimed, found.log_u.expm1())
    s = found.generator_log_u
    expected = s * s.exp() - s.exp() + 1
    # Interpolation between points of the grid, 0.25 apart.
    assert float((found.generator - expected).abs().max()) < 1e-3 * float(expected.max())
    assert float((found.generator - (s.expm1() - s)).abs().max()) > 0.1 * float(expected.max())
    torch.testing.assert_close(found.claimed_generator, expected)


def test_a_generator_of_one_s_own_is_drawn_if_given(report):
    own = opd.Divergence.from_expr(2 * opd.divergence("reverse_kl").expr, name="<mine>")
    found = opd.audit(lambda r: r.token_sum(r.log_u.square()), own)
    assert curves(found).claimed is None and "known by name only" in render_audit(found)
    torch.testing.assert_close(curves(found, own).claimed, 2 * found.weight["log_u"], rtol=1e-12, atol=1e-12)
    assert "known by name only" not in render_audit(found, divergence=own)


def test_no_generator_where_the_weight_is_no_function_of_the_ratio(report):
    apart = dataclasses.replace(report, weight=dataclasses.replace(report.weight, depends_on_ratio_only=False))
    assert curves(apart).generator is None
    assert [figure.title for figure in figures(apart, curves(apart))][:2] == ["Weight on a token", "Bias by pair"]
