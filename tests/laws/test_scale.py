"""The oracle beyond what one tree or any enumeration holds: subtrees, automata, second moments, single rollouts."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

import opdtheory as opd
from opdtheory import FiniteStatePolicy, MarkovPolicy, ModulePolicy, TabularPolicy, exact_gradient, exact_value
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import (
    gradient_moments,
    policies,
    random_pair,
    rollout_gradients,
    sampled_moments,
    second_moments,
    subtrees,
)
from opdtheory.exact.chain import Chain
from opdtheory.exact.enumeration import Enumeration
from opdtheory.exact.recursions import tree_gradient, tree_value
from opdtheory.exact.sampling import Sampler, sample_rollouts
from opdtheory.exact.second_moments import RolloutMoments, rollout_moments
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import gather_logprobs
from opdtheory.testing import gradient_gap
from tests.tolerances import ENUMERATION

SETTINGS = [("token_local", 1.0), ("sequence", 1.0), ("token_return", 1.0), ("token_return", 0.6)]
by_setting = pytest.mark.parametrize(("objective", "gamma"), SETTINGS)


# Subtrees.


@by_setting
@pytest.mark.parametrize("at_once", [1, 2, 7, 30, 81])
@pytest.mark.parametrize(
    "options",
    [{}, {"eos": 1}, {"eos": 0, "zeros": 1}, {"eos": 2, "environment": (0, 2)}, {"environment": (3,)}],
    ids=str,
)
def test_part_by_part_is_the_whole_tree(monkeypatch, options, at_once, objective, gamma):
    student, teacher = random_pair(3, 4, seed=3, **options)
    tree = Tree.build(student, teacher)
    monkeypatch.setattr(subtrees, "_AT_ONCE", at_once)
    for name in ("jsd", "chi2"):
        d = opd.divergence(name)
        value = exact_value(student, teacher, d, objective, gamma)
        assert gradient_gap([value], [tree_value(tree, d, objective, gamma)]) <= ENUMERATION
        found = exact_gradient(student, teacher, d, objective, gamma)
        assert gradient_gap(found, tree_gradient(tree, d, objective, gamma)) <= ENUMERATION


@pytest.mark.parametrize("at_once", [1, 9])
def test_an_infinite_divergence_is_infinite_part_by_part(monkeypatch, at_once):
    student, teacher = random_pair(3, 3, seed=1)
    student.logits[1][0, 2] = -torch.inf
    monkeypatch.setattr(subtrees, "_AT_ONCE", at_once)
    for objective in ("token_local", "sequence"):
        assert math.isinf(exact_value(student, teacher, "forward_kl", objective))
        with pytest.raises(InvalidArgumentError, match="infinite"):
            exact_gradient(student, teacher, "forward_kl", objective)
        assert math.isfinite(exact_value(student, teacher, "jsd", objective))


@pytest.mark.parametrize("dropped", ["first", "cut"])
def test_a_subtree_that_forgets_where_it_hangs_is_seen(monkeypatch, dropped):
    student, teacher = random_pair(3, 4, seed=3, eos=1)
    right = exact_value(student, teacher, "jsd", "token_return", 0.6)
    gradient = exact_gradient(student, teacher, "jsd", "sequence")
    grown = Tree.grown.__func__

    def forgetful(cls, *arguments):
        return replace(grown(cls, *arguments), **{dropped: 0})

    monkeypatch.setattr(subtrees, "_AT_ONCE", 9)
    monkeypatch.setattr(Tree, "grown", classmethod(forgetful))
    wrong = exact_value(student, teacher, "jsd", "token_return", 0.6)
    gaps = gradient_gap([wrong], [right]), gradient_gap(exact_gradient(student, teacher, "jsd", "sequence"), gradient)
    assert max(gaps) > 1e-3


class Recurrent(nn.Module):
    """A module whose prefixes are read in as many calls as the oracle likes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.cell, self.head = nn.Embedding(4, 5), nn.GRU(5, 6, batch_first=True), nn.Linear(6, 3)

    def forward(self, tokens):
        return self.head(self.cell(self.embed(tokens))[0])


