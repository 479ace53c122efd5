"""The advantage of a sampled token: the OPD+ weight, its gauge, bounds and baseline."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError, check_between

__all__ = ["SampledBaseline", "TokenWeight"]

SampledBaseline = Literal["constant", "leave_one_out"]


@dataclass(frozen=True)
class TokenWeight:
    r"""The advantage $A_n = \mathrm{clip}(w_f(\mathrm{clip}(\log u_n)) - g) - b_n$ of each sampled token (T1, T7).

    $g$ is 0, or $w_f(1)$ in the centred gauge. Neither $g$ nor the baseline $b_n$ changes the expected gradient; a
    bound that is met does.

    Attributes:
        divergence: the generator $f$.
        clip_log_ratio: $\log u$ is held within plus and minus this number.
        clip_weight: so is the weight, after the gauge and before the baseline.
        centred: whether $w_f(1)$ is subtracted.
        baseline: `constant` subtracts `baseline_value`; `leave_one_out` the mean over the other rollouts of the
            micro-batch that have a token at the same position, 0 where there is none.
        baseline_value: the constant.
    """

    divergence: Divergence
    clip_log_ratio: float | None = None
    clip_weight: float | None = None
    centred: bool = False
    baseline: SampledBaseline | None = None
    baseline_value: float = 0.0

    def __post_init__(self) -> None:
        for name in ("clip_log_ratio", "clip_weight"):
            if getattr(self, name) is not None:
                check_between(name, getattr(self, name))
        if self.baseline is not None and self.baseline not in get_args(SampledBaseline):
            named = ", ".join(get_args(SampledBaseline))
            raise InvalidArgumentError("baseline", f"must be None or one of {named}, got {self.baseline!r}")
        if self.baseline_value and self.baseline != "constant":
            raise InvalidArgumentError("baseline_value", "needs baseline='constant'")

    def __call__(
        self, student: Float[Tensor, "B T"], teacher: Float[Tensor, "B T"], mask: Shaped[Tensor, "B T"]
    ) -> Float[Tensor, "B T"]:
        r"""The advantages from log-probabilities of the sampled tokens, zero where the mask is; evaluated in float64.

        Args:
            student: $\log p$ of the tokens.
            teacher: $\log q$ of them.
            mask: 1 on the tokens that the student sampled.
        """
        alive = mask > 0
        log_u = torch.where(alive, (teacher - student).detach().double(), 0.0)
        if self.clip_log_ratio is not None:
            log_u = log_u.clamp(-self.clip_log_ratio, self.clip_log_ratio)
        weight = self.divergence.weight(log_u)
        if self.centred:
            weight = weight - self.divergence.weight(torch.zeros_like(log_u))
        if self.clip_weight is not None:
            weight = weight.clamp(-self.clip_weight, self.clip_weight)
        weight = torch.where(alive, weight, 0.0)
        return torch.where(alive, weight - self._baseline(weight, alive.double()), 0.0).to(student.dtype)

    def _baseline(self, weight: Tensor, alive: Tensor) -> Tensor | float:
        if self.baseline == "leave_one_out":
            others = alive.sum(0, keepdim=True) - alive
            return (weight.sum(0, keepdim=True) - weight) / others.clamp_min(1.0)
        return self.baseline_value if self.baseline == "constant" else 0.0
