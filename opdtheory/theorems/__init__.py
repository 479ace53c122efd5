"""The statements of the theory as objects that run their own checks."""

from opdtheory.theorems.local import identities
from opdtheory.theorems.theorem import Identity, IdentityResult

__all__ = ["Identity", "IdentityResult", "identities"]