@by_setting
def test_a_module_is_pulled_back_some_prefixes_at_a_time(monkeypatch, objective, gamma):
    student = ModulePolicy(Recurrent().double(), 3, 4, eos=0, prompt=(3,))
    teacher = TabularPolicy.random(3, 4, eos=0, seed=5)
    whole = exact_gradient(student, teacher, "jsd", objective, gamma)
    tables = student.tables()
    levels = exact_gradient(student.tabulate(), teacher, "jsd", objective, gamma)
    by_autograd = torch.autograd.grad(tables, student.parameters(), levels)
    assert gradient_gap(whole, list(by_autograd)) <= ENUMERATION
    monkeypatch.setattr(policies, "PREFIXES_AT_ONCE", 4)
    monkeypatch.setattr(subtrees, "_AT_ONCE", 9)
    assert gradient_gap(exact_gradient(student, teacher, "jsd", objective, gamma), whole) <= ENUMERATION


def test_a_module_without_parameters_in_a_level_is_pulled_back():
    class Positional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.late = nn.Parameter(torch.ones(2, dtype=torch.float64))

        def forward(self, tokens):
            rows = torch.zeros(len(tokens), 2, dtype=torch.float64)
            return rows if tokens.shape[1] == 0 else rows + self.late * tokens[:, -1:]

    (gradient,) = exact_gradient(ModulePolicy(Positional(), 2, 3), TabularPolicy.random(2, 3), "jsd")
    assert float(gradient.abs().max()) > 0


def test_a_tree_beyond_the_budget_is_refused_with_its_size():
    student = FiniteStatePolicy.ngram(10, 9, 1)
    with pytest.raises(BudgetExceededError, match="V=10, T=9.*1,000,000,000"):
        exact_value(student, ModulePolicy(Recurrent(), 10, 9), "jsd")


@pytest.mark.parametrize(
    ("at_once", "top", "roots", "trees"), [(243, 5, 0, 0), (30, 2, 1, 9), (20, 3, 2, 14), (9, 3, 1, 27), (1, 4, 1, 81)]
)
def test_a_tree_is_cut_where_its_parts_fit(monkeypatch, at_once, top, roots, trees):
    """What is worked on together has as many sequences as are allowed, and no more unless one token has."""
    pair = random_pair(3, 5, seed=2)
    grown = []
    build = subtrees._grown

    def watched(*arguments):
        grown.append(build(*arguments))
        return grown[-1]

    monkeypatch.setattr(subtrees, "_AT_ONCE", at_once)
    monkeypatch.setattr(subtrees, "_grown", watched)
    exact_value(*pair, "jsd")
    first, *parts = grown
    assert first.horizon == top and first.cut == (top < 5) and len(parts) == trees
    if parts:
        assert len(parts[0].live[0]) == roots and parts[0].horizon == 5 - top
        assert all(3 * len(part.live[-2]) <= max(at_once, 3) for part in parts)


@pytest.mark.parametrize("shift", [-900.0, 30.0, 900.0])
def test_a_constant_of_a_row_changes_nothing(shift):
    """Whose exponentials would be zero or infinite."""
    student, teacher = random_pair(3, 3, seed=5)
    moved = TabularPolicy([level + shift * (1 + n % 2) for n, level in enumerate(student.logits)])
    for objective in ("token_return", "sequence"):
        found, wanted = (exact_gradient(policy, teacher, "jsd", objective) for policy in (moved, student))
        # Logits around 1800 are rounded to 2e-13.
        assert gradient_gap(found, wanted) <= 1e-11


# Automata.

