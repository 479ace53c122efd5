r"""A sampled audit as a whole: the verdict, the name of what the loss follows, the weight, and all three in words.

The error rate $\alpha$ bounds the probability that any statement of the audit is wrong. Half of it goes to the search
for the verdict, a quarter to the fresh draws that confirm a name, in equal parts, and a quarter to the weight. The
union bound adds them up, so the parts need not be independent. The module `confidence` says how each part is divided.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from opdtheory.auditing.black_box import BlackBox
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.sampling.followed import CONFIRMATIONS, Named, name_followed, small_batch
from opdtheory.auditing.sampling.montecarlo import ALPHA, Search
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult
from opdtheory.auditing.sampling.scout import Scout
from opdtheory.auditing.sampling.weights import SampledWeight, sampled_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.objective import Objective

__all__ = ["sampled"]

_MARGIN = 0.05

# Shares of the error rate.
_VERDICT, _NAME, _WEIGHT = 0.5, 0.25, 0.25

# Budget of calls of the loss and of seconds for one stream, and of seconds for the weight.
_BATCHES, _SECONDS, _WEIGHT_SECONDS = 20_000, 30.0, 5.0

# The seeds of streams differ by multiples of this.
_APART = 7919


def sampled(
    loss: BlackBox, objective: Objective, scenario: Scenario, *, weigh: bool, alpha: float = ALPHA
) -> tuple[MonteCarloResult, RecoveredWeight]:
    """Compare a loss with its claim by sampling, name what it follows instead, and recover its weight.

    Args:
        loss: the black box.
        objective: the claimed objective.
        scenario: what the rollouts look like.
        weigh: whether to recover the weight.
        alpha: probability that any statement is wrong, between 0 and 1/2.

    Returns:
        The verdict with its intervals and the confirmed objective, if any; and the weight, if it is to be recovered.

    Raises:
        InvalidArgumentError: as `monte_carlo_compare`.
        BudgetExceededError: as `monte_carlo_compare`.
        LossError: as `monte_carlo_compare`.
    """
    # Two pairs, near and far, as each needs thousands of rollouts.
    cases = scenario.single.pairs()[1:4:2]

    def restart(other: Objective, number: int) -> Search:
        apart = replace(scenario, seed=scenario.seed + _APART * number)
        share = _VERDICT if number == 0 else _NAME / CONFIRMATIONS
        return Search(loss, cases, other, apart, share * alpha, _BATCHES, _SECONDS)

    search = restart(objective, 0)
    verdict = search.run(_MARGIN)
    scout: Scout | None = None
    if weigh or verdict == "biased":
        scout = small_batch(loss, objective.granularity, scenario)
    named: Named | None = None
    if verdict == "biased":
        search.settle(_MARGIN)
        named = name_followed(search, scout, restart, scenario.batch_size, _MARGIN)
    result = search.result(verdict, None if named is None else named.identified, _MARGIN, alpha)
    if not weigh:
        return result, RecoveredWeight.unknown()
    found = sampled_weight(
        loss,
        objective if named is None else named.objective,
        scenario,
        alpha=_WEIGHT * alpha,
        seconds=_WEIGHT_SECONDS,
    )
    words = [result.words, found.words(scenario.batch_size), *_beside(found, scout, scenario.batch_size)]
    return replace(result, words=" ".join(words)), found.recovered()


def _beside(found: SampledWeight, scout: Scout | None, batch_size: int) -> list[str]:
    """How the exact weight at a smaller batch size, if known, relates to the sampled one."""
    if scout is None or not scout.weight.depends_on_ratio_only or found.separated:
        return []
    from scipy.interpolate import PchipInterpolator

    exact = PchipInterpolator(scout.weight.log_u.numpy(), scout.weight.weight.numpy())
    scale = found.holds(torch.from_numpy(exact(found.log_u.numpy())))
    whose = f"the exact weight at batch size {scout.batch_size}"
    whose += f" ({scout.label})" if scout.label not in (None, "no formula found") else ""
    if scale is None:
        return [f"No positive multiple of {whose} lies in all intervals: the weight changes with the batch size."]
    return [
        f"{scale:.4g} times {whose} lies in all intervals, which does not prove that it is the same at {batch_size}."
    ]
