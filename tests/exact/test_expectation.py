"""Expected gradients of arbitrary losses against a brute force over sequences that is written here from scratch."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from opdtheory import ModulePolicy, Rollouts, TabularPolicy, estimator, exact_gradient, expected_gradient, random_pair
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from opdtheory.exact import Enumeration, gradient_moments
from opdtheory.exact.expectation import _companies
from opdtheory.testing import gradient_gap, policy_pairs
from tests.sparse import some
from tests.tolerances import ENUMERATION

JUNK = 3.7  # what a padded row holds; the policies' own tables hold other numbers there


def sequences(policy):
    """Every sequence of a policy with its probability, by recursion over plain Python numbers."""

    def extend(prefix, probability):
        if len(prefix) == policy.horizon or (policy.eos is not None and policy.eos in prefix):
            yield prefix, probability
            return
        row = policy.logits[len(prefix)][index_of(prefix, policy.vocab_size)].tolist()
        total = sum(math.exp(z) for z in row)
        for token, logit in enumerate(row):
            if logit > -math.inf:
                yield from extend((*prefix, token), probability * math.exp(logit) / total)

    return list(extend((), 1.0))


def index_of(prefix, vocab_size):
    return sum(token * vocab_size**power for power, token in enumerate(reversed(prefix)))


def batch_of(ys, student_tables, teacher, behavior):
    """Rollouts of these sequences, padded by junk that no policy holds."""
    size, horizon = teacher.vocab_size, teacher.horizon
    junk = torch.linspace(-JUNK, JUNK, size, dtype=torch.float64)

    def rows(tables):
        return torch.stack(
            [
                torch.stack([tables[n][index_of(y[:n], size)] if n < len(y) else junk.clone() for n in range(horizon)])
                for y in ys
            ]
        )

    tokens = torch.tensor([[*y, *(0 for _ in range(horizon - len(y)))] for y in ys])
    mask = torch.tensor([[float(n < len(y)) for n in range(horizon)] for y in ys], dtype=torch.float64)
    mu = rows(behavior.logits).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return Rollouts.from_logits(tokens, rows(student_tables), rows(teacher.logits), mask=mask, behavior_logprobs=mu)


def brute_force(loss, student, teacher, batch_size=1, behavior=None):
    """Mean and trace of the covariance of a loss's gradient over all ordered batches."""
    behavior = student if behavior is None else behavior
    mean, second = [torch.zeros_like(level) for level in student.logits], 0.0
    for drawn in itertools.product(sequences(behavior), repeat=batch_size):
        probability = math.prod(chance for _, chance in drawn)
        leaves = [level.detach().clone().requires_grad_() for level in student.logits]
        value = loss(batch_of([y for y, _ in drawn], leaves, teacher, behavior))
        gradient = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
        for total, level in zip(mean, gradient, strict=True):
            total += probability * level
        second += probability * sum(float(level.square().sum()) for level in gradient)
    return mean, second - sum(float(level.square().sum()) for level in mean)


def assert_agrees(loss, student, teacher, batch_size=1, behavior=None, separable=None):
    mean, variance = brute_force(loss, student, teacher, batch_size, behavior)
    moments = gradient_moments(loss, student, teacher, batch_size, behavior)
    assert gradient_gap(moments.mean, mean) <= ENUMERATION
    assert gradient_gap(expected_gradient(loss, student, teacher, batch_size, behavior), mean) <= ENUMERATION
    assert moments.variance == pytest.approx(variance, rel=1e-10, abs=1e-12)
    norm = sum(float(level.square().sum()) for level in moments.mean)
    assert moments.second_moment == pytest.approx(variance + norm, rel=1e-10, abs=1e-12)
    if separable is not None:
        assert moments.separable is separable


# Losses written inline.


def k2(r):
    return r.token_sum(r.log_u.square() / 2)


def k3_of_sequences(r):
    return r.sequence_mean(r.log_u.expm1() - r.log_u)


