"""Small verifications, shared by the tests of the command, the record and the page."""

from __future__ import annotations

import functools

from opdtheory.theorems import IdentityResult, StepResult, TheoremResult
from opdtheory.verification.verify import Verification, verify


@functools.cache
def few() -> Verification:
    """Two quick theorems and a few estimators; tests/laws runs all of them."""
    return verify(["T1b", "T8c", "k1_loss", "k3_loss", "sign"])


def of(*identities: IdentityResult, steps: bool = True) -> Verification:
    """A run of one theorem that found these."""
    step = StepResult("1 = 1", "arithmetic", steps, False)
    return Verification([TheoremResult("T0", "name", [step], list(identities), 0.1)], [], 1.0)
