"""The library's own estimators in place of a loss."""

from __future__ import annotations

import pytest

from opdtheory.auditing.fixes.substitutes import last_resort
from tests.auditing.fixes.losses import facts_of, zoo


@pytest.mark.parametrize("name", ["opd_plus", "return_to_go", "sequence_opd_plus"])
@pytest.mark.parametrize("off_policy", [0.0, 0.4])
def test_the_last_resort_is_always_exact(name: str, off_policy: float) -> None:
    granularity = {"opd_plus": "token_local", "return_to_go": "token_return", "sequence_opd_plus": "sequence"}[name]
    changed = {"off_policy": off_policy, "eos": 0, "gamma": 0.5 if granularity == "token_return" else 1.0}
    facts = facts_of(zoo("power", alpha=0.5), "jsd", granularity, **changed)
    resort = last_resort(facts)
    assert name in resort.text
    assert facts.trial(resort.loss)[0] == "exact"
