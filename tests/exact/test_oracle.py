"""The exact oracle by two routes: sweeps over levels against autograd of sums over all sequences."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opdtheory import MarkovPolicy, ModulePolicy, TabularPolicy, divergence, exact_gradient, exact_value, random_pair
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import OBJECTIVES, enumerated_value
from opdtheory.exact.oracle import full_vocabulary_variance
from opdtheory.testing import divergences, gradient_gap, policy_pairs
from tests.exact.automata import ENTRIES, FACTORING, chains
from tests.tolerances import ALGEBRA, ENUMERATION, FINITE_DIFFERENCE

GAMMAS = (0.0, 0.3, 1.0)
SETTINGS = [("token_local", 1.0), ("sequence", 1.0), *(("token_return", gamma) for gamma in GAMMAS)]
settings_of_an_objective = st.sampled_from(SETTINGS)
by_setting = pytest.mark.parametrize(("objective", "gamma"), SETTINGS)


def autograd_route(student, teacher, d, objective, gamma):
    """Value and gradient of the objective's definition, summed over sequences and differentiated by autograd."""
    leaves = [p.detach().clone().requires_grad_() for p in student.parameters()]
    copy = TabularPolicy(leaves, eos=student.eos)
    value = enumerated_value(copy, teacher, d, objective, gamma)
    gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    return value.detach(), list(gradient)


def routes_gap(student, teacher, d, objective, gamma) -> float:
    value, gradient = autograd_route(student, teacher, d, objective, gamma)
    return max(
        gradient_gap([exact_value(student, teacher, d, objective, gamma)], [value]),
        gradient_gap(exact_gradient(student, teacher, d, objective, gamma), gradient),
    )


# Two routes.


@given(policy_pairs(), divergences(), settings_of_an_objective)
def test_the_two_routes_agree(pair, d, setting):
    assert routes_gap(*pair, d, *setting) <= ENUMERATION


@by_setting
@pytest.mark.parametrize("eos", [None, 0])
def test_the_two_routes_agree_for_every_entry(objective, gamma, eos):
    pair = random_pair(3, 3, eos=eos, distance=1.5, seed=4)
    entries = [d if isinstance(d, str) else divergence(d[0], **d[1]) for d in ENTRIES]
    for d in entries:
        assert routes_gap(*pair, d, objective, gamma) <= ENUMERATION, d


@given(policy_pairs(), divergences(), settings_of_an_objective, st.integers(0, 10**6))
def test_the_gradient_is_the_slope_of_the_value(pair, d, setting, seed):
    # `token_local` holds the prefixes fixed, so that no value has it for a slope unless the horizon is 1.
    objective, gamma = setting
    student, teacher = pair
    if objective == "token_local":
        student, teacher = (TabularPolicy(policy.logits[:1], eos=policy.eos) for policy in pair)
    if d.name == "total_variation":
        return  # has a kink at u = 1, where near-equal pairs are
    generator = torch.Generator().manual_seed(seed)
    direction = [torch.randn(level.shape, generator=generator, dtype=torch.float64) for level in student.logits]
    h = 1e-5
    ends = [
        TabularPolicy([z + sign * h * v for z, v in zip(student.logits, direction, strict=True)], eos=student.eos)
        for sign in (1, -1)
    ]
    up, down = (float(exact_value(end, teacher, d, objective, gamma)) for end in ends)
    gradient = exact_gradient(student, teacher, d, objective, gamma)
    slope = sum(float((g * v).sum()) for g, v in zip(gradient, direction, strict=True))
    size = max(1.0, abs(slope), abs(up))
    assert abs((up - down) / (2 * h) - slope) <= FINITE_DIFFERENCE * size


@given(policy_pairs(sharp=True))
def test_near_deterministic_rows_keep_the_chain_rule(pair):
    tokens, sequences = (exact_gradient(*pair, "reverse_kl", name) for name in ("token_return", "sequence"))
    assert gradient_gap(tokens, sequences) <= ENUMERATION


@given(policy_pairs(zeros=(0, 2)), divergences(), settings_of_an_objective)
def test_shared_zeros_are_as_if_the_tokens_were_not_there(pair, d, setting):
    smaller = [_without_zeros(policy) for policy in pair]
    assert gradient_gap([exact_value(*pair, d, *setting)], [exact_value(*smaller, d, *setting)]) <= ENUMERATION
    full, reduced = exact_gradient(*pair, d, *setting), exact_gradient(*smaller, d, *setting)
    present = [_present(policy) for policy in pair]
    for n, (level, expected) in enumerate(zip(full, reduced, strict=True)):
        rows = _rows_of(present[0], pair[0].vocab_size, n)
        assert gradient_gap([level[rows][:, : len(present[0])]], [expected]) <= ENUMERATION
        level = level.clone()
        level[rows[:, None], torch.tensor(present[0])] = 0.0
        assert not level.any()


