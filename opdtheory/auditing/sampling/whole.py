"""A sampled audit as a whole: the verdict, the name of what is followed, the weight, and the words for all three."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from opdtheory.auditing.black_box import BlackBox
from opdtheory.auditing.naming.objective import Aim
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.sampling.followed import name_followed, small_batch
from opdtheory.auditing.sampling.montecarlo import Search
from opdtheory.auditing.sampling.montecarlo_result import MonteCarloResult
from opdtheory.auditing.sampling.scout import Scout
from opdtheory.auditing.sampling.weights import SampledWeight, sampled_weight
from opdtheory.auditing.scenario import Case

__all__ = ["SampledAudit", "sampled"]

_MARGIN, _CONFIDENCE = 0.05, 0.99

# Calls of the loss and seconds that one stream may take, and seconds for the weight.
_BATCHES, _SECONDS, _WEIGHT_SECONDS = 20_000, 30.0, 5.0

# Streams differ in their seeds by multiples of this.
_APART = 7919


@dataclass(frozen=True)
class SampledAudit:
    """What sampling says of a loss.

    Attributes:
        result: the verdict with its intervals, and the objective followed, if one is confirmed.
        weight: as of an `Audit`, with `low` and `high`; empty where it was not looked for.
    """

    result: MonteCarloResult
    weight: dict[str, Any]


def sampled(
    loss: BlackBox,
    cases: list[Case],
    aim: Aim,
    panel: Callable[[int, int | None], list[Case]],
    *,
    batch_size: int,
    eos: int | None,
    off_policy: float,
    seed: int,
    shared_prompt: bool,
    weigh: bool,
) -> SampledAudit:
    """Compare a loss with its claim by sampling, name what it follows instead, and recover its weight.

    Args:
        loss: the black box.
        cases: pairs from which rollouts are drawn.
        aim: the claimed objective.
        panel: makes pairs for smaller batches, by batch size and end-of-sequence token.
        batch_size: rollouts that the loss sees at once.
        eos: the token that ends a rollout.
        off_policy: noise of the sampling policy's logits.
        seed: of everything drawn.
        shared_prompt: whether the rollouts of a batch answer one prompt.
        weigh: whether the weight is recovered.

    Raises:
        LossError: as `monte_carlo_compare`; likewise the others.
    """

    def restart(other: Aim, number: int) -> Search:
        own = seed + _APART * number
        return Search(loss, cases, other, batch_size, own, _CONFIDENCE, shared_prompt, _BATCHES, _SECONDS)

    search = restart(aim, 0)
    verdict = search.run(_MARGIN)
    scout: Scout | None = None
    if weigh or verdict == "biased":
        scout = small_batch(
            loss, lambda size: panel(size, eos), aim.granularity, batch_size, off_policy, seed, shared_prompt
        )
    named = name_followed(search, scout, restart, batch_size, _MARGIN) if verdict == "biased" else None
    result = search.result(verdict, None if named is None else named.identified, _MARGIN)
    if not weigh:
        return SampledAudit(result, _as_weight(None))
    found = sampled_weight(
        loss,
        batch_size,
        aim if named is None else named.aim,
        off_policy,
        seed,
        confidence=_CONFIDENCE,
        seconds=_WEIGHT_SECONDS,
    )
    words = [result.words, found.words(batch_size), *_beside(found, scout, batch_size)]
    return SampledAudit(replace(result, words=" ".join(words)), _as_weight(found))


def _beside(found: SampledWeight, scout: Scout | None, batch_size: int) -> list[str]:
    """What the exact weight at a smaller batch size has to do with the sampled one, if there is one."""
    if scout is None or not scout.weight.depends_on_ratio_only or found.separated:
        return []
    from scipy.interpolate import PchipInterpolator

    exact = PchipInterpolator(scout.weight.log_u.numpy(), scout.weight.weight.numpy())
    scale = found.holds(torch.from_numpy(exact(found.log_u.numpy())))
    whose = f"the one at batch size {scout.batch_size}, which is exact"
    whose += f" and {scout.label}" if scout.label not in (None, "no formula found") else ""
    if scale is None:
        return [f"No positive multiple of {whose}, lies in all of them: the weight changes with the batch size."]
    return [f"{scale:.4g} times {whose}, lies in all of them; that it is the same at {batch_size} is not proved."]


def _as_weight(found: SampledWeight | None) -> dict[str, Any]:
    empty = torch.zeros(0, dtype=torch.float64)
    if found is None:
        weight = RecoveredWeight(empty, empty, float("nan"), False, False, float("nan"))
        return {**vars(weight), "explains_panel": None}
    return {**vars(found.recovered()), "explains_panel": None, "low": found.low, "high": found.high}
