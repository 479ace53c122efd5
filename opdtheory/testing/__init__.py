"""For the tests of a project that writes losses: `assert_unbiased`, and hypothesis strategies.

The assertions need nothing beyond opdtheory; the strategies need hypothesis, which loads at the first use of one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opdtheory.testing.laws import assert_claim, assert_unbiased, claim_settings, gradient_gap

if TYPE_CHECKING:
    from opdtheory.testing.strategies import divergences as divergences
    from opdtheory.testing.strategies import policies as policies
    from opdtheory.testing.strategies import policy_pairs as policy_pairs
    from opdtheory.testing.strategies import rollouts as rollouts

_STRATEGIES = ("divergences", "policies", "policy_pairs", "rollouts")

__all__ = [
    "assert_claim",
    "assert_unbiased",
    "claim_settings",
    "divergences",
    "gradient_gap",
    "policies",
    "policy_pairs",
    "rollouts",
]


def __getattr__(name: str) -> Any:
    if name not in _STRATEGIES:
        raise AttributeError(f"module 'opdtheory.testing' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("opdtheory.testing.strategies"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
