"""The KL loss of OpenRLHF as functions `loss(rollouts) -> scalar`.

The adapter loads the published function and calls it; nothing of it is copied. Only the module of the function is
loaded: the package as a whole imports DeepSpeed and vLLM, which a CPU has no use for.
"""

from __future__ import annotations

import importlib.util
import sys
from functools import cache
from pathlib import Path
from types import ModuleType

from torch import Tensor

import opdtheory as opd


def openrlhf_k2(r: opd.Rollouts) -> Tensor:
    """`compute_approx_kl` with k2, added to the actor's loss, averaged over tokens."""
    return _kl(r, "k2", unbiased_gradient=False)


def openrlhf_k3(r: opd.Rollouts) -> Tensor:
    """The same with k3."""
    return _kl(r, "k3", unbiased_gradient=False)


def openrlhf_k3_unbiased(r: opd.Rollouts) -> Tensor:
    """The same with `--algo.kl.unbiased_gradient`: the value of k3, the gradient of the reverse KL."""
    return _kl(r, "k3", unbiased_gradient=True)


def _kl(r: opd.Rollouts, estimator: str, unbiased_gradient: bool) -> Tensor:
    published = _module().compute_approx_kl
    arguments = (r.student_logprobs, r.teacher_logprobs, r.behavior_logprobs, estimator, unbiased_gradient)
    # It computes in float32, whatever it is given.
    return r.token_mean(published(*arguments)).float()


@cache
def _module() -> ModuleType:
    package = importlib.util.find_spec("openrlhf")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("No module named 'openrlhf'", name="openrlhf")
    path = Path(package.submodule_search_locations[0], "models", "utils.py")
    spec = importlib.util.spec_from_file_location("openrlhf_models_utils", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # The module names DeepSpeed at its top and uses it in another function only.
    absent = importlib.util.find_spec("deepspeed") is None
    if absent:
        sys.modules["deepspeed"] = ModuleType("deepspeed")
    try:
        spec.loader.exec_module(module)
    finally:
        if absent:
            del sys.modules["deepspeed"]
    return module
