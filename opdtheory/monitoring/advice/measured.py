"""The errors of a batch's gradient: each history in closed form, and how histories add up."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from opdtheory.divergences import Divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.advice.candidates import Candidate
from opdtheory.monitoring.advice.coherence import Features, Square
from opdtheory.monitoring.advice.exact import Groups, Sizes
from opdtheory.monitoring.advice.rows import Rows

__all__ = ["measure"]

Measured = tuple[Candidate, float, float]


def measure(
    rows: Rows, target: Divergence, listed: Sequence[Candidate], tokens: int, batches: int | None
) -> list[Measured]:
    """Each candidate with its relative squared bias and variance."""
    chunks = rows.chunks()
    features = Features.of([rows.student[chunk] for chunk in chunks])
    listed = _with_constants(rows, target, listed, chunks)
    largest = [math.inf] * len(listed) if batches is None else _largest(rows, target, listed, tokens * batches)
    exact, spread = Square(), [0.0] * len(listed)
    biases = [Square() for _ in listed]
    for chunk in chunks:
        histories = rows.histories(target, chunk)
        groups = histories.groups
        gradient, phi, left = histories.gradient(), features.phi[chunk], features.left[chunk]
        exact.add(gradient, phi, left)
        for number, candidate in enumerate(listed):
            found = histories.moments(candidate, largest[number])
            spread[number] += float(found.variance.sum())
            if found.bias is not None:
                biases[number].add(found.bias, phi, left)
            if found.pairs is not None and groups is not None:
                own = gradient if found.bias is None else gradient + found.bias
                spread[number] += _together(own, phi, groups, found.pairs)
    signal = exact.of_mean(tokens)
    if signal <= 0:
        raise InvalidArgumentError("found_or_rollouts", "must not have a gradient of zero: teacher and student agree")
    return [
        (candidate, bias.of_mean(tokens) / signal, max(0.0, noise) / len(rows.student) / tokens / signal)
        for candidate, bias, noise in zip(listed, biases, spread, strict=True)
    ]


def _largest(rows: Rows, target: Divergence, listed: Sequence[Candidate], tokens: int) -> list[float]:
    """The size of an outcome above which each candidate meets less than one in so many tokens."""
    found = [Sizes() for _ in listed]
    for chunk in rows.chunks():
        histories = rows.histories(target, chunk)
        for candidate, sizes in zip(listed, found, strict=True):
            histories.add_sizes(candidate, sizes)
    return [sizes.largest(len(rows.student) / tokens) for sizes in found]


def _together(gradient: Tensor, phi: Tensor, groups: Groups, pairs: Tensor) -> float:
    r"""$\sum_{i \ne j} J\, K_{ij}\, g_i\cdot g_j$ within each set; identical histories have $K_{ij} = 1$."""
    total, order = 0.0, groups.number.argsort(stable=True)
    for members in order.split(groups.number.bincount().tolist()):
        if len(members) > 1:
            g, f = gradient[members], phi[members]
            products = (g @ g.T) * (f @ f.T)
            total += float(pairs[members[0]]) * float(products.sum() - products.diagonal().sum())
    return total


def _with_constants(
    rows: Rows, target: Divergence, listed: Sequence[Candidate], chunks: Sequence[slice]
) -> list[Candidate]:
    """The candidates with the best constant of all rows together where one is asked for (T19)."""
    sums = {number: [0.0, 0.0] for number, each in enumerate(listed) if each.best}
    for chunk in chunks:
        histories = rows.histories(target, chunk)
        for number, found in sums.items():
            top, bottom = histories.parabola(listed[number])
            found[0], found[1] = found[0] + top, found[1] + bottom
    values = {number: top / bottom if bottom > 1e-300 else 0.0 for number, (top, bottom) in sums.items()}
    return [each.with_constant(values[number]) if number in values else each for number, each in enumerate(listed)]
