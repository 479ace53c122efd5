"""The recursion for the moments of one rollout: against every sequence, and against samples at a long horizon."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory import FiniteStatePolicy, MarkovPolicy, TabularPolicy, exact_gradient
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import sampled_moments, second_moments
from opdtheory.exact.enumeration import Enumeration
from opdtheory.exact.second_moments import RolloutMoments, rollout_moments
from opdtheory.testing import gradient_gap
from tests.exact.automata import AUTOMATA, by_automata, by_eos
from tests.sparse import some
from tests.tolerances import ENUMERATION


def spelled_out(student, teacher, weight, cost, gamma, summed) -> RolloutMoments:
    """The moments by autograd of every sequence's own loss, in the parameters that positions share."""
    everything = Enumeration.build(student, teacher)
    mean, second = [torch.zeros_like(p) for p in student.parameters()], 0.0
    for tokens, mask, probability in zip(everything.tokens, everything.mask, everything.probability, strict=True):
        leaves = [p.clone().requires_grad_() for p in student.parameters()]
        logits = torch.cat([leaf.reshape(-1, student.vocab_size) for leaf in leaves])
        states, loss = [student.start, teacher.start], torch.zeros((), dtype=torch.float64)
        rows = []
        for a in tokens[: int(mask.sum())].tolist():
            log_p = torch.log_softmax(logits[states[0]], -1)
            rows.append((a, log_p, torch.log_softmax(teacher.state_logits[states[1]], -1)))
            states = [int(policy.successors[x, a]) for policy, x in zip((student, teacher), states, strict=True)]
        for n, (a, log_p, log_q) in enumerate(rows):
            weights = weight((log_q - log_p).detach())
            kept = log_p.detach().topk(summed).indices
            later = [gamma ** (m - n) * cost((q - p)[b].detach()) for m, (b, p, q) in enumerate(rows) if m > n and cost]
            factor = torch.where((kept == a).any(), 0.0, weights[a]) - sum(later, torch.tensor(0.0))
            exact = (log_p[kept].detach().exp() * weights[kept] * log_p[kept]).sum()
            loss = loss - gamma**n * (factor * log_p[a] + exact)
        gradient = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        second += float(probability) * sum(float(g.square().sum()) for g in gradient)
        mean = [m + probability * g for m, g in zip(mean, gradient, strict=True)]
    return RolloutMoments(mean, second - sum(float(m.square().sum()) for m in mean), second)


@by_eos
@by_automata
def test_moments_agree_with_every_sequence_spelled_out(pair, eos):
    student, teacher = pair(eos, 3)
    d = opd.divergence("jsd")
    for cost, gamma, summed in ((None, 1.0, 0), (None, 1.0, 1), (d.generator, 1.0, 0), (d.generator, 0.7, 2)):
        found = rollout_moments(student, teacher, d.weight, cost, gamma, summed)
        reference = spelled_out(student, teacher, d.weight, cost, gamma, summed)
        assert gradient_gap(found.mean, reference.mean) <= ENUMERATION
        assert found.second_moment == pytest.approx(reference.second_moment, rel=ENUMERATION)
        assert found.variance == pytest.approx(reference.variance, rel=1e-11)
        objective = "token_local" if cost is None else "token_return"
        exact = exact_gradient(student, teacher, d, objective, gamma)
        assert gradient_gap(found.mean, exact) <= ENUMERATION


@pytest.mark.parametrize("wrong", ["orthogonal scores", "no product with the cost"])
def test_moments_without_a_correlation_are_seen(monkeypatch, wrong):
    from opdtheory.exact import second_moments

    student, teacher = AUTOMATA["n-grams of order 2"](None, 4)
    d = opd.divergence("jsd")
    right = rollout_moments(student, teacher, d.weight, d.generator).second_moment
    if wrong == "orthogonal scores":
        monkeypatch.setattr(second_moments._Recursion, "_with_later", lambda self: torch.zeros(self.chain.rows))
    else:
        along = second_moments._Recursion._along_score
        monkeypatch.setattr(
            second_moments._Recursion,
            "_along_score",
            lambda self, table: along(self, torch.zeros_like(table) if table is self.product else table),
        )
    assert abs(rollout_moments(student, teacher, d.weight, d.generator).second_moment / right - 1) > 1e-3


def test_the_summed_vocabulary_is_the_quietest():
    student, teacher = (MarkovPolicy.random(5, 200, eos=0, seed=s) for s in (0, 1))
    weight = opd.divergence("jsd").weight
    variances = [rollout_moments(student, teacher, weight, summed_tokens=k).variance for k in range(6)]
    assert variances == sorted(variances, reverse=True) and variances[5] < variances[0] / 2


@pytest.mark.parametrize("name", some(["opd_plus", "return_to_go", "full_vocab"]))
def test_moments_at_a_long_horizon_agree_with_sampling(name):
    """20,000 rollouts, seed 0: within four standard errors."""
    student, teacher = (MarkovPolicy.random(4, 40, eos=0, seed=s) for s in (0, 1))
    d = opd.divergence("jsd")
    options = {"gamma": 1.0} if name == "return_to_go" else {}
    sampled = sampled_moments(opd.estimator(name, "jsd", **options), student, teacher, 20_000)
    exact = rollout_moments(
        student, teacher, d.weight, d.generator if options else None, summed_tokens=4 * (name == "full_vocab")
    )
    assert abs(sampled.variance - exact.variance) <= 4 * sampled.variance_error
    # One that takes the positions for uncorrelated would be refuted.
    assert sampled.variance_error < exact.variance / 10


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"gamma": 0.5}, "gamma"),
        ({"gamma": 1.5, "cost": torch.exp}, "gamma"),
        ({"summed_tokens": 4}, "summed_tokens"),
        ({"summed_tokens": True}, "summed_tokens"),
        ({"weight": lambda t: t / 0.0}, "weight"),
        ({"cost": lambda t: t * torch.inf}, "cost"),
        pytest.param({"student": TabularPolicy.random(3, 4)}, "student", marks=pytest.mark.bad_input),
        ({"teacher": MarkovPolicy.random(3, 5)}, "teacher"),
    ],
)
def test_what_has_no_moments_is_refused_by_name(change, named):
    student, teacher = (MarkovPolicy.random(3, 4, seed=s) for s in (0, 1))
    with pytest.raises(InvalidArgumentError, match=named):
        rollout_moments(**{"student": student, "teacher": teacher, "weight": torch.expm1, **change})


def test_the_budget_of_moments_counts_the_rows_and_the_end(monkeypatch):
    pair = [FiniteStatePolicy.ngram(3, 10, 1, seed=s) for s in (0, 1)]
    # From each of four rows, and from the end: expected gradients of four states by three tokens.
    monkeypatch.setattr(second_moments, "_TABLE_BUDGET", 5 * 4 * 3)
    rollout_moments(*pair, torch.expm1)
    monkeypatch.setattr(second_moments, "_TABLE_BUDGET", 5 * 4 * 3 - 1)
    with pytest.raises(BudgetExceededError, match="60"):
        rollout_moments(*pair, torch.expm1)


def test_moments_of_too_many_states_are_refused():
    with pytest.raises(BudgetExceededError, match="states"):
        rollout_moments(*(FiniteStatePolicy.ngram(16, 10, 3, seed=s) for s in (0, 1)), torch.expm1)
