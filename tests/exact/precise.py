"""Values and gradients of the objectives with sixty digits, by listing every sequence."""

from __future__ import annotations

import itertools

import mpmath
import sympy
import torch

from opdtheory import divergences

DIGITS = 60


def _softmax(row):
    terms = [mpmath.exp(mpmath.mpf(z)) for z in row]
    total = mpmath.fsum(terms)
    return [term / total for term in terms]


def _functions(divergence):
    u = divergences.symbol()
    f = divergence.expr
    return [sympy.lambdify(u, g, "mpmath") for g in (f, u * f.diff(u) - f)]


def precise(student, teacher, divergence, objective, gamma=1.0):
    """The value, and the gradient in the rows of the table, level by level, as mpmath numbers."""
    with mpmath.workdps(DIGITS):
        p, q = (
            [[_softmax(row.tolist()) for row in level] for level in policy.tables()] for policy in (student, teacher)
        )
        f, weight = _functions(divergence)
        size, horizon, eos = student.vocab_size, student.horizon, student.eos
        gradient = [[[mpmath.mpf(0)] * size for _ in level] for level in p]
        value = mpmath.mpf(0)
        for tokens in _sequences(size, horizon, eos):
            rows = [sum(a * size ** (n - 1 - k) for k, a in enumerate(tokens[:n])) for n in range(len(tokens))]
            ratios = [q[n][r][a] / p[n][r][a] for n, (r, a) in enumerate(zip(rows, tokens, strict=True))]
            mass = mpmath.fprod(p[n][r][a] for n, (r, a) in enumerate(zip(rows, tokens, strict=True)))
            if objective == "sequence":
                whole = mpmath.fprod(ratios)
                value += mass * f(whole)
                weights = [weight(whole)] * len(tokens)
            else:
                g = mpmath.mpf(gamma if objective == "token_return" else 1)
                costs = [g**n * f(ratio) for n, ratio in enumerate(ratios)]
                value += mass * mpmath.fsum(costs)
                weights = [g**n * weight(ratio) for n, ratio in enumerate(ratios)]
                if objective == "token_return":
                    weights = [w - mpmath.fsum(costs[n + 1 :]) for n, w in enumerate(weights)]
            for n, (r, a) in enumerate(zip(rows, tokens, strict=True)):
                for b in range(size):
                    gradient[n][r][b] -= mass * weights[n] * ((a == b) - p[n][r][b])
        levels = [torch.tensor([[float(x) for x in row] for row in level], dtype=torch.float64) for level in gradient]
        return float(value), levels


def _sequences(size, horizon, eos):
    for tokens in itertools.product(range(size), repeat=horizon):
        if eos is None or eos not in tokens[:-1]:
            yield tokens
        elif not any(tokens[tokens.index(eos) + 1 :]):
            yield tokens[: tokens.index(eos) + 1]


def nearby(policy, distance, seed=7, shift=0.0):
    """A chain whose logits differ by random numbers of a size, and by a constant in each row."""
    generator = torch.Generator().manual_seed(seed)
    moved = [
        z + distance * torch.randn(z.shape, generator=generator, dtype=torch.float64) + shift
        for z in (policy.initial, policy.transition)
    ]
    return type(policy)(*moved, policy.horizon, eos=policy.eos)
