"""Sampled weights: intervals that hold the truth."""

from __future__ import annotations

import opdtheory as opd
from opdtheory.auditing.sampling.weights import SampledWeight, sampled_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.objective import Objective
from tests.auditing.sampling.pairs import ORIGIN, Loss


def test_sampled_weights_hold_the_truth_and_tell_a_ratio_from_more() -> None:
    """A control that is not the loss leaves noise, and a weight of the student's probability is none of the ratio."""
    jsd = opd.divergence("jsd")

    def weight_of(loss: Loss, control: str, batch_size: int) -> SampledWeight:
        objective = Objective.of(opd.divergence(control))
        return sampled_weight(loss, objective, Scenario(batch_size), alpha=0.01, seconds=20.0, most=40)

    found = weight_of(opd.estimator("opd", "chi2", baseline="leave_one_out"), "reverse_kl", 8)
    truth = opd.estimator("opd", "chi2").token_loss.advantage.of_log_u(found.log_u)  # type: ignore[attr-defined]
    assert not found.separated and found.widest > 1e-6 and found.hidden is None
    assert bool((found.low <= truth).all()) and bool((truth <= found.high).all())
    assert found.holds(truth) is not None
    assert found.holds(jsd.weight(found.log_u) - jsd.weight(ORIGIN)) is None
    entropy = weight_of(lambda r: r.token_sum(r.student_logprobs.square() / 2), "reverse_kl", 8)
    assert entropy.separated and not entropy.recovered().depends_on_ratio_only
    assert "it is not a function of u alone" in entropy.words(8)
