"""The comparison on every rollout of a tiny vocabulary and horizon, without sampling."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.exact import ModulePolicy, exact_gradient, expected_gradient
from opdtheory.exact.enumeration import Enumeration
from opdtheory.training.models.language_model import LanguageModel, check_same_vocabulary
from opdtheory.training.objective import needs_groups
from opdtheory.training.validation.expectation import Loss
from opdtheory.training.validation.prediction import (
    VOCABULARY,
    group_factor,
    on_set,
    predicted_weight,
    ratio_correction,
    standardised,
)
from opdtheory.training.validation.report import Validation
from opdtheory.training.validation.vectors import difference, dot, relations

__all__ = ["validate_by_enumeration"]

_ROUNDING = 1e-10


def validate_by_enumeration(
    student: LanguageModel,
    teacher: LanguageModel,
    estimator: Estimator,
    *,
    prompt: Sequence[int],
    horizon: int = 3,
    eos: int | None = None,
    behavior: LanguageModel | None = None,
    loss: Loss | None = None,
) -> Validation:
    r"""Compare an estimator's expected gradient with theory, as a sum over every rollout or pair of rollouts.

    The estimator's own code runs on all rollouts of at most `horizon` tokens. Theory is summed over the same
    sequences: $-E_\mu[\sum_n \rho_n A_n s_n]$ with the weights of T1-T9, and those of T6 for estimators that look
    beyond the next token.

    Args:
        student: the student, in float64, with a tiny vocabulary.
        teacher: the teacher, likewise.
        estimator: the estimator whose claim is tested; one that compares the rollouts of a group gets groups of two.
        prompt: tokens before every rollout, at least one.
        horizon: length of the longest rollout.
        eos: the token that ends a rollout; with None all have one length, as estimators of groups need.
        behavior: the model that samples; by default the student.
        loss: the loss to run; by default the estimator.

    Raises:
        InvalidArgumentError: a model is not float64, or theory has no closed form for this combination.
        BudgetExceededError: there are too many rollouts.
    """
    check_same_vocabulary(student, teacher)
    if student.dtype != torch.float64 or teacher.dtype != torch.float64:
        got = f"{student.dtype} and {teacher.dtype}"
        raise InvalidArgumentError("student", f"must be float64, like the teacher, got {got}; call .double() on both")
    grouped = needs_groups(estimator)
    if eos is not None and (grouped or estimator.reduction == "token_mean"):
        raise InvalidArgumentError("eos", f"must be None for {estimator!r}, predicted only for one length, got {eos}")

    def policy(model: LanguageModel) -> ModulePolicy:
        return ModulePolicy(model, student.vocabulary.size, horizon, eos, prompt)

    ours, theirs = policy(student), policy(teacher)
    sampler = ours if behavior is None else policy(behavior)
    claim = estimator.claim
    gamma = claim.gamma if claim.granularity == "token_return" else 1.0
    exact = exact_gradient(ours, theirs, claim.divergence, claim.granularity, gamma)
    everything = Enumeration.build(ours, theirs, sampler)
    predicted = ours.pull_back(_predicted_tables(estimator, everything, grouped))
    run: Loss = estimator if loss is None else loss
    expected = expected_gradient(run, ours, theirs, 2 if grouped else 1, behavior=sampler)
    compared = relations(exact, predicted, expected)
    return Validation(
        estimator=estimator.label,
        claimed=claim.verdict,
        objective=f"{claim.granularity} {claim.divergence.label}",
        method="enumeration",
        rollouts=len(everything),
        prefixes=sum(student.vocabulary.size**n for n in range(horizon)),
        parameters=sum(parameter.numel() for parameter in ours.parameters()),
        draws=0,
        tolerance=_ROUNDING,
        along_predicted=dot(difference(predicted, exact), exact) / (compared["exact_norm"] or 1.0) ** 2,
        **compared,
    )


def _predicted_tables(estimator: Estimator, everything: Enumeration, grouped: bool) -> list[Tensor]:
    """The expected gradient that theory predicts, in the table of the student's logits."""
    options, mask, tokens = estimator.settings, everything.mask, everything.tokens
    distributions = (everything.student_tables, everything.teacher_tables, everything.behavior_tables)
    log_p, log_q, log_mu = (
        torch.log_softmax(everything.gather_logits([t.detach() for t in x]), -1) for x in distributions
    )
    at = tokens.clamp_min(0).unsqueeze(-1)
    own, other, drew = (torch.where(mask > 0, x.gather(-1, at).squeeze(-1), 0.0) for x in (log_p, log_q, log_mu))
    if estimator.is_token_local:
        vocabulary = log_p.shape[-1]
        table = predicted_weight(estimator, log_p.view(-1, vocabulary), log_q.view(-1, vocabulary)).view(log_p.shape)
        weight = torch.where(mask > 0, table.gather(-1, at).squeeze(-1), 0.0)
    else:
        weight = _whole_rollout_weight(estimator, other - own, mask)
    if options.get("zscore"):
        distribution, eps = everything.probability, options.get("eps", 1e-6)
        weight = torch.stack([standardised(column, distribution, eps) for column in weight.unbind(-1)], dim=-1)
    elif grouped:
        weight = group_factor(estimator, 2) * weight
    if options.get("baseline") == "constant" and options.get("importance") is None:
        weight = weight - options["baseline_value"]  # off-policy this is no baseline (T8); on-policy it cancels
    importance = options.get("importance")
    if estimator.name in VOCABULARY:  # the sum over the next token uses the student's probabilities, whoever sampled
        importance = "token" if importance is None else importance
    ratio = _ratio(importance, own - drew, mask)
    if estimator.name == "topk_tail_sampled":  # so does the sum over the set, beside the tail of the sampled token
        inside = on_set(options, log_p, log_q).gather(-1, at).squeeze(-1)
        bare = torch.ones_like(ratio) if importance is None else ratio
        weight = torch.where(inside, weight * _ratio(importance or "token", own - drew, mask), weight * bare)
    elif importance == "sequence_mask":
        low, high = options.get("keep_range", (0.5, 5.0))
        whole = _ratio("sequence", own - drew, mask)
        weight = weight * torch.where((low <= whole) & (whole <= high), ratio, 0.0)
    else:
        weight = weight * ratio_correction({**options, "importance": importance}, weight, ratio)
    if estimator.reduction != "token_sum":
        weight = weight / mask.sum(-1, keepdim=True)
    shares = (everything.probability.unsqueeze(-1) * mask * weight).unsqueeze(-1)
    score = torch.zeros_like(log_p).scatter(-1, at, 1.0) - log_p.exp()
    tables = [torch.zeros_like(table) for table in everything.student_tables]
    for n, table in enumerate(tables):
        table.index_add_(0, everything.rows[:, n], -(shares * score)[:, n])
    return [table.detach() for table in tables]


