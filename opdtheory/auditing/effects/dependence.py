"""What a token's weight depends on besides its own ratio: position, other tokens, batch, sampling policy, top-k set."""

from __future__ import annotations

from dataclasses import dataclass, field

from opdtheory.auditing.effects import batch_effects, both_probabilities, rollout_effects, sampler_effects
from opdtheory.auditing.effects.probes import Effect, Pool, experiment, size_for
from opdtheory.auditing.naming.recover import RecoveredWeight
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import check_between
from opdtheory.exact import Loss

__all__ = ["Dependence", "dependence"]

# A weight with a smaller range is constant, to rounding.
_CONSTANT = 1e-9


@dataclass(frozen=True)
class Dependence:
    r"""What a token's weight depends on, found by changing one thing at a time.

    Attributes:
        ratio_only: whether the expected weight is the same function of the token's own ratio at every position.
        position: relative weight of each position at equal ratios, the first being 1; None if they are equal.
        position_label: the pattern of the positions, such as `geometric with factor 0.9`.
        batch: whether a rollout's gradient depends on the other rollouts of its batch.
        other_tokens: whether the expected weight depends on the ratios of other tokens of the rollout.
        sampling_policy: whether the gradient depends on `behavior_logprobs` at unchanged tokens.
        top_k: number of likeliest tokens after which all others have one weight; None if there is no such number.
        student_and_teacher: what a weight $A(p, q)$ of both probabilities follows if it is not a function of the ratio
            (T4), in words; None if it is one or depends on more.
        words: the findings in sentences, and what could not be examined.
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
    r"""Find out what a token's weight depends on, by experiments on rollouts made for the purpose.

    Equal rows at every history show the effect of the position. Other rows at later or earlier tokens show whether
    their ratios count. Other `behavior_logprobs` alone show the effect of the sampling policy, and another rollout in
    the batch that of the batch. One step over a larger vocabulary shows top-k sets and weights $A(p, q)$. The
    experiments are on-policy and at fixed length unless stated otherwise.

    Args:
        loss: a function `loss(rollouts) -> scalar tensor`.
        weight: its recovered weight, from `recover_weight`; if that does not explain the panel, nothing is said to be
            followed.
        scenario: only its batch size and seed are used.
        tolerance: relative error of the loss's gradient that counts as rounding.

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
    check_between("tolerance", tolerance)
    batch_size = scenario.batch_size
    # An expectation amplifies the rounding of a gradient, as in the recovered weight.
    limit = 100.0 * tolerance
    words: list[str] = []
    tokens = rollout_effects.TokenEffects()
    if (size := size_for(batch_size)) is None:
        words.append(
            f"Position and other tokens were not looked at: there are too many batches of {batch_size} to enumerate."
        )
    else:
        with experiment(words, "Position and other tokens"):
            tokens = rollout_effects.token_effects(loss, size, batch_size, limit)
    words += tokens.words
    group = sampler = Effect()
    with experiment(words, "The batch and the sampling policy"):
        pool = Pool(loss)
        with experiment(words, "The batch"):
            group = batch_effects.batch_effect(pool, batch_size, max(limit, 1e-8))
        with experiment(words, "The sampling policy"):
            sampler = sampler_effects.sampler_effect(pool, batch_size, max(limit, 1e-8))
    words += group.words + sampler.words
    distributions = both_probabilities.DistributionEffect()
    if not group.found:
        with experiment(words, "The two distributions"):
            distributions = both_probabilities.distribution_effect(
                loss,
                weight.depends_on_ratio_only,
                batch_size,
                scenario.seed,
                limit,
                local=weight.explains_panel is not False,
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
        batch=group.found,
        other_tokens=tokens.other_tokens,
        sampling_policy=sampler.found,
        top_k=distributions.top_k,
        student_and_teacher=distributions.student_and_teacher,
        words=words,
    )
