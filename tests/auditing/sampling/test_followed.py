"""Names and weights from samples: confirmed on fresh draws at the batch size asked for, or not given."""

from __future__ import annotations

import json
from collections.abc import Callable

import jsonschema
import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.naming.knob import knob_of
from opdtheory.auditing.sampling.fitting import fitted, knob_range, shortened
from opdtheory.auditing.sampling.followed import Named, _coincident, name_followed
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.sampling.scout import Scout, scouted
from opdtheory.auditing.sampling.weights import SampledWeight, sampled_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.auditing.views import render_audit
from opdtheory.auditing.views.schema import AUDIT_SCHEMA
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts

Loss = Callable[[Rollouts], Tensor]
ORIGIN = torch.zeros((), dtype=torch.float64)


def named(loss: Loss, claim: str, scout: Scout | None = None, batch_size: int = 1, seed: int = 0) -> Named | None:
    """The name at a batch size, from samples alone unless there is a scout."""
    cases = Scenario(1).pairs()[1:4:2]

    def restart(objective: Objective, number: int) -> Search:
        return Search(loss, cases, objective, Scenario(batch_size, seed=seed + 100 * number), 0.99, 20_000, 30.0)

    search = restart(Objective.of(opd.divergence(claim)), 0)
    assert search.run(0.05) == "biased"
    return name_followed(search, scout, restart, batch_size, 0.05)


def test_a_member_of_a_family_is_named_at_a_batch_size_that_only_sampling_reaches() -> None:
    alpha = opd.divergences.alpha(0.3)
    loss = opd.estimator("opd_plus", alpha, baseline="group_mean")
    report = opd.audit(loss, "jsd", batch_size=16)
    assert report.monte_carlo is not None and report.verdict == "other_objective"
    assert report.descends == "alpha(alpha=0.3)"
    identified = report.identified
    assert identified is not None and identified["scale"] == pytest.approx(15 / 16)
    assert identified["fitted"] == "alpha"
    assert identified["fitted_range"][0] <= 0.3 <= identified["fitted_range"][1]
    for said in ("conjectured from batches of 2", "confirmed at batch size 16"):
        assert said in identified["evidence"] and said in report.summary()
    # The weight is the one at 16, and what holds at 2 is said to hold at 2.
    low, high, log_u = (report.weight[key] for key in ("low", "high", "log_u"))
    truth = 15 / 16 * (alpha.weight(log_u) - alpha.weight(ORIGIN))
    assert bool((low <= truth).all()) and bool((truth <= high).all())
    assert report.weight["depends_on_ratio_only"] and report.weight["non_decreasing"]
    assert "1.875 times the one at batch size 2, which is exact and alpha(alpha=0.3)" in report.summary()
    record = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    jsonschema.validate(record, AUDIT_SCHEMA)
    record["identified"]["fitted_range"] = "wide"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(record, AUDIT_SCHEMA)
    page = render_audit(report)
    assert "intervals that hold jointly" in page and "conjectured from batches of 2" in page


def test_what_holds_at_a_smaller_batch_size_is_not_taken_to_hold_at_a_larger_one() -> None:
    """A loss that is another one in small batches: neither its name there nor its weight there is claimed."""
    small, large = (
        opd.estimator("opd_plus", divergence, baseline="leave_one_out")
        for divergence in ("forward_kl", opd.divergences.skew_jsd(0.3))
    )
    report = opd.audit(
        lambda r: (small if len(r.tokens) < 12 else large)(r), "jsd", batch_size=12, method="monte_carlo"
    )
    assert report.descends == "skew_jsd(beta=0.3)"
    assert report.identified is not None and "fitted to samples" in report.identified["evidence"]
    assert "No positive multiple of the one at batch size 2, which is exact and forward_kl" in report.summary()


