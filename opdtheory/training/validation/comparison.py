r"""The comparison at fixed prefixes: exact, predicted, summed over the vocabulary, and sampled, in the parameters.

Everything is linear in the gradients of the logits at the prefixes, $g = J^\top c$. Four of them are compared:

- exact: autograd of $\sum_h D_f(h)$ over the whole vocabulary;
- predicted: the exact one and the bias that theory states for the estimator;
- expected: the estimator's own code on every next token, summed with their probabilities;
- sampled: the mean of the estimator's loss, backwards, over draws of the next token at every prefix.

Projections on a direction $v$ are $\langle c, Jv\rangle$, and since next tokens at fixed prefixes are independent, the
variance of a projection is a sum over prefixes and the vocabulary: exact, whatever the tails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from scipy import special
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.rollouts import Rollouts
from opdtheory.training.objective import needs_groups
from opdtheory.training.validation.expectation import Known, Loss, Moments, Singles, moments, sensitivity
from opdtheory.training.validation.prediction import (
    VOCABULARY,
    group_factor,
    predicted_weight,
    ratio_correction,
    standardised,
)
from opdtheory.training.validation.prefixes import Prefixes
from opdtheory.training.validation.report import Validation
from opdtheory.training.validation.vectors import difference, dot, norm

__all__ = ["LEVEL", "compare", "predicted_logit_gradient", "random_images"]

# Probability that a faithful estimator is found to disagree by one validation, all directions together.
LEVEL = 1e-3
_COUPLED = 1e-6
_HELD = 2**22  # logits of draws that are held at once
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4}


def compare(
    prefixes: Prefixes,
    estimator: Estimator,
    loss: Loss | None = None,
    *,
    draws: int = 256,
    directions: int = 8,
    seed: int = 0,
    pushed: Sequence[Tensor] | None = None,
) -> Validation:
    """Compare an estimator with theory at fixed prefixes.

    Args:
        prefixes: of the student.
        estimator: what is claimed.
        loss: what is run, a function of `Rollouts` that sums over tokens and averages over rollouts; by default the
            estimator, with its own reduction.
        draws: of the next token at every prefix; groups of two for an estimator that compares rollouts.
        directions: random ones; the exact gradient's and the bias's are added.
        seed: of the directions and the draws.
        pushed: the random directions' images in the logits, to share them between estimators.

    Raises:
        InvalidArgumentError: the estimator looks beyond the next token.
        LossError: the loss has no gradient that can be read.
    """
    if not estimator.is_token_local:
        raise InvalidArgumentError(
            "estimator",
            f"{estimator!r} weighs a token by what comes after it; validate_by_enumeration takes it on tiny models",
        )
    if draws < 1 or directions < 1:
        raise InvalidArgumentError("draws" if draws < 1 else "directions", "is below 1; a positive integer is needed")
    group = 2 if needs_groups(estimator) else 1
    if group == 2 and not prefixes.on_policy:
        raise InvalidArgumentError("behavior", f"of {estimator!r}: groups are validated on-policy only")
    plain: Loss = dataclasses.replace(estimator, reduction="token_sum") if loss is None else loss
    reduction = estimator.reduction if loss is None else "token_sum"
    run: Loss = estimator if loss is None else loss
    shares = prefixes.shares(reduction).unsqueeze(-1)

    distribution = moments(plain, prefixes.log_p, prefixes.log_q, prefixes.log_mu, group)
    exact = shares * prefixes.exact(estimator.claim.divergence)
    predicted = shares * predicted_logit_gradient(estimator, prefixes)
    expected = shares * distribution.mean()
    if group == 1:
        _check_rows_apart(prefixes, run, distribution, shares)
    sampled = (
        expected if isinstance(distribution, Known) else _sampled(prefixes, run, plain, group, shares, draws, seed)
    )

    vectors = [prefixes.pull_back(c) for c in (exact, predicted, expected)]
    exact_norm, unit = norm(vectors[0]), 1.0
    unit = exact_norm if exact_norm > 0 else 1.0
    bias = difference(vectors[1], vectors[0])

    images = list(pushed) if pushed is not None else random_images(prefixes, directions, seed)
    randoms, along = len(images), None
    if exact_norm > 0:
        along = prefixes.push_forward([x / exact_norm for x in vectors[0]])
        images.append(along)
    if norm(bias) > 1e-6 * unit:
        images.append(prefixes.push_forward([x / norm(bias) for x in bias]))

    # Of one draw of all next tokens, along each direction.
    spreads = [float((shares.squeeze(-1).square() * distribution.variance(image)).sum()) for image in images]
    deviations = [math.sqrt(spread / draws) for spread in spreads]

    def z_against(reference: Tensor) -> float:
        worst = 0.0
        for image, deviation in zip(images, deviations, strict=True):
            gap = float(((sampled - reference) * image).sum())
            if deviation > 0 and abs(gap / deviation) > abs(worst):
                worst = gap / deviation
        return worst

    noisy = not isinstance(distribution, Known)
    limit = float(special.ndtri(1 - LEVEL / (2 * len(images))))
    sizes = [exact_norm, norm(vectors[2])]
    variance = _variance(prefixes, images[:randoms], spreads, expected, group)
    shift = interval = foreseen = None
    if along is not None:
        shift = float(((sampled - exact) * along).sum()) / unit
        width = 1.96 * deviations[randoms] / unit
        interval = (shift - width, shift + width)
        foreseen = float(((predicted - exact) * along).sum()) / unit
    return Validation(
        estimator=estimator.label,
        claimed=estimator.claim.verdict,
        objective=f"{estimator.claim.granularity} {estimator.claim.divergence.label}",
        method="prefixes",
        rollouts=len(prefixes.samples),
        prefixes=len(prefixes),
        parameters=prefixes.dimension,
        draws=draws if noisy else 0,
        exact_norm=exact_norm,
        bias=norm(difference(vectors[2], vectors[0])) / unit,
        predicted_bias=norm(bias) / unit,
        discrepancy=norm(difference(vectors[2], vectors[1])) / max(*sizes, norm(vectors[1]), 1e-300),
        tolerance=_ROUNDING.get(prefixes.parameters[0].dtype, 1e-2),
        cosine=dot(vectors[0], vectors[2]) / math.prod(sizes) if min(sizes) > 1e-9 * max(*sizes, 1e-300) else None,
        z=z_against(predicted) if noisy else 0.0,
        z_limit=limit,
        z_exact=z_against(exact) if noisy else 0.0,
        along=shift,
        along_interval=interval,
        along_predicted=foreseen,
        variance=variance / unit**2,
        signal_to_noise=_ratio(sizes[1], variance, exact_norm),
        seed=seed,
    )


def random_images(prefixes: Prefixes, directions: int, seed: int) -> list[Tensor]:
    """The images in the logits of the fixed random directions of a seed."""
    return [prefixes.push_forward(prefixes.random(number, seed)) for number in range(directions)]


def predicted_logit_gradient(estimator: Estimator, prefixes: Prefixes) -> Float[Tensor, "N V"]:
    r"""The exact gradient at each prefix and the bias of theory, $E_p[(w_f - A) s]$, in the student's logits."""
    options, divergence = estimator.settings, estimator.claim.divergence
    log_p, log_q = prefixes.log_p, prefixes.log_q
    p, weight = log_p.exp(), predicted_weight(estimator, log_p, log_q)
    if options.get("zscore"):
        weight = standardised(weight, p, options.get("eps", 1e-6))
    weight = group_factor(estimator, 2) * weight
    if not prefixes.on_policy and estimator.name not in VOCABULARY:
        ratio = (log_p - prefixes.log_mu).exp()
        if options.get("importance") is None:
            if "baseline" in options:
                raise InvalidArgumentError(
                    "behavior", f"of {estimator!r}: off-policy and unweighted, a baseline biases"
                )
            weight = weight / ratio
        else:
            correction = ratio_correction(options["importance"], weight, ratio, options.get("clip_range", 0.2))
            weight = weight * correction / ratio
    bias = divergence.weight(log_q - log_p) - weight
    return prefixes.exact(divergence) + _mean_times_score(bias, p)


