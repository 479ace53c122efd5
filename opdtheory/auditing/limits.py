"""What an audit did not ask, in sentences, with the setting that asks it."""

from __future__ import annotations

from collections.abc import Sequence

from opdtheory.auditing.scenario import Scenario
from opdtheory.auditing.worlds import LARGEST_LOG_U, SIZES, World

__all__ = ["limits"]

_SAMPLED = {
    "": "",
    "company": "That each rollout is treated alone in batches of {size} was seen on a sample of them, and proved for "
    "smaller batches where those were asked.",
    "order": "That the order of the rollouts in batches of {size} does not matter was seen on one other order of each.",
}


def limits(scenario: Scenario, worlds: Sequence[World], sampled: str, by_sampling: bool) -> tuple[str, ...]:
    """The limits of an audit.

    Args:
        scenario: what the rollouts of the panel looked like.
        worlds: the worlds that were asked beside the panel.
        sampled: what a sample of batches had to judge, as in `GradientMoments`.
        by_sampling: whether the audit drew batches instead of enumerating them.
    """
    found = [f"{world.name[:1].upper()}{world.name[1:]}: {world.detail}" for world in worlds if world.holds is None]
    if by_sampling:
        found.append(
            "Batches were drawn, not enumerated: the verdict holds up to the stated error rate and margin; a smaller "
            "batch_size is exact."
        )
    if sampled:
        found.append(_SAMPLED[sampled].format(size=scenario.batch_size))
    if not worlds:
        found.append(
            "Other lengths, prompts, batch sizes and vocabularies were not asked, as they are of a loss that follows "
            "an objective on the panel."
        )
    if worlds:
        found.append(
            f"Batches of more than {max(*SIZES, scenario.batch_size)}, "
            f"{_largest(worlds, ' tokens')}{_largest(worlds, ' steps')}"
            f"and |log u| above {LARGEST_LOG_U:g} were not asked."
        )
    if scenario.lengths == "fixed":
        found.append("Rollouts that end early were not asked: lengths='both' asks them.")
    if not scenario.off_policy:
        found.append("Only the student sampled: off_policy=0.3 asks about another sampling policy.")
    if not scenario.environment:
        found.append("No token was written by a tool: environment=(1,) asks about one.")
    if scenario.coupled and not scenario.shared_prompt:
        found.append("Rollouts of a batch had no prompt in common: prompts=2, shared_prompt=True asks about groups.")
    return tuple(found)


def _largest(worlds: Sequence[World], unit: str) -> str:
    sizes = [int(world.name.removesuffix(unit)) for world in worlds if world.name.endswith(unit)]
    return f"more than {max(sizes)}{unit}, " if sizes else ""
