r"""`Monitor`: the sums of a run while it runs, with a warning at the first step where a collapse is foreseen."""

from __future__ import annotations

import statistics
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.monitoring.diagnosis import loss_of
from opdtheory.monitoring.evidence import Evidence
from opdtheory.monitoring.findings import Finding, foresights, setting_of
from opdtheory.monitoring.report import Diagnosis, Step
from opdtheory.monitoring.sums import EDGE
from opdtheory.monitoring.tokens import SampledTokens, words_of
from opdtheory.monitoring.weights import Weight, weight_of
from opdtheory.monitoring.zoo import beside

__all__ = ["CollapseWarning", "Monitor"]

# Fewer tokens than this decide nothing. After them it is asked again whenever the run has grown by a twentieth.
_FEWEST, _GROWN = 1000, 1.05


class CollapseWarning(UserWarning):
    """A run's tokens foresee its collapse."""


class Monitor:
    """Running sums of a run's sampled tokens: metrics of each step, and a warning once a collapse is foreseen.

    It keeps some thirty megabytes whatever the length of the run, on the CPU, and draws nothing at random.

    Args:
        estimator: the estimator in use, or its name.
        divergence: the divergence that it is for, where the name needs one; reverse KL by default.
        together: the number of rollouts of one prompt, which stand next to each other.
        **options: further options of `opdtheory.estimator`.

    Raises:
        InvalidArgumentError: as for `diagnose`.

    Example:
        >>> monitor = Monitor("opd", "forward_kl")
        >>> monitor.add(torch.full((4, 8), -1.0), torch.full((4, 8), -1.1))
        >>> metrics = monitor.step()
        >>> metrics["opd/falls"]
        1.0
    """

    def __init__(
        self,
        estimator: str | Estimator = "opd",
        divergence: str | Divergence | None = None,
        *,
        together: int = 1,
        **options: Any,
    ) -> None:
        self.loss = loss_of(estimator, divergence, options)
        self._weight = weight_of(self.loss)
        self._whole = Evidence(self._weight, together, tuple(beside(self.loss)))
        self._now: list[SampledTokens] = []
        self._asked = 0
        self._steps: list[Step] = []
        self._first: dict[str, Finding] = {}

    def add(
        self,
        student_logprobs: Any,
        teacher_logprobs: Any,
        behavior_logprobs: Any = None,
        mask: Any = None,
        *,
        entropy: Any = None,
    ) -> None:
        """Add rollouts of the current step, as `diagnose` takes them; tensors of any device, in nats."""
        given = (student_logprobs, teacher_logprobs, behavior_logprobs, mask)
        self.add_tokens(SampledTokens.of(*map(_on_cpu, given), entropy=_on_cpu(entropy)))

    def add_tokens(self, tokens: SampledTokens) -> None:
        """Add tokens of the current step."""
        self._whole.add(tokens)
        self._now.append(tokens)

    def step(self, number: int | None = None) -> dict[str, float]:
        """End a step: its metrics, each named `opd/...`; the first one that foresees a collapse warns.

        Args:
            number: of the step; by default one more than the last one's, from 1.
        """
        now, self._now = self._now, []
        count = sum(map(len, now))
        if not count:
            return {}
        if number is None:
            number = self._steps[-1].number + 1 if self._steps else 1
        metrics = metrics_of(self._weight, now)
        foreseen = tuple(each.name for each in self._foresee(count))
        metrics["opd/collapse_foreseen"] = float(bool(self._first))
        self._steps.append(Step(number, count, metrics, foreseen))
        return metrics

    def _foresee(self, tokens: int) -> tuple[Finding, ...]:
        """The findings on all tokens so far by which a collapse is foreseen; new ones warn."""
        if self._whole.tokens < max(_FEWEST, _GROWN * self._asked):
            return ()
        self._asked = self._whole.tokens
        size = statistics.median([*(step.tokens for step in self._steps), tokens])
        found = foresights(setting_of(self.loss, self._whole, float(size)))
        for each in found:
            if each.name not in self._first:
                self._first[each.name] = each
                warnings.warn(f"{each.sentence} {each.remedy}", CollapseWarning, stacklevel=3)
        return found

    @property
    def foreseen(self) -> tuple[Finding, ...]:
        """The findings by which a collapse was foreseen, as they were when they first held."""
        return tuple(self._first.values())

    def diagnosis(
        self, source: str = "a monitor", *, batch_tokens: float | None = None, left_out: Sequence[str] | None = None
    ) -> Diagnosis:
        """What all tokens so far say.

        Args:
            source: where they come from, in words.
            batch_tokens: the tokens of one optimiser step; by default the median of the steps.
            left_out: what could not be used, in sentences; by default what this monitor itself left out.

        Raises:
            InvalidArgumentError: there is no token yet.
        """
        if self._now:
            self.step()
        if not self._whole.tokens:
            raise InvalidArgumentError("tokens", f"must be some; left out: {dict(self._whole.left_out)}")
        size = float(statistics.median(step.tokens for step in self._steps)) if batch_tokens is None else batch_tokens
        words = words_of(self._whole.left_out) if left_out is None else tuple(left_out)
        return Diagnosis(self.loss, self._whole, size, tuple(self._steps), dict(self._first), source, words)


def metrics_of(weight: Weight, parts: Sequence[SampledTokens]) -> dict[str, float]:
    r"""The metrics of one step's tokens, as they were sampled; the symbols are those of `Measured`.

    Each is a mean over tokens: `reverse_kl` of $-\log u$, `mean_u` of u, `falls` of $A' < 0$; `slope`, `towards`,
    `signal` and `carried` as in `Measured`; `sampler_kl` of $\rho - 1 - \log\rho$ and `surprise` of $-\log p - H$
    where they are known.
    """
    log_u = torch.cat([part.log_u for part in parts]).clamp(-EDGE, EDGE)
    p = torch.cat([part.student for part in parts]).exp()
    u, score = log_u.exp(), 1 - p
    a, slope, square, apart = weight(log_u), weight.slope(log_u), score.square(), p * (u - 1)
    mean_square = square.mean().clamp_min(1e-300)
    centred = a - (square * a).mean() / mean_square
    noise = (square * centred.square()).mean()
    towards = ((a - a.mean()) * apart).mean()
    loud = ((apart * (u - 1)).mean() * noise).sqrt()
    metrics = {
        "reverse_kl": -log_u.mean(),
        "mean_u": u.mean(),
        "falls": (slope < -1e-9 * slope.abs().max()).double().mean(),
        "slope": (square * slope).mean() / mean_square,
        "towards": towards,
        "signal": towards / loud if float(loud) > 0 else torch.zeros(()),
        "carried": (score * centred.abs()).mean().square() / noise if float(noise) > 0 else torch.zeros(()),
        "tokens": torch.tensor(float(len(log_u))),
    }
    known = [part.student - part.behavior for part in parts if part.behavior is not None]
    if known:
        log_rho = torch.cat(known)
        metrics["sampler_kl"] = (log_rho.expm1() - log_rho).mean()
    surprises = [-part.student - part.entropy for part in parts if part.entropy is not None]
    if surprises:
        metrics["surprise"] = torch.cat(surprises).nanmean()
    return {f"opd/{name}": float(value) for name, value in metrics.items()}


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) else value
