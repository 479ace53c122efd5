r"""The comparison at fixed prefixes: exact, predicted, summed over the vocabulary, and sampled, in the parameters.

Everything is linear in the gradients in the logits at the prefixes, $g = J^\top c$. Four gradients are compared:

- exact: autograd of $\sum_h D_f(h)$ over the whole vocabulary;
- predicted: the exact one plus the bias that theory states for the estimator;
- expected: the estimator's own code on every next token, summed with their probabilities; or on those drawn, with the
  weight of theory on the others, where a loss would read a whole vocabulary for each token of it;
- sampled: the gradient of the estimator's mean loss over draws of the next token at every prefix.

Projections on a direction $v$ are $\langle c, Jv\rangle$, and since next tokens at fixed prefixes are independent, the
variance of a projection is a sum over prefixes and the vocabulary: exact, whatever the tails.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int64
from scipy import special
from torch import Tensor

from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator
from opdtheory.rollouts import Rollouts
from opdtheory.training.objective import needs_groups
from opdtheory.training.validation.expectation import (
    Both,
    Known,
    Loss,
    Moments,
    Singles,
    Some,
    moments,
    reads_rows,
    sensitivity,
)
from opdtheory.training.validation.prediction import (
    VOCABULARY,
    group_factor,
    on_set,
    predicted_constant,
    predicted_weight,
    ratio_correction,
    standardised,
)
from opdtheory.training.validation.prefixes import Prefixes
from opdtheory.training.validation.report import Validation
from opdtheory.training.validation.vectors import difference, norm, relations

__all__ = ["LEVEL", "compare", "predicted_logit_gradient", "predicted_sensitivity", "random_images"]

# Probability that one validation finds a faithful estimator to disagree, all directions together.
LEVEL = 1e-3
_COUPLED = 1e-6
_HELD = 2**22  # logits of draws held at once
_EVERY = 2**12  # the largest vocabulary whose square is run
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
    every_token: bool | None = None,
) -> Validation:
    """Compare an estimator with theory at fixed prefixes.

    Args:
        prefixes: prefixes of the student.
        estimator: the estimator whose claim is tested.
        loss: the loss to run, a function of `Rollouts` that sums over tokens and averages over rollouts; by default
            the estimator, with its own reduction.
        draws: number of draws of the next token at every prefix; of pairs for an estimator that compares rollouts.
        directions: number of random directions; those of the exact gradient and of the bias are added.
        seed: seed of the directions and the draws.
        pushed: images of the random directions in the logits, to share them between estimators.
        every_token: run the loss on every next token, or on those drawn only; there its weight must be that of theory,
            which stands for it on the others. By default every token, unless the loss reads whole distributions of
            more than 4,096 tokens.

    Raises:
        InvalidArgumentError: the estimator looks beyond the next token, or only some tokens shall be run and theory
            does not state the weight of each.
        LossError: the gradient of the loss cannot be read.
    """
    if not estimator.is_token_local:
        raise InvalidArgumentError(
            "estimator",
            f"must weigh a token by its history and itself, got {estimator!r}, which depends on what comes after it; "
            "use validate_by_enumeration on a tiny model",
        )
    if draws < 1 or directions < 1:
        which = "draws" if draws < 1 else "directions"
        raise InvalidArgumentError(which, f"must be at least 1, got {min(draws, directions)}")
    group = 2 if needs_groups(estimator) else 1
    if group == 2 and not prefixes.on_policy:
        raise InvalidArgumentError("behavior", f"must be None for {estimator!r}: groups are validated on-policy only")
    plain: Loss = dataclasses.replace(estimator, reduction="token_sum") if loss is None else loss
    reduction = estimator.reduction if loss is None else "token_sum"
    run: Loss = estimator if loss is None else loss
    shares = prefixes.shares(reduction).unsqueeze(-1)

    drawn = _draws(prefixes, group, draws, seed)
    distributions = (prefixes.log_p, prefixes.log_q, prefixes.log_mu)
    stated = predicted_sensitivity(estimator, prefixes) if group == 1 else None
    if every_token is None:
        large = prefixes.log_p.shape[-1] > _EVERY and group == 1 and stated is not None
        every_token = not (large and reads_rows(plain, *distributions))
    elif not every_token and stated is None:
        raise InvalidArgumentError("every_token", f"must not be False for {estimator!r}: theory states no weight")
    some = None if every_token or stated is None else Some(drawn.squeeze(-1), stated)
    distribution = moments(plain, *distributions, group, some)
    exact = shares * prefixes.exact(estimator.claim.divergence)
    predicted = shares * predicted_logit_gradient(estimator, prefixes)
    expected = shares * distribution.mean()
    if group == 1:
        _check_rows_apart(prefixes, run, distribution, shares)
    if isinstance(distribution, Known):
        sampled = expected
    elif some is not None:
        sampled = _mean_of_draws(prefixes, shares * _singles(distribution).kappa.gather(-1, some.tokens), some.tokens)
    else:
        sampled = _sampled(prefixes, run, plain, shares, drawn)
    if isinstance(distribution, Both):
        sampled = sampled + shares * distribution.known.gradient

    vectors = [prefixes.pull_back(c) for c in (exact, predicted, expected)]
    compared = relations(*vectors)
    if some is not None:
        # A sum could hide weights that are wrong on single tokens.
        apart = _apart(_singles(distribution).kappa, some)
        if apart > _tolerance(prefixes):
            compared["discrepancy"] = max(apart, compared["discrepancy"])
    exact_norm = compared["exact_norm"]
    unit = exact_norm or 1.0
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
        run_on=1.0 if some is None else some.mass(prefixes.log_mu),
        tolerance=_tolerance(prefixes),
        z=z_against(predicted) if noisy else 0.0,
        z_limit=limit,
        z_exact=z_against(exact) if noisy else 0.0,
        along=shift,
        along_interval=interval,
        along_predicted=foreseen,
        variance=variance / unit**2,
        signal_to_noise=_ratio(norm(vectors[2]), variance, exact_norm),
        seed=seed,
        **compared,
    )


def _tolerance(prefixes: Prefixes) -> float:
    """The largest discrepancy that counts as rounding."""
    return _ROUNDING.get(prefixes.parameters[0].dtype, 1e-2)


def _apart(kappa: Float[Tensor, "N V"], some: Some) -> float:
    """The largest distance of a drawn token's sensitivity from the stated one, relative to it and to typical ones."""
    found, stated = (x.gather(-1, some.tokens) for x in (kappa, some.otherwise))
    typical = stated.square().mean().sqrt().clamp_min(torch.finfo(stated.dtype).tiny)
    return float(((found - stated).abs() / (stated.abs() + typical)).max())


