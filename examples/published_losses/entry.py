"""One published loss with the claim it is held to."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import opdtheory as opd

__all__ = ["OURS", "Entry", "described"]

# The "package" of the losses that are written here from a paper's description.
OURS = "papers"

_MODULES = {
    "liger-kernel": "liger_losses",
    "ms-swift": "swift_losses",
    "twinkle-kit": "twinkle_losses",
    "tinker-cookbook": "tinker_losses",
    OURS: "papers",
}


@dataclass(frozen=True)
class Entry:
    """One published loss with the claim it is held to.

    Attributes:
        function: name of the adapter.
        label: name of the loss in the table.
        package: the package it is imported from, or `OURS`.
        source: where the published function lives, or the link to the paper.
        says: the claim, short enough for a table.
        quote: the words of the documentation that the claim rests on.
        objective: the claimed divergence, as a catalogue name.
        parameters: parameters of that catalogue entry.
        granularity: the claimed granularity.
        settings: further arguments of `audit`.
        remark: what the verdict does not say by itself.
        follows: what the loss descends if the catalogue has no name for it; a test checks this.
        module: the module of the adapter, if it is not the package's.
    """

    function: str
    label: str
    package: str
    source: str
    says: str
    quote: str
    objective: str
    parameters: dict[str, float] = field(default_factory=dict)
    granularity: str = "token_local"
    settings: dict[str, Any] = field(default_factory=dict)
    remark: str = ""
    follows: str = ""
    module: str = ""

    @property
    def loss(self) -> Callable[[opd.Rollouts], Any]:
        """The adapter; loading it imports neither the package nor the adapters of other packages."""
        return getattr(self._adapters(), self.function)

    @property
    def version(self) -> str | None:
        """The version of the installed package: None if it is not installed, empty for `OURS`."""
        if self.package == OURS:
            return ""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None

    @property
    def origin(self) -> str:
        """The package with its version, for a table."""
        return "as described" if self.package == OURS else f"{self.package} {self.version}"

    def audit(self) -> opd.Audit:
        """The audit against the claim."""
        claim = opd.divergence(self.objective, **self.parameters)
        return opd.audit(self.loss, claim, self.granularity, name=self.function, details=False, **self.settings)

    def _adapters(self) -> ModuleType:
        name = self.module or _MODULES.get(self.package, f"{self.package}_losses")
        return importlib.import_module(f"examples.published_losses.{name}")


def described(
    function: str,
    label: str,
    link: str,
    says: str,
    objective: str = "reverse_kl",
    remark: str = "",
    follows: str = "",
    *,
    granularity: str = "token_local",
    settings: dict[str, Any] | None = None,
    module: str = "",
    **parameters: float,
) -> Entry:
    """The entry of a loss that is written here from its description at a link; the other arguments are its fields."""
    return Entry(
        function,
        label,
        OURS,
        link,
        says,
        "",
        objective,
        parameters,
        granularity,
        settings or {},
        remark=remark,
        follows=follows,
        module=module,
    )
