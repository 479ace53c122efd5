"""opdtheory: what an on-policy-distillation loss really does.

Exact expected gradients of any loss on enumerated policies, the objective it follows, and the
f-divergence estimators of on-policy distillation with the claims they keep.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from opdtheory.version import __version__

# Where each public name lives; modules load at the first use of one of their names (PEP 562).
_HOMES = {
    "Audit": "opdtheory.auditing",
    "Claim": "opdtheory.estimators",
    "Divergence": "opdtheory.divergences",
    "Estimator": "opdtheory.estimators",
    "FiniteStatePolicy": "opdtheory.exact",
    "MarkovPolicy": "opdtheory.exact",
    "ModulePolicy": "opdtheory.exact",
    "Rollouts": "opdtheory.rollouts",
    "TabularPolicy": "opdtheory.exact",
    "TrainConfig": "opdtheory.training.config",
    "audit": "opdtheory.auditing",
    "bind": "opdtheory.adapters",
    "divergence": "opdtheory.divergences",
    "estimator": "opdtheory.estimators",
    "estimator_names": "opdtheory.estimators",
    "exact_gradient": "opdtheory.exact",
    "exact_value": "opdtheory.exact",
    "expected_gradient": "opdtheory.exact",
    "from_advantage": "opdtheory.adapters",
    "from_hidden": "opdtheory.adapters",
    "from_logits": "opdtheory.adapters",
    "from_logprobs": "opdtheory.adapters",
    "from_top_k": "opdtheory.adapters",
    "fused_divergence": "opdtheory.kernels",
    "fused_linear_divergence": "opdtheory.kernels",
    "fused_parallel_divergence": "opdtheory.kernels",
    "fused_top_k_divergence": "opdtheory.kernels",
    "implied_generator": "opdtheory.divergences",
    "random_pair": "opdtheory.exact",
    "rollout_moments": "opdtheory.exact",
    "train": "opdtheory.training.trainer",
    "u": "opdtheory.divergences",
    "validate": "opdtheory.training.validation",
}
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
    from opdtheory.kernels import fused_top_k_divergence as fused_top_k_divergence
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
    # Kept, so that the next look-up finds it without coming here.
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
