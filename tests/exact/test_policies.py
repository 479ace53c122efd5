"""Policies: shapes and rows, random generators, wrapped modules, and what is refused."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from torch import nn

from opdtheory import MarkovPolicy, ModulePolicy, TabularPolicy, random_pair
from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import Enumeration
from opdtheory.exact.policies import ROW_BUDGET, prefixes
from opdtheory.testing import gradient_gap, policies
from tests.tolerances import ALGEBRA, ENUMERATION


class Bag(nn.Module):
    """Next-token logits from the sum of the prefix's embeddings."""

    def __init__(self, vocab_size: int, width: int = 5, every_position: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(vocab_size, width).double()
        self.head = nn.Linear(width, vocab_size).double()
        self.every_position = every_position

    def forward(self, tokens):
        if self.every_position:
            return self.head(self.embedding(tokens).cumsum(1))
        return self.head(self.embedding(tokens).sum(1))


def refused(argument: str, make, *args, **kwargs) -> str:
    with pytest.raises(ValueError) as caught:
        make(*args, **kwargs)
    assert isinstance(caught.value, InvalidArgumentError)
    assert caught.value.argument == argument
    return str(caught.value)


@given(policies())
def test_levels_hold_one_row_per_prefix(policy):
    assert [tuple(level.shape) for level in policy.logits] == [
        (policy.vocab_size**n, policy.vocab_size) for n in range(policy.horizon)
    ]
    assert policy.tables() == policy.parameters() == policy.logits


@given(policies(zeros=(0, 1), sharp=True))
def test_probabilities_of_all_sequences_sum_to_one(policy):
    assert float(Enumeration.build(policy, policy).probability.sum()) == pytest.approx(1.0, abs=ENUMERATION)


def test_prefixes_are_in_the_order_of_the_rows():
    assert prefixes(3, 2).tolist() == [list(digits) for digits in itertools.product(range(3), repeat=2)]
    assert prefixes(3, 0).shape == (1, 0)


def test_equal_seeds_give_equal_policies():
    first, again, other = (TabularPolicy.random(3, 2, seed=seed) for seed in (0, 0, 1))
    assert gradient_gap(first.logits, again.logits) == 0.0
    assert gradient_gap(first.logits, other.logits) > 0.1


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    random_pair(3, 2, seed=7)
    MarkovPolicy.random(3, 2, seed=7)
    assert torch.equal(torch.rand(1), expected)


def test_scale_goes_from_uniform_to_nearly_deterministic():
    uniform, sharp = (TabularPolicy.random(4, 2, scale=scale, seed=0) for scale in (0.0, 200.0))
    assert float(uniform.logits[1].softmax(-1).max()) == pytest.approx(0.25, abs=ALGEBRA)
    assert float(sharp.logits[1].softmax(-1).amax(-1).min()) > 1 - 1e-3


def test_pairs_share_their_zeros_and_keep_their_distance():
    student, teacher = random_pair(5, 3, eos=0, distance=1e-3, zeros=2, seed=3)
    for ours, theirs in zip(student.logits, teacher.logits, strict=True):
        assert torch.equal(torch.isneginf(ours), torch.isneginf(theirs))
        assert torch.isneginf(ours).sum(-1).eq(2).all()
        assert 0 < float((ours - theirs)[:, :3].abs().max()) < 1e-2
    assert (teacher.vocab_size, teacher.horizon, teacher.eos) == (5, 3, 0)


def test_distance_zero_is_the_same_policy():
    student, teacher = random_pair(3, 2, distance=0.0, seed=1)
    assert gradient_gap(student.logits, teacher.logits) == 0.0


@pytest.mark.parametrize("every_position", [False, True])
@pytest.mark.parametrize("prompt", [(2,), (0, 1)])
def test_a_module_is_called_on_the_prompt_and_every_prefix(every_position, prompt):
    module = Bag(3, every_position=every_position)
    policy = ModulePolicy(module, vocab_size=3, horizon=3, prompt=prompt)
    with torch.no_grad():
        for n, level in enumerate(policy.tables()):
            for row, prefix in enumerate(prefixes(3, n).tolist()):
                logits = module(torch.tensor([[*prompt, *prefix]]))
                expected = logits[0, -1] if every_position else logits[0]
                assert gradient_gap([level[row]], [expected]) <= ALGEBRA


def test_only_parameters_that_require_gradients_count():
    module = Bag(3)
    module.embedding.weight.requires_grad_(False)
    policy = ModulePolicy(module, vocab_size=3, horizon=2)
    assert [p.shape for p in policy.parameters()] == [p.shape for p in module.head.parameters()]
    module.requires_grad_(False)
    refused("module", policy.pull_back, [table.detach() for table in policy.tables()])


def test_tabulating_detaches_and_copies():
    table = ModulePolicy(Bag(3), vocab_size=3, horizon=2).tabulate()
    assert not any(level.requires_grad for level in table.logits)
    copy = table.tabulate()
    copy.logits[0][0, 0] += 1.0
    assert gradient_gap(table.logits, copy.logits) > 0.1


@pytest.mark.parametrize("policy", [TabularPolicy.random(3, 2), MarkovPolicy.random(3, 2)])
def test_representations_say_the_sizes(policy):
    assert repr(policy) == f"{type(policy).__name__}(vocab_size=3, horizon=2, eos=None)"
    assert repr(ModulePolicy(Bag(3), 3, 2, eos=0)) == "ModulePolicy(Bag, vocab_size=3, horizon=2, eos=0)"


@pytest.mark.parametrize("kind", [TabularPolicy.random, MarkovPolicy.random, random_pair])
def test_sizes_below_one_are_refused(kind):
    assert "0" in refused("vocab_size", kind, 0, 2)
    assert "-1" in refused("horizon", kind, 2, -1)
    for eos in (2, -1):
        assert str(eos) in refused("eos", kind, 2, 2, eos=eos)
    for scale in (-1.0, float("nan"), float("inf")):
        refused("scale", kind, 2, 2, scale=scale)


@pytest.mark.bad_input
def test_fractional_sizes_are_refused():
    refused("vocab_size", TabularPolicy.random, 2.5, 2)
    refused("horizon", ModulePolicy, Bag(3), 3, 2.0)


@pytest.mark.parametrize("zeros", [-1, 3, 4])
def test_zeros_must_leave_a_token(zeros):
    assert "[0, 2]" in refused("zeros", TabularPolicy.random, 3, 2, zeros=zeros)


@pytest.mark.parametrize("distance", [-0.1, float("nan"), float("inf")])
def test_a_distance_is_finite_and_not_negative(distance):
    refused("distance", TabularPolicy.random(2, 1).perturbed, distance)


@pytest.mark.bad_input
def test_tables_of_a_wrong_shape_or_dtype_are_refused():
    good = TabularPolicy.random(3, 2).logits
    refused("logits", TabularPolicy, [])
    assert "(3, 3)" in refused("logits[1]", TabularPolicy, [good[0], good[1][:2]])
    assert "torch.float32" in refused("logits[0]", TabularPolicy, [good[0].float()])
    refused("logits[0]", TabularPolicy, [good[0].long()])
    chain = MarkovPolicy.random(3, 2)
    refused("initial", MarkovPolicy, chain.initial[:2], chain.transition, 2)
    refused("transition", MarkovPolicy, chain.initial, chain.transition[:2], 2)
    refused("transition", MarkovPolicy, chain.initial, chain.transition.float(), 2)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_unusable_logits_are_refused(value):
    logits = TabularPolicy.random(3, 2).logits
    logits[1][2, 1] = value
    refused("logits[1]", TabularPolicy, logits)
    logits[1][2] = -torch.inf
    refused("logits[1]", TabularPolicy, logits)


def test_a_module_with_wrong_logits_is_refused():
    refused("module(prefixes)", ModulePolicy(Bag(4), vocab_size=3, horizon=2, prompt=(0,)).tables)

    class Wrapped(Bag):
        def forward(self, tokens):
            return (super().forward(tokens),)

    assert "tuple" in refused("module", ModulePolicy(Wrapped(3), vocab_size=3, horizon=2).tables)


@pytest.mark.parametrize(
    "tabulate",
    [
        lambda: TabularPolicy.random(64, 1000),
        MarkovPolicy.random(64, 1000).tabulate,
        ModulePolicy(Bag(64), 64, 1000).tabulate,
    ],
)
def test_tables_beyond_the_budget_are_refused_with_the_count(tabulate):
    with pytest.raises(BudgetExceededError, match=f"{ROW_BUDGET:,}") as caught:
        tabulate()
    assert caught.value.count == 64**999 and caught.value.budget == ROW_BUDGET


def _spread(logits: list[torch.Tensor]) -> tuple[float, float]:
    """The standard deviation of many logits, and its own standard error at the value one."""
    values = torch.cat([level.flatten() for level in logits])
    return float(values.std()), 1 / (2 * len(values)) ** 0.5


def test_logits_are_as_spread_as_the_scale_says():
    for policy in (TabularPolicy.random(4, 6), MarkovPolicy.random(60, 3), random_pair(4, 6)[0]):
        spread, error = _spread(policy.tables() if isinstance(policy, TabularPolicy) else policy.parameters())
        assert abs(spread - 1.0) < 4 * error
    for scale in (0.5, 3.0):
        spread, error = _spread(TabularPolicy.random(4, 6, scale=scale).logits)
        assert abs(spread / scale - 1.0) < 4 * error


def test_noise_is_as_large_as_the_distance():
    student = TabularPolicy.random(4, 6)
    for distance in (1e-3, 2.0):
        noisy = student.perturbed(distance, seed=5)
        spread, error = _spread([(a - b) / distance for a, b in zip(noisy.logits, student.logits, strict=True)])
        assert abs(spread - 1.0) < 4 * error
    student, teacher = random_pair(4, 6)
    spread, error = _spread([a - b for a, b in zip(teacher.logits, student.logits, strict=True)])
    assert abs(spread - 1.0) < 4 * error
    assert not torch.isneginf(torch.cat([level.flatten() for level in student.logits])).any()


def test_pairs_of_different_seeds_differ_in_both_policies():
    noises = []
    for seed in (0, 1):
        student, teacher = random_pair(3, 1, seed=seed)
        noises.append(teacher.logits[0] - student.logits[0])
    assert float((noises[0] - noises[1]).abs().max()) > 0.1
    assert not torch.equal(random_pair(3, 1, seed=0)[0].logits[0], random_pair(3, 1, seed=1)[0].logits[0])


OTHER = [pytest.param(other, marks=pytest.mark.bad_input) for other in (1.0, "0")]


@pytest.mark.parametrize("position", [-1, 3, True, *OTHER])
def test_what_is_no_position_is_refused(position):
    with pytest.raises(InvalidArgumentError, match="environment.*position") as caught:
        TabularPolicy.random(2, 3, environment=(position,))
    assert caught.value.argument == "environment"


def test_positions_are_a_sorted_set():
    assert TabularPolicy.random(2, 3, environment=[2, 0, 2]).environment == (0, 2)
    policy = TabularPolicy.random(2, 3, environment=(1,))
    assert policy.tabulate().environment == policy.perturbed(1.0).environment == (1,)
    assert "environment=(1,)" in repr(policy) and "environment" not in repr(TabularPolicy.random(2, 3))
