"""On what the weight of a token depends beside its own ratio: position, other tokens, the batch, who sampled, top k."""

from __future__ import annotations

from dataclasses import dataclass, field

from opdtheory.auditing.effects import batch_effects, both_probabilities, rollout_effects, sampler_effects
from opdtheory.auditing.effects.probes import Pool, experiment, size_for
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import Loss

__all__ = ["Dependence", "dependence"]

# A weight whose range is below this is constant: what is left is rounding.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Dependence:
    r"""What the weight of a token depends on, from experiments that change one thing at a time.

    Attributes:
        ratio_only: whether the expected weight is one function of the token's own ratio, at every position.
        position: relative weight of each position at equal ratios, the first being 1; None if they are alike.
        position_label: its distribution, such as `geometric with factor 0.9`.
        batch: whether the other rollouts of a batch enter a rollout's gradient.
        other_tokens: whether the expected weight depends on the ratios of other tokens of the rollout.
        sampling_policy: whether `behavior_logprobs` enter at unchanged tokens.
        top_k: how many likeliest tokens are told apart, all others having one weight; None if all are.
        student_and_teacher: the divergence of a weight $A(p, q)$ of both probabilities that is no function of the
            ratio (T4), in words; None where the question does not arise or the weight depends on more.
        words: the findings as sentences, and what could not be looked at.
    """

    ratio_only: bool
    position: list[float] | None = None
    position_label: str | None = None
    batch: bool = False
    other_tokens: bool = False
    sampling_policy: bool = False
    top_k: int | None = None
    student_and_teacher: str | None = None
    words: list[str] = field(default_factory=list)


def dependence(loss: Loss, weight: RecoveredWeight, scenario: Scenario, tolerance: float = 1e-9) -> Dependence:
    r"""Find out on what the weight of a token depends, by experiments on rollouts made for the purpose.

    Rows that are alike at every history tell positions apart; replacing the rows of later or of earlier tokens tells
    whether their ratios count; changing `behavior_logprobs` alone, or the company that a rollout keeps, tells about
    the sampling policy and the batch; one step over a larger vocabulary tells top-k losses and weights $A(p, q)$.
    The experiments are on-policy, at fixed length unless said otherwise.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`.
        weight: its recovered weight, from `recover_weight`.
        scenario: its batch size and seed count here.
        tolerance: relative error of the loss's gradient that is rounding.

    Raises:
        InvalidArgumentError: `tolerance` is not positive.

    Example:
        >>> import opdtheory as opd
        >>> from opdtheory.auditing.naming.recover import recover_weight
        >>> loss = opd.estimator("power", alpha=0.5)
        >>> from opdtheory.auditing.scenario import Scenario
        >>> dependence(loss, recover_weight(loss, Scenario()), Scenario()).student_and_teacher
        'density-power divergence, alpha=0.5'
    """
    if not tolerance > 0:
        raise InvalidArgumentError("tolerance", f"must be positive, got {tolerance!r}")
    batch_size = scenario.batch_size
    # What an expectation amplifies of the rounding of a gradient, as in the recovered weight.
    limit = 100.0 * tolerance
    words: list[str] = []
    tokens = rollout_effects.TokenEffects()
    if (size := size_for(batch_size)) is None:
        words.append(
            f"Position and other tokens were not looked at: batches of {batch_size} are too many to enumerate."
        )
    else:
        with experiment(words, "Position and other tokens"):
            tokens = rollout_effects.token_effects(loss, size, batch_size, limit)
    words += tokens.words
    group = batch_effects.BatchEffect(False)
    sampler = sampler_effects.SamplerEffect(False)
    with experiment(words, "The batch and the sampling policy"):
        pool = Pool(loss)
        with experiment(words, "The batch"):
            group = batch_effects.batch_effect(pool, batch_size, max(limit, 1e-8))
        with experiment(words, "The sampling policy"):
            sampler = sampler_effects.sampler_effect(pool, batch_size, max(limit, 1e-8))
    words += group.words + sampler.words
    distributions = both_probabilities.DistributionEffect()
    if not group.batch:
        with experiment(words, "The two distributions"):
            distributions = both_probabilities.distribution_effect(
                loss, weight.depends_on_ratio_only, batch_size, scenario.seed, limit
            )
    words += distributions.words
    ratio_only = (
        weight.depends_on_ratio_only
        and tokens.position is None
        and not tokens.other_tokens
        and distributions.top_k is None
    )
    if ratio_only and not words and float(weight.weight.max() - weight.weight.min()) <= _CONSTANT:
        words.append("The expected weight is a constant: there is nothing that it could depend on.")
    elif ratio_only and not words:
        words.append("The weight of a token is a function of its own ratio alone, the same at every position.")
    return Dependence(
        ratio_only=ratio_only,
        position=tokens.position,
        position_label=tokens.position_label,
        batch=group.batch,
        other_tokens=tokens.other_tokens,
        sampling_policy=sampler.reads,
        top_k=distributions.top_k,
        student_and_teacher=distributions.student_and_teacher,
        words=words,
    )