def _present(policy) -> list[int]:
    return [a for a in range(policy.vocab_size) if torch.isfinite(policy.logits[0][0, a])]


def _rows_of(tokens: list[int], vocab_size: int, n: int) -> torch.Tensor:
    rows = torch.zeros(1, dtype=torch.int64)
    for _ in range(n):
        rows = (rows.unsqueeze(1) * vocab_size + torch.tensor(tokens)).flatten()
    return rows


def _without_zeros(policy) -> TabularPolicy:
    tokens = _present(policy)
    logits = [z[_rows_of(tokens, policy.vocab_size, n)][:, : len(tokens)] for n, z in enumerate(policy.logits)]
    return TabularPolicy(logits, eos=policy.eos)


@given(policy_pairs(horizon=(2, 3), distinct=True), divergences(smooth=True))
def test_at_discount_zero_the_first_token_alone_counts(pair, d):
    local, first = exact_gradient(*pair, d), exact_gradient(*pair, d, "token_return", 0.0)
    assert gradient_gap(first[:1], local[:1]) <= ALGEBRA
    assert not any(level.any() for level in first[1:])


@given(policy_pairs(horizon=1), divergences())
def test_on_bandits_the_objectives_coincide(pair, d):
    local = exact_gradient(*pair, d)
    for objective in OBJECTIVES[1:]:
        assert gradient_gap(exact_gradient(*pair, d, objective), local) <= ALGEBRA


@given(policy_pairs(), divergences(), settings_of_an_objective)
def test_the_teacher_is_a_stationary_point_of_value_zero(pair, d, setting):
    teacher = pair[1]
    assert float(exact_value(teacher, teacher, d, *setting)) == pytest.approx(0.0, abs=ALGEBRA)
    if d.name != "total_variation":
        gradient = exact_gradient(teacher, teacher, d, *setting)
        assert gradient_gap(gradient, [torch.zeros_like(level) for level in gradient]) <= ALGEBRA


def test_rows_after_the_end_get_no_gradient():
    student, teacher = random_pair(3, 3, eos=0, seed=2)
    for objective, gamma in SETTINGS:
        gradient = exact_gradient(student, teacher, "jsd", objective, gamma)
        assert not gradient[1][0].any() and not gradient[2][[0, 1, 2, 3, 6]].any()
        if gamma > 0:
            assert gradient[1][1:].any() and gradient[2][[4, 5, 7, 8]].any()


# Wrapped modules.


class Gru(nn.Module):
    """A recurrent next-token model in float64."""

    def __init__(self, vocab_size: int, width: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.cell = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, vocab_size)

    def forward(self, tokens):
        return self.head(self.cell(self.embedding(tokens))[0])


def gru(seed: int, eos: int | None) -> ModulePolicy:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module = Gru(3).double()
    return ModulePolicy(module, vocab_size=3, horizon=3, eos=eos, prompt=(1,))


@by_setting
@pytest.mark.parametrize("eos", [None, 2])
def test_a_module_by_autograd_of_its_enumeration(objective, gamma, eos):
    student, teacher = gru(0, eos), gru(1, eos)
    value = enumerated_value(student, teacher, "jsd", objective, gamma)
    auto = torch.autograd.grad(value, student.parameters())
    assert len(auto) == len(list(student.module.parameters()))
    assert gradient_gap([exact_value(student, teacher, "jsd", objective, gamma)], [value]) <= ENUMERATION
    gradient = exact_gradient(student, teacher, "jsd", objective, gamma)
    assert gradient_gap(gradient, auto) <= ENUMERATION
    assert max(float(g.abs().max()) for g in gradient) > 1e-3


def test_a_teacher_module_is_not_differentiated():
    teacher = gru(1, None)
    student = TabularPolicy.random(3, 3)
    exact_gradient(student, teacher, "jsd")
    assert all(p.grad is None for p in teacher.module.parameters())


# Size.


@pytest.mark.parametrize("eos", [None, 0])
def test_a_quarter_of_a_million_sequences(eos):
    pair = random_pair(8, 6, eos=eos, seed=0)
    assert float(exact_value(*pair, "reverse_kl", "sequence")) == pytest.approx(
        float(exact_value(*pair, "reverse_kl", "token_return")), rel=ENUMERATION
    )
    tokens, whole = (exact_gradient(*pair, "reverse_kl", name) for name in ("token_return", "sequence"))
    assert gradient_gap(tokens, whole) <= ENUMERATION
    assert all(torch.isfinite(level).all() for level in exact_gradient(*pair, "jsd", "token_return", 0.9))


