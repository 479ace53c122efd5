"""The result of a validation, in numbers and words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from opdtheory.choices import Verdict

__all__ = ["Validation"]


@dataclass(frozen=True)
class Validation:
    r"""How an estimator's gradient in the student's parameters compares with theory.

    Sizes are relative to the length of the exact gradient of the declared objective, or absolute where that is zero.

    Attributes:
        estimator: label of the estimator.
        claimed: the verdict that the estimator claims.
        objective: the declared objective.
        method: `prefixes` or `enumeration`.
        rollouts: number of rollouts that the prefixes come from; all possible ones for an enumeration.
        prefixes: number of prefixes.
        parameters: number of parameters.
        draws: next tokens drawn at each prefix; 0 for an enumeration.
        run_on: mean probability of the next tokens that the estimator's own code was run on, 1 for every token; on the
            others the weight of theory stands for it.
        exact_norm: length of the exact gradient.
        bias: bias of the estimator's expected gradient, from its own code summed over the vocabulary.
        predicted_bias: the bias that theory predicts.
        discrepancy: distance of the expected gradient from the predicted one.
        tolerance: the largest discrepancy that counts as rounding.
        cosine: cosine of the expected with the exact gradient; None where one of them is zero.
        z: largest distance of the sampled mean from the prediction along the directions, in exact standard
            deviations; 0 where the gradient has no variance, None for an enumeration.
        z_limit: two-sided limit of the absolute value of `z`, for all directions together.
        z_exact: the same distance from the exact gradient; large where sampling shows the bias.
        along: relative bias of the sampled mean along the exact gradient.
        along_interval: 95 % interval of `along`, from the exact variance.
        along_predicted: the value of `along` that theory predicts.
        variance: trace of the covariance of one rollout's gradient, over the squared length of the exact gradient.
        signal_to_noise: signal-to-noise ratio of one rollout; it grows as the root of the number of rollouts.
        seed: seed of rollouts, directions and draws.
    """

    estimator: str
    claimed: Verdict
    objective: str
    method: Literal["prefixes", "enumeration"]
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
    run_on: float = 1.0
    z: float | None = None
    z_limit: float | None = None
    z_exact: float | None = None
    along: float | None = None
    along_interval: tuple[float, float] | None = None
    along_predicted: float | None = None
    variance: float | None = None
    signal_to_noise: float | None = None
    seed: int = 0

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
        """The number of rollouts that reach a signal-to-noise ratio; infinite without a signal."""
        if not self.signal_to_noise:
            return math.inf
        return (ratio / self.signal_to_noise) ** 2

    def noise(self, rollouts: int) -> float | None:
        """The signal-to-noise ratio of the mean over so many rollouts."""
        return None if self.signal_to_noise is None else self.signal_to_noise * math.sqrt(rollouts)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values, with `agrees`; values that are not finite become None."""
        values = {**dataclasses.asdict(self), "agrees": self.agrees}
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Validation:
        """A validation from the values of `to_dict`."""
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
            f"off by {self.discrepancy:.1e} (tolerance {self.tolerance:.0e})",
        ]
        if self.cosine is not None:
            lines.append(f"  cosine with the exact gradient {self.cosine:+.3f}")
        if self.z is not None and self.z_limit is not None:
            lines.append(
                f"  {self.draws} draws of every next token: z = {self.z:+.2f} against the prediction (limit "
                f"{self.z_limit:.2f}), {self.z_exact:+.2f} against the exact gradient"
            )
        if self.run_on < 1:
            lines.append(
                f"  its own code was run on the tokens drawn, {self.run_on:.1%} of the probability; elsewhere the "
                "weight of theory stands for it"
            )
        if self.along is not None and self.along_interval is not None:
            lines.append(
                f"  bias along the gradient {self.along:+.3f} in [{self.along_interval[0]:+.3f}, "
                f"{self.along_interval[1]:+.3f}], predicted {self.along_predicted:+.3f}"
            )
        if self.signal_to_noise is not None:
            lines.append(f"  signal-to-noise ratio of one rollout {self.signal_to_noise:.3g}")
        return "\n".join(lines)