AUTOMATA = {
    "n-grams of order 2": lambda eos, T: [FiniteStatePolicy.ngram(3, T, 2, eos=eos, seed=s) for s in (0, 1)],
    "orders 2 and 1": lambda eos, T: [FiniteStatePolicy.ngram(3, T, k, eos=eos, seed=k) for k in (2, 1)],
    "a chain and order 2": lambda eos, T: [
        MarkovPolicy.random(3, T, eos=eos),
        FiniteStatePolicy.ngram(3, T, 2, eos=eos, seed=1),
    ],
    "other states": lambda eos, T: [FiniteStatePolicy.random(3, T, k, eos=eos, seed=k) for k in (4, 3)],
    "other starts": lambda eos, T: [
        FiniteStatePolicy(random.table, random.successors, T, start=k - 1, eos=eos)
        for k in (4, 3)
        for random in [FiniteStatePolicy.random(3, T, k, seed=k)]
    ],
    "no memory": lambda eos, T: [FiniteStatePolicy.ngram(3, T, 0, eos=eos, seed=s) for s in (0, 1)],
}
by_automata = pytest.mark.parametrize("pair", AUTOMATA.values(), ids=AUTOMATA)
by_eos = pytest.mark.parametrize("eos", [None, 1])


@by_eos
@by_setting
@by_automata
def test_pairs_of_states_agree_with_the_tree(pair, objective, gamma, eos):
    student, teacher = pair(eos, 4)
    table, scores = student.tabulate(), teacher.tabulate()
    for name in ("reverse_kl", "forward_kl", "alpha(alpha=0.4)", "chi2") + ("jsd",) * (objective != "sequence"):
        value = exact_value(student, teacher, name, objective, gamma)
        assert gradient_gap([value], [exact_value(table, scores, name, objective, gamma)]) <= ENUMERATION
        gradient = student.pull_back(exact_gradient(table, scores, name, objective, gamma))
        assert gradient_gap(exact_gradient(student, teacher, name, objective, gamma), gradient) <= ENUMERATION


def test_a_chain_is_the_automaton_of_order_one():
    order_one = FiniteStatePolicy.ngram(4, 300, 1, eos=2, seed=8)
    chain = MarkovPolicy(order_one.table[0], order_one.table[1:], 300, eos=2)
    other = FiniteStatePolicy.ngram(4, 300, 1, eos=2, seed=9)
    found = exact_gradient(chain, other, "jsd", "token_return")
    assert (
        gradient_gap([torch.cat([found[0][None], found[1]])], exact_gradient(order_one, other, "jsd", "token_return"))
        < 1e-14
    )


def test_the_states_of_an_ngram_are_its_last_tokens():
    policy = FiniteStatePolicy.ngram(3, 5, 2)
    assert len(policy.table) == 1 + 3 + 9
    level = policy.rows(4, 0, 81)
    for number in range(81):
        # 4 and 5 states stand for shorter histories.
        assert torch.equal(level[number], policy.table[4 + number % 9])


def test_only_states_that_can_meet_are_rows():
    student, teacher = FiniteStatePolicy.ngram(3, 50, 3), FiniteStatePolicy.ngram(3, 50, 2)
    chain = Chain.build(student, teacher)
    assert chain.rows == 40
    assert torch.equal(chain.student_states[0], torch.tensor(0))


def long_objective(leaf, successors, teacher, horizon, divergence, objective):
    """An objective of an automaton by a differentiable loop over positions."""
    log_p, log_q = torch.log_softmax(leaf, -1), torch.log_softmax(teacher, -1)
    if objective == "sequence":
        # E_P U^a by a product of matrices, for the member that follows.
        alpha = divergence.parameters["alpha"]
        steps = torch.zeros(len(leaf), len(leaf), dtype=torch.float64)
        steps = steps.scatter_add(1, successors, ((1 - alpha) * log_p + alpha * log_q).exp())
        total = torch.linalg.matrix_power(steps, horizon)[0].sum()
        return (total - 1) / (alpha * (alpha - 1))
    steps = torch.zeros(len(leaf), len(leaf), dtype=torch.float64).scatter_add(1, successors, log_p.exp())
    costs = (log_p.exp() * divergence.generator(log_q - log_p)).sum(-1)
    at, total = torch.nn.functional.one_hot(torch.tensor(0), len(leaf)).double(), torch.zeros((), dtype=torch.float64)
    for n in range(horizon):
        total = total + 0.999**n * (at @ costs)
        at = at @ steps
    return total