def _mean_times_score(values: Tensor, p: Tensor) -> Tensor:
    """$E_p[x s]$ in the logits."""
    return p * (values - (p * values).sum(-1, keepdim=True))


def _check_rows_apart(prefixes: Prefixes, run: Loss, distribution: Moments, shares: Tensor) -> None:
    """Refuse a loss whose gradient at a prefix, within whole rollouts, is not what it is at the prefix alone."""
    live, mask = prefixes.live, prefixes.samples.mask.double()
    tokens = prefixes.samples.tokens
    if isinstance(distribution, Known):
        whole, alone = _logit_gradient(prefixes, run), shares * distribution.gradient
    else:
        assert isinstance(distribution, Singles)
        whole = sensitivity(run, tokens, mask, *prefixes.grids)[live]
        alone = (shares * distribution.kappa).gather(-1, tokens[live].unsqueeze(-1)).squeeze(-1)
    gap, size = float((whole - alone).abs().max()), float(alone.abs().max())
    if not gap <= _COUPLED * max(size, 1e-12):
        raise InvalidArgumentError(
            "loss",
            f"depends on more than each token and its prefix: within whole rollouts its sensitivity is "
            f"off by {gap:.3g} of {size:.3g}; validate_by_enumeration takes any loss, on a tiny vocabulary",
        )