def test_budgets_state_the_count():
    pair = random_pair(3, 4)
    for function in (exact_value, exact_gradient):
        with pytest.raises(BudgetExceededError, match=r"81, over the budget of 80") as caught:
            function(*pair, "jsd", budget=80)
        assert (caught.value.count, caught.value.budget) == (81, 80)
        function(*pair, "jsd", budget=81)
    with pytest.raises(BudgetExceededError, match=r"31, over the budget of 30"):
        enumerated_value(*random_pair(3, 4, eos=0), "jsd", budget=30)  # 1 + 2 + 4 + 8 that end, 16 that do not
    mixed = MarkovPolicy.random(64, 1000), ModulePolicy(Gru(64).double(), 64, 1000)
    with pytest.raises(BudgetExceededError) as caught:
        exact_value(*mixed, "jsd")
    assert caught.value.count == 64**1000


# Support (T10).


def lacking(token: int, horizon: int = 1, logit: float = -math.inf) -> TabularPolicy:
    policy = TabularPolicy.random(3, horizon, seed=5)
    for level in policy.logits:
        level[:, token] = logit
    return policy


BOUNDED_ABOVE = ["reverse_kl", "jsd", "neyman_chi2", "hellinger", "total_variation", "le_cam"]
BOUNDED_AT_ZERO = ["forward_kl", "jsd", "chi2", "hellinger", "total_variation", "le_cam"]
PLAIN = ["reverse_kl", "forward_kl", "jsd", "chi2", "neyman_chi2", "hellinger", "total_variation", "le_cam", "jeffreys"]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("name", BOUNDED_ABOVE)
def test_teacher_mass_that_the_student_never_samples_costs_its_slope(name, horizon, objective):
    full = TabularPolicy.random(3, horizon, seed=6)
    value = float(exact_value(lacking(2, horizon), full, name, objective))
    # Square-root terms of the Hellinger distance leave exp(-80 / 2).
    assert value == pytest.approx(float(exact_value(lacking(2, horizon, -80.0), full, name, objective)), rel=1e-12)
    if horizon == 1:
        d, (p, q) = divergence(name), (z.logits[0][0].softmax(-1) for z in (lacking(2), full))
        by_hand = float((p[:2] * d.generator((q / p).log()[:2])).sum() + d.slope_at_infinity * q[2])
        assert value == pytest.approx(by_hand, rel=ALGEBRA)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("horizon", [1, 2])
@pytest.mark.parametrize("name", BOUNDED_AT_ZERO)
def test_student_mass_that_the_teacher_rules_out_costs_the_value_at_zero(name, horizon, objective):
    full = TabularPolicy.random(3, horizon, seed=6)
    for function in (exact_value, exact_gradient):
        exact, near = (function(full, lacking(2, horizon, logit), name, objective) for logit in (-math.inf, -80.0))
        as_list = (lambda x: x) if function is exact_gradient else (lambda x: [x])
        assert gradient_gap(as_list(exact), as_list(near)) <= 1e-12


@pytest.mark.parametrize("objective", ["token_return", "sequence"])
@pytest.mark.parametrize("name", BOUNDED_ABOVE)
def test_the_gradient_with_unseen_teacher_mass_is_the_slope_of_the_value(name, objective):
    student, teacher = lacking(2, 2), TabularPolicy.random(3, 2, seed=6)
    gradient = exact_gradient(student, teacher, name, objective)
    h = 1e-5
    for row, token in ((0, 0), (1, 1), (2, 0)):
        ends = []
        for sign in (1, -1):
            moved = [level.clone() for level in student.logits]
            moved[1][row, token] += sign * h
            ends.append(float(exact_value(TabularPolicy(moved), teacher, name, objective)))
        assert float(gradient[1][row, token]) == pytest.approx((ends[0] - ends[1]) / (2 * h), abs=FINITE_DIFFERENCE)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("markov", [False, True])
