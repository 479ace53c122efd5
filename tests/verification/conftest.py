from __future__ import annotations

import pytest

from opdtheory.verification.verify import Verification
from tests.verification.runs import few


@pytest.fixture(scope="module")
def verification() -> Verification:
    return few()