def _logit_gradient(prefixes: Prefixes, run: Loss) -> Tensor:
    """The gradient in the logits of the rollouts as they are."""
    samples, (log_p, log_q, log_mu) = prefixes.samples, prefixes.grids
    leaf = log_p.clone().requires_grad_()
    with torch.enable_grad():
        value = run(
            Rollouts.from_logits(samples.tokens, leaf, log_q, samples.mask.double(), _at(log_mu, samples.tokens))
        )
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient[prefixes.live]


def _sampled(
    prefixes: Prefixes, run: Loss, plain: Loss, group: int, shares: Tensor, draws: int, seed: int
) -> Float[Tensor, "N V"]:
    """The mean over draws of the loss's gradient in the logits; each draw is a token at every prefix, or a pair."""
    generator = torch.Generator(device=prefixes.log_p.device).manual_seed(seed + 1)
    p, (count, vocabulary) = prefixes.log_p.exp(), prefixes.log_p.shape
    drawn = torch.multinomial(prefixes.log_mu.exp(), draws * group, replacement=True, generator=generator)
    drawn = drawn.view(count, draws, group)
    mask, tokens = prefixes.samples.mask.double(), prefixes.samples.tokens
    distributions = (prefixes.log_p, prefixes.log_q, prefixes.log_mu) if group == 2 else prefixes.grids
    at_once = max(1, _HELD // (group * mask.numel() * vocabulary))
    total = torch.zeros_like(p)
    for some in drawn.split(at_once, dim=1):
        times = some.shape[1]
        if group == 1:
            # Rollouts of one mask side by side: each reduction is the mean over them.
            batch = tokens.repeat(times, 1, 1)
            batch[:, prefixes.live] = some.squeeze(-1).T
            rows = [x.expand(times, *x.shape).flatten(0, 1) for x in distributions]
            kappa = sensitivity(run, batch.flatten(0, 1), mask.repeat(times, 1), *rows).view(times, *mask.shape)
            kappa = times * kappa[:, prefixes.live].T
        else:
            rows = [x.unsqueeze(1).expand(-1, times, -1).reshape(1, -1, vocabulary) for x in distributions]
            kappa = sensitivity(plain, some.reshape(-1, 2).T, None, *rows).T.reshape(count, -1) * shares
        total.scatter_add_(-1, some.flatten(1), kappa)
    return (total - p * total.sum(-1, keepdim=True)) / draws


def _variance(
    prefixes: Prefixes, images: Sequence[Tensor], spreads: Sequence[float], expected: Tensor, group: int
) -> float:
    """The trace of the covariance of one rollout's gradient: P times its mean along random directions.

    Over next tokens it is exact; over prefixes it is the spread of the rollouts' expected gradients.
    """
    rollouts, found = len(prefixes.samples), []
    for image, spread in zip(images, spreads, strict=False):
        means = torch.zeros(rollouts, dtype=torch.float64, device=image.device)
        means.index_add_(0, prefixes.rollout, rollouts * (expected * image).sum(-1))
        between = float(means.var()) if rollouts > 1 else 0.0
        found.append(group * rollouts * spread + between)
    return prefixes.dimension * sum(found) / len(found)


def _ratio(signal: float, variance: float, exact_norm: float) -> float | None:
    if variance <= 0:
        return None
    return signal / math.sqrt(variance) if signal > 1e-9 * exact_norm else 0.0


def _at(log: Tensor, tokens: Tensor) -> Tensor:
    return log.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
