"""The catalogue objective that a loss follows, whatever it claims."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory import divergences
from opdtheory.auditing.naming.combine import best_combination
from opdtheory.auditing.naming.identify import ExactGradients, best_match
from opdtheory.auditing.naming.recover import recover_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.estimators import estimator
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts
from tests.auditing.naming.weights import on_panel
from tests.auditing.verdicts import audit
from tests.losses import k3


def full_jsd(r: Rollouts, beta: float = 0.5) -> torch.Tensor:
    """The generalised JSD between whole vocabularies, written out without the library's divergences."""
    log_p, log_q = torch.log_softmax(r.student_logits, -1), torch.log_softmax(r.teacher_logits, -1)
    log_m = torch.log(beta * log_q.exp() + (1 - beta) * log_p.exp())
    value = beta * (log_q.exp() * (log_q - log_m)).sum(-1) + (1 - beta) * (log_p.exp() * (log_p - log_m)).sum(-1)
    return r.token_sum(value)


def test_k3_as_a_loss_descends_the_forward_kl() -> None:
    report = audit(k3, "reverse_kl")
    assert report.verdict == "other_objective"
    assert report.descends == "forward_kl"
    assert report.identified is not None
    assert report.identified["granularity"] == "token_local"
    assert report.identified["error"] < 1e-12
    assert report.identified["scale"] == pytest.approx(1.0, abs=1e-12)
    assert not report.faithful


@pytest.mark.parametrize("beta", [0.1, 0.3, 0.9])
def test_names_the_member_of_a_family(beta: float) -> None:
    report = audit(lambda r: full_jsd(r, beta), "reverse_kl")
    assert report.verdict == "other_objective"
    assert report.identified is not None
    assert report.identified["objective"] == "skew_jsd"
    assert report.identified["parameters"] == {"beta": beta}
    assert report.identified["error"] < 1e-9


def test_prefers_the_entry_without_a_parameter() -> None:
    report = audit(full_jsd, "reverse_kl")
    assert report.descends == "jsd"


@pytest.mark.parametrize(
    ("loss", "label"),
    [
        (opd.estimator("box_cox", alpha=0.3), "alpha(alpha=0.3)"),
        (opd.estimator("box_cox", alpha=2.0), "chi2"),
        (opd.estimator("opd_plus", opd.divergences.skew_forward_kl(0.2)), "skew_forward_kl(lam=0.2)"),
        (opd.estimator("opd_plus", opd.divergences.skew_reverse_kl(0.2)), "skew_reverse_kl(lam=0.2)"),
    ],
    ids=str,
)
def test_identifies_against_a_false_claim(loss: opd.Estimator, label: str) -> None:
    report = audit(loss, "total_variation")
    assert report.verdict == "other_objective"
    assert report.descends == label


@pytest.mark.parametrize("granularity", ["token_return", "sequence"])
def test_finds_the_granularity(granularity: str) -> None:
    names = {"token_return": ("return_to_go", {"gamma": 1.0}), "sequence": ("sequence_opd_plus", {})}
    name, options = names[granularity]
    loss = opd.estimator(name, "hellinger", **options)
    assert audit(loss, "hellinger", granularity).verdict == "exact"
    report = audit(loss, "hellinger", "token_local")
    assert report.verdict == "other_objective"
    assert report.identified is not None
    assert (report.identified["objective"], report.identified["granularity"]) == ("hellinger", granularity)


def test_discount_is_fitted() -> None:
    gamma = 0.83
    loss = estimator("return_to_go", "jsd", gamma=gamma, discounted=True)
    gradients, cases = on_panel(loss)
    match = best_match(gradients, ExactGradients(cases), recover_weight(loss, Scenario()), "token_local", 1e-9)
    assert match is not None and match.fit.worst_error < 1e-12
    assert match.objective == Objective.of(divergences.divergence("jsd"), "token_return", gamma)


def test_no_discount_is_fitted_to_the_return_to_go_of_no_objective() -> None:
    """T6: without the outer gamma^(n-1) it is the gradient of nothing."""
    loss = estimator("return_to_go", "jsd", gamma=0.5)
    gradients, cases = on_panel(loss)
    match = best_match(gradients, ExactGradients(cases), recover_weight(loss, Scenario()), "token_local", 1e-9)
    assert match is None or match.fit.worst_error > 1e-3
    assert best_combination(gradients, ExactGradients(cases), "token_local", 1e-9) is None


@pytest.mark.slow
def test_a_plain_name_is_kept_where_a_fitted_member_is_hardly_nearer() -> None:
    def weighted(r: Rollouts) -> torch.Tensor:
        return r.sequence_mean(r.log_u.square() / 2)

    for batch_size in (1, 2):
        found = audit(weighted, "forward_kl", eos=0, batch_size=batch_size).identified
        assert found is not None and found.parameters == {}
    # A member that is clearly nearer, or matches, is named.
    assert audit(estimator("opd_plus", divergences.skew_jsd(0.25)), "jsd").descends == "skew_jsd(beta=0.25)"
    near = audit(lambda r: r.token_sum(-(r.log_u - r.log_u.square() / 100).detach() * r.student_logprobs), "reverse_kl")
    assert near.identified is not None and near.identified.parameters


def test_what_is_far_from_everything_has_no_nearest() -> None:
    def turning(r: Rollouts) -> torch.Tensor:
        return r.token_sum(-(6 * r.log_u.detach()).sin() * r.student_logprobs)

    report = audit(turning, "reverse_kl")
    assert report.verdict == "biased"
    assert "nearest" not in report.summary() or (report.identified is not None and report.identified.error < 0.98)