def _whole_rollout_weight(estimator: Estimator, log_u: Tensor, mask: Tensor) -> Float[Tensor, "S T"]:
    r"""T6: $\gamma^{n-1}[w(u_n) - \sum_{m>n}\gamma^{m-n} f(u_m)]$, with the outer discount as an option, or $w(U)$."""
    options, divergence = estimator.settings, estimator.claim.divergence
    bound = options.get("clip_log_ratio", math.inf)
    log_u = log_u.clamp(-bound, bound)
    if estimator.name == "sequence_opd_plus":
        weight = divergence.weight((mask * log_u).sum(-1, keepdim=True)).expand_as(log_u)
    else:
        gamma, place = options["gamma"], torch.arange(log_u.shape[-1])
        ahead = place.unsqueeze(0) - place.unsqueeze(1)  # m - n
        discount = torch.where(ahead > 0, gamma ** ahead.clamp_min(0).double(), 0.0)
        penalty = mask * divergence.generator(log_u)
        weight = divergence.weight(log_u) - penalty @ discount.T
        if options.get("discounted"):
            weight = weight * gamma ** place.double()
    if "clip_weight" in options:
        weight = weight.clamp(*options["clip_weight"])
    return torch.where(mask > 0, weight, 0.0)


def _ratio(importance: str | None, log_ratio: Tensor, mask: Tensor) -> Tensor:
    if importance == "prefix":
        log_ratio = log_ratio.cumsum(-1)
    elif importance in ("sequence", "gspo"):
        whole = log_ratio.sum(-1, keepdim=True).expand_as(log_ratio)
        log_ratio = whole / mask.sum(-1, keepdim=True) if importance == "gspo" else whole
    return log_ratio.exp()
