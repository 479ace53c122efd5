"""The advantage of a token: the weight of the divergence, its gauge, bounds and baselines."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.integrations.trl.weights import TokenWeight
from tests.tolerances import ALGEBRA

JSD = opd.divergence("jsd")
P = torch.tensor([[-1.0, -2.0, -9.0], [-0.5, -9.0, -9.0], [-3.0, -0.1, -9.0]], dtype=torch.float64)
Q = torch.tensor([[-2.0, -0.5, -torch.inf], [-1.5, torch.nan, -9.0], [-0.2, -4.0, -9.0]], dtype=torch.float64)
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 0]])


def test_it_is_the_weight_where_there_is_a_token() -> None:
    """By its definition; the reward of plain OPD, -f(u), is something else."""
    u = (Q - P).exp()[MASK > 0]
    f = 0.5 * (u * u.log() - (1 + u) * ((1 + u) / 2).log())
    slope = 0.5 * (2 * u / (1 + u)).log()
    found = TokenWeight(JSD)(P, Q, MASK)
    assert float((found[MASK > 0] - (u * slope - f)).abs().max()) < ALGEBRA
    assert float((found[MASK > 0] + f).abs().max()) > 0.1
    assert torch.equal(found[MASK == 0], torch.zeros(4, dtype=torch.float64))


def test_bounds_gauge_and_baselines() -> None:
    plain, log_u = TokenWeight(JSD)(P, Q, MASK), torch.where(MASK > 0, Q - P, 0.0)
    clipped = TokenWeight(JSD, clip_log_ratio=0.5)(P, Q, MASK)
    assert torch.allclose(clipped[MASK > 0], JSD.weight(log_u.clamp(-0.5, 0.5))[MASK > 0], atol=ALGEBRA)
    kl = opd.divergence("forward_kl")
    centred = TokenWeight(kl, centred=True, clip_weight=0.3)(P, Q, MASK)
    wanted = (kl.weight(log_u) - kl.weight(torch.zeros(()).double())).clamp(-0.3, 0.3)
    assert torch.allclose(centred[MASK > 0], wanted[MASK > 0], atol=ALGEBRA)
    constant = TokenWeight(JSD, baseline="constant", baseline_value=2.0)(P, Q, MASK)
    assert torch.allclose(constant[MASK > 0], plain[MASK > 0] - 2.0, atol=ALGEBRA)
    assert torch.equal(constant[MASK == 0], torch.zeros(4, dtype=torch.float64))
    others = TokenWeight(JSD, baseline="leave_one_out")(P, Q, MASK)
    assert float(others[0, 0]) == pytest.approx(float(plain[0, 0] - plain[1:, 0].mean()), abs=ALGEBRA)
    assert float(others[0, 1]) == pytest.approx(float(plain[0, 1] - plain[2, 1]), abs=ALGEBRA)
    alone = TokenWeight(JSD, baseline="leave_one_out")(P[:1], Q[:1], MASK[:1])
    assert torch.equal(alone, plain[:1])


def test_float32_is_rounded_once() -> None:
    narrow = TokenWeight(opd.divergence("chi2"))(P.float(), Q.float(), MASK)
    wide = TokenWeight(opd.divergence("chi2"))(P.float().double(), Q.float().double(), MASK)
    assert narrow.dtype == torch.float32
    assert torch.allclose(narrow[MASK > 0].double(), wide[MASK > 0], rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_weight": 0.0}, "clip_weight: must be a number above 0"),
        ({"clip_log_ratio": -1.0}, "clip_log_ratio: must be a number above 0"),
        ({"baseline": "mean"}, "baseline: must be None or one of constant, leave_one_out"),
        ({"baseline_value": 1.0}, "baseline_value: needs baseline='constant'"),
    ],
)
@pytest.mark.bad_input
def test_what_does_not_fit_is_refused(options: dict, message: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{message}"):
        TokenWeight(JSD, **options)
