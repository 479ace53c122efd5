"""Fixtures that the commands share with the packages that they call."""

from __future__ import annotations

from tests.reproduction.stand_in import stand_in  # noqa: F401
from tests.verification.conftest import verification  # noqa: F401
