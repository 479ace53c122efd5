"""Whether a framework is there, and of a version that its plug-in was written for."""

from __future__ import annotations

import importlib.metadata
import re

from opdtheory.errors import IntegrationError

__all__ = ["check_version"]


def check_version(package: str, first: tuple[int, int], last: tuple[int, int], extra: str) -> str:
    """The installed version of a package, whose major and minor number must lie in a range.

    Args:
        package: its name in the registry.
        first: the earliest major and minor number, included.
        last: the latest, included.
        extra: the extra of opdtheory that installs it.

    Raises:
        IntegrationError: it is missing, or its version is outside the range.
    """
    wanted = f"opdtheory supports {package} {first[0]}.{first[1]} to {last[0]}.{last[1]}"
    try:
        found = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        raise IntegrationError(f"{package} is not installed: {wanted}; pip install 'opdtheory[{extra}]'") from None
    numbers = re.match(r"(\d+)\.(\d+)", found)
    if numbers is None or not first <= (int(numbers[1]), int(numbers[2])) <= last:
        raise IntegrationError(f"{package} {found} is installed: {wanted}; pip install 'opdtheory[{extra}]'")
    return found
