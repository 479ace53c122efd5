"""Exact expectations on policies small enough to enumerate, in float64."""

from opdtheory.exact.enumeration import Enumeration, enumerated_value
from opdtheory.exact.expectation import GradientMoments, Loss, expected_gradient, gradient_moments
from opdtheory.exact.finite_state import FiniteStatePolicy, MarkovPolicy
from opdtheory.exact.histories import local_gradient
from opdtheory.exact.least_variance import Estimate, LeastVariance, least_variance
from opdtheory.exact.oracle import OBJECTIVES, exact_gradient, exact_value
from opdtheory.exact.per_rollout import SampledMoments, rollout_gradients, sampled_moments
from opdtheory.exact.policies import ModulePolicy, Policy, TabularPolicy, random_pair
from opdtheory.exact.sampled_tail import TailMoments, tail_moments
from opdtheory.exact.second_moments import RolloutMoments, rollout_moments

__all__ = [
    "OBJECTIVES",
    "Enumeration",
    "Estimate",
    "FiniteStatePolicy",
    "GradientMoments",
    "LeastVariance",
    "Loss",
    "MarkovPolicy",
    "ModulePolicy",
    "Policy",
    "RolloutMoments",
    "SampledMoments",
    "TabularPolicy",
    "TailMoments",
    "enumerated_value",
    "exact_gradient",
    "exact_value",
    "expected_gradient",
    "gradient_moments",
    "least_variance",
    "local_gradient",
    "random_pair",
    "rollout_gradients",
    "rollout_moments",
    "sampled_moments",
    "tail_moments",
]