def random_images(prefixes: Prefixes, directions: int, seed: int) -> list[Tensor]:
    """The images in the logits of a seed's random directions."""
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
        if options.get("importance") is None and "baseline" in options:
            raise InvalidArgumentError(
                "behavior", f"must be None for {estimator!r}: off-policy, a baseline without importance biases"
            )
        share = _correction(options, weight, prefixes) / (log_p - prefixes.log_mu).exp()
        if estimator.name == "topk_tail_sampled":  # the set is summed, whoever sampled
            share = torch.where(on_set(options, log_p, log_q), 1.0, share)
        weight = weight * share
    bias = divergence.weight(log_q - log_p) - weight
    return prefixes.exact(divergence) + _mean_times_score(bias, p)


def predicted_sensitivity(estimator: Estimator, prefixes: Prefixes) -> Float[Tensor, "N V"] | None:
    r"""The sensitivity of theory to each sampled token, $-\rho (A_a - c)$; None where none is stated."""
    log_p, log_q, options = prefixes.log_p, prefixes.log_q, estimator.settings
    constant = predicted_constant(estimator, log_p, log_q)
    if constant is None or estimator.name in VOCABULARY:
        return None
    weight = predicted_weight(estimator, log_p, log_q) - constant
    if not prefixes.on_policy:
        weight = weight * _correction(options, weight, prefixes)
    # The set is summed: a token of it that is sampled adds nothing.
    summed = estimator.name == "topk_tail_sampled"
    return -weight.masked_fill(on_set(options, log_p, log_q), 0.0) if summed else -weight


def _correction(options: Mapping[str, Any], weight: Tensor, prefixes: Prefixes) -> Tensor:
    """The factor of each token's weight for its sampler, see `ratio_correction`."""
    importance = options.get("importance")
    if importance in ("sequence_mask", "gspo"):
        raise InvalidArgumentError("importance", f"must not be one factor for the whole rollout, got {importance!r}")
    return ratio_correction(options, weight, (prefixes.log_p - prefixes.log_mu).exp())


def _mean_times_score(values: Tensor, p: Tensor) -> Tensor:
    """$E_p[x s]$ in the logits."""
    return p * (values - (p * values).sum(-1, keepdim=True))


