"""A monitor for verl: what the log-probabilities in its batches say of the run."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError, LossError
from opdtheory.estimators import Estimator
from opdtheory.integrations.verl import DISTILLATION_LOSSES, PADDING, verl_modules
from opdtheory.monitoring import Monitor

__all__ = ["MonitoredLoss", "VerlTokens", "feed", "tokens_of", "watch"]

# What verl calls the log-probabilities of the teacher's side, the first that is there.
_TEACHERS = ("ref_log_prob", "teacher_log_probs")


@dataclass(frozen=True)
class VerlTokens:
    r"""The sampled tokens of a batch, each tensor `(B, T)` over the responses.

    Attributes:
        student: $\log p$: `old_log_probs`.
        teacher: $\log q$: `teacher_logprobs` of verl's teacher, else `ref_log_prob`.
        mask: `response_mask`.
        behavior: $\log\mu$ of the inference engine: `rollout_log_probs`; None if it is not there.
        entropy: `entropys`, likewise.
    """

    student: Float[Tensor, "B T"]
    teacher: Float[Tensor, "B T"]
    mask: Shaped[Tensor, "B T"]
    behavior: Float[Tensor, "B T"] | None = None
    entropy: Float[Tensor, "B T"] | None = None


def tokens_of(batch: Any) -> VerlTokens:
    """The sampled tokens of a batch of verl.

    Tensors are padded to the length of the responses, or nested. `teacher_logprobs` is of prompts and responses
    together, at each position that of the next token, with a last dimension of one.

    Args:
        batch: a `DataProto`, or the `TensorDict` or mapping of tensors that it holds.

    Raises:
        LossError: a field is missing, or the teacher's log-probabilities are those of several tokens at a position.
    """
    data = getattr(batch, "batch", batch)
    fields = {name: data[name] for name in data.keys()}  # noqa: SIM118  (a TensorDict iterates over its rows)
    for name in ("old_log_probs", "response_mask"):
        if name not in fields:
            raise LossError(
                f"a batch of verl must hold {name} to be watched, got {', '.join(sorted(map(str, fields)))}"
            )
    mask = _padded(fields["response_mask"])
    if fields.get("teacher_logprobs") is not None:
        teacher = _of_teacher(fields["teacher_logprobs"], data, mask)
    else:
        known = [fields[name] for name in _TEACHERS if fields.get(name) is not None]
        if not known:
            raise LossError("a batch of verl must hold teacher_logprobs or ref_log_prob to be watched, got neither")
        teacher = _padded(known[0])
    others = [None if fields.get(name) is None else _padded(fields[name]) for name in ("rollout_log_probs", "entropys")]
    return VerlTokens(_padded(fields["old_log_probs"]), teacher, mask, *others)


def feed(monitor: Any, batch: Any, number: int | None = None) -> dict[str, float]:
    """The metrics `opd/...` of the tokens of a batch, which a monitor is given.

    Args:
        monitor: of `opdtheory.monitoring`.
        batch: see `tokens_of`.
        number: of the step.
    """
    found = tokens_of(batch)
    return _step(monitor, found, number)


def watch(
    loss_mode: str = "k1",
    estimator: str | Estimator | None = None,
    divergence: str | Divergence | None = None,
    **options: Any,
) -> None:
    r"""Put a monitor around a distillation loss in verl's registry, under the name that it has.

    verl's losses read their own name, so the entry of `DISTILLATION_LOSS_REGISTRY` is replaced, in this process and
    until it ends, by a `MonitoredLoss` around it. The loss and its gradient are passed on as they are; the metrics
    `opd/...` of each micro-batch join those that verl logs as `actor/...`. The same call again does nothing, so that
    every process may make it. Each process reads its own rollouts and warns for itself.

    Args:
        loss_mode: the name of `distillation.distillation_loss.loss_mode`, of a loss on sampled tokens.
        estimator: what the run descends, by name or as an object; by default that of verl's names `k1`, `k2` and `k3`
            and their synonyms, which depends on `use_policy_gradient`, and of the names of `opdtheory`.
        divergence: likewise.
        options: of the estimator, such as `clip_log_ratio`.

    Raises:
        IntegrationError: verl is not installed, or of a version without this registry.
        InvalidArgumentError: verl has no such loss, or another monitor is around it.
    """
    registry = verl_modules()[DISTILLATION_LOSSES].DISTILLATION_LOSS_REGISTRY
    if loss_mode not in registry:
        raise InvalidArgumentError("loss_mode", f"must be one of {', '.join(sorted(registry))}, got {loss_mode!r}")
    loss = registry[loss_mode]
    inner = loss.loss if isinstance(loss, MonitoredLoss) else loss
    made = MonitoredLoss(inner, estimator, divergence, tuple(sorted(options.items())))
    if isinstance(loss, MonitoredLoss) and loss != made:
        raise InvalidArgumentError("loss_mode", f"{loss_mode!r} is watched already, as {loss!r}")
    if not isinstance(loss, MonitoredLoss):
        registry[loss_mode] = made


@dataclass(frozen=True)
class MonitoredLoss:
    """A distillation loss of verl whose tokens a monitor reads; the monitor is made in the process that calls it.

    Attributes:
        loss: as it was registered.
        estimator: see `watch`.
        divergence: likewise.
        options: likewise, as pairs.
    """

    loss: Any
    estimator: Any = None
    divergence: Any = None
    options: tuple[tuple[str, Any], ...] = ()
    _monitors: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.loss, self.estimator, self.divergence, self.options)

    def __call__(
        self, config: Any, distillation_config: Any, model_output: Any, data: Any
    ) -> tuple[Float[Tensor, "B T"], dict[str, Any]]:
        """What the loss returns, with more metrics while gradients are computed.

        Args:
            config: verl's `actor`.
            distillation_config: verl's `distillation`.
            model_output: the engine's output; `log_probs` are those of the sampled tokens.
            data: the micro-batch.

        Raises:
            LossError: the teacher's log-probabilities are those of several tokens at a position.
        """
        losses, metrics = self.loss(
            config=config, distillation_config=distillation_config, model_output=model_output, data=data
        )
        if not torch.is_grad_enabled():
            return losses, metrics
        padded = verl_modules()[PADDING].no_padding_2_padding
        mask = _padded(data["response_mask"])
        student = padded(model_output["log_probs"], data).detach()
        behavior = data.get("rollout_log_probs", None)
        behavior = data.get("old_log_probs", None) if behavior is None else behavior
        found = VerlTokens(
            student,
            _of_teacher(data["teacher_logprobs"], data, mask),
            mask,
            None if behavior is None else _padded(behavior),
        )
        monitor = self.monitor(distillation_config.distillation_loss)
        return losses, {**metrics, **_step(monitor, found, None)}

    def monitor(self, settings: Any) -> Any:
        """The monitor of this process.

        Args:
            settings: verl's `distillation_loss`.
        """
        estimator, divergence, options = self.estimator, self.divergence, dict(self.options)
        if estimator is None:
            estimator, own, clip = estimator_of(self.loss, settings)
            divergence, options = divergence or own, {**clip, **options}
        # A fork copies this object; sums stay in their process.
        key = os.getpid(), repr((estimator, divergence, options))
        if key not in self._monitors:
            self._monitors[key] = Monitor(estimator, divergence, **options)
        return self._monitors[key]


def estimator_of(loss: Any, settings: Any) -> tuple[str, Divergence | None, dict[str, Any]]:
    """The estimator, divergence and options that a distillation loss of verl is.

    Args:
        loss: as it is registered.
        settings: verl's `distillation_loss`.

    Raises:
        InvalidArgumentError: it has no name in `opdtheory`.
    """
    clamp = settings.loss_max_clamp
    if hasattr(loss, "divergence"):
        options = {} if clamp is None else {"clip_weight": (-clamp, clamp)}
        return ("opd_plus_centred" if loss.centred else "opd_plus"), loss.divergence, options
    names = {"kl": "k1", "k1": "k1", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}
    mode = settings.loss_mode
    if mode not in names:
        raise InvalidArgumentError("estimator", f"must be given for the loss {mode!r}")
    if settings.use_policy_gradient:
        return f"{names[mode]}_reward", None, {} if clamp is None else {"clip_weight": (-clamp, clamp)}
    return f"{names[mode]}_loss", None, {}


def _step(monitor: Any, found: VerlTokens, number: int | None) -> dict[str, float]:
    monitor.add(found.student, found.teacher, found.behavior, found.mask, entropy=found.entropy)
    metrics: dict[str, float] = monitor.step(number)
    return metrics


def _of_teacher(values: Tensor, data: Any, mask: Tensor) -> Tensor:
    """The teacher's log-probabilities of the responses' tokens."""
    if values.shape[-1] != 1:
        raise LossError(
            f"teacher_logprobs must have a last dimension of 1, the sampled tokens, got {tuple(values.shape)}"
        )
    if values.ndim == 3 and not values.is_nested:
        # Padded like prompts and responses together.
        found = values[:, -mask.shape[1] - 1 : -1]
    else:
        found = verl_modules()[PADDING].no_padding_2_padding(values, data)
    return found.squeeze(-1).detach()


def _padded(values: Tensor) -> Tensor:
    """Without a nested layout, padded with zeros."""
    return values.to_padded_tensor(0) if values.is_nested else values
