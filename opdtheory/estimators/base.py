"""What every estimator consists of: a claim, a reduction, and the loss of each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import Granularity, Reduction, Verdict
from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.objective import Objective
from opdtheory.rollouts import Rollouts

__all__ = [
    "Assumptions",
    "Claim",
    "Estimator",
    "Sampler",
    "TokenLoss",
    "teacher_distribution",
    "unmasked",
]

TokenLoss = Callable[[Rollouts], Tensor]
Sampler = Literal["any", "on_policy", "on_policy_or_one_step"]


@dataclass(frozen=True)
class Assumptions:
    """Assumptions on the rollouts under which a claim's verdict is right.

    Attributes:
        sampler: the sampling policy: `any`; the student (`on_policy`); or the student unless rollouts have one step
            only (`on_policy_or_one_step`).
        fixed_length: whether all rollouts have one length.
        batch_size: smallest number of rollouts in a batch.
        several_steps: whether rollouts have more than one step.
        vocabulary_above: a number of tokens that the vocabulary exceeds.
        log_ratio_beyond: a bound on `|log u|` that some tokens exceed.
        advantage_outside: an interval outside which some advantages lie.
    """

    sampler: Sampler = "any"
    fixed_length: bool = False
    batch_size: int = 1
    several_steps: bool = False
    vocabulary_above: int | None = None
    log_ratio_beyond: float | None = None
    advantage_outside: tuple[float, float] | None = None

    @property
    def words(self) -> tuple[str, ...]:
        """The assumptions as text."""
        found = [] if self.sampler == "any" else [self.sampler.replace("_", " ").replace("on policy", "on-policy")]
        found += ["fixed length"] if self.fixed_length else []
        found += [f"batch of at least {self.batch_size}"] if self.batch_size > 1 else []
        found += ["more than one step"] if self.several_steps else []
        if self.vocabulary_above is not None:
            found.append(f"vocabulary above {self.vocabulary_above}")
        if self.log_ratio_beyond is not None:
            found.append(f"log-ratios beyond {self.log_ratio_beyond:g} occur")
        if self.advantage_outside is not None:
            low, high = self.advantage_outside
            found.append(f"advantages outside [{low:g}, {high:g}] occur")
        return tuple(found)


@dataclass(frozen=True)
class Claim:
    r"""What an estimator claims about its expected gradient, for an audit to confirm or refute.

    It says that under the assumptions, the expected gradient has the relation `verdict` to the exact gradient of the
    objective (`divergence`, `granularity`, `gamma`). A declared bias is part of the claim: an audit that finds none
    refutes it too.

    Attributes:
        divergence: the divergence that the loss is for.
        granularity: `token_local`, `token_return` or `sequence`, as in `exact_gradient(objective=...)`.
        verdict: `exact`, `exact_up_to_scale`, `other_objective`, `zero` or `biased`.
        theorem: the theorems that prove the verdict.
        descends: what the loss descends instead, in words or as a catalogue name; None if unknown.
        gamma: discount of `token_return`.
        assumptions: assumptions of the verdict.
    """

    divergence: Divergence
    granularity: Granularity
    verdict: Verdict
    theorem: str
    descends: str | None = None
    gamma: float = 1.0
    assumptions: Assumptions = Assumptions()

    @property
    def objective(self) -> Objective:
        """The objective that the verdict is about."""
        gamma = self.gamma if self.granularity == "token_return" else 1.0
        return Objective.of(self.divergence, self.granularity, gamma)

    def assuming(self, **more: Any) -> Claim:
        """The claim under further assumptions, fields of `Assumptions`."""
        return replace(self, assumptions=replace(self.assumptions, **more))

    def to_dict(self) -> dict[str, object]:
        """The claim as plain JSON values, with the label of the divergence."""
        return {
            "divergence": self.divergence.label,
            "granularity": self.granularity,
            "verdict": self.verdict,
            "theorem": self.theorem,
            "descends": self.descends,
            "gamma": self.gamma,
            "assumptions": list(self.assumptions.words),
        }

    def __str__(self) -> str:
        discount = f" (gamma={self.gamma:g})" if self.granularity == "token_return" else ""
        text = f"{self.verdict} for the {self.granularity} objective{discount} of {self.divergence.label}"
        if self.descends is not None:
            text += f"; descends {self.descends}"
        if self.assumptions.words:
            text += f"; given: {', '.join(self.assumptions.words)}"
        return f"{text} [{self.theorem}]"


@dataclass(frozen=True)
class Estimator:
    r"""A loss with a claim: `estimator(rollouts)` is a 0-d tensor to minimise, $\mathrm{reduce}_{b,n}\, \ell_{bn}$.

    The value of a sampled-token loss, $-\sum_n A_n \log p(y_n|h_n)$, is a surrogate: only its gradient means something.
    Use `opdtheory.estimators.estimator` to make one.

    Attributes:
        name: name given to `estimator`.
        claim: claim about the expected gradient.
        token_loss: maps rollouts to the loss of each token, `(B, T)`, before the reduction.
        reduction: `token_sum` (sum over tokens, mean over rollouts), `token_mean` or `sequence_mean`.
        options: options given, in the order of the signature.
    """

    name: str
    claim: Claim
    token_loss: TokenLoss = field(repr=False)
    reduction: Reduction = "token_sum"
    options: tuple[tuple[str, object], ...] = ()

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, ""]:
        """The loss of a batch, a 0-d tensor in nats or in the unit of the advantage."""
        values = self.token_loss(rollouts)
        if self.reduction == "token_sum":
            return rollouts.token_sum(values)
        return rollouts.token_mean(values) if self.reduction == "token_mean" else rollouts.sequence_mean(values)

    @property
    def settings(self) -> dict[str, Any]:
        """The options given, by name."""
        return dict(self.options)

    @property
    def is_token_local(self) -> bool:
        """Whether a token's weight depends on its own history and probabilities only, apart from the batch."""
        advantage = getattr(self.token_loss, "advantage", None)
        return not getattr(advantage, "looks_ahead", False)

    @property
    def label(self) -> str:
        """The name in tables, such as `opd(jsd, clip_log_ratio=6.0)`."""
        shown = (str(value) if key == "divergence" else f"{key}={value}" for key, value in self.options)
        return f"{self.name}({', '.join(shown)})" if self.options else self.name

    def __repr__(self) -> str:
        arguments = [repr(self.name)]
        arguments += [repr(value) if key == "divergence" else f"{key}={value!r}" for key, value in self.options]
        return f"estimator({', '.join(arguments)})"


def teacher_distribution(rollouts: Rollouts, what: str) -> Float[Tensor, "B T V"]:
    """The teacher's logits for what needs its whole distribution, detached, with 0 where masked.

    Raises:
        InvalidArgumentError: the rollouts hold the teacher's likeliest tokens only.
    """
    if rollouts.payload is not None:
        known = rollouts.payload.ids.shape[-1]
        problem = f"must hold the teacher's whole distribution for {what}, got a payload of {known} tokens"
        raise InvalidArgumentError("rollouts", problem)
    return unmasked(rollouts, rollouts.teacher_logits.detach())


def unmasked(rollouts: Rollouts, values: Tensor, fill: float = 0.0) -> Tensor:
    """The values with `fill` at masked positions, where the gradient is then exactly zero; any trailing axes.

    Use it before computing anything from masked values: an overflow there would come back as 0 * inf.
    """
    mask = rollouts.mask.reshape(*rollouts.mask.shape, *(1 for _ in range(values.ndim - rollouts.mask.ndim)))
    return torch.where(mask > 0, values, torch.full_like(values, fill))