@pytest.mark.parametrize(
    ("loss", "label", "granularity", "gamma"),
    [
        (opd.estimator("return_to_go", "jsd", gamma=0.8, discounted=True), "jsd", "token_return", 0.8),
        (opd.estimator("k3_reward"), "reverse_kl - forward_kl", "token_local", 1.0),
    ],
    ids=["discount", "signed sum"],
)
def test_names_from_samples_alone(loss: Loss, label: str, granularity: str, gamma: float) -> None:
    found = named(loss, "hellinger")
    assert found is not None
    assert (found.objective.label, found.objective.granularity, found.objective.gamma) == (label, granularity, gamma)
    assert found.identified["error"] < 1e-6
    low, high = found.identified["fitted_range"]
    knob = knob_of(found.objective)
    assert knob is not None and low <= knob.value <= high


def test_a_loss_of_no_objective_is_not_named() -> None:
    """T6: without the outer discount; and a wrong conjecture is not believed."""
    wrong = Scout(2, Objective.of(opd.divergence("forward_kl")), None, None)  # type: ignore[arg-type]
    assert named(opd.estimator("return_to_go", "jsd", gamma=0.5), "jsd", wrong) is None


def test_the_range_of_a_fitted_number_is_that_of_the_samples() -> None:
    """With a control that leaves noise the truth is inside, a far value is not, and the shortest decimal is chosen."""
    loss = opd.estimator("opd_plus", opd.divergences.skew_jsd(0.25))
    claim = Objective.of(opd.divergence("jsd"))
    search = Search(loss, Scenario().pairs()[3:4], claim, Scenario(seed=3), 0.99, 400, 30.0)
    search.run(0.05)
    knob = knob_of(next(each for each in fitted(search) if each.divergence.name == "skew_jsd"))
    assert knob is not None
    low, high = knob_range(search, knob)
    assert low < 0.25 < high and high - low < 0.5
    assert search.excludes(knob.turned(min(high + 0.05, 0.99))) and not search.excludes(knob.turned(0.25))
    assert low <= shortened(knob, (low, high)) <= high
    assert shortened(knob, (knob.value, knob.value)) == knob.value
    # T6c: of the reverse KL alone.
    for name, alike in (("reverse_kl", ["token_return"]), ("forward_kl", [])):
        others = _coincident(Objective.of(opd.divergence(name), "sequence"), search)
        assert [other.granularity for other in others] == alike


def test_a_scout_that_cannot_be_had_is_none() -> None:
    def fours(r: Rollouts) -> Tensor:
        return opd.estimator("k2_loss")(r) * r.tokens.view(-1, 4, r.tokens.shape[1]).shape[1] / 4

    from opdtheory.auditing.black_box import BlackBox

    assert scouted(BlackBox(fours), Scenario(2).pairs()[1:2], "token_local", Scenario(2)) is None


def test_sampled_weights_hold_the_truth_and_tell_a_ratio_from_more() -> None:
    """A control that is not the loss leaves noise, and a weight of the student's probability is none of the ratio."""
    jsd = opd.divergence("jsd")

    def weight_of(loss: Loss, control: str, batch_size: int) -> SampledWeight:
        objective = Objective.of(opd.divergence(control))
        return sampled_weight(loss, objective, Scenario(batch_size), confidence=0.99, seconds=20.0, most=40)

    found = weight_of(opd.estimator("opd", "chi2", baseline="leave_one_out"), "reverse_kl", 8)
    truth = opd.estimator("opd", "chi2").token_loss.advantage.of_log_u(found.log_u)  # type: ignore[attr-defined]
    assert not found.separated and found.widest > 1e-6 and found.hidden is None
    assert bool((found.low <= truth).all()) and bool((truth <= found.high).all())
    assert found.holds(truth) is not None
    assert found.holds(jsd.weight(found.log_u) - jsd.weight(ORIGIN)) is None
    entropy = weight_of(lambda r: r.token_sum(r.student_logprobs.square() / 2), "reverse_kl", 8)
    assert entropy.separated and not entropy.recovered().depends_on_ratio_only
    assert "no function of u alone" in entropy.words(8)