@pytest.mark.parametrize(("objective", "name"), [("token_return", "jsd"), ("sequence", "alpha(alpha=0.3)")])
def test_a_horizon_of_four_hundred_by_autograd(objective, name):
    student, teacher = (FiniteStatePolicy.ngram(3, 400, 2, seed=s, scale=0.2) for s in (0, 1))
    d, leaf = opd.divergence(name), student.table.clone().requires_grad_()
    value = long_objective(leaf, student.successors, teacher.table, 400, d, objective)
    (gradient,) = torch.autograd.grad(value, leaf)
    gamma = 0.999 if objective == "token_return" else 1.0
    assert float(exact_value(student, teacher, d, objective, gamma)) == pytest.approx(float(value.detach()), rel=1e-12)
    assert gradient_gap(exact_gradient(student, teacher, d, objective, gamma), [gradient]) <= 1e-11


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"table": torch.zeros(3)}, "table"),
        ({"table": torch.zeros(2, 3)}, "table"),
        ({"successors": torch.zeros(2, 2, dtype=torch.int64)}, "successors"),
        ({"successors": torch.full((2, 3), 2)}, "successors"),
        ({"successors": torch.zeros(2, 3)}, "successors"),
        ({"start": 2}, "start"),
        ({"start": True}, "start"),
        ({"eos": 3}, "eos"),
        ({"horizon": 0}, "horizon"),
    ],
)
def test_no_automaton_is_refused_by_name(arguments, named):
    right = {"table": torch.zeros(2, 3, dtype=torch.float64), "successors": torch.zeros(2, 3, dtype=torch.int64)}
    assert FiniteStatePolicy(**right, horizon=2)
    with pytest.raises(InvalidArgumentError, match=named):
        FiniteStatePolicy(**{**right, "horizon": 2, **arguments})


@pytest.mark.parametrize("named", ["states", "order"])
def test_sizes_of_random_automata_are_checked(named):
    make = {"states": FiniteStatePolicy.random, "order": FiniteStatePolicy.ngram}[named]
    with pytest.raises(InvalidArgumentError, match=named):
        make(3, 2, -1)
    if named == "order":
        with pytest.raises(BudgetExceededError, match="lower the order"):
            make(100, 2, 5)


def test_visits_that_do_not_fit_are_refused():
    student, teacher = (FiniteStatePolicy.ngram(32, 10**6, 2, seed=s) for s in (0, 1))
    for objective, name in (("token_return", "jsd"), ("sequence", "chi2")):
        with pytest.raises(BudgetExceededError, match="positions"):
            exact_gradient(student, teacher, name, objective)


# Second moments.


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


@pytest.mark.parametrize("name", ["opd_plus", "return_to_go", "full_vocab"])
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
        ({"student": TabularPolicy.random(3, 4)}, "student"),
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


# Single rollouts.


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("opd_plus", {}),
        ("full_vocab", {}),
        ("topk_tail", {"k": 2}),
        ("topk_renormalised", {"k": 2}),
        ("return_to_go", {"gamma": 0.5}),
    ],
)
def test_all_at_once_is_one_by_one(name, options):
    estimator = opd.estimator(name, "jsd", **options)
    sample = sample_rollouts(*random_pair(4, 3, eos=0), 12)
    found = rollout_gradients(estimator, sample)
    for b in range(12):
        one = sample.select(torch.tensor([b]))
        (gradient,) = torch.autograd.grad(estimator(one.rollouts), one.rollouts.student_logits)
        assert gradient_gap([found[b]], [gradient[0]]) <= ENUMERATION


@pytest.mark.parametrize("name", ["jsd", "forward_kl", "chi2"])
def test_far_ratios_and_missing_tokens_are_mapped_too(name):
    student, teacher = random_pair(4, 2, zeros=1)
    student.logits[0][0, 1] = -740.0
    estimator = opd.estimator("full_vocab", name)
    sample = sample_rollouts(student, teacher, 6)
    found = rollout_gradients(estimator, sample)
    for b in range(6):
        one = sample.select(torch.tensor([b]))
        (gradient,) = torch.autograd.grad(estimator(one.rollouts), one.rollouts.student_logits)
        assert gradient_gap([found[b]], [gradient[0]]) <= ENUMERATION


