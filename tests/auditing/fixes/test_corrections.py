"""Terms for the advantage: what is missing, what a clip took away, and a shift of the gauge."""

from __future__ import annotations

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.fixes.corrections import Curve, clips, gauge_shift, missing_terms


def test_the_shifted_weight_is_monotone_and_a_smaller_shift_is_not() -> None:
    divergence = opd.divergence("jsd")
    log_u = torch.linspace(-6, 6, 61, dtype=torch.float64)
    curve = Curve(log_u, -divergence.generator(log_u))
    shift = gauge_shift(curve, divergence)
    assert shift is not None
    slope = divergence.slope_at_infinity
    assert bool(((curve.weight + slope * log_u.expm1()).diff() >= 0).all())
    assert bool(((curve.weight + 0.9 * slope * log_u.expm1()).diff() < 0).any())
    assert gauge_shift(Curve(log_u, divergence.weight(log_u)), divergence) is None


def test_missing_terms_need_a_positive_multiple() -> None:
    divergence, log_u = opd.divergence("forward_kl"), torch.linspace(-4, 4, 33, dtype=torch.float64)
    (term,) = missing_terms(Curve(log_u, -divergence.generator(log_u)), divergence, "token_local", 1.0)
    assert term.kind == "slope"
    assert not list(missing_terms(Curve(log_u, divergence.generator(log_u)), divergence, "token_local", 1.0))
    assert not list(missing_terms(Curve(log_u, log_u.sin()), divergence, "token_local", 1.0))


def test_a_smooth_bend_is_no_clip() -> None:
    divergence, log_u = opd.divergence("forward_kl"), torch.linspace(-4, 4, 33, dtype=torch.float64)
    far = torch.tensor([-12.0, -8.0, 0.0, 8.0, 12.0], dtype=torch.float64)

    def bent(t: Tensor) -> Tensor:
        return (2.0 * (t / 2.0).tanh()).expm1()

    assert not list(clips(Curve(log_u, bent(log_u)), lambda: Curve(far, bent(far)), divergence))
    assert not list(clips(Curve(log_u, log_u.clamp(-2, 2).expm1()), lambda: None, divergence))
    (found,) = clips(
        Curve(log_u, log_u.clamp(-1.3, 2.1).expm1()), lambda: Curve(far, far.clamp(-1.3, 2.1).expm1()), divergence
    )
    assert "[-1.3, 2.1]" in found.text
