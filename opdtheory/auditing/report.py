"""The result of an audit: a verdict, the numbers behind it, and a way to read them."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from opdtheory.rendering import text

if TYPE_CHECKING:
    from opdtheory.auditing.checks.numerics import DtypeResult
    from opdtheory.auditing.checks.soundness import Check
    from opdtheory.auditing.effects.dependence import Dependence
    from opdtheory.auditing.naming.weight_form import WeightForm

__all__ = ["FAITHFUL", "VERDICTS", "Audit", "PairResult", "Remedy"]

SCHEMA_VERSION = 1

# A slope at the teacher this small against the weight's range is a finite difference's error.
_FLAT = 1e-6

VERDICTS = {
    "exact": "its expected gradient is the exact one",
    "exact_up_to_scale": "its expected gradient is the exact one times a constant",
    "other_objective": "it descends another objective than the one claimed",
    "zero": "its expected gradient is zero",
    "biased": "its expected gradient is biased",
    "undecided": "the budget ended before its expected gradient could be told",
}

FAITHFUL = ("exact", "exact_up_to_scale")

# Checks that say the same as the verdict, and those of extreme numbers, which are about range and not about the claim.
_OF_THE_VERDICT = ("stationary at the teacher", "one common scale", "error at the best scale")
_OF_THE_RANGE = ("finite at probability 1e-30", "finite where the teacher gives zero", "extreme padding is ignored")


@dataclass(frozen=True)
class PairResult:
    """One row of an audit's table.

    Attributes:
        label: which student-teacher pair.
        relative_bias: `|E g - exact| / |exact|`.
        cosine: between the expected and the exact gradient.
        variance: trace of the covariance of the gradient of one batch.
        full_vocabulary_variance: the same for the whole-vocabulary estimator of the claimed
            divergence, whose only randomness is the prefix.
    """

    label: str
    relative_bias: float
    cosine: float
    variance: float
    full_vocabulary_variance: float


@dataclass(frozen=True)
class Remedy:
    """One change to a loss that is not faithful to its claim.

    Attributes:
        kind: `sign scale position reduction padding importance slope advantage granularity clip detach differentiate k2
            tail vocabulary baseline`, two of them joined by a comma, `claim`, `gauge` or `replace`.
        text: an imperative sentence with the formula and the theorem.
        verdict: of the changed loss against the claim; of `claim`, against the other claim.
        relative_bias: of the changed loss at scale one.
        verified: whether an audit of the changed loss found it faithful.
    """

    kind: str
    text: str
    verdict: str
    relative_bias: float
    verified: bool


@dataclass(frozen=True)
class Audit:
    """What a loss really does, by exact expectation over a panel of enumerated policies.

    Attributes:
        name: of the loss.
        objective: the claimed divergence.
        granularity: the claimed one of `token_local`, `token_return` and `sequence`.
        verdict: a key of `VERDICTS`.
        relative_bias: worst over the panel, against the claimed objective at scale one.
        cosine: worst over the panel.
        scale: best common multiple of the claimed gradient.
        tolerance: relative error that counts as rounding.
        identified: the catalogue objective that matches best over all granularities, with
            `objective`, `granularity`, `parameters`, `scale` and `error`, or None if no objective
            points the same way; with `gamma` where a discount was fitted, and with `terms` where it is a signed sum of
            a few objectives, their coefficients by name. The error is relative to the loss's gradient, at that
            scale: the worst over the panel for a match, the root mean square for the nearest miss.
        weight: the recovered local weight: `log_u`, `weight`, `depends_on_ratio_only`, `non_decreasing`,
            `residual`, `slope_at_teacher` (see `RecoveredWeight`) and `explains_panel`: whether that weight
            of each token's own ratio gives the gradient over several tokens too (None: cannot tell).
        pairs: one row per pair of the panel.
        variable_lengths: verdict and worst relative bias, against the objective that the loss
            follows at fixed length, when rollouts may end early; None if not looked at.
        form: the recovered weight as a formula, with the divergence it implies and its behaviour (T4, T5, T7d).
        dependence: on what the weight of a token depends beside its own ratio.
        checks: what else must hold of a loss that follows its claim, such as no gradient on padding.
        numerics: the same loss in lower precision.
        remedies: verified changes that would make the loss do what it claims.
        monte_carlo: intervals and sample sizes where the expectation was estimated; None if it is exact.
        settings: batch size, eos, off_policy, gamma, seed.
        evaluations: how often the loss was called.
        seconds: how long the audit took.
    """

    name: str
    objective: str
    granularity: str
    verdict: str
    relative_bias: float
    cosine: float
    scale: float
    tolerance: float
    identified: dict[str, Any] | None
    weight: dict[str, Any]
    pairs: list[PairResult]
    variable_lengths: dict[str, Any] | None = None
    form: WeightForm | None = None
    dependence: Dependence | None = None
    checks: list[Check] = field(default_factory=list)
    numerics: list[DtypeResult] = field(default_factory=list)
    remedies: list[Remedy] = field(default_factory=list)
    monte_carlo: dict[str, Any] | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    evaluations: int = 0
    seconds: float = 0.0

    @property
    def faithful(self) -> bool:
        """Whether the loss does what it claims, up to a constant factor, and no check found it unsound."""
        unsound = [check for check in self._failed() if check.name not in _OF_THE_RANGE]
        return self.verdict in FAITHFUL and not unsound

    def _failed(self) -> list[Check]:
        """The checks that failed and say more than the verdict."""
        return [check for check in self.checks if check.passed is False and check.name not in _OF_THE_VERDICT]

    @property
    def descends(self) -> str | None:
        """The catalogue objective whose exact gradient the loss follows, or None if there is none."""
        if self.identified is None or self.identified["error"] > self.tolerance or self.verdict == "zero":
            return None
        # A signed sum of objectives is none of the catalogue's.
        return None if "terms" in self.identified else _label(self.identified)

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain Python values that `json.dumps` takes; infinite numbers become null."""
        record = {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "objective": self.objective,
            "granularity": self.granularity,
            "verdict": self.verdict,
            "faithful": self.faithful,
            "descends": self.descends,
            "relative_bias": self.relative_bias,
            "cosine": self.cosine,
            "scale": self.scale,
            "tolerance": self.tolerance,
            "identified": self.identified,
            "weight": {k: v.tolist() if hasattr(v, "tolist") else v for k, v in self.weight.items()},
            "pairs": [vars(pair) for pair in self.pairs],
            "variable_lengths": self.variable_lengths,
            "form": None if self.form is None else asdict(self.form),
            "dependence": None if self.dependence is None else asdict(self.dependence),
            "checks": [asdict(check) for check in self.checks],
            "numerics": [asdict(result) for result in self.numerics],
            "remedies": [asdict(remedy) for remedy in self.remedies],
            "monte_carlo": self.monte_carlo,
            "settings": self.settings,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
        }
        plain = _plain(record)
        assert isinstance(plain, dict)
        return plain

    def summary(self) -> str:
        """The findings in a few sentences."""
        if self.monte_carlo is not None:
            return str(self.monte_carlo["words"])
        sentences = (
            self._claim(),
            self._follows(),
            self._shape(),
            self._depends(),
            self._lengths(),
            *(check.detail for check in self._failed()),
            self._noise(),
        )
        return " ".join(sentence for sentence in sentences if sentence)

    def __str__(self) -> str:
        rule = f"{self.name}: {self.verdict.replace('_', ' ').upper()}"
        header = ("pair", "relative bias", "cosine", "variance", "full-vocab variance")
        rows = [
            (
                p.label,
                f"{p.relative_bias:.2e}",
                f"{p.cosine:+.6f}",
                f"{p.variance:.3e}",
                f"{p.full_vocabulary_variance:.3e}",
            )
            for p in self.pairs
        ]
        lines = text.table((header, *rows), align="lr")
        parts = [rule, "", text.paragraph(self.summary())]
        parts += ["", *lines] if rows else []
        if self.remedies:
            parts += ["", "What would make it right:", *(text.item(remedy.text) for remedy in self.remedies)]
        narrow = [f"{r.dtype}: {r.words}" for r in self.numerics if r.regime == "realistic" and _matters(r)]
        if narrow:
            parts += ["", "On realistic logits in narrow dtypes:", *map(text.item, narrow)]
        return "\n".join(parts)

    def _claim(self) -> str:
        claim = f"{self.objective} ({self.granularity})"
        if self.verdict == "exact":
            return f"The expected gradient is exactly that of {claim}."
        if self.verdict == "exact_up_to_scale":
            return f"The expected gradient is exactly that of {claim}, times {self.scale:.6g}."
        if self.verdict == "zero":
            return f"The expected gradient is zero: in expectation this loss does not train at all, let alone {claim}."
        if self.verdict == "other_objective":
            return f"The loss does not descend {claim}."
        uphill = sum(pair.cosine < 0 for pair in self.pairs)
        turn = f", uphill on {uphill} of {len(self.pairs)} pairs" if uphill else ""
        return (
            f"The expected gradient is not that of {claim}: it is off by up to {_percent(self.relative_bias)} "
            f"of the exact gradient's length, with a cosine down to {self.cosine:.4f}{turn}."
        )

    def _follows(self) -> str:
        if self.identified is None or self.verdict in ("zero", *FAITHFUL):
            return ""
        where = f"{_label(self.identified)} ({self.identified['granularity']})"
        if self.identified["error"] > self.tolerance:
            near = "" if self.identified["error"] < 0.5 else " and far from it"
            return (
                f"The nearest catalogue objective is {where}, off by {_percent(self.identified['error'])} "
                f"at best scale{near}."
            )
        factor = self.identified["scale"]
        times = "" if abs(factor - 1.0) <= self.tolerance else f" times {factor:.6g}"
        return f"Its expected gradient is that of {where}{times}, to {self.identified['error']:.0e}."

    def _shape(self) -> str:
        if self.verdict == "zero":
            return ""
        if not self.weight["depends_on_ratio_only"]:
            return "The weight on a token is no function of the ratio u = teacher/student alone."
        if self.descends is None and self.weight["explains_panel"] is False:
            return (
                "On one-step policies the weight on a token is a function of the ratio u = teacher/student; over "
                "several tokens it depends on more than this token's."
            )
        sentences = []
        if self.form is not None and self.form.expr is not None and self.descends is None:
            sentences.append(f"The weight on a token is {self.form.expr}, up to a scale and a constant.")
        if not self.weight["non_decreasing"]:
            sentences.append(f"The weight falls {_intervals(self.weight)}, so no f-divergence is minimised (T4).")
        elif self.descends is None:
            sentences.append("The weight never falls as u grows, so some f-divergence is minimised (T4).")
        slope, span = self.weight["slope_at_teacher"], float(self.weight["weight"].abs().max())
        if slope < -_FLAT * span:
            sentences.append("The teacher is a repelling fixed point (T5).")
        elif slope <= _FLAT * span:
            sentences.append("The teacher does not attract to first order (T5).")
        return " ".join(sentences)

    def _depends(self) -> str:
        """On what else than the token's own ratio the weight depends."""
        if self.dependence is None or self.dependence.ratio_only:
            return ""
        return " ".join(self.dependence.words)

    def _lengths(self) -> str:
        if self.variable_lengths is None:
            return ""
        if self.variable_lengths["verdict"] in FAITHFUL:
            return ""
        return (
            "This holds at fixed length only: when rollouts may end early, it is off by up to "
            f"{_percent(self.variable_lengths['relative_bias'])} even at the best scale (T11)."
        )

    def _noise(self) -> str:
        """Variance at the claimed gradient's own scale, where the two estimate the same vector."""
        if not self.faithful or self.granularity != "token_local":
            return ""
        ratios = [
            p.variance / (self.scale**2 * p.full_vocabulary_variance)
            for p in self.pairs
            if p.full_vocabulary_variance > 0
        ]
        if not ratios or min(ratios) <= 0:
            return ""
        middle = math.exp(sum(map(math.log, ratios)) / len(ratios))
        if abs(middle - 1.0) < 1e-6:
            return "Its variance is that of the whole-vocabulary estimator."
        return f"At equal scale its variance is {middle:.3g} times that of the whole-vocabulary estimator."


def _label(identified: dict[str, Any]) -> str:
    parameters = ", ".join(f"{k}={v:.6g}" for k, v in identified["parameters"].items())
    return f"{identified['objective']}({parameters})" if parameters else str(identified["objective"])


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.3g}%" if math.isfinite(ratio) else "any amount"


def _intervals(weight: dict[str, Any]) -> str:
    """Where the weight falls, as words."""
    log_u, falls = weight["log_u"], (weight["weight"].diff() < 0).tolist()
    starts = [i for i, f in enumerate(falls) if f and (i == 0 or not falls[i - 1])]
    ends = [i + 1 for i, f in enumerate(falls) if f and (i + 1 == len(falls) or not falls[i + 1])]
    spans = [f"[{float(log_u[a]):.3g}, {float(log_u[b]):.3g}]" for a, b in zip(starts, ends, strict=True)]
    return "for log u in " + " and ".join(spans)


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _matters(result: DtypeResult) -> bool:
    """Whether a narrow dtype does more to the gradient than round it."""
    return bool(result.overflow or result.lost_gradient or result.sign_changed)
