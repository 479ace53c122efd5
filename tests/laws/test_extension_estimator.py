"""CONTRIBUTING's promise: an estimator is its part, its entry and its test; with these all else serves it too."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory import testing
from opdtheory.cli import main
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Claim
from opdtheory.estimators.base import Assumptions
from opdtheory.estimators.factory import ENTRIES
from opdtheory.estimators.options import Entry
from opdtheory.estimators.sampled import RatioAdvantage, ScoreFunction
from opdtheory.rollouts import Rollouts
from opdtheory.training.config import TrainConfig
from opdtheory.training.validation.prediction import predicted_weight
from opdtheory.verification.estimators import rows
from opdtheory.verification.verify import check_estimator, shipped_estimators, verify

# A reward that saturates: its weight never falls, so some f-divergence is descended, and none of the catalogue's.
BOUNDED = Entry(
    lambda d, o: ScoreFunction(RatioAdvantage(torch.tanh, o.get("clip_log_ratio"))),
    frozenset({"clip_log_ratio"}),
    "T4",
    "reverse_kl",
    descends="the divergence with weight tanh(log u)",
    examples=({}, {"clip_log_ratio": 0.5}),
    formula=lambda sympy, f, u, o: (u**2 - 1) / (u**2 + 1),
)


@dataclass(frozen=True)
class HalfSquare:
    """A part of a kind that the library does not have: a callable of rollouts, without an advantage."""

    factor: float

    def __call__(self, rollouts: Rollouts) -> Tensor:
        return self.factor * rollouts.log_u.square() / 2


def own_claim(divergence: opd.Divergence, options: dict) -> Claim:
    verdict = "exact" if options["alpha"] == 1 else "exact_up_to_scale"
    return Claim(divergence, "token_local", verdict, "T4", assumptions=Assumptions(sampler="on_policy"))


OF_ANOTHER_KIND = Entry(
    lambda d, o: HalfSquare(o["alpha"]),
    frozenset({"alpha"}),
    "T4",
    "reverse_kl",
    required=("alpha",),
    examples=({"alpha": 1.0}, {"alpha": 2.0}),
    claim=own_claim,
)


@pytest.fixture(autouse=True)
def entries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(ENTRIES, "bounded_reward", BOUNDED)
    monkeypatch.setitem(ENTRIES, "half_square", OF_ANOTHER_KIND)
    yield


NAMES = ("bounded_reward", "half_square")


@pytest.mark.slow
def test_it_is_shipped_and_keeps_its_claim() -> None:
    found = {loss.label: loss for loss in shipped_estimators() if loss.name in NAMES}
    assert list(found) == [
        "bounded_reward",
        "bounded_reward(clip_log_ratio=0.5)",
        "half_square(alpha=1.0)",
        "half_square(alpha=2.0)",
    ]
    assert set(NAMES) <= set(opd.estimator_names())
    for loss in found.values():
        assert check_estimator(loss).passed, loss
    assert [result.label for result in verify(NAMES).estimators] == list(found)


def test_a_wrong_claim_of_it_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = Entry(
        lambda d, o: HalfSquare(2.0), frozenset(), "T4", "reverse_kl", claim=lambda d, o: own_claim(d, {"alpha": 1})
    )
    monkeypatch.setitem(ENTRIES, "half_square", wrong)
    with pytest.raises(AssertionError, match="claims 'exact', the audit finds 'exact_up_to_scale'"):
        testing.assert_claim(opd.estimator("half_square"))


def test_reductions_and_options_apply_to_it() -> None:
    mean = opd.estimator("half_square", alpha=1.0, reduction="token_mean")
    assert (mean.claim.verdict, mean.claim.assumptions.fixed_length) == ("exact_up_to_scale", True)
    testing.assert_claim(mean)
    with pytest.raises(InvalidArgumentError, match="gamma"):
        opd.estimator("half_square", alpha=1.0, gamma=0.5)


def test_the_audit_names_its_weight() -> None:
    report = opd.audit(opd.estimator("bounded_reward"), "reverse_kl")
    assert report.verdict == "biased" and report.weight.non_decreasing
    assert opd.audit(opd.estimator("half_square", alpha=2.0), "reverse_kl").scale == pytest.approx(2.0)


@pytest.mark.slow
def test_the_table_has_its_row(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = (row for row in rows() if row.estimator.name == "bounded_reward")
    assert (row.verdict, row.stability, row.second_moment) == ("some f-divergence", "attracts", "bounded")
    assert main(["table"]) == 0
    assert "bounded_reward" in capsys.readouterr().out


def test_training_and_validation_take_it() -> None:
    assert TrainConfig(estimator="bounded_reward", reduction="token_sum").loss().label == "bounded_reward"
    loss = opd.estimator("bounded_reward", clip_log_ratio=0.5)
    log_p, log_q = (torch.randn(3, 5, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    expected = torch.tanh((log_q - log_p).clamp(-0.5, 0.5))
    torch.testing.assert_close(predicted_weight(loss, log_p, log_q), expected, rtol=1e-12, atol=1e-12)
