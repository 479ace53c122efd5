"""`docs/validation.md`: the recorded validations as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from opdtheory.rendering.html import verdict_words
from opdtheory.rendering.markdown import folded, markdown_table
from opdtheory.training.validation.comparison import LEVEL
from opdtheory.training.validation.report import Validation

__all__ = ["SECTIONS", "page"]

Record = Mapping[str, Any]

SECTIONS = ("small", "enumerated", "smollm2_noise", "smollm2_layer")

_INTRODUCTION = f"""# Gradient validation

Does an estimator give a language model the gradient that theory predicts? `python docs/generate_validation.py` writes
this page from `docs/validation.json`, which it also writes. `--smollm2` adds the runs with SmolLM2-135M; `--quick`
repeats a few rows and compares them with the record. For your own pair of models use
`opdtheory.validate(student, teacher, prompts, "opd", "jsd")`, and in training `opdtheory train --validate-every 50`.

At the prefixes of the student's own answers, four gradients in its parameters are compared:

- **exact**: the gradient of the declared objective, by autograd over the whole vocabulary;
- **predicted**: the exact gradient plus the bias of theory: $E_p[u f'(u) s]$ for stop-gradient estimators (T2), and
  the weights of T4, T7, T8, T9 and T11 for the others, without the estimators' code;
- **expected**: the estimator's own code on every next token, summed with their probabilities;
- **sampled**: the gradient of the estimator's mean loss over sampled next tokens.

*bias* is |expected − exact| and *predicted* is |predicted − exact|, both relative to |exact|. *off by* is the
distance |expected − predicted|, relative to the longest of the three. *cosine* is between expected and exact. *z* is
the largest distance of the sampled mean from the prediction, in standard deviations, over fixed random directions, the
exact gradient and the bias; a faithful estimator exceeds the limit with probability {LEVEL:g}. *z, exact* is the same
distance from the exact gradient, which is large where samples show the bias. *along the gradient* is the sampled bias
along the exact gradient with its 95 % interval, and *theory* its prediction. *SNR* is |expected| over the root of the
trace of the covariance of one rollout's gradient; it grows as the root of the number of rollouts. Variances are sums
over the vocabulary, not sample variances: the weights of the forward KL and of χ² have heavy tails, and a sample that
misses them looks precise. Over prefixes the variance is the spread between rollouts, and the trace is estimated from
random directions. The rows of a table share prefixes, directions and draws, so rows with similar weights have similar
*z*.

*claims* is the verdict of `loss.claim` under its assumptions. Rows that are off-policy without the matching importance
ratio break these assumptions on purpose, and the prediction says by how much (T8). At fixed prefixes the exact
gradient has the estimator's own reduction. That a mean over each rollout's tokens is another objective when lengths
vary (T11) shows only where all rollouts are enumerated.
"""

_TITLES = {
    "small": "Every estimator on a small transformer",
    "enumerated": "Every rollout of a tiny model",
    "smollm2_noise": "SmolLM2-135M, student with noise in its weights",
    "smollm2_layer": "SmolLM2-135M, student without one layer",
}

_TEXTS = {
    "small": "Two layers of width 48 in float64, and 8 prompts of the addition task. Student, teacher and, in rows "
    "marked *off-policy*, the sampling policy are three initialisations with widened logits. Estimators that compare "
    "rollouts get groups of two at one prefix.",
    "enumerated": "A vocabulary of 4, and rollouts of at most 3 tokens with an end-of-sequence token, or of exactly 2 "
    "where pairs of rollouts are enumerated; two layers of width 8, float64. All rollouts go through the estimator's "
    "code, and the gradient through the transformer. This covers estimators that look beyond the next token: "
    "returns-to-go, sequence weights, products of importance ratios.",
    "smollm2_noise": "The teacher is SmolLM2-135M-Instruct; the student is the same model with noise of a tenth of "
    "each weight matrix's standard deviation. Eight English prompts; gradients in the last block and the final norm, "
    "in float32, so that rounding is 1e-4. Expected and predicted gradients are summed in float64 before they are "
    "pulled back, and often round to the same vector. For χ² without a clip, 1024 draws say nothing (see the "
    "interval), but the sum over the vocabulary does. An estimator that reads whole distributions beside the sampled "
    "token would take the square of the vocabulary at each prefix: its own code is run on the tokens drawn, whose "
    "share of the probability is given, and must have the weight of theory on each; on the others that weight stands "
    "for it.",
    "smollm2_layer": "The same teacher; the student lacks one layer in the middle.",
}

_CONCLUSION = """## Reading the tables

- {agreement}
- A wrong claim does not agree. With the sign flipped, a stop-gradient loss claimed exact, or a clip or an importance
  ratio forgotten, both comparisons fail; see `tests/training/validation`.
- Outside the clip of a *differentiated* loss there is no gradient, so a constant is no baseline there: the clipped k3
  has the weight $u - 1$, not $u$, and the clipped k1 has a gradient, which is zero without the clip.
- Stop-gradient χ² has the weight $-(u-1)^2 = -(u^2-1) + 2(u-1)$: the corrected weight with its sign flipped, plus
  twice that of the forward KL, which is small in comparison where ratios are large. Samples show this late: see its
  signal-to-noise ratio.
"""


def page(record: Mapping[str, Record]) -> str:
    """The page of the sections that the record has.

    Args:
        record: for each section, `rows` of `Validation.to_dict` with `off_policy`, and `seconds` of processor time.
    """
    parts = [_INTRODUCTION]
    for section in SECTIONS:
        if section in record:
            rows = record[section]["rows"]
            parts.append(f"## {_TITLES[section]}\n\n{_TEXTS[section]} {_facts(record[section])}\n\n{_tables(rows)}\n")
    found = [Validation.from_dict(row) for section in SECTIONS if section in record for row in record[section]["rows"]]
    wrong = [row.estimator for row in found if not row.agrees]
    agreement = f"All {len(found)} rows agree: summed gradients to rounding, sampled ones within their limit."
    if wrong:
        agreement = f"{len(found) - len(wrong)} of {len(found)} rows agree; these do not: `{'`, `'.join(wrong)}`."
    return "\n".join([*parts, _CONCLUSION.format(agreement=agreement)])


def _facts(section: Record) -> str:
    first, draws = section["rows"][0], max(row["draws"] for row in section["rows"])
    text = f"{first['parameters']:,} parameters, seed {first['seed']}"
    if draws:
        text += f", {first['rollouts']} rollouts with {first['prefixes']} prefixes, {draws} draws of each next token"
    return f"{text}; {section['seconds']:.0f} s of processor time."


def _tables(rows: Sequence[Record]) -> str:
    """The expected gradients, and folded what was sampled, if anything was."""
    found = [Validation.from_dict(row) for row in rows]
    names = [
        f"`{each.estimator}`" + (", off-policy" if row.get("off_policy") else "") + _run_on(each)
        for row, each in zip(rows, found, strict=True)
    ]
    expected = [(name, *_expected(each)) for name, each in zip(names, found, strict=True)]
    head = ("estimator", "claims", "bias", "predicted", "off by", "cosine", "verdict")
    parts = [markdown_table(head, expected)]
    if any(each.z is not None for each in found):
        sampled = [(name, *_sampled(each)) for name, each in zip(names, found, strict=True)]
        head = ("estimator", "z", "z, exact", "along the gradient", "theory", "variance", "SNR of 1 and 128")
        parts.append(folded("The same with sampled gradients", markdown_table(head, sampled)))
    return "\n\n".join(parts)


def _expected(found: Validation) -> tuple[str, ...]:
    return (
        verdict_words(found.claimed),
        _number(found.bias),
        _number(found.predicted_bias),
        f"{found.discrepancy:.0e}",
        "none" if found.cosine is None else f"{found.cosine:+.3f}",
        found.verdict,
    )


def _run_on(found: Validation) -> str:
    return "" if found.run_on == 1 else f", {found.draws} draws, run on {found.run_on:.0%}"


def _sampled(found: Validation) -> list[str]:
    if not found.draws:
        along = ["exact", "exact", _signed(found.along), _signed(found.along_predicted)]
    else:
        low, high = found.along_interval or (None, None)
        along = [
            f"{found.z:+.1f} of {found.z_limit:.1f}",
            f"{found.z_exact:+.1f}",
            f"{_signed(found.along)} [{_signed(low)}, {_signed(high)}]",
            _signed(found.along_predicted),
        ]
    noise = ", ".join(_number(found.noise(rollouts)) for rollouts in (1, 128))
    return [*along, _number(found.variance), noise]


def _number(value: float | None, sign: str = "") -> str:
    if value is None:
        return "none"
    return "0" if abs(value) < 1e-6 else f"{value:{sign}.3g}"


def _signed(value: float | None) -> str:
    return _number(value, "+")