@pytest.mark.parametrize("horizon", [1, 2, 3])
@pytest.mark.parametrize("name", [*(n for n in PLAIN if n not in BOUNDED_ABOVE), "reversed"])
def test_infinite_divergences_have_an_infinite_value_and_no_gradient(name, horizon, markov, objective):
    full, poor = TabularPolicy.random(3, horizon, seed=6), lacking(2, horizon)
    if markov:
        full = MarkovPolicy.random(3, horizon, seed=6)
        poor = MarkovPolicy.random(3, horizon, seed=5)
        poor.initial[2], poor.transition[:, 2] = -math.inf, -math.inf
    cases = [(poor, full, name)] if name != "reversed" else [(full, poor, n) for n in PLAIN if n not in BOUNDED_AT_ZERO]
    for student, teacher, d in cases:
        assert float(exact_value(student, teacher, d, objective)) == math.inf
        with pytest.raises(InvalidArgumentError, match=f"divergence: {d}.*infinite.*T10"):
            exact_gradient(student, teacher, d, objective)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("name", FACTORING[:6])
def test_rows_that_nobody_visits_do_not_count(name, objective):
    # Both rule out token 2; after it they would disagree about the support.
    student, teacher = chains(3, 4)
    for policy in (student, teacher):
        policy.initial[2], policy.transition[:2, 2] = -math.inf, -math.inf
    expected = exact_value(student, teacher, name, objective)
    gradient = exact_gradient(student, teacher, name, objective)
    student.transition[2, 0], teacher.transition[2, 1] = -math.inf, -math.inf
    assert gradient_gap([exact_value(student, teacher, name, objective)], [expected]) <= ALGEBRA
    assert gradient_gap(exact_gradient(student, teacher, name, objective), gradient) <= ALGEBRA


def test_zero_probabilities_are_refused_by_the_definition():
    with pytest.raises(InvalidArgumentError, match="must have positive probabilities"):
        enumerated_value(lacking(2), TabularPolicy.random(3, 1), "jsd")


# Refusals.


@pytest.mark.parametrize("function", [exact_value, exact_gradient, enumerated_value])
def test_wrong_names_and_discounts_are_refused_by_argument(function):
    pair = random_pair(2, 2)
    for arguments, name, words in [
        (("no_such",), "divergence", "no_such"),
        (("alpha",), "alpha", "alpha"),
        (("jsd", "token"), "objective", "token_local, token_return, sequence"),
        (("jsd", "token_return", 1.5), "gamma", "1.5"),
        (("jsd", "token_return", -0.1), "gamma", "-0.1"),
        (("jsd", "token_return", math.nan), "gamma", "nan"),
        (("jsd", "token_local", 0.5), "gamma", "must be 1 for token_local, which has no discount"),
        (("jsd", "sequence", 0.0), "gamma", "must be 1 for sequence, which has no discount"),
    ]:
        with pytest.raises(InvalidArgumentError) as caught:
            function(*pair, *arguments)
        assert caught.value.argument == name and words in str(caught.value)


@pytest.mark.parametrize("function", [exact_value, exact_gradient, enumerated_value])
def test_policies_over_other_sequences_are_refused(function):
    student = TabularPolicy.random(3, 2)
    for teacher, words in [
        (TabularPolicy.random(4, 2), "vocab_size=4"),
        (TabularPolicy.random(3, 3), "horizon=3"),
        (TabularPolicy.random(3, 2, eos=0), "eos=0"),
    ]:
        with pytest.raises(InvalidArgumentError, match=words) as caught:
            function(student, teacher, "jsd")
        assert caught.value.argument == "teacher"


@pytest.mark.bad_input
def test_what_is_no_policy_is_refused():
    with pytest.raises(ValueError, match="student.*list"):
        exact_value(TabularPolicy.random(3, 2).logits, TabularPolicy.random(3, 2), "jsd")


# The variance of the whole-vocabulary estimator (T7c).


@given(policy_pairs(), divergences())
def test_whole_vocabulary_variance_by_listing_prefixes(pair, d):
    student, teacher = pair
    reach = {(): 1.0}
    mean, second, total = exact_gradient(student, teacher, d), 0.0, 0.0
    for n in range(student.horizon):
        for row, (prefix, mass) in enumerate(sorted(reach.items())):
            live = student.eos is None or student.eos not in prefix
            if live:  # this row's gradient given that it is visited, times the chance of a visit
                norm = float((mean[n][row] / mass).square().sum())
                second, total = second + mass * norm, total + mass**2 * norm
        reach = {
            (*prefix, a): mass * float(student.logits[n][row].softmax(-1)[a])
            for row, (prefix, mass) in enumerate(sorted(reach.items()))
            for a in range(student.vocab_size)
        }
    assert full_vocabulary_variance(student, teacher, d) == pytest.approx(second - total, rel=1e-9, abs=1e-12)


def _at_disjoint(name: str) -> float:
    d = divergence(name)
    return d.at_zero + d.slope_at_infinity