def test_a_support_without_a_token_is_refused_when_it_is_mapped():
    student, teacher = random_pair(4, 2)
    student.logits[0][0, teacher.logits[0][0].topk(2).indices] = -torch.inf
    estimator = opd.estimator("topk_renormalised", "jsd", k=2)
    sample = sample_rollouts(student, teacher, 6)
    with pytest.raises(InvalidArgumentError, match="probability zero"):
        estimator(sample.rollouts)
    with pytest.raises(LossError, match="NaN or inf"):
        rollout_gradients(estimator, sample)


def test_moments_of_rollouts_agree_with_enumeration():
    """100,000 rollouts, seed 1: within four standard errors."""
    student, teacher = random_pair(4, 3, eos=0)
    for estimator in (opd.estimator("opd_plus", "jsd"), opd.estimator("full_vocab", "jsd")):
        sampled = sampled_moments(estimator, student, teacher, 100_000, seed=1)
        exact = gradient_moments(estimator, student, teacher)
        assert abs(sampled.variance - exact.variance) <= 4 * sampled.variance_error
        difference = sum(float((a - b).square().sum()) for a, b in zip(sampled.mean, exact.mean, strict=True))
        assert difference <= 4 * exact.variance / sampled.rollouts
        assert sampled.variance_error < exact.variance / 50


def test_the_variance_of_a_few_rollouts_is_without_bias():
    student, teacher = random_pair(3, 2, seed=1)
    estimator, sampler = opd.estimator("opd_plus", "jsd"), Sampler.build(student, teacher)
    sample = sampler.draw(5, torch.Generator().manual_seed(7))
    gradients = rollout_gradients(estimator, sample)
    tables = torch.stack([sampler.scatter(sample.rows[n : n + 1], gradients[n : n + 1]) for n in range(5)])
    found = sampled_moments(estimator, student, teacher, 5, seed=7)
    assert found.variance == pytest.approx(float(tables.var(0, correction=1).sum()), rel=1e-12)
    assert found.variance != pytest.approx(float(tables.var(0, correction=0).sum()), rel=1e-3)
    norms = tables.square().sum((1, 2))
    assert found.variance_error == pytest.approx(float(norms.std()) / 5**0.5, rel=1e-12)


def test_rollouts_off_policy_have_the_sampling_distribution():
    student, teacher = random_pair(3, 2)
    behavior = student.perturbed(0.5, seed=4)
    estimator = opd.estimator("opd_plus", "jsd", importance="prefix")
    sampled = sampled_moments(estimator, student, teacher, 50_000, behavior)
    exact = gradient_moments(estimator, student, teacher, behavior=behavior)
    assert abs(sampled.variance - exact.variance) <= 4 * sampled.variance_error
    assert exact.variance > 1.05 * gradient_moments(estimator, student, teacher).variance


@pytest.mark.parametrize(
    ("loss", "said"),
    [
        (lambda r: r.student_logprobs.sum() if r.student_logprobs.sum() > 0 else -r.student_logprobs.sum(), "vmap"),
        (lambda r: r.student_logprobs, "shape"),
        (lambda r: 1.0, "float"),
        (lambda r: (r.student_logprobs * torch.inf).sum(), "NaN or inf"),
    ],
)
def test_a_loss_that_cannot_be_mapped_is_refused(loss, said):
    with pytest.raises(LossError, match=said):
        rollout_gradients(loss, sample_rollouts(*random_pair(3, 2), 4))


@pytest.mark.parametrize("rollouts", [1, 2.0, True])
def test_a_variance_needs_two_rollouts(rollouts):
    with pytest.raises(InvalidArgumentError, match="rollouts"):
        sampled_moments(opd.estimator("opd_plus", "jsd"), *random_pair(3, 2), rollouts)


def test_drawn_logprobs_are_those_of_the_drawn_logits():
    student, teacher = random_pair(4, 3, eos=1, zeros=1)
    sample = Sampler.build(student, teacher, student.perturbed(0.3)).draw(50, torch.Generator().manual_seed(0))
    r = sample.rollouts
    expected = gather_logprobs(r.teacher_logits, r.tokens, r.mask)
    assert torch.equal(r.teacher_logprobs, expected)
