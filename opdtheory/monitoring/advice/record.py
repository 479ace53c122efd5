"""What a recommendation consists of: ranked choices, and the words around them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from opdtheory.divergences import Divergence
from opdtheory.estimators import Estimator
from opdtheory.monitoring.advice.candidates import Have
from opdtheory.rendering import text
from opdtheory.rendering.table import Table

__all__ = ["Advice", "Choice"]

_COLUMNS = ("", "estimator", "error", "bias", "noise", "numbers", "teacher sends")


@dataclass(frozen=True)
class Choice:
    r"""One estimator and what its gradient of a batch is off by.

    Attributes:
        loss: the estimator, ready to be called on rollouts.
        bias: the square of the bias, relative to $|g|^2$ of the exact gradient at the same histories.
        variance: the variance of a batch's gradient, likewise.
        numbers: the numbers of teacher and student that its loss holds of a token; None for two whole vocabularies of
            unknown size.
        calls: the log-probabilities that the teacher sends of a token, all teachers together; None likewise.
        reason: what it does, as a sentence without its subject.
        theorem: what that rests on.
        trl: the lines of TRL with the plug-in; None where it cannot do it.
        verl: the settings of verl with the plug-in; None where it cannot do it.
        train: the options of `opdtheory train`.
        yours: whether it is the estimator of the run.
    """

    loss: Estimator
    bias: float
    variance: float
    numbers: int | None
    calls: int | None
    reason: str
    theorem: str
    trl: str | None
    verl: str | None
    train: str
    yours: bool = False

    @property
    def name(self) -> str:
        """The name given to `opd.estimator`."""
        return self.loss.name

    @property
    def options(self) -> dict[str, Any]:
        """The options given to `opd.estimator`, the divergence among them."""
        return self.loss.settings

    @property
    def error(self) -> float:
        """The expected squared error of a batch's gradient, relative to the exact one's square: bias and variance."""
        return self.bias + self.variance

    def to_dict(self) -> dict[str, Any]:
        """The choice as plain JSON values."""
        options = {key: str(value) if isinstance(value, Divergence) else value for key, value in self.options.items()}
        return {
            "name": self.name,
            "options": {key: list(value) if isinstance(value, tuple) else value for key, value in options.items()},
            "error": self.error,
            **{key: getattr(self, key) for key in ("bias", "variance", "numbers", "calls", "reason", "theorem")},
            **{key: getattr(self, key) for key in ("trl", "verl", "train", "yours")},
        }


def _counts(choice: Choice) -> tuple[str, str]:
    if choice.numbers is None or choice.calls is None:
        return "2 V", "V"
    return str(choice.numbers), str(choice.calls)


@dataclass(frozen=True)
class Advice:
    """Estimators ranked by the expected squared error of their gradient at equal cost.

    Attributes:
        divergence: the label of the target.
        have: what the teacher can send.
        choices: the estimators, best first.
        tokens: the number of tokens that the numbers come from.
        batch_tokens: the number of sampled tokens of the batch that is spoken of.
        exact: whether the numbers are closed forms over both distributions; otherwise they are proxies.
        notes: what the numbers leave out, as sentences.
    """

    divergence: str
    have: Have
    choices: tuple[Choice, ...]
    tokens: int
    batch_tokens: int
    exact: bool
    notes: tuple[str, ...] = ()

    @property
    def best(self) -> Choice:
        """The first choice."""
        return self.choices[0]

    def to_dict(self) -> dict[str, Any]:
        """The advice as plain JSON values."""
        return {
            **{key: getattr(self, key) for key in ("divergence", "have", "tokens", "batch_tokens", "exact")},
            "choices": [choice.to_dict() for choice in self.choices],
            "notes": list(self.notes),
        }

    def __str__(self) -> str:
        kind = "closed forms over both distributions" if self.exact else "proxies from the sampled tokens"
        sent = {"sampled": "the sampled token", "top_k": "the likeliest tokens", "vocabulary": "the whole vocabulary"}
        lines = [
            text.paragraph(
                f"{self.divergence}, from a teacher that sends log-probabilities of {sent[self.have]}. Errors are "
                f"squared, of the gradient of a batch of {self.batch_tokens:,} tokens, relative to the exact one's "
                f"square; {kind} of {self.tokens:,} tokens."
            ),
            "",
        ]
        rows: list[tuple[str, ...]] = [_COLUMNS]
        for rank, choice in enumerate(self.choices, 1):
            numbers = (f"{x:.3g}" for x in (choice.error, choice.bias, choice.variance))
            mark = f"{rank}*" if choice.yours else str(rank)
            rows.append((mark, choice.loss.label, *numbers, *_counts(choice)))
        lines += Table(rows, "llr").lines()
        if any(choice.yours for choice in self.choices):
            lines.append("* the estimator of the run")
        best = self.best
        lines += ["", text.item(f"{best.loss.label} {best.reason} [{best.theorem}].")]
        lines += [text.item(f"{c.loss.label} {c.reason} [{c.theorem}].") for c in self.choices if c.yours and c != best]
        lines += [text.item(note) for note in self.notes]
        for where, config in (("TRL", best.trl), ("verl", best.verl), ("opdtheory train", best.train)):
            lines.append("")
            lines += [f"{where}:", *(f"  {line}" for line in config.splitlines())] if config else [f"{where}: cannot"]
        return "\n".join(lines)
