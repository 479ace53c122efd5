"""The gradient that an estimator gives a language model, compared with theory at prefixes or on every rollout."""

from __future__ import annotations

from opdtheory.training.validation.comparison import compare, random_images
from opdtheory.training.validation.entry import validate
from opdtheory.training.validation.enumerated import validate_by_enumeration
from opdtheory.training.validation.prefixes import Prefixes
from opdtheory.training.validation.report import Validation

__all__ = ["Prefixes", "Validation", "compare", "random_images", "validate", "validate_by_enumeration"]
