"""One trainer in one setting, and what it is said to minimise."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Entry"]


@dataclass(frozen=True)
class Entry:
    """A trainer in one setting.

    Attributes:
        name: the trainer and the setting.
        package: the package that it is from.
        build: makes it, for `audit_trainer`; or the update itself, for `audit_update`.
        claim: the divergence that its documentation or its name states.
        says: where it says so, and what.
        is_update: whether `build` is an update.
        settings: further arguments of the audit.
    """

    name: str
    package: str
    build: Callable[..., Any]
    claim: str
    says: str
    is_update: bool
    settings: dict[str, Any]

    @classmethod
    def of(
        cls,
        name: str,
        package: str,
        build: Callable[..., Any],
        claim: str,
        says: str,
        is_update: bool = False,
        **settings: Any,
    ) -> Entry:
        """An entry."""
        return cls(name, package, build, claim, says, is_update, settings)
