"""What a validation finds, in numbers and words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Validation"]


@dataclass(frozen=True)
class Validation:
    r"""How an estimator's gradient in the student's parameters compares with theory.

    Sizes are relative to the length of the exact gradient of the declared objective, or absolute where that is zero.

    Attributes:
        estimator: as text.
        claimed: the verdict that the estimator claims.
        objective: the declared objective.
        method: `prefixes` or `enumeration`.
        rollouts: how many rollouts the prefixes are from; all there are for an enumeration.
        prefixes: how many.
        parameters: dimension of the space.
        draws: next tokens drawn at each prefix; 0 for an enumeration.
        exact_norm: length of the exact gradient.
        bias: of the estimator's expected gradient, its own code summed over the vocabulary.
        predicted_bias: what the theory says it is.
        discrepancy: distance of the expected gradient from the predicted one.
        tolerance: the largest discrepancy that counts as rounding.
        cosine: of the expected with the exact gradient; None where one of them is zero.
        z: the largest of the sampled mean's distances from the prediction along the directions, in its exact standard
            deviations; 0 where the gradient has no variance, None for an enumeration.
        z_limit: of its absolute value, two-sided, for all directions together.
        z_exact: the same against the exact gradient: large where sampling shows the bias.
        along: the sampled mean's bias along the exact gradient, relative.
        along_interval: at 95 %, by the exact variance.
        along_predicted: what theory says.
        variance: trace of the covariance of one rollout's gradient, over the squared length of the exact gradient.
        signal_to_noise: for one rollout; it grows as the root of their number.
        seed: of rollouts, directions and draws.
    """

    estimator: str
    claimed: str
    objective: str
    method: str
    rollouts: int
    prefixes: int
    parameters: int
    draws: int
    exact_norm: float
    bias: float
    predicted_bias: float
    discrepancy: float
    tolerance: float
    cosine: float | None
    z: float | None
    z_limit: float | None
    z_exact: float | None
    along: float | None
    along_interval: tuple[float, float] | None
    along_predicted: float | None
    variance: float | None
    signal_to_noise: float | None
    seed: int

    @property
    def agrees(self) -> bool:
        """Whether both the sum over the vocabulary and the sampled mean are what theory predicts."""
        summed = self.discrepancy <= self.tolerance
        return summed and (self.z is None or self.z_limit is None or abs(self.z) <= self.z_limit)

    @property
    def verdict(self) -> str:
        """`agree` or `disagree`."""
        return "agree" if self.agrees else "disagree"

    def rollouts_for(self, ratio: float) -> float:
        """How many rollouts a signal-to-noise ratio takes; infinite without a signal."""
        if not self.signal_to_noise:
            return math.inf
        return (ratio / self.signal_to_noise) ** 2

    def noise(self, rollouts: int) -> float | None:
        """The signal-to-noise ratio of the mean over so many rollouts."""
        return None if self.signal_to_noise is None else self.signal_to_noise * math.sqrt(rollouts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, the verdict included; what is not finite becomes None."""
        values = {**dataclasses.asdict(self), "agrees": self.agrees}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Validation:
        """From `to_dict`."""
        fields = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in fields}
        if known.get("along_interval") is not None:
            low, high = known["along_interval"]
            known["along_interval"] = (low, high)
        return cls(**known)

    def __str__(self) -> str:
        lines = [
            f"{self.estimator}: {self.verdict} with theory ({self.method}, {self.prefixes} prefixes, "
            f"{self.parameters} parameters)",
            f"  bias {self.bias:.3g} of the exact gradient of {self.objective}, predicted {self.predicted_bias:.3g}; "
            f"off by {self.discrepancy:.1e}, rounding allows {self.tolerance:.0e}",
        ]
        if self.cosine is not None:
            lines.append(f"  cosine with the exact gradient {self.cosine:+.3f}")
        if self.z is not None and self.z_limit is not None:
            lines.append(
                f"  {self.draws} draws of every next token: z = {self.z:+.2f} against the prediction (limit "
                f"{self.z_limit:.2f}), {self.z_exact:+.2f} against the exact gradient"
            )
        if self.along is not None and self.along_interval is not None:
            lines.append(
                f"  bias along the gradient {self.along:+.3f} in [{self.along_interval[0]:+.3f}, "
                f"{self.along_interval[1]:+.3f}], predicted {self.along_predicted:+.3f}"
            )
        if self.signal_to_noise is not None:
            lines.append(f"  signal to noise of one rollout {self.signal_to_noise:.3g}")
        return "\n".join(lines)
