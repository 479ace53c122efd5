"""Estimators of the distillation gradient: losses of a batch of rollouts, each with a claim."""

from opdtheory.estimators.base import Claim, Estimator
from opdtheory.estimators.factory import estimator, estimator_names

__all__ = ["Claim", "Estimator", "estimator", "estimator_names"]
