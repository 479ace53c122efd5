"""Sampled steps: a faithful update is rarely called biased, a wrong one is, and a fault without variance is seen."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.end_to_end import audit_update, trainer_pair
from opdtheory.end_to_end.claims import claimed_gradient
from opdtheory.end_to_end.played import play_update
from opdtheory.end_to_end.sampling import judged
from tests.end_to_end.update_faults import FAULTS, loop, policy_gradient, reverse_kl
from tests.sparse import some


def outcomes(played) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of all outcomes, and their probabilities."""
    gradients = torch.stack([leaf.gradient.flatten() for leaf in played.leaves])
    return gradients, torch.tensor([leaf.probability for leaf in played.leaves])


def drawn(played, steps: int, seed: int) -> torch.Tensor:
    """Gradients drawn from the outcomes that were played: what sampling them would give."""
    gradients, chances = outcomes(played)
    generator = torch.Generator().manual_seed(seed)
    return gradients[torch.multinomial(chances, steps, replacement=True, generator=generator)]


def exact_of(pair, name: str) -> torch.Tensor:
    return claimed_gradient(pair, opd.divergence(name), "token_local").flatten()


def test_the_rate_of_false_alarms_is_the_stated_one() -> None:
    """At a rate of 5 %, of 300 samples of 500 steps; at most 5 % plus four standard errors."""
    pair = trainer_pair()
    played = play_update(loop(policy_gradient(lambda x: x)), pair)
    exact = exact_of(pair, "reverse_kl")
    met = (outcomes(played)[0] != 0).any(0)
    alarms = [judged(drawn(played, 500, seed)[:, met], exact[met], 0.05).verdict == "biased" for seed in range(300)]
    assert sum(alarms) / 300 < 0.05 + 4 * (0.05 * 0.95 / 300) ** 0.5
    other = exact_of(pair, "forward_kl")[met]
    assert all(judged(drawn(played, 1_000, seed)[:, met], other, 0.05).verdict == "biased" for seed in range(5))


@pytest.mark.parametrize("claim", ["reverse_kl", "forward_kl"])
def test_the_difference_that_is_not_excluded_holds_the_true_one(claim: str) -> None:
    """At a rate of 5 %, of 200 samples of 500 steps: for a faithful update, with no difference, and another claim."""
    pair = trainer_pair()
    played = play_update(loop(policy_gradient(lambda x: x)), pair)
    exact, mean = exact_of(pair, claim), played.gradient.flatten()
    scale = float(mean @ exact / (exact @ exact))
    true = float((mean - scale * exact).norm()) / (scale * float(exact.norm()))
    met = (outcomes(played)[0] != 0).any(0)
    missed = [judged(drawn(played, 500, seed)[:, met], exact[met], 0.05).radius < true for seed in range(200)]
    assert sum(missed) / 200 < 0.05 + 4 * (0.05 * 0.95 / 200) ** 0.5
    assert (true > 0.1) is (claim == "forward_kl")


@pytest.mark.parametrize(
    ("name", "verdict"),
    some([("one token late", "biased"), ("k3 loss", "biased"), ("uphill", "biased")]),
)
def test_a_fault_is_found_by_sampling(name: str, verdict: str) -> None:
    found = audit_update(FAULTS[name][0], "reverse_kl", method="monte_carlo")
    assert found.verdict == verdict and found.monte_carlo == 1_000 and not found.variants, str(found)


def test_a_faithful_update_passes_by_sampling_and_says_how_sure_it_is() -> None:
    found = audit_update(loop(reverse_kl), "reverse_kl", limit=10)
    assert found.verdict == "exact_up_to_scale" and found.passes and found.monte_carlo == 1_000
    assert "of the gradient is excluded" in found.words[0] and "0.001" in found.words[0]
    assert found.headline == "EXACT UP TO SCALE, BY SAMPLING" and any("steps were sampled" in x for x in found.limits)
    few = play_update(loop(policy_gradient(lambda x: x)), trainer_pair())
    assert judged(drawn(few, 60, 0), exact_of(few.pair, "reverse_kl")).verdict == "undecided"


def test_an_entry_without_variance_is_compared_exactly() -> None:
    """A prompt's own rows get the same gradient in every step: no standard error speaks of them."""
    pair = trainer_pair()
    played, exact = play_update(loop(reverse_kl), pair), exact_of(pair, "reverse_kl")
    entry = pair.student.model.rows.row(pair.prompt_tokens[1][:1]) * len(pair.tokenizer) + 2
    assert float(exact[entry]) == 0.0
    steps = drawn(played, 1_000, 0)
    assert judged(steps, exact).verdict == "exact_up_to_scale"
    leak = steps.clone()
    leak[:, entry] += 0.01
    found = judged(leak, exact)
    assert found.verdict == "biased" and "never varies" in found.words
