"""OPD+ in verl: any f-divergence under a name of verl's own registries, so that its configuration selects it."""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import IntegrationError, InvalidArgumentError, LossError

__all__ = ["LOG_RATIO", "SUPPORTED", "AdvantageEstimator", "DistillationLoss", "LogRatio", "PolicyLoss", "register"]

# Major and minor number of the versions that were tried.
SUPPORTED = (0, 9)

# The advantage estimator that the policy losses need.
LOG_RATIO = "opd_plus_log_ratio"

_ALGORITHMS, DISTILLATION_LOSSES = "verl.trainer.ppo.core_algos", "verl.trainer.distillation.losses"
PADDING = "verl.workers.utils.padding"

# What of verl is used.
_NEEDED = {
    _ALGORITHMS: (
        *("ADV_ESTIMATOR_REGISTRY", "POLICY_LOSS_REGISTRY"),
        *("agg_loss", "register_adv_est", "register_policy_loss"),
    ),
    DISTILLATION_LOSSES: ("DISTILLATION_LOSS_REGISTRY", "DistillationLossSettings", "register_distillation_loss"),
    PADDING: ("no_padding_2_padding",),
}


def register(divergence: str | Divergence = "reverse_kl", *, centred: bool = False, name: str | None = None) -> str:
    r"""Register OPD+ of a divergence in verl, under one name in three places.

    The advantage of a sampled token is $w_f(u) = u f'(u) - f(u)$, with $u = q/p$ (T1). Summed over the tokens of a
    rollout and averaged over rollouts (`loss_agg_mode: seq-mean-token-sum`) the expected gradient is that of
    $\sum_n D_f(q_n \| p_n)$ at the student's own histories. Choose one of:

    - `distillation.distillation_loss.loss_mode`: with verl's teacher. The same with `use_policy_gradient` or without,
      on rollouts of the student of the moment; in later steps on the same rollouts only the first has importance
      ratios.
    - `algorithm.adv_estimator`: with the reference model in the teacher's place, which verl 0.9 loads from the path of
      the student, so that it is the student at the start. It reads $\log u$ off the rewards, so it needs
      `use_kl_in_reward: true`, `kl_penalty: kl`, `kl_ctrl.type: fixed`, `kl_ctrl.kl_coef: 1.0` and scores of zero.
    - `actor_rollout_ref.actor.policy_loss.loss_mode`, with `algorithm.adv_estimator: opd_plus_log_ratio` under the
      same settings: $u$ is that of the student of the moment, the importance ratio is not clipped.

    Registering the same again does nothing, so that every process of verl may do so.

    Args:
        divergence: an object or a catalogue name.
        centred: whether $w_f(1)$ is subtracted, which changes the variance alone where all tokens have one denominator.
        name: by default `opd_plus_` and the divergence with its parameters, such as `opd_plus_alpha_0.5`.

    Returns:
        The name.

    Raises:
        IntegrationError: verl is not installed, or of a version without these registries.
        InvalidArgumentError: something else is registered under that name.
    """
    divergence = as_divergence(divergence)
    name = _name(divergence) if name is None else name
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise InvalidArgumentError("name", f"must hold letters, digits, '_', '.' and '-' only, got {name!r}")
    modules = verl_modules()
    algorithms, distillation = modules[_ALGORITHMS], modules[DISTILLATION_LOSSES]
    settings = distillation.DistillationLossSettings(names=[name], use_estimator=True)
    for registry, key, value, decorator in (
        (algorithms.ADV_ESTIMATOR_REGISTRY, LOG_RATIO, LogRatio(), algorithms.register_adv_est),
        (algorithms.ADV_ESTIMATOR_REGISTRY, name, AdvantageEstimator(divergence, centred), algorithms.register_adv_est),
        (algorithms.POLICY_LOSS_REGISTRY, name, PolicyLoss(divergence, centred), algorithms.register_policy_loss),
        (
            distillation.DISTILLATION_LOSS_REGISTRY,
            name,
            DistillationLoss(divergence, centred),
            lambda _: distillation.register_distillation_loss(settings),
        ),
    ):
        _put(registry, key, value, decorator)
    return name