def _check_rows_apart(prefixes: Prefixes, run: Loss, distribution: Moments, shares: Tensor) -> None:
    """Raise unless the loss has the same gradient at a prefix within whole rollouts as at the prefix alone."""
    live, mask = prefixes.live, prefixes.samples.mask.double()
    tokens = prefixes.samples.tokens
    if isinstance(distribution, Known):
        whole, alone = _logit_gradient(prefixes, run), shares * distribution.gradient
    elif isinstance(distribution, Both):
        singles, drawn = distribution.singles, tokens[live].unsqueeze(-1)
        kappa = torch.zeros_like(singles.p).scatter(-1, drawn, singles.kappa.gather(-1, drawn))
        own = kappa - singles.p * kappa.sum(-1, keepdim=True)
        whole, alone = _logit_gradient(prefixes, run), shares * (distribution.known.gradient + own)
    else:
        whole = sensitivity(run, tokens, mask, *prefixes.grids)[live]
        alone = (shares * _singles(distribution).kappa).gather(-1, tokens[live].unsqueeze(-1)).squeeze(-1)
    gap, size = float((whole - alone).abs().max()), float(alone.abs().max())
    if not gap <= _COUPLED * max(size, 1e-12):
        raise InvalidArgumentError(
            "loss",
            f"must depend only on each token and its prefix, but its sensitivity in whole rollouts is off by {gap:.3g} "
            f"of {size:.3g}; use validate_by_enumeration, which takes any loss, on a tiny model",
        )


def _singles(distribution: Moments) -> Singles:
    """The part of one sampled token at a time."""
    found = distribution.singles if isinstance(distribution, Both) else distribution
    assert isinstance(found, Singles)
    return found


def _logit_gradient(prefixes: Prefixes, run: Loss) -> Tensor:
    """The gradient in the logits of the rollouts as they were sampled."""
    samples, (log_p, log_q, log_mu) = prefixes.samples, prefixes.grids
    leaf = log_p.clone().requires_grad_()
    with torch.enable_grad():
        value = run(
            Rollouts.from_logits(samples.tokens, leaf, log_q, samples.mask.double(), _at(log_mu, samples.tokens))
        )
        (gradient,) = torch.autograd.grad(value, leaf)
    return gradient[prefixes.live]


def _draws(prefixes: Prefixes, group: int, draws: int, seed: int) -> Int64[Tensor, "N draws group"]:
    """Draws of one next token, or a pair of them, at every prefix."""
    generator = torch.Generator(device=prefixes.log_p.device).manual_seed(seed + 1)
    found = torch.multinomial(prefixes.log_mu.exp(), draws * group, replacement=True, generator=generator)
    return found.view(len(prefixes), draws, group)


def _sampled(
    prefixes: Prefixes, run: Loss, plain: Loss, shares: Tensor, drawn: Int64[Tensor, "N draws group"]
) -> Float[Tensor, "N V"]:
    """The mean gradient in the logits over draws of one token, or a pair of tokens, at every prefix."""
    (count, _, group), vocabulary = drawn.shape, prefixes.log_p.shape[-1]
    mask, tokens = prefixes.samples.mask.double(), prefixes.samples.tokens
    distributions = (prefixes.log_p, prefixes.log_q, prefixes.log_mu) if group == 2 else prefixes.grids
    at_once = max(1, _HELD // (group * mask.numel() * vocabulary))
    found = []
    for some in drawn.split(at_once, dim=1):
        times = some.shape[1]
        if group == 1:
            # Rollouts with one mask in one batch: every reduction is the mean over them.
            batch = tokens.repeat(times, 1, 1)
            batch[:, prefixes.live] = some.squeeze(-1).T
            rows = [x.expand(times, *x.shape).flatten(0, 1) for x in distributions]
            kappa = sensitivity(run, batch.flatten(0, 1), mask.repeat(times, 1), *rows).view(times, *mask.shape)
            kappa = times * kappa[:, prefixes.live].T
        else:
            rows = [x.unsqueeze(1).expand(-1, times, -1).reshape(1, -1, vocabulary) for x in distributions]
            kappa = sensitivity(plain, some.reshape(-1, 2).T, None, *rows).T.reshape(count, -1) * shares
        found.append(kappa)
    return _mean_of_draws(prefixes, torch.cat(found, -1), drawn.flatten(1)) * group


def _mean_of_draws(
    prefixes: Prefixes, kappa: Float[Tensor, "N draws"], drawn: Int64[Tensor, "N draws"]
) -> Float[Tensor, "N V"]:
    """The mean gradient in the logits of draws whose sensitivities are given."""
    p = prefixes.log_p.exp()
    total = torch.zeros_like(p).scatter_add_(-1, drawn, kappa)
    return (total - p * total.sum(-1, keepdim=True)) / drawn.shape[1]


def _variance(
    prefixes: Prefixes, images: Sequence[Tensor], spreads: Sequence[float], expected: Tensor, group: int
) -> float:
    """The trace of the covariance of one rollout's gradient: P times its mean along random directions.

    It is exact over next tokens; over prefixes it is the spread of the rollouts' expected gradients.
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
