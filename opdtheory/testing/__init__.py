"""Test tools for projects with losses of their own: assertions, the mark of the pytest plugin, hypothesis strategies.

The assertions need only opdtheory and import torch at their first use; the strategies need hypothesis.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opdtheory.testing.assertions import assert_claim as assert_claim
    from opdtheory.testing.assertions import assert_minimises as assert_minimises
    from opdtheory.testing.assertions import assert_same_gradient as assert_same_gradient
    from opdtheory.testing.assertions import assert_unbiased as assert_unbiased
    from opdtheory.testing.assertions import claim_settings as claim_settings
    from opdtheory.testing.assertions import gradient_gap as gradient_gap
    from opdtheory.testing.marks import opd_loss as opd_loss
    from opdtheory.testing.marks import opd_trainer as opd_trainer
    from opdtheory.testing.strategies import divergences as divergences
    from opdtheory.testing.strategies import policies as policies
    from opdtheory.testing.strategies import policy_pairs as policy_pairs
    from opdtheory.testing.strategies import rollouts as rollouts

# The pytest plugin is in this package and must load in milliseconds, so nothing here imports torch eagerly.
_HOMES = {
    "assert_claim": "assertions",
    "assert_minimises": "assertions",
    "assert_same_gradient": "assertions",
    "assert_unbiased": "assertions",
    "claim_settings": "assertions",
    "divergences": "strategies",
    "gradient_gap": "assertions",
    "opd_loss": "marks",
    "opd_trainer": "marks",
    "policies": "strategies",
    "policy_pairs": "strategies",
    "rollouts": "strategies",
}

__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'opdtheory.testing' has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"opdtheory.testing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
