from __future__ import annotations

from pathlib import Path

import pytest
from coq import Coq, Missing


@pytest.fixture
def coq(tmp_path: Path) -> Coq:
    """Coq with Coquelicot; tests that need it are skipped where it is not installed."""
    try:
        return Coq.found("coqc", tmp_path)
    except Missing as missing:
        pytest.skip(str(missing).splitlines()[0])
