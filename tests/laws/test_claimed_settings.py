"""What a claim may be: sums, softened distributions, teachers, a base, histories, micro-batches, a reward."""

from __future__ import annotations

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.rollouts import Rollouts


def vocabulary(
    r: Rollouts, divergence: str, teacher: Tensor | None = None, tau: tuple[float, float] = (1, 1)
) -> Tensor:
    """The divergence of the whole vocabulary at every token, by its definition."""
    log_p = (r.student_logits / tau[0]).log_softmax(-1)
    log_q = ((r.teacher_logits if teacher is None else teacher) / tau[1]).log_softmax(-1)
    log_u = log_q - log_p
    terms = {
        "reverse_kl": lambda: log_p.exp() * -log_u,
        "forward_kl": lambda: log_q.exp() * log_u,
        "chi2": lambda: log_p.exp() * log_u.expm1().square(),
        "hellinger": lambda: log_p.exp() * (log_u / 2).expm1().square(),
    }
    return terms[divergence]().sum(-1)


SUMS = {
    "9*reverse_kl + forward_kl": {"reverse_kl": 9, "forward_kl": 1},
    "0.5*chi2 + 2*hellinger": {"chi2": 0.5, "hellinger": 2},
    "reverse_kl + 0.25*chi2 + hellinger": {"reverse_kl": 1, "chi2": 0.25, "hellinger": 1},
    "2*forward_kl": {"forward_kl": 2},
}


def summed(r: Rollouts, weights: dict[str, float]) -> Tensor:
    return r.token_sum(sum(c * vocabulary(r, name) for name, c in weights.items()))


@pytest.mark.parametrize("claim", SUMS)
def test_a_weighted_sum_is_a_claim(claim):
    report = opd.audit(lambda r: summed(r, SUMS[claim]), claim, details=False)
    assert report.verdict == "exact" and report.relative_bias <= 1e-9
    assert report.objective == claim
    # The twin: other weights.
    wrong = {name: c + (name == "forward_kl" or name == "hellinger") for name, c in SUMS[claim].items()}
    verdict = opd.audit(lambda r: summed(r, wrong), claim, details=False).verdict
    assert verdict == ("exact_up_to_scale" if len(wrong) == 1 else "biased")


@pytest.mark.parametrize("granularity", ["token_local", "token_return", "sequence"])
def test_a_sampled_sum_is_exact_in_every_granularity(granularity):
    claim = opd.divergence("9*reverse_kl + forward_kl")

    def loss(r: Rollouts, factor: float = 9.0) -> Tensor:
        u, log_u = r.log_u.detach().exp() * r.mask, r.log_u.detach() * r.mask
        if granularity == "sequence":
            total = log_u.sum(-1, keepdim=True)
            weight = (factor * total + total.exp()).expand_as(log_u)
        else:
            weight = factor * log_u + u
            if granularity == "token_return":
                later = (-factor * log_u + u * log_u).flip(-1).cumsum(-1).flip(-1)
                weight = weight - (later - (-factor * log_u + u * log_u))
        return r.token_sum(-weight * r.student_logprobs)

    assert opd.audit(loss, claim, granularity, details=False).verdict == "exact"
    assert opd.audit(lambda r: loss(r, 8.0), claim, granularity, details=False).verdict != "exact"


def test_what_a_biased_sum_is_told():
    report = opd.audit(lambda r: summed(r, {"reverse_kl": 9, "forward_kl": 1}), "8*reverse_kl + forward_kl")
    assert report.verdict == "biased"
    assert report.identified.read().label == "9 * reverse_kl + forward_kl"
    assert any("forward KL" in remedy.text and remedy.verified for remedy in report.remedies)
    assert opd.audit(lambda r: summed(r, {"chi2": 1}), "9*reverse_kl + forward_kl").verdict == "other_objective"


def test_estimators_take_sums():
    for name in ("opd_plus", "opd_plus_centred", "full_vocab"):
        loss = opd.estimator(name, "0.5*chi2 + 2*hellinger")
        assert opd.audit(loss, loss.claim.divergence, details=False).verdict == "exact"
