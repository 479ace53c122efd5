"""The theorems, as objects that derive themselves and run their own checks."""

from __future__ import annotations

import functools
import importlib
import re

from opdtheory.errors import InvalidArgumentError
from opdtheory.theorems.theorem import Identity, IdentityResult, Step, StepResult, Theorem, TheoremResult

__all__ = [
    "Identity",
    "IdentityResult",
    "Step",
    "StepResult",
    "Theorem",
    "TheoremResult",
    "theorems",
]

# The table of contents: every module that states theorems, by family. A new one needs a line here and nothing else.
_MODULES = (
    "gradient.opd_plus",
    "gradient.stop_gradient",
    "gradient.up_to_scale",
    "gradient.gauge",
    "gradient.control_variate",
    "gradient.blind",
    "weight.implied",
    "weight.bregman",
    "stability.attraction",
    "stability.gauge_cure",
    "stability.fixed_points",
    "sequences.objectives",
    "sequences.chain_rule",
    "sequences.endings",
    "sequences.return_to_go",
    "variance.constants",
    "variance.moments",
    "variance.rao_blackwell",
    "variance.groups",
    "variance.optimal_baselines",
    "variance.bounds",
    "variance.sampled_alone",
    "variance.known_tokens",
    "variance.leave_one_out",
    "samplers.offpolicy",
    "samplers.clipping",
    "samplers.support",
    "samplers.truncated_sampling",
    "samplers.truncated_ratios",
    "samplers.rollout_ratios",
    "samplers.histories",
    "truncation.top_k",
    "truncation.forms",
    "truncation.sampled_tail",
    "teachers.several",
    "teachers.extrapolated",
    "teachers.temperatures",
    "reductions.means",
    "reductions.windows",
    "vocabulary",
)


def theorems(*numbers: str) -> tuple[Theorem, ...]:
    """All theorems in the order of their numbers, T1, T1b, T2 and so on, or only those named.

    Raises:
        InvalidArgumentError: a number is that of no theorem.

    Example:
        >>> [theorem.name for theorem in theorems("T1", "T4")]
        ['OPD+ identity', 'implied divergence']
    """
    everything = {theorem.number: theorem for theorem in _all()}
    for number in numbers:
        if number not in everything:
            raise InvalidArgumentError("numbers", f"must be among {', '.join(everything)}, got {number!r}")
    return tuple(everything[number] for number in numbers or everything)


@functools.cache
def _all() -> tuple[Theorem, ...]:
    modules = [importlib.import_module(f"opdtheory.theorems.{name}") for name in _MODULES]
    found = [theorem for module in modules for theorem in module.theorems()]
    return tuple(sorted(found, key=_order))


def _order(theorem: Theorem) -> tuple[int, str]:
    number = re.fullmatch(r"T(\d+)([a-z]?)", theorem.number)
    if number is None:
        raise ValueError(f"the number of a theorem must be like T4 or T4b, got {theorem.number!r}")
    return int(number[1]), number[2]
