"""Every shipped estimator keeps its claim under audit, and a false twin of it does not."""

from __future__ import annotations

import pytest

from opdtheory.estimators import Estimator
from opdtheory.verification.verify import check_estimator, shipped_estimators


# `make verify` does this too.
@pytest.mark.slow
@pytest.mark.parametrize("loss", list(shipped_estimators()), ids=repr)
def test_claim_holds_and_its_twin_is_refuted(loss: Estimator) -> None:
    result = check_estimator(loss)
    assert result.agrees, f"claims {result.claim}\n\n{result.audit}"
    assert result.twin_refuted, f"{result.twin}: {result.twin_verdict}"
