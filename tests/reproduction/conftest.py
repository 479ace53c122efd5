from __future__ import annotations

from tests.reproduction.stand_in import stand_in  # noqa: F401
