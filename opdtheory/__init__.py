"""opdtheory: what an on-policy-distillation loss really does.

Exact expected gradients of any loss on enumerated policies, the objective that it descends, and the f-divergence
estimators of on-policy distillation with their claims.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opdtheory.version import __version__

# Where each public name lives; modules load at the first use of one of their names (PEP 562).
_NAMES = {
    "adapters": ("bind", "from_advantage", "from_hidden", "from_logits", "from_logprobs", "from_top_k"),
    "auditing": ("Audit", "audit"),
    "divergences": ("Divergence", "divergence", "implied_generator", "u"),
    "end_to_end": ("TrainerAudit", "audit_trainer", "audit_update", "trainer_pair"),
    "estimators": ("Claim", "Estimator", "estimator", "estimator_names"),
    "exact": (
        *("FiniteStatePolicy", "MarkovPolicy", "ModulePolicy", "TabularPolicy", "random_pair"),
        *("exact_gradient", "exact_value", "expected_gradient", "rollout_moments"),
    ),
    "kernels": (
        *("fused_divergence", "fused_linear_divergence", "fused_parallel_divergence"),
        *("fused_sampled_tail", "fused_top_k_divergence"),
    ),
    "monitoring": ("Diagnosis", "Monitor", "diagnose", "diagnose_file", "recommend"),
    "rollouts": ("Rollouts",),
    "training.config": ("TrainConfig",),
    "training.trainer": ("train",),
    "training.validation": ("validate",),
}
_HOMES = {name: f"opdtheory.{module}" for module, names in _NAMES.items() for name in names}
_MODULES = ("divergences", "testing")

__all__ = [*_HOMES, *_MODULES, "__version__"]

if TYPE_CHECKING:
    from opdtheory import divergences as divergences
    from opdtheory import testing as testing
    from opdtheory.adapters import bind as bind
    from opdtheory.adapters import from_advantage as from_advantage
    from opdtheory.adapters import from_hidden as from_hidden
    from opdtheory.adapters import from_logits as from_logits
    from opdtheory.adapters import from_logprobs as from_logprobs
    from opdtheory.adapters import from_top_k as from_top_k
    from opdtheory.auditing import Audit as Audit
    from opdtheory.auditing import audit as audit
    from opdtheory.divergences import Divergence as Divergence
    from opdtheory.divergences import divergence as divergence
    from opdtheory.divergences import implied_generator as implied_generator
    from opdtheory.divergences import u as u
    from opdtheory.end_to_end import TrainerAudit as TrainerAudit
    from opdtheory.end_to_end import audit_trainer as audit_trainer
    from opdtheory.end_to_end import audit_update as audit_update
    from opdtheory.end_to_end import trainer_pair as trainer_pair
    from opdtheory.estimators import Claim as Claim
    from opdtheory.estimators import Estimator as Estimator
    from opdtheory.estimators import estimator as estimator
    from opdtheory.estimators import estimator_names as estimator_names
    from opdtheory.exact import FiniteStatePolicy as FiniteStatePolicy
    from opdtheory.exact import MarkovPolicy as MarkovPolicy
    from opdtheory.exact import ModulePolicy as ModulePolicy
    from opdtheory.exact import TabularPolicy as TabularPolicy
    from opdtheory.exact import exact_gradient as exact_gradient
    from opdtheory.exact import exact_value as exact_value
    from opdtheory.exact import expected_gradient as expected_gradient
    from opdtheory.exact import random_pair as random_pair
    from opdtheory.exact import rollout_moments as rollout_moments
    from opdtheory.kernels import fused_divergence as fused_divergence
    from opdtheory.kernels import fused_linear_divergence as fused_linear_divergence
    from opdtheory.kernels import fused_parallel_divergence as fused_parallel_divergence
    from opdtheory.kernels import fused_sampled_tail as fused_sampled_tail
    from opdtheory.kernels import fused_top_k_divergence as fused_top_k_divergence
    from opdtheory.monitoring import Diagnosis as Diagnosis
    from opdtheory.monitoring import Monitor as Monitor
    from opdtheory.monitoring import diagnose as diagnose
    from opdtheory.monitoring import diagnose_file as diagnose_file
    from opdtheory.monitoring import recommend as recommend
    from opdtheory.rollouts import Rollouts as Rollouts
    from opdtheory.training.config import TrainConfig as TrainConfig
    from opdtheory.training.trainer import train as train
    from opdtheory.training.validation import validate as validate


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in _MODULES:
        value = importlib.import_module(f"opdtheory.{name}")
    else:
        raise AttributeError(f"module 'opdtheory' has no attribute {name!r}")
    # Stored, so that the next look-up does not come here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