def jsd_by_hand(r):
    p, q = r.student_logits.softmax(-1), r.teacher_logits.softmax(-1)
    m = (p + q) / 2
    return r.token_sum((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2)


def both_leaves(r):
    entropy = -(r.student_logits.softmax(-1) * r.student_logits.log_softmax(-1)).sum(-1)
    return r.token_sum(r.log_u.detach() * r.student_logprobs + 0.1 * entropy * r.student_logprobs)


def weighted(r):
    return r.token_sum((r.student_logprobs.detach() - r.behavior_logprobs).exp() * r.log_u.square() / 2)


def token_mean(r):
    return r.token_mean(r.log_u.square() / 2)


def total(r):
    return r.tokens.shape[0] * k2(r)


def next_one_as_baseline(r):
    reward = torch.where(r.mask > 0, r.log_u.detach(), 0.0)
    return -r.token_sum((reward - reward.roll(1, 0)) * r.student_logprobs)


def first_one_counts_double(r):
    order = torch.arange(r.tokens.shape[0], 0, -1, dtype=torch.float64).unsqueeze(-1)
    return -r.token_sum(order * r.log_u.detach() * r.student_logprobs)


def leaky(r):
    return (r.log_u.square() / 2).sum() / r.tokens.shape[0]


SEPARABLE = [k2, k3_of_sequences, jsd_by_hand, both_leaves]
LIBRARY = [
    estimator("opd", "forward_kl"),
    estimator("opd_plus", "jsd"),
    estimator("k1_loss"),
    estimator("k3_reward"),
    estimator("full_vocab", "chi2"),
    estimator("topk_tail", "forward_kl", k=1),
    estimator("return_to_go", "jsd", gamma=0.7),
    estimator("sequence_opd_plus", "hellinger"),
]
COUPLED = [
    token_mean,
    total,
    next_one_as_baseline,
    first_one_counts_double,
    estimator("opd_plus", "jsd", baseline="leave_one_out"),
    estimator("opd", "forward_kl", baseline="group_mean"),
    estimator("opd", "reverse_kl", zscore=True),
]


def label(loss):
    return getattr(loss, "__name__", None) or repr(loss)


@pytest.mark.parametrize("eos", [None, 0, 2])
@pytest.mark.parametrize("loss", [*SEPARABLE, *LIBRARY], ids=label)
def test_single_rollouts(loss, eos):
    assert_agrees(loss, *random_pair(3, 2, eos=eos, seed=1))


@given(policy_pairs(vocab_size=(2, 3), horizon=(1, 3)), st.sampled_from([*SEPARABLE, token_mean]))
def test_single_rollouts_of_any_pair(pair, loss):
    assert_agrees(loss, *pair)


@pytest.mark.parametrize("loss", SEPARABLE, ids=label)
def test_separable_losses_are_recognised_in_batches(loss):
    assert_agrees(loss, *random_pair(2, 2, eos=0, seed=1), batch_size=2, separable=True)


def test_rounding_of_a_narrow_loss_is_no_coupling():
    def narrow(loss):
        def in_float32(r):
            return loss(dataclasses.replace(r, **{k: x.float() for k, x in vars(r).items() if x.is_floating_point()}))

        return in_float32

    pair = random_pair(3, 2, eos=0, seed=1)
    wide = gradient_moments(k2, *pair, 2)
    found = gradient_moments(narrow(k2), *pair, 2)
    assert wide.separable and found.separable and found.evaluations == wide.evaluations
    for a, b in zip(found.mean, wide.mean, strict=True):
        assert float((a - b).abs().max()) < 1e-5 * float(b.abs().max())
    # What couples by more than float32 rounds is still seen, and so is any coupling in float64.
    for size, loss in ((1e-3, narrow(k2)), (1e-7, k2)):

        def twin(r, size=size, loss=loss):
            value = loss(r)
            return value * (1.0 + size * r.student_logprobs.detach().sum()).to(value.dtype)

        assert not gradient_moments(twin, *pair, 2).separable


@pytest.mark.parametrize(("eos", "horizon", "batch_size"), [(None, 2, 2), (0, 2, 2), (0, 2, 3), (0, 3, 2)])
@pytest.mark.parametrize("loss", COUPLED, ids=label)
def test_coupled_losses(loss, eos, horizon, batch_size):
    assert_agrees(loss, *random_pair(2, horizon, eos=eos, seed=2), batch_size=batch_size)


def test_coupling_is_reported():
    fixed, varying = random_pair(2, 2, seed=2), random_pair(2, 2, eos=0, seed=2)
    assert gradient_moments(token_mean, *fixed, 2).separable
    assert not gradient_moments(token_mean, *varying, 2).separable
    assert not gradient_moments(estimator("opd_plus", "jsd", baseline="leave_one_out"), *fixed, 2).separable


@pytest.mark.parametrize("loss", [next_one_as_baseline, first_one_counts_double], ids=label)
def test_triples_of_a_loss_that_minds_the_order(loss):
    # `next_one_as_baseline` of three rollouts survives a rotation of them, but no exchange of two.
    assert_agrees(loss, *random_pair(3, 1, seed=3), batch_size=3, separable=False)


def test_a_total_over_a_batch_is_larger_by_its_size():
    pair = random_pair(2, 2, seed=2)
    single = expected_gradient(k2, *pair)
    assert gradient_gap(expected_gradient(total, *pair, batch_size=3), [3 * level for level in single]) <= ENUMERATION


@pytest.mark.parametrize("loss", [k2, weighted, estimator("opd_plus", "jsd", importance="prefix")], ids=label)
@pytest.mark.parametrize("eos", [None, 0])
def test_another_policy_samples(loss, eos):
    student, teacher = random_pair(3, 2, eos=eos, seed=1)
    behavior = student.perturbed(0.8, seed=9)
    assert_agrees(loss, student, teacher, behavior=behavior)
    moved = expected_gradient(loss, student, teacher, behavior=behavior)
    if loss is k2:
        assert gradient_gap(moved, expected_gradient(loss, student, teacher)) > 1e-3
    elif loss is not weighted:
        assert gradient_gap(moved, expected_gradient(loss, student, teacher)) <= ENUMERATION


def test_importance_weights_restore_the_exact_gradient():
    student, teacher = random_pair(3, 1, seed=1)
    off_policy = expected_gradient(weighted, student, teacher, behavior=student.perturbed(0.8, seed=9))
    assert gradient_gap(off_policy, exact_gradient(student, teacher, "reverse_kl")) <= ENUMERATION


def test_a_behaviour_policy_with_a_narrower_support():
    student, teacher = random_pair(3, 2, seed=1)
    logits = [level.clone() for level in student.logits]
    for level in logits:
        level[:, 2] = -torch.inf
    behavior = TabularPolicy(logits)
    assert_agrees(k2, student, teacher, behavior=behavior)
    assert not expected_gradient(k2, student, teacher, behavior=behavior)[1][2].any()


@given(policy_pairs(horizon=(1, 2), zeros=(0, 1), sharp=True))
def test_zeros_and_sharp_rows(pair):
    assert_agrees(k2, *pair)


# Padding.


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_leak_over_padding_shows_in_the_rows_of_ended_prefixes(batch_size):
    student, teacher = random_pair(2, 3, eos=0, seed=4)
    ended = [torch.tensor([], dtype=torch.int64), torch.tensor([0]), torch.tensor([0, 1, 2])]
    for loss in (k2, token_mean, k3_of_sequences, estimator("opd_plus", "jsd"), estimator("full_vocab", "jsd")):
        gradient = expected_gradient(loss, student, teacher, batch_size)
        assert all(not level[rows].any() for level, rows in zip(gradient, ended, strict=True)), loss
    leaked = expected_gradient(leaky, student, teacher, batch_size)
    assert leaked[1][0].any() and leaked[2][0].any()
    # What is not padding is as it would be without the leak.
    correct = expected_gradient(k2, student, teacher, batch_size)
    live = [torch.tensor([0]), torch.tensor([1]), torch.tensor([3])]
    picked, expected = ([level[rows] for level, rows in zip(g, live, strict=True)] for g in (leaked, correct))
    assert gradient_gap(picked, expected) <= ENUMERATION


# Rates and routes.


@pytest.mark.parametrize("loss", [k2, estimator("opd_plus", "jsd"), jsd_by_hand], ids=label)
def test_the_variance_of_a_mean_falls_as_one_over_its_size(loss):
    pair = random_pair(3, 2, eos=0, distance=2.0, seed=5)
    single = gradient_moments(loss, *pair).variance
    assert single > 1e-3
    for batch_size in (2, 3, 7):
        assert batch_size * gradient_moments(loss, *pair, batch_size).variance == pytest.approx(single, rel=1e-8)


def test_enumerated_batches_and_single_rollouts_give_one_answer():
    # A tie between rollouts far below the size of the loss, which forces the enumeration of batches.
    def tied(r):
        return k2(r) + 1e-9 * r.token_sum(r.log_u).square()

    pair = random_pair(2, 2, eos=0, seed=5)
    coupled, single = gradient_moments(tied, *pair, 3), gradient_moments(k2, *pair, 3)
    assert not coupled.separable and single.separable
    assert gradient_gap(coupled.mean, single.mean) < 1e-7
    assert coupled.variance == pytest.approx(single.variance, rel=1e-6)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "chi2"])
