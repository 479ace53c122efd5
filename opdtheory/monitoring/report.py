"""The result of reading a run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch

from opdtheory.divergences import Divergence
from opdtheory.estimators import Estimator
from opdtheory.monitoring.evidence import Evidence, leave_one_out
from opdtheory.monitoring.findings import CONFIDENCE, FORESEES, Finding, Setting, findings, setting_of
from opdtheory.monitoring.findings.trends import trend
from opdtheory.monitoring.measures import Measured, measured, moment, quantiles
from opdtheory.monitoring.sums import Number, Sums, number_of
from opdtheory.monitoring.zoo import beside
from opdtheory.rendering import text
from opdtheory.rendering.table import Table
from opdtheory.rendering.values import plain_values

__all__ = ["SCHEMA_VERSION", "VERDICTS", "ZOO_COLUMNS", "Diagnosis", "Step", "Verdict", "cells"]

SCHEMA_VERSION = 1

Verdict = Literal["collapse", "no_signal", "noise", "other_samples", "clipped", "nothing_found"]

VERDICTS: dict[Verdict, str] = {
    "collapse": "heads for a collapse",
    "no_signal": "learns nothing",
    "noise": "is drowned in noise",
    "other_samples": "learns from another policy's samples",
    "clipped": "descends another divergence than its own",
    "nothing_found": "nothing in these tokens speaks against it",
}

# Which warning amounts to which verdict, the gravest first.
_AMOUNTS: dict[str, Verdict] = {
    "collapse": "collapse",
    "collapsed": "collapse",
    "no_signal": "no_signal",
    "noise": "noise",
    "not_own_probabilities": "other_samples",
    "mismatch": "other_samples",
    "gauge": "other_samples",
    "support": "other_samples",
    "clipping": "clipped",
}

# Importance weights that a histogram of tokens cannot follow.
_WHOLE_ROLLOUT = ("prefix", "sequence", "sequence_mask", "gspo", "ppo")

_SHARES = (0.001, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 0.999)
ZOO_COLUMNS = ("estimator", "falls on", "rises on", "slope", "at u = 1", "towards", "signal", "carried by")


@dataclass(frozen=True)
class Step:
    """One step of a run.

    Attributes:
        number: of the step.
        tokens: the number of its tokens.
        metrics: what was measured on it, by name.
        foreseen: the findings on all tokens up to it by which a collapse is foreseen, by name.
    """

    number: int
    tokens: int
    metrics: Mapping[str, float]
    foreseen: tuple[str, ...] = ()


@dataclass(frozen=True)
class Diagnosis:
    r"""What a run's tokens say of it.

    Attributes:
        loss: the estimator in use.
        evidence: the sums of all tokens.
        batch_tokens: the tokens of one optimiser step.
        steps: in the order read; empty if the tokens came without steps.
        first: findings by which a collapse was foreseen, as they were at the step where each first held.
        source: where the tokens come from, in words.
        left_out: what could not be used, a sentence for each reason.
    """

    loss: Estimator
    evidence: Evidence = field(repr=False)
    batch_tokens: float
    steps: tuple[Step, ...] = field(default=(), repr=False)
    first: Mapping[str, Finding] = field(default_factory=dict, repr=False)
    source: str = "arrays"
    left_out: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """The number of tokens that were used."""
        return self.evidence.tokens

    @property
    def estimator(self) -> str:
        """The name of the estimator in use."""
        return self.loss.name

    @property
    def divergence(self) -> Divergence:
        """The divergence that it is for."""
        return self.loss.claim.divergence

    @property
    def sums(self) -> Sums:
        """The histograms of log u, as expectations under the student where the sampler is known."""
        return self.evidence.own

    @cached_property
    def setting(self) -> Setting:
        """What the findings are about."""
        return setting_of(self.loss, self.evidence, self.batch_tokens)

    @cached_property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, warnings first; a collapse that was foreseen at some step comes as it was foreseen."""
        later = [found for found in findings(self.setting) if found.name not in self.first]
        later += trend(self.setting, self.steps)
        return tuple(sorted([*self.first.values(), *later], key=lambda found: found.level != "warning"))

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that call for a change."""
        return tuple(found for found in self.findings if found.level == "warning")

    @property
    def verdict(self) -> Verdict:
        """What the gravest warning amounts to."""
        names = {found.name for found in self.warnings}
        return next((verdict for name, verdict in _AMOUNTS.items() if name in names), "nothing_found")

    @property
    def foresees_collapse(self) -> bool:
        """Whether a collapse is foreseen, at any step."""
        return any(found.name in FORESEES for found in self.warnings)

    @property
    def first_warning(self) -> int | None:
        """The first step at which a collapse was foreseen; None if none was, or the tokens came without steps."""
        return next((step.number for step in self.steps if step.foreseen), None)

    @property
    def headline(self) -> str:
        """The verdict as one sentence."""
        words = VERDICTS[self.verdict]
        return f"{self.loss.label}: {words}" if self.verdict == "nothing_found" else f"{self.loss.label} {words}"

    @cached_property
    def zoo(self) -> tuple[Measured, ...]:
        """The estimator in use, and others, on the same tokens."""
        weights = (self.setting.weight, *beside(self.loss))
        return tuple(measured(weight, self.evidence.own, CONFIDENCE) for weight in weights)

    @cached_property
    def signal(self) -> dict[str, Number]:
        r"""Signal to noise of one token, $\sqrt{E|g|^2 / E\,\mathrm{tr\,Var}}$ in the logits at the best baseline.

        By estimator; empty unless both whole distributions came with all tokens.
        """
        if not self.evidence.complete:
            return {}
        found = {}
        for name, sums in self.evidence.rows.items():
            _, signal, noise, _ = leave_one_out(sums).unbind(-1)
            found[name] = number_of((signal / noise.clamp_min(1e-300)).sqrt(), CONFIDENCE)
        return found

    @cached_property
    def log_u(self) -> dict[float, float]:
        """Quantiles of log u, in nats, by share."""
        shares = torch.tensor(_SHARES, dtype=torch.float64)
        return dict(zip(_SHARES, quantiles(self.evidence.own, shares).tolist(), strict=True))

    @cached_property
    def reverse_kl(self) -> Number:
        r"""$KL(p\|q)$ at the student's histories, in nats per token, by the mean of $-\log u$."""
        return self.evidence.own.number(moment(torch.neg), CONFIDENCE)

    @property
    def limits(self) -> tuple[str, ...]:
        """What these tokens cannot say."""
        found = [
            "What is read is the weight of a token and where tokens lie; how gradients of tokens add up in the model's "
            "parameters, the optimiser and the learning rate are not seen.",
            "Signal and noise are those of the logits, by the sampled token's own part of the score; the whole "
            "distributions would make them exact.",
        ]
        if self.signal:
            found[1] = "The exact signal to noise is that of the logits, each history by itself."
        if self.setting.importance in _WHOLE_ROLLOUT:
            found.append(
                f"importance={self.setting.importance!r} weighs by more than the token's own ratio, and is read as if "
                "by that alone."
            )
        if not self.steps:
            found.append("The tokens came without steps: nothing is said of when.")
        if self.setting.measured.slope.interval is None:
            found.append("There are fewer than 8 rollouts: no interval, so no warning that needs one.")
        return tuple(found)

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as values that `json.dumps` takes; infinite numbers and NaN become None."""
        found = {
            "schema_version": SCHEMA_VERSION,
            "source": self.source,
            "estimator": self.loss.label,
            "divergence": self.divergence.label,
            "verdict": self.verdict,
            "headline": self.headline,
            "foresees_collapse": self.foresees_collapse,
            "first_warning": self.first_warning,
            "tokens": self.tokens,
            "rollouts": self.evidence.rollouts,
            "batch_tokens": self.batch_tokens,
            "findings": [each.to_dict() for each in self.findings],
            "log_u": {str(share): value for share, value in self.log_u.items()},
            "reverse_kl": list(self.reverse_kl),
            "signal": {name: list(number) for name, number in self.signal.items()},
            "zoo": [{key: plain_values(value) for key, value in vars(each).items()} for each in self.zoo],
            "steps": [{**vars(each), "metrics": dict(each.metrics)} for each in self.steps],
            "left_out": list(self.left_out),
            "limits": list(self.limits),
        }
        plain: dict[str, Any] = plain_values(found)
        return plain

    def __str__(self) -> str:
        lines = [text.paragraph(f"{self.headline}."), "", *map(text.paragraph, self.facts), ""]
        for found in self.findings:
            mark = "WARNING " if found.level == "warning" else ""
            lines.append(text.item(f"{mark}{found.sentence}{' ' + found.remedy if found.remedy else ''}"))
        lines += ["", *zoo_table(self).lines()]
        if self.signal:
            rows = [(name, f"{number}") for name, number in self.signal.items()]
            lines += ["", *Table([("estimator", "exact signal to noise of a token"), *rows], "lr").lines()]
        lines += ["", "What these tokens cannot say:", *map(text.item, self.limits)]
        return "\n".join(lines)

    @property
    def facts(self) -> tuple[str, ...]:
        """How much was read and where the tokens lie, in sentences."""
        steps = f", {len(self.steps)} steps" if self.steps else ""
        facts = [f"{self.tokens:,} tokens of {self.evidence.rollouts:,} rollouts{steps}, from {self.source}."]
        quantile = ", ".join(f"{100 * share:g} %: {value:.2f}" for share, value in self.log_u.items())
        facts.append(f"KL(p|q) {self.reverse_kl} nats a token. Quantiles of log u: {quantile}.")
        if self.first:
            facts.append(f"A collapse is foreseen from step {self.first_warning} on.")
        if self.left_out:
            facts.append(f"Left out: {' '.join(self.left_out)}")
        return tuple(facts)


def zoo_table(found: Diagnosis) -> Table:
    """The estimators on these tokens, the one in use first."""
    rows = [ZOO_COLUMNS, *map(cells, found.zoo)]
    return Table(rows, "lr", "Estimators on these tokens, the one in use first")


def cells(row: Measured) -> tuple[str, ...]:
    """A row of the table of estimators, as text."""
    shares = (f"{100 * each.value:.0f} %" for each in (row.falls, row.rises))
    numbers = (row.slope.value, row.pull, row.towards.value, row.signal.value)
    return (row.name, *shares, *(f"{value:+.2g}" for value in numbers), f"{100 * row.carried.value:.2g} %")