@dataclass(frozen=True)
class _Weight:
    """The weight of a divergence at sampled tokens; instances are compared and pickled by what they hold."""

    divergence: Divergence
    centred: bool = False

    def weight(self, log_u: Tensor, mask: Tensor) -> Tensor:
        """The advantages, detached, zero where the mask is; evaluated in float64."""
        log_u = _alive(log_u.detach().double(), mask)
        weight = self.divergence.centred_weight(log_u) if self.centred else self.divergence.weight(log_u)
        return _alive(weight, mask)

    def estimate(self, log_u: Tensor, mask: Tensor) -> float:
        """The mean over tokens of an unbiased estimate of the divergence, for the log."""
        values = self.divergence.remainder(_alive(log_u.detach().double(), mask))
        return float(_alive(values, mask).sum() / mask.sum().clamp_min(1))


@dataclass(frozen=True)
class AdvantageEstimator(_Weight):
    """`algorithm.adv_estimator`: the weight of each token, from rewards that are log-ratios of teacher to student."""

    def __call__(
        self,
        token_level_rewards: Float[Tensor, "B T"],
        response_mask: Shaped[Tensor, "B T"],
        config: Any = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """Advantages and returns, which are the same.

        Args:
            token_level_rewards: the log-ratios, as `use_kl_in_reward` leaves them.
            response_mask: 1 on the student's tokens.
            config: verl's `algorithm`.

        Raises:
            InvalidArgumentError: under this configuration the rewards are something else.
        """
        check_rewards(config)
        advantages = self.weight(token_level_rewards, response_mask).to(token_level_rewards.dtype)
        return advantages, advantages


@dataclass(frozen=True)
class LogRatio:
    """`algorithm.adv_estimator: opd_plus_log_ratio`: the log-ratios as they are, for a `PolicyLoss`.

    They are float64, by which a policy loss tells them from the advantages of other estimators.
    """

    def __call__(
        self,
        token_level_rewards: Float[Tensor, "B T"],
        response_mask: Shaped[Tensor, "B T"],
        config: Any = None,
        **_: Any,
    ) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
        """As `AdvantageEstimator`, without the weight."""
        check_rewards(config)
        log_u = _alive(token_level_rewards.double(), response_mask)
        return log_u, log_u


@dataclass(frozen=True)
class PolicyLoss(_Weight):
    """`policy_loss.loss_mode`: the weight at the student of the moment, times the importance ratio, without a clip."""

    def __call__(
        self,
        old_log_prob: Float[Tensor, "B T"],
        log_prob: Float[Tensor, "B T"],
        advantages: Float[Tensor, "B T"],
        response_mask: Shaped[Tensor, "B T"],
        loss_agg_mode: str = "token-mean",
        config: Any = None,
        rollout_is_weights: Float[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Any]]:
        r"""The loss and what is logged.

        Args:
            old_log_prob: $\log p$ of the tokens when the log-ratios were taken.
            log_prob: $\log p$ now.
            advantages: the log-ratios of `opd_plus_log_ratio`.
            response_mask: 1 on the student's tokens.
            loss_agg_mode: verl's reduction.
            config: verl's `actor`.
            rollout_is_weights: verl's weights of another sampler.

        Raises:
            LossError: the advantages are those of another estimator.
        """
        if advantages.dtype != torch.float64:
            raise LossError(
                f"{_name(self.divergence)} as a policy loss needs algorithm.adv_estimator={LOG_RATIO}, whose "
                f"advantages are log-ratios in float64, got {advantages.dtype}"
            )
        moved = _alive(log_prob - old_log_prob, response_mask)
        log_u = advantages - moved.detach().double()
        losses = -moved.exp() * self.weight(log_u, response_mask).to(log_prob.dtype)
        if rollout_is_weights is not None:
            losses = losses * rollout_is_weights
        batch = {} if config is None else config.global_batch_info
        agg_loss = verl_modules()[_ALGORITHMS].agg_loss
        loss = agg_loss(loss_mat=losses, loss_mask=response_mask, loss_agg_mode=loss_agg_mode, **batch)
        metrics = {
            "actor/ppo_kl": float(-moved.detach().sum() / response_mask.sum().clamp_min(1)),
            "actor/divergence": self.estimate(log_u, response_mask),
        }
        return loss, metrics


@dataclass(frozen=True)
class DistillationLoss(_Weight):
    """`distillation_loss.loss_mode`: values that are minus the weights, with the gradient of the OPD+ loss.

    With `use_policy_gradient` verl takes the values, detached, as rewards; without, their gradient. Both are OPD+.
    """

    def __call__(
        self, config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> tuple[Float[Tensor, "B T"], dict[str, Any]]:
        """The loss of each token and what is logged.

        Args:
            config: verl's `actor`.
            distillation_config: verl's `distillation`.
            model_output: the engine's output; `log_probs` are those of the sampled tokens.
            data: the micro-batch; `teacher_logprobs` are the teacher's.

        Raises:
            LossError: the teacher's log-probabilities are those of several tokens at a position.
        """
        clamp = distillation_config.distillation_loss.loss_max_clamp
        if clamp is not None:
            warnings.warn(
                f"distillation_loss.loss_max_clamp={clamp} clips the weights of OPD+, which biases the gradient where "
                "it is met; set it to null",
                stacklevel=2,
            )
        padded = verl_modules()[PADDING].no_padding_2_padding
        log_p, log_q = padded(model_output["log_probs"], data), padded(data["teacher_logprobs"], data)
        if log_q.ndim != 3 or log_q.shape[-1] != 1:
            raise LossError(
                f"teacher_logprobs must have shape (B, T, 1), those of the sampled tokens, got {tuple(log_q.shape)}"
            )
        mask = data["response_mask"]
        mask = mask.to_padded_tensor(0) if mask.is_nested else mask
        log_u = log_q.squeeze(-1) - log_p.detach()
        weight = self.weight(log_u, mask).to(log_p.dtype)
        # One plus what has no value but a gradient.
        losses = -weight * (1.0 + _alive(log_p - log_p.detach(), mask))
        return losses, {"distillation/divergence": self.estimate(log_u, mask)}


def check_rewards(config: Any) -> None:
    r"""Raise unless verl's rewards are the log-ratios $\log q - \log p$, up to the scores, which must be zero.

    Raises:
        InvalidArgumentError: the configuration makes them something else.
    """
    control = None if config is None else config.get("kl_ctrl")
    wanted: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "use_kl_in_reward": (None if config is None else config.get("use_kl_in_reward"), (True,)),
        "kl_penalty": (None if config is None else config.get("kl_penalty"), ("kl", "k1")),
        "kl_ctrl.type": (None if control is None else control.get("type"), ("fixed",)),
        "kl_ctrl.kl_coef": (None if control is None else control.get("kl_coef"), (1.0,)),
    }
    for key, (found, allowed) in wanted.items():
        if found not in allowed:
            raise InvalidArgumentError(
                f"algorithm.{key}",
                f"must be {allowed[0]}, so that rewards are log-ratios of teacher to student, got {found!r}",
            )


def _put(registry: dict[str, Any], name: str, value: Any, decorator: Callable[[str], Callable[[Any], Any]]) -> None:
    if name not in registry:
        decorator(name)(value)
    elif registry[name] != value:
        raise InvalidArgumentError("name", f"{name!r} is registered in verl already, as {registry[name]!r}")


def _alive(values: Tensor, mask: Tensor) -> Tensor:
    """Zero, and no gradient, where the mask is zero."""
    return torch.where(mask > 0, values, 0.0)


def _name(divergence: Divergence) -> str:
    label = "_".join([divergence.name, *(repr(value) for value in divergence.parameters.values())])
    return "opd_plus_" + re.sub(r"[^A-Za-z0-9.-]+", "_", label).strip("_")


def verl_modules() -> dict[str, ModuleType]:
    """The modules of verl that are used, which hold what is used of them."""
    wanted = f"opdtheory supports verl {SUPPORTED[0]}.{SUPPORTED[1]}"
    try:
        verl = importlib.import_module("verl")
    except ImportError as error:
        raise IntegrationError(f"verl cannot be imported ({error}); {wanted}") from error
    version = str(getattr(verl, "__version__", "of no known version"))
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or (int(numbers[1]), int(numbers[2])) != SUPPORTED:
        raise IntegrationError(f"verl {version} is installed; {wanted}")
    found = {}
    for path, names in _NEEDED.items():
        try:
            found[path] = importlib.import_module(path)
        except ImportError as error:
            raise IntegrationError(f"verl {version} has no usable module {path} ({error}); {wanted}") from error
        missing = [each for each in names if not hasattr(found[path], each)]
        if missing:
            raise IntegrationError(f"verl {version} has no {', '.join(missing)} in {path}; {wanted}")
    return found
