"""The teacher's k likeliest tokens exactly and the sampled token for all others, within a policy gradient (T13)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from opdtheory.divergences import Divergence
from opdtheory.divergences.rest import rest_weight
from opdtheory.errors import IntegrationError, InvalidArgumentError, check_integer
from opdtheory.kernels.chosen import OutputLayer
from opdtheory.kernels.heads import head_form
from opdtheory.kernels.reference import LogDistributions, terms, weight_masses

__all__ = ["ExactTop", "check_settings", "check_the_same", "last_hidden_states", "output_layer"]

_LOSS_TYPES = ("dr_grpo", "dapo", "bnpo", "grpo", "luspo")

# Nats between two ways to the same log-probabilities, on average; logits rounded to bfloat16 stay below.
_APART = 0.25


@dataclass(frozen=True)
class ExactTop:
    r"""The estimator of T13 with $S$ the teacher's `k` likeliest tokens.

    Attributes:
        divergence: the generator $f$.
        k: the number of tokens of $S$.
        constant: $c$, or `rest` for the weight of all tokens outside $S$ as one (T19b).
    """

    divergence: Divergence
    k: int
    constant: float | Literal["rest"] = 0.0

    def parts(
        self,
        log_p: Float[Tensor, "N k"],
        log_q: Float[Tensor, "N k"],
        log_u: Float[Tensor, " N"],
        outside: Bool[Tensor, " N"],
    ) -> tuple[Float[Tensor, " N"], Float[Tensor, " N"]]:
        r"""The advantage $1[y \notin S](w_f(u_y) - c)$ of each token, and $\sum_S p f(q/p) + c\,p(S)$, in float64.

        The advantage is detached; the other part has its gradient in `log_p`.

        Args:
            log_p: the student's log-probabilities on $S$.
            log_q: the teacher's.
            log_u: $\log q(y) - \log p(y)$ of the sampled token.
            outside: whether the sampled token is outside $S$.
        """
        ours, theirs = log_p.detach().double(), log_q.detach().double()
        both = (ours > -math.inf) & (theirs > -math.inf)
        logs = LogDistributions(ours, theirs, torch.where(both, theirs - ours, 0.0), both)
        constant: Any = self.constant
        if constant == "rest":
            constant = rest_weight(self.divergence, ours, theirs)
        constant = torch.as_tensor(constant, dtype=torch.float64, device=ours.device).expand(len(ours))
        weight = self.divergence.weight(torch.where(outside, log_u.detach().double(), 0.0))
        advantage = torch.where(outside, weight - constant, 0.0)
        # The derivative in log p is minus these masses.
        masses = weight_masses(self.divergence, logs) - constant.unsqueeze(-1) * ours.exp()
        slope = -(masses * torch.where(ours > -math.inf, log_p.double(), 0.0)).sum(-1)
        value = terms(self.divergence, logs).sum(-1) + constant * ours.exp().sum(-1)
        return advantage, slope - slope.detach() + value


def check_settings(k: int, args: Any, model: Any) -> None:
    """Raise unless the exact part goes with a `GRPOConfig` and a student.

    Args:
        k: the number of exact tokens.
        args: the configuration.
        model: the student.

    Raises:
        InvalidArgumentError: it does not; the message names the setting.
    """
    check_integer("top_k", k, 1, int(model.config.get_text_config().vocab_size))
    if args.loss_type not in _LOSS_TYPES:
        raise InvalidArgumentError("top_k", f"needs a loss_type of {', '.join(_LOSS_TYPES)}, got {args.loss_type!r}")
    wanted = {"importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None}
    for name, value in wanted.items():
        if getattr(args, name, value) != value:
            raise InvalidArgumentError("top_k", f"needs {name}={value!r}, got {getattr(args, name)!r}")


def check_the_same(whose: str, here: Tensor, there: Tensor) -> None:
    """Raise unless the log-probabilities of an output layer are those of TRL.

    Args:
        whose: the student or the teacher.
        here: log-probabilities of the sampled tokens.
        there: TRL's.

    Raises:
        IntegrationError: they are apart by more than rounding.
    """
    apart = float((here.detach() - there.detach().double()).abs().mean()) if here.numel() else 0.0
    if not apart <= _APART:
        raise IntegrationError(
            f"trl: top_k cannot tell how the {whose} makes logits of hidden states: its log-probabilities of the "
            f"sampled tokens are {apart:.3g} nats from TRL's on average"
        )


@contextmanager
def last_hidden_states(model: Any) -> Iterator[list[Tensor]]:
    """Collect what the backbone of a model returns while the context lasts.

    Args:
        model: a causal language model of transformers, maybe with an adapter of PEFT.

    Raises:
        IntegrationError: it returns no `last_hidden_state`, or none is seen.
    """
    model = _inner(model)
    found: list[Tensor] = []
    # Before transformers 5, models of images and text name their backbone another way.
    backbone = model.base_model if model.base_model is not model else getattr(model, "model", model)

    def keep(_: Any, __: Any, output: Any) -> None:
        states = getattr(output, "last_hidden_state", None)
        if states is None:
            raise IntegrationError(f"trl: top_k needs the last_hidden_state of {type(backbone).__name__}")
        found.append(states)

    handle = backbone.register_forward_hook(keep)
    try:
        yield found
    finally:
        handle.remove()
    if not found:
        raise IntegrationError(f"trl: top_k saw no forward pass of {type(backbone).__name__}")


def output_layer(model: Any, temperature: float, dtype: torch.dtype | None, *, argument: str = "top_k") -> OutputLayer:
    """The output layer of a model, with the scale and the soft-capping that its configuration names.

    Args:
        model: a causal language model of transformers, maybe with an adapter of PEFT.
        temperature: divides its logits.
        dtype: of the product, by default that of the weight.
        argument: what needs the layer, for the message.

    Raises:
        InvalidArgumentError: the layer is not a `torch.nn.Linear`, as with an adapter on it.
    """
    model = _inner(model)
    layer = model.get_output_embeddings()
    if not isinstance(layer, nn.Linear):
        kind = f"{type(layer).__module__}.{type(layer).__qualname__}"
        raise InvalidArgumentError(argument, f"needs models whose output layer is a torch.nn.Linear, got {kind}")
    settings = model.config.get_text_config()
    form = head_form("student", _scale(settings), getattr(settings, "final_logit_softcapping", None))
    return OutputLayer(layer.weight, layer.bias, form, temperature, dtype or layer.weight.dtype)


def _scale(settings: Any) -> float:
    """What a model multiplies its logits with; the name of it depends on the model."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(settings, name, None) is not None:
            return float(getattr(settings, name))
    divisor = getattr(settings, "logits_scaling", None)
    if divisor is None:
        return 1.0
    return float(divisor if settings.model_type == "hyperclovax" else 1.0 / divisor)


def _inner(model: Any) -> Any:
    """The model without an adapter of PEFT around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
