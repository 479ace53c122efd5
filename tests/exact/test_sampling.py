"""Rollouts drawn from tables: their distribution and form, groups of one prompt, and what is never drawn."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from scipy import stats

from opdtheory.errors import BudgetExceededError, InvalidArgumentError
from opdtheory.exact import Enumeration, TabularPolicy, exact_gradient, random_pair
from opdtheory.exact.sampling import Sampler, sample_rollouts
from opdtheory.rollouts import Rollouts, gather_logprobs
from tests.exact.chains import chains
from tests.tolerances import ENUMERATION


def pair(vocab_size: int, horizon: int, eos: int | None = None) -> tuple[TabularPolicy, TabularPolicy]:
    return random_pair(vocab_size, horizon, eos=eos, scale=1.0, distance=1.0)


def test_drawn_logprobs_are_those_of_the_drawn_logits():
    student, teacher = random_pair(4, 3, eos=1, zeros=1)
    sample = Sampler.build(student, teacher, student.perturbed(0.3)).draw(50, torch.Generator().manual_seed(0))
    r = sample.rollouts
    expected = gather_logprobs(r.teacher_logits, r.tokens, r.mask)
    assert torch.equal(r.teacher_logprobs, expected)


@pytest.mark.parametrize("off_policy", [0.0, 0.7])
@pytest.mark.parametrize("eos", [None, 1])
def test_draws_follow_the_behaviour_distribution(eos: int | None, off_policy: float) -> None:
    """20000 rollouts, seed 5: a chi-square test of all sequences at 1e-4."""
    student, teacher = pair(3, 3, eos)
    behavior = student.perturbed(off_policy, seed=77) if off_policy else None
    everything = Enumeration.build(student, teacher, behavior)
    sample = sample_rollouts(student, teacher, 20_000, behavior, torch.Generator().manual_seed(5))
    index = {tuple(tokens): i for i, tokens in enumerate(everything.tokens.tolist())}
    drawn = torch.tensor([index[tuple(tokens)] for tokens in sample.rollouts.tokens.tolist()])
    counts = torch.bincount(drawn, minlength=len(everything)).numpy()
    expected = (20_000 * everything.probability / everything.probability.sum()).numpy()
    assert stats.chisquare(counts, expected).pvalue > 1e-4
    if off_policy:
        on_policy = Enumeration.build(student, teacher).probability
        assert stats.chisquare(counts, (20_000 * on_policy / on_policy.sum()).numpy()).pvalue < 1e-9


@pytest.mark.parametrize(("eos", "written"), [(None, ()), (1, ()), (1, (0,)), (1, (1,))])
def test_a_sample_has_the_form_of_an_enumeration(eos: int | None, written: tuple[int, ...]) -> None:
    student = TabularPolicy.random(3, 3, eos=eos, seed=0, environment=written)
    policies = student, student.perturbed(1.0, seed=1), student.perturbed(0.4, seed=2)
    everything = Enumeration.build(*policies)
    index = {tuple(tokens): i for i, tokens in enumerate(everything.tokens.tolist())}
    sample = Sampler.build(*policies).draw(200, torch.Generator().manual_seed(0))
    drawn = torch.tensor([index[tuple(tokens)] for tokens in sample.rollouts.tokens.tolist()])
    spelled = everything.rollouts(drawn)
    first = torch.tensor([0, 1, 4])
    assert torch.equal(sample.rows, everything.rows[drawn] + first)
    for field in dataclasses.fields(Rollouts):
        ours, theirs = getattr(sample.rollouts, field.name), getattr(spelled, field.name)
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=ENUMERATION, msg=field.name)
    assert sample.rollouts.student_logits.is_leaf and sample.rollouts.student_logits.requires_grad


@pytest.mark.parametrize("chain", [False, True])
def test_padding_reads_rows_that_no_live_position_reads(chain: bool) -> None:
    sample = sample_rollouts(*(chains(4, 5) if chain else pair(4, 5, eos=0)), 3000)
    live = sample.rollouts.mask > 0
    assert not set(sample.rows[live].tolist()) & set(sample.rows[~live].tolist())
    assert len(set(sample.rows[~live].tolist())) >= 1


def test_environment_tokens_are_masked_and_end_nothing() -> None:
    student = TabularPolicy.random(3, 3, eos=0, seed=0, environment=(1,))
    sample = sample_rollouts(student, student.perturbed(1.0, seed=1), 500)
    tokens, mask = sample.rollouts.tokens, sample.rollouts.mask
    assert float(mask[:, 1].sum()) == 0.0
    written_zero = (tokens[:, 0] != 0) & (tokens[:, 1] == 0)
    assert bool(written_zero.any()) and bool((mask[written_zero, 2] == 1).all())


def test_the_rollouts_of_a_group_share_their_prompt() -> None:
    student = TabularPolicy.random(4, 3, seed=0, environment=(0,))
    sampler = Sampler.build(student, student.perturbed(1.0, seed=1))
    tokens = sampler.draw(400, torch.Generator().manual_seed(0), group=4).rollouts.tokens.view(100, 4, 3)
    assert bool((tokens[..., 0] == tokens[:, :1, 0]).all()) and len(tokens[:, 0, 0].unique()) == 4
    assert not bool((tokens[..., 1] == tokens[:, :1, 1]).all())
    apart = sampler.draw(400, torch.Generator().manual_seed(0)).rollouts.tokens.view(100, 4, 3)
    assert not bool((apart[..., 0] == apart[:, :1, 0]).all())


def test_a_table_is_stacked_and_unstacked() -> None:
    for policies in (pair(3, 3), chains(3, 3)):
        sampler = Sampler.build(*policies)
        gradient = exact_gradient(*policies, "jsd")
        for there, back in zip(gradient, sampler.unstack(sampler.stack(gradient)), strict=True):
            torch.testing.assert_close(there, back, rtol=0, atol=0)


def test_zero_probability_is_never_drawn() -> None:
    student, teacher = random_pair(5, 3, zeros=2, seed=3)
    assert int(sample_rollouts(student, teacher, 5000).rollouts.tokens.max()) <= 2


def test_sizes_out_of_range_are_refused() -> None:
    with pytest.raises(BudgetExceededError):
        Sampler.build(*random_pair(4, 6), budget=1000)
    with pytest.raises(InvalidArgumentError, match="count"):
        sample_rollouts(*random_pair(2, 2), 0)