@pytest.mark.parametrize("eos", [None, 0])
def test_unbiased_estimators_meet_the_oracle(name, eos):
    pair = random_pair(3, 3, eos=eos, seed=6)
    for loss in (estimator("opd_plus", name), estimator("full_vocab", name)):
        assert gradient_gap(expected_gradient(loss, *pair), exact_gradient(*pair, name)) <= ENUMERATION
    whole = expected_gradient(estimator("return_to_go", name, gamma=1.0), *pair)
    assert gradient_gap(whole, exact_gradient(*pair, name, "token_return")) <= ENUMERATION


def test_a_module_gets_the_gradient_in_its_own_parameters():
    class Bag(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embedding, self.head = nn.Embedding(3, 4), nn.Linear(4, 3)

        def forward(self, tokens):
            return self.head(self.embedding(tokens).sum(1))

    student = ModulePolicy(Bag().double(), 3, 2, eos=0, prompt=(0,))
    teacher = TabularPolicy.random(3, 2, eos=0)
    gradient = expected_gradient(estimator("opd_plus", "jsd"), student, teacher)
    assert gradient_gap(gradient, exact_gradient(student, teacher, "jsd")) <= ENUMERATION
    assert [g.shape for g in gradient] == [p.shape for p in student.parameters()]


def test_nothing_is_left_on_the_policies():
    student, teacher = random_pair(2, 2)
    for level in (*student.logits, *teacher.logits):
        level.requires_grad_()
    gradient = expected_gradient(k2, student, teacher, batch_size=2)
    gradient += expected_gradient(token_mean, *random_pair(2, 2, eos=0), batch_size=2)
    assert all(level.grad is None for level in (*student.logits, *teacher.logits))
    assert not any(level.requires_grad for level in gradient)


def test_it_works_where_gradients_are_switched_off():
    pair = random_pair(2, 2)
    with torch.no_grad():
        assert gradient_gap(expected_gradient(k2, *pair), exact_gradient(*pair, "reverse_kl")) <= ENUMERATION


def test_a_loss_in_single_precision_is_taken():
    def single(r):
        return r.token_sum(r.log_u.float().square() / 2)

    pair = random_pair(2, 2, seed=1)
    assert gradient_gap(expected_gradient(single, *pair), expected_gradient(k2, *pair)) < 1e-6


# Refusals.


def refused(loss, words, **kwargs):
    with pytest.raises(LossError, match=words) as caught:
        expected_gradient(loss, *random_pair(2, 2), **kwargs)
    assert isinstance(caught.value, ValueError)


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_loss_per_token_is_refused(batch_size):
    refused(lambda r: r.log_u, r"must return a scalar tensor, got shape \(4, 2\)", batch_size=batch_size)
    refused(lambda r: r.log_u.sum().view(1), r"shape \(1,\)", batch_size=batch_size)


def test_what_is_no_tensor_is_refused():
    refused(lambda r: 1.0, "float")
    refused(lambda r: None, "NoneType")
    refused(lambda r: (k2(r),), "tuple")


def test_a_loss_without_a_gradient_is_refused():
    refused(lambda r: r.token_sum(r.log_u.detach()), "no gradient.*detached")
    refused(lambda r: r.token_sum(r.teacher_logprobs), "no gradient")
    refused(lambda r: torch.ones((), requires_grad=True, dtype=torch.float64) * 2, "no gradient.*does not depend")


def test_an_integer_loss_is_refused():
    refused(lambda r: r.tokens.sum(), "torch.int64")
    refused(lambda r: k2(r).detach() > 0, "torch.bool")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_is_refused(value):
    refused(lambda r: k2(r) + value, f"must be finite, got {value}")


def test_a_gradient_that_is_not_finite_is_refused():
    refused(lambda r: r.token_sum((r.log_u - r.log_u.detach()).abs().sqrt()), "gradient holds .* NaN or inf")


def test_a_nan_on_rare_batches_only_is_found():
    def rare(r):
        alike = r.tokens.shape[0] == 2 and bool((r.tokens == 1).all())
        return token_mean(r) * (math.nan if alike else 1.0)

    with pytest.raises(LossError, match="nan"):
        expected_gradient(rare, *random_pair(2, 2, eos=0), batch_size=2)


def test_a_random_loss_is_refused():
    refused(lambda r: k2(r) * torch.rand(()), "not deterministic: its value changed by .* identical calls")
    refused(lambda r: r.token_sum(nn.functional.dropout(r.log_u, 0.5).square()), "not deterministic")


def test_a_loss_with_a_random_gradient_only_is_refused():
    def noisy(r):
        noise = torch.rand_like(r.log_u) * (r.student_logprobs - r.student_logprobs.detach())
        return k2(r) + r.token_sum(noise)

    refused(noisy, "not deterministic: its gradient")


def test_a_moving_baseline_is_refused():
    state = {"mean": 0.0}

    def moving(r):
        advantage = r.log_u.detach() - state["mean"]
        state["mean"] += 0.1 * (1.0 - state["mean"])
        return -r.token_sum(advantage * r.student_logprobs)

    refused(moving, "keep no state")


def test_budgets_state_the_count():
    pair = random_pair(2, 2, eos=0)  # 3 sequences
    for loss, count in ((token_mean, math.comb(3 + 9, 10)), (first_one_counts_double, 3**10)):
        with pytest.raises(BudgetExceededError, match=f"{count:,}, over the budget of 60") as caught:
            expected_gradient(loss, *pair, batch_size=10, budget=60)
        assert (caught.value.count, caught.value.budget) == (count, 60)
    expected_gradient(k2, *random_pair(3, 3), batch_size=10, budget=60)  # seen to need single rollouts only
    with pytest.raises(BudgetExceededError, match="4, over the budget of 3"):
        expected_gradient(k2, *random_pair(2, 2), budget=3)
    with pytest.raises(BudgetExceededError, match=f"{8**7:,}"):
        expected_gradient(k2, *random_pair(8, 7))


@pytest.mark.parametrize("batch_size", [0, -1])
def test_a_batch_needs_a_rollout(batch_size):
    with pytest.raises(InvalidArgumentError, match=f"batch_size.*{batch_size}"):
        expected_gradient(k2, *random_pair(2, 2), batch_size=batch_size)


@pytest.mark.bad_input
def test_a_batch_size_is_whole():
    with pytest.raises(InvalidArgumentError, match="batch_size.*1.5"):
        expected_gradient(k2, *random_pair(2, 2), batch_size=1.5)


def test_a_behaviour_policy_over_other_sequences_is_refused():
    with pytest.raises(InvalidArgumentError, match="horizon=3"):
        expected_gradient(k2, *random_pair(2, 2), behavior=TabularPolicy.random(2, 3))


def test_few_batches_are_all_looked_at_for_coupling():
    """Three sequences, two of them scored alike: a sample of batches may be blind to the group mean."""
    student = TabularPolicy([torch.zeros(1, 3, dtype=torch.float64)])
    teacher = TabularPolicy([torch.tensor([[0.0, 0.0, 0.1]], dtype=torch.float64)])
    loss = estimator("opd_plus", "reverse_kl", baseline="group_mean")
    exact = exact_gradient(student, teacher, "reverse_kl")
    for batch_size in (2, 3, 4):
        found = expected_gradient(loss, student, teacher, batch_size=batch_size)
        share = (batch_size - 1) / batch_size
        torch.testing.assert_close(found[0], share * exact[0], rtol=0, atol=1e-15)


def test_evaluations_count_the_calls():
    calls = []

    def loss(rollouts):
        calls.append(1)
        return rollouts.token_sum(rollouts.log_u)

    student, teacher = random_pair(3, 2, seed=0)
    assert gradient_moments(loss, student, teacher).evaluations == len(calls)


def test_companies_in_which_rollouts_are_looked_at():
    assert len(_companies(5, 2)) == 15  # every pair with repetition
    companies = _companies(6, 2)
    assert list(map(len, companies)) == [2] * 6 + [3, 3, 2, 2, 2]
    companies = _companies(50, 3)
    assert [int(company[0]) for company in companies[:8]] == [0, 7, 14, 21, 28, 35, 42, 49]
    for first, last in ((8, 10), (10, 13)):
        assert sorted(torch.cat(companies[first:last]).tolist()) == list(range(50))


def with_leaves(policy: TabularPolicy) -> TabularPolicy:
    leaves = [z.clone().requires_grad_() for z in policy.logits]
    return TabularPolicy(leaves, eos=policy.eos, environment=policy.environment)


# Batches of one prompt.


def coupled(r: Rollouts) -> torch.Tensor:
    """GRPO-like: each rollout's summed log-ratio, standardised over the batch, against its log-probability."""
    reward = (r.mask * r.log_u).sum(-1).detach()
    advantage = (reward - reward.mean()) / (reward.std(correction=0) + 0.1)
    return -r.token_sum(advantage.unsqueeze(-1) * r.student_logprobs)


def in_order(r: Rollouts) -> torch.Tensor:
    """The second rollout's reward for the first one's tokens: not symmetric."""
    reward = (r.mask * r.log_u).sum(-1).detach().roll(1)
    return -(reward[0] * (r.mask * r.student_logprobs)[0].sum() + reward.square().sum() * r.student_logprobs[1, 1])


def by_plain_loops(loss, student, teacher, batch_size, shared, behavior=None):
    """Mean and second moment of the gradient over ordered batches, prompt by prompt."""
    every = Enumeration.build(student, teacher, behavior)
    leaves = with_leaves(student)
    source = Enumeration.build(leaves, teacher, behavior if behavior is not None else student)
    distribution = {x: float(every.probability[every.tokens[:, 0] == x].sum()) for x in every.tokens[:, 0].tolist()}
    mean, second = [torch.zeros_like(z) for z in student.logits], 0.0
    for batch in itertools.product(range(len(every)), repeat=batch_size):
        prompts = {int(every.tokens[i, 0]) for i in batch}
        if shared and len(prompts) > 1:
            continue
        weight = 1.0
        for i in batch:
            weight *= float(every.probability[i]) / (distribution[prompts.copy().pop()] if shared else 1.0)
        weight *= distribution[prompts.pop()] if shared else 1.0
        r = source.rollouts(torch.tensor(batch))
        if behavior is None:
            r = dataclasses.replace(r, behavior_logprobs=r.student_logprobs.detach())
        gradient = torch.autograd.grad(loss(r), leaves.logits, allow_unused=True, materialize_grads=True)
        for total, level in zip(mean, gradient, strict=True):
            total += weight * level
        second += weight * sum(float(level.square().sum()) for level in gradient)
    return mean, second


@pytest.mark.parametrize(
    "loss", [coupled, in_order, estimator("opd_plus", "jsd")], ids=["coupled", "ordered", "single"]
)
@pytest.mark.parametrize("off_policy", [False, True])
def test_batches_of_one_prompt_against_plain_loops(loss, off_policy):
    student, teacher = random_pair(2, 3, eos=0, seed=8, environment=(0,))
    behavior = student.perturbed(0.4) if off_policy else None
    for shared in (True, False):
        mean, second = by_plain_loops(loss, student, teacher, 2, shared, behavior)
        moments = gradient_moments(loss, student, teacher, 2, behavior, shared_prompt=shared)
        assert gradient_gap(moments.mean, mean) <= ENUMERATION
        assert moments.second_moment == pytest.approx(second, rel=1e-10)
        norm = sum(float(level.square().sum()) for level in mean)
        assert moments.variance == pytest.approx(second - norm, rel=1e-8)
        found = expected_gradient(loss, student, teacher, 2, behavior, shared_prompt=shared)
        assert gradient_gap(found, mean) <= ENUMERATION


def test_a_shared_prompt_matters_to_a_coupled_mean_and_to_any_variance():
    student, teacher = random_pair(2, 3, eos=0, seed=8, environment=(0,))
    own, shared = (gradient_moments(coupled, student, teacher, 2, shared_prompt=each) for each in (False, True))
    assert gradient_gap(own.mean, shared.mean) > 1e-3
    loss = estimator("opd_plus", "jsd")
    own, shared = (gradient_moments(loss, student, teacher, 2, shared_prompt=each) for each in (False, True))
    assert gradient_gap(own.mean, shared.mean) <= ENUMERATION
    assert shared.variance > 1.01 * own.variance


def test_a_shared_prompt_never_meets_another():
    def one_prompt(r: Rollouts) -> torch.Tensor:
        if (r.tokens[:, 0] != r.tokens[0, 0]).any():
            raise RuntimeError("two prompts in one group")
        return coupled(r)

    student, teacher = random_pair(2, 3, eos=0, seed=8, environment=(0,))
    expected_gradient(one_prompt, student, teacher, 3, shared_prompt=True)
    with pytest.raises(RuntimeError, match="two prompts"):
        expected_gradient(one_prompt, student, teacher, 3)


def test_without_a_prompt_there_is_nothing_to_share():
    student, teacher = random_pair(2, 2, eos=0, seed=8, environment=(1,))
    own, shared = (gradient_moments(coupled, student, teacher, 3, shared_prompt=each) for each in (False, True))
    assert own == dataclasses.replace(shared, mean=own.mean) and gradient_gap(own.mean, shared.mean) == 0.0


def test_the_budget_counts_each_prompt():
    student, teacher = random_pair(2, 3, seed=8, environment=(0,))
    with pytest.raises(BudgetExceededError, match="4 sequences for each of 2 prompts needs 40") as caught:
        gradient_moments(coupled, student, teacher, 3, budget=39, shared_prompt=True)
    assert caught.value.count == 40
    assert not gradient_moments(coupled, student, teacher, 3, budget=40, shared_prompt=True).separable


def test_a_large_group_of_few_sequences_is_cheap():
    """Batches of 30 out of 3 rollouts: 496 up to order, 2e14 in order; their number per batch is a multinomial."""
    student, teacher = random_pair(3, 1, seed=1)
    p = student.logits[0][0].softmax(-1)

    def of_counts(r: Rollouts) -> torch.Tensor:
        return (r.tokens == 0).double().mean() ** 2 * r.token_sum(r.student_logprobs)

    found = gradient_moments(of_counts, student, teacher, 30)
    counts = torch.distributions.Binomial(30, p[0])
    n = torch.arange(31, dtype=torch.float64)
    cube, square = (float((counts.log_prob(n).exp() * (n / 30) ** k).sum()) for k in (3, 2))
    # E[m^2 (share - p)], the shares of the other tokens given the first one's being proportional.
    rest = (square - cube) * p / (1 - p[0]) - square * p
    truth = torch.where(torch.arange(3) == 0, cube - square * p[0], rest)
    assert not found.separable and found.evaluations < 600
    assert gradient_gap([found.mean[0][0]], [truth]) <= ENUMERATION


def test_a_gradient_that_is_not_finite_is_refused_even_where_it_would_cancel():
    def infinite(r: Rollouts) -> torch.Tensor:
        return r.token_sum(torch.sqrt((r.student_logprobs - r.student_logprobs.detach()).abs()))

    with pytest.raises(LossError, match="NaN or inf"):
        expected_gradient(infinite, *random_pair(2, 2))


# Losses that treat rollouts alone but for a few batches.


def first_reward(r):
    return (r.log_u.detach() * r.mask).sum(-1)


def skips_equal_returns(r):
    reward = first_reward(r)
    return (0.0 if bool((reward - reward[0]).abs().max() < 1e-12) else 1.0) * k2(r)


def drops_duplicates(r):
    kept = {tuple(row): i for i, row in enumerate(r.tokens.tolist())}
    index = torch.tensor(sorted(kept.values()))
    return (r.mask * r.log_u.square() / 2)[index].sum() / len(r.tokens)


def halves_one_pair(r):
    special = bool((r.tokens[0] == 2).all()) and bool((r.tokens[-1] == 1).all())
    return (0.5 if special else 1.0) * k2(r)


def mapped_skip(r):
    reward = first_reward(r)
    return torch.where((reward - reward[0]).abs().max() < 1e-12, 0.0, 1.0) * k2(r)


@pytest.mark.parametrize("loss", some([skips_equal_returns, drops_duplicates, halves_one_pair, mapped_skip], 2))
@pytest.mark.parametrize("batch_size", some([2, 3], 2))
def test_coupling_of_a_few_batches_only_is_not_overlooked(loss, batch_size):
    pair = random_pair(3, 2, seed=3)
    found = gradient_moments(loss, *pair, batch_size)
    mean, variance = brute_force(loss, *pair, batch_size)
    assert not found.separable and found.sampled == ""
    assert gradient_gap(found.mean, mean) <= ENUMERATION
    assert found.variance == pytest.approx(variance, rel=1e-9)
    sampled = gradient_moments(loss, *pair, batch_size, thorough=False)
    assert sampled.sampled == "company" or not sampled.separable


def test_what_a_sample_had_to_judge_is_said():
    pair = random_pair(3, 2, seed=3)
    assert gradient_moments(k2, *pair, 2).sampled == ""
    assert gradient_moments(k2, *pair, 12).sampled == "company"
    assert gradient_moments(token_mean, *random_pair(2, 2, eos=0), 12).sampled == "order"


def test_an_order_that_a_sample_misses_is_found():
    """One batch in one order: all others are symmetric."""

    def minds_one_order(r):
        odd = bool((r.tokens[0] == 2).all()) and bool((r.tokens[1:] == 0).all())
        return (3.0 if odd else 1.0) * k2(r)

    pair = random_pair(3, 2, seed=3)
    mean, _ = brute_force(minds_one_order, *pair, 3)
    assert gradient_gap(gradient_moments(minds_one_order, *pair, 3).mean, mean) <= ENUMERATION


def test_a_loss_that_cannot_be_mapped_gives_the_mapped_numbers():
    def called(r):
        assert float(r.mask.sum()) > 0  # a branch on a value, which vmap refuses
        return k2(r)

    pair = random_pair(3, 3, eos=0, seed=4)
    for batch_size in (1, 2):
        mapped, single = (gradient_moments(loss, *pair, batch_size) for loss in (k2, called))
        assert mapped.evaluations < single.evaluations
        assert gradient_gap(mapped.mean, single.mean) <= 1e-15 and mapped.separable == single.separable


def test_a_loss_that_maps_to_other_numbers_is_called():
    """`len(r.tokens)` is the batch within `vmap` too, but a loss may count its calls' devices or grad modes."""

    def differs(r):
        return (2.0 if torch._C._functorch.is_batchedtensor(r.tokens) else 1.0) * k2(r)

    pair = random_pair(3, 2, seed=4)
    assert gradient_gap(gradient_moments(differs, *pair).mean, gradient_moments(k2, *pair).mean) <= 1e-15


ZEROS = {
    "own detached copy": lambda r: r.token_sum(
        (r.student_logits.softmax(-1) * (r.student_logits - r.student_logits.detach())).sum(-1) * 0.0
        + (
            r.student_logits.log_softmax(-1).exp()
            * (r.student_logits.log_softmax(-1) - r.student_logits.log_softmax(-1).detach())
        ).sum(-1)
    ),
    "in float32": lambda r: r.token_sum(
        torch.nn.functional.kl_div(
            r.student_logits.float().log_softmax(-1),
            r.student_logits.detach().float().log_softmax(-1),
            log_target=True,
            reduction="none",
        ).sum(-1)
    ),
    "times 1e-20": lambda r: 1e-20 * ZEROS["own detached copy"](r),
    "k1": lambda r: r.token_sum(-r.log_u),
}


@pytest.mark.parametrize("name", ZEROS)
def test_zero_is_measured_against_the_terms_that_cancel(name):
    assert gradient_moments(ZEROS[name], *random_pair(3, 2, seed=1)).is_zero


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e-20, 1e20])
@pytest.mark.parametrize("distance", [1.0, 1e-3])
def test_a_small_gradient_is_not_zero(factor, distance):
    pair = random_pair(3, 2, seed=1, distance=distance)
    assert not gradient_moments(lambda r: factor * k2(r), *pair).is_zero
    whole = estimator("full_vocab", "jsd")
    assert not gradient_moments(lambda r: factor * whole(r), *pair).is_zero


def test_a_mapping_that_is_wrong_where_rollouts_differ_is_not_believed():
    """On copies of one rollout the loss is zero, mapped or not."""

    def others(r):
        reward = (r.log_u.detach() * r.mask).sum(-1, keepdim=True)
        wrong = 2.0 if torch._C._functorch.is_batchedtensor(r.tokens) else 1.0
        return -wrong * r.token_sum((reward - reward.flip(0)) * r.student_logprobs)

    pair = random_pair(3, 1, seed=4)
    for thorough in (True, False):
        found = gradient_moments(others, *pair, 2, thorough=thorough)
        assert gradient_gap(found.mean, exact_gradient(*pair, "reverse_kl")) <= ENUMERATION
