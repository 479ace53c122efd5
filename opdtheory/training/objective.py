r"""The loss of a run: an estimator of the library by name, or one of the experiment's controls."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.choices import Control, Verdict
from opdtheory.divergences import Divergence, divergence, names
from opdtheory.divergences.parsing import generator_from_text
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Claim, Estimator, estimator
from opdtheory.estimators.base import Assumptions, unmasked
from opdtheory.estimators.sampled import RatioAdvantage, ScoreFunction
from opdtheory.rollouts import Rollouts

__all__ = [
    "ExactScore",
    "divergence_text",
    "group_losses",
    "needs_groups",
    "objective",
    "parse_divergence",
    "summed",
    "unpredicted_off_policy",
]

_FIELDS = (
    *("tokens", "mask", "student_logits", "teacher_logits"),
    *("student_logprobs", "teacher_logprobs", "behavior_logprobs"),
)


def parse_divergence(text: str) -> Divergence:
    r"""The divergence of a catalogue name or label, or of a generator $f(u)$ written as an expression.

    Expressions may contain `u`, numbers, `+ - * / **`, parentheses, and `log exp sqrt Abs Max Min`. Nothing else is
    evaluated.

    Raises:
        InvalidArgumentError: the text is neither a known name nor such an expression, or it is not the generator of a
            divergence.

    Example:
        >>> parse_divergence("u*log(u) - 2*(u-1)").name
        'u*log(u) - 2*(u-1)'
    """
    name = re.match(r"\w+", text.strip())
    if name is not None and name[0] in names():
        return divergence(text.strip())
    words = set(re.findall(r"[^\W\d]\w*", text))
    if "u" not in words:
        return divergence(text)  # raises, with the nearest name
    return Divergence.from_expr(generator_from_text(text), name=text)


def divergence_text(given: Divergence) -> str:
    """The text from which `parse_divergence` makes this divergence again.

    Raises:
        InvalidArgumentError: the argument is not a divergence.
    """
    if not isinstance(given, Divergence):
        raise InvalidArgumentError("divergence", f"must be a name, an expression in u or a Divergence, got {given!r}")
    # A generator of the user's own may carry a name of the catalogue.
    return given.label if given._own_expr is None else str(given.expr)


def objective(
    name: str,
    given: str | None,
    options: Mapping[str, Any],
    control: Control | None = None,
    advantage: float | None = None,
) -> Estimator:
    r"""The loss of a run.

    The control `constant_advantage` descends $-A \sum_n \log p(y_n|h_n)$ with one constant $A$ for every token, whose
    expected gradient is zero on-policy. The control `supervised` is the cross-entropy of demonstrations. The control
    `exact_opd` is the expectation of OPD at each history, $\sum_a p(a|h_n)\,f(u_a)$ with the gradient of $f$ stopped:
    OPD's bias without its variance (T2).

    Raises:
        InvalidArgumentError: as for `opdtheory.estimator`, or an option does not apply to the control.
    """
    if control is None:
        if advantage is not None:
            raise InvalidArgumentError("advantage", f"applies only to control='constant_advantage', got {advantage:g}")
        return estimator(name, None if given is None else parse_divergence(given), **options)
    if control == "exact_opd":
        return _exact_opd(given, options)
    if given is not None:
        raise InvalidArgumentError("divergence", f"does not apply to control={control!r}, got {given!r}")
    _refuse_others(options, control, ("reduction",))
    if control == "constant_advantage" and advantage is None:
        raise InvalidArgumentError("advantage", "must be given for control='constant_advantage', such as -1.0")
    weight = 1.0 if advantage is None else advantage
    verdict: Verdict = "biased" if control == "supervised" else "zero"
    given_that = Assumptions(sampler="on_policy", fixed_length=True)
    claim = Claim(divergence("reverse_kl"), "token_local", verdict, "T4", assumptions=given_that)
    return Estimator(control, claim, lambda rollouts: -weight * rollouts.student_logprobs, options["reduction"])


def _exact_opd(given: str | None, options: Mapping[str, Any]) -> Estimator:
    if given is None:
        raise InvalidArgumentError("divergence", "must be given for control='exact_opd'")
    _refuse_others(options, "exact_opd", ("reduction", "clip_log_ratio"))
    followed = estimator("opd", parse_divergence(given), **options)
    rule = followed.token_loss
    assert isinstance(rule, ScoreFunction) and isinstance(rule.advantage, RatioAdvantage)
    return Estimator("exact_opd", followed.claim, ExactScore(rule.advantage), options["reduction"])


@dataclass(frozen=True)
class ExactScore:
    r"""The expectation of a score function's loss at each history, $-\sum_a p(a|h_n)\,A(a|h_n)$ with $A$ detached."""

    advantage: RatioAdvantage

    def __call__(self, rollouts: Rollouts) -> Float[Tensor, "B T"]:
        """The loss of each token, whose gradient is the expected gradient of a sampled token."""
        logits = (unmasked(rollouts, z) for z in (rollouts.student_logits, rollouts.teacher_logits))
        log_p, log_q = (torch.log_softmax(z, -1) for z in logits)
        return -(log_p.exp() * self.advantage.at(log_p.detach(), log_q.detach())).sum(-1)


def _refuse_others(options: Mapping[str, Any], control: str, kept: tuple[str, ...]) -> None:
    for option, value in options.items():
        if option not in kept and value not in (None, False):
            raise InvalidArgumentError(option, f"does not apply to control={control!r}, got {value!r}")


def needs_groups(loss: Estimator) -> bool:
    """Whether the loss of one rollout depends on the others in its group."""
    rule = loss.token_loss
    return isinstance(rule, ScoreFunction) and (rule.zscore or rule.baseline in ("group_mean", "leave_one_out"))


def unpredicted_off_policy(loss: Estimator) -> str | None:
    """Why no gradient is predicted for rollouts that the student did not sample; None where one is."""
    importance = loss.settings.get("importance")
    if needs_groups(loss):
        return "the rollouts of a prompt are compared with each other, which is predicted on-policy only"
    if importance is None and "baseline" in loss.settings:
        return "without importance weights its baseline biases"
    if importance in ("prefix", "sequence", "sequence_mask", "gspo"):
        return f"importance={importance!r} looks beyond the token"
    if loss.name in ("constant_advantage", "topk_reward"):
        return "its advantage has a zero mean on-policy only"
    return None


def group_losses(loss: Estimator, rollouts: Rollouts, group_size: int) -> Float[Tensor, "B T"]:
    """The loss of each token, with baselines and z-scores taken within each run of `group_size` rollouts."""
    if not needs_groups(loss) or len(rollouts.tokens) == group_size:
        return loss.token_loss(rollouts)
    # Not slices: the backward pass of `split` joins the pieces once.
    pieces = zip(*(getattr(rollouts, name).split(group_size) for name in _FIELDS), strict=True)
    groups = (Rollouts.unchecked(**dict(zip(_FIELDS, piece, strict=True))) for piece in pieces)
    return torch.cat([loss.token_loss(group) for group in groups])


def summed(loss: Estimator, rollouts: Rollouts, group_size: int) -> Float[Tensor, ""]:
    r"""The numerator of the loss, to be divided by the number of rollouts or unmasked tokens of the whole batch.

    Numerators of the parts of a batch add up, unlike means.
    """
    values = group_losses(loss, rollouts, group_size)
    values = torch.where(rollouts.mask > 0, values, torch.zeros_like(values))
    if loss.reduction == "sequence_mean":
        values = values.sum(-1) / rollouts.mask.sum(-1).clamp_min(1)
    return values.sum()
