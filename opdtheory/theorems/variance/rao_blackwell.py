"""T7b and T7c: baselines that read the history, and the whole vocabulary in place of one token."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import estimator
from opdtheory.exact import exact_gradient, expected_gradient, gradient_moments
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import RATIONAL, Pair, pairs, rational_distributions
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    expectation,
    first_rows,
    intervals,
    kl,
    mean_gradient,
    optimal_baseline,
    ratios,
    score,
    square,
    three_atoms,
    variance,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

# T7b: baselines that read the history.

TwoStep = Callable[[int, int, Sequence[Fraction], Sequence[Sequence[Fraction]], Any], tuple[Fraction, Fraction]]


def theorems() -> list[Theorem]:
    """T7b and T7c."""
    return [_history(), _vocabulary()]


def _history() -> Theorem:
    return Theorem(
        number="T7b",
        name="baselines that read the history",
        statement=r"E_p\Big[\sum_n b_n(h_n)\,s_n\Big] = 0; \quad E_p[\log u \mid h] = -KL(p\|q)(h); \quad "
        r"\text{but } b_n = E_p[w \mid h_n] \text{ lowers the variance of } w s \text{ iff } |b_n - b^*| < |b^*|",
        hypotheses=(
            "b_n depends on the history h_n, not on y_n or on later tokens",
            "the third claim: one softmax row, against no baseline; b* as in T7a",
        ),
        source="vOPD, arXiv 2605.07865; the third claim derived here",
        advice="A baseline computed from both models' logits at the history is always safe for the mean; measure "
        "whether it lowers the variance, for chi2 it may raise it.",
        derivation=(
            Step(
                r"E_p[b(h)\,s \mid h] = b(h)\,\textstyle\sum_a \partial p_a = 0",
                "given h the baseline is a constant, and probabilities sum to one",
                _given_history,
            ),
            Step(
                r"E_p[b(y_{>n})\,s_n] \ne 0 \text{ in general}",
                "the distribution of later tokens depends on y_n: two tokens, a baseline that tells the second ones apart",
                _later_token_biases,
            ),
            Step(
                r"E_p[(w-b)^2] = E_p[(w - E_p w)^2] + (b - E_p w)^2",
                "so the conditional mean is the best baseline for the weight's own square, not for that of w s",
                _mean_is_best_for_squares,
            ),
        ),
        identities=(
            Identity(
                "two steps in fractions",
                r"E_p[\textstyle\sum_n (w_n - b_n(h_n)) s_n] = E_p[\sum_n w_n s_n]",
                _check_two_steps,
                lambda a, b, w1, w2, distributions: (
                    expectation(distributions[0], w1),
                    expectation(distributions[1 + a], w2[a]),
                ),
                {
                    "the baseline reads the next token": lambda a, b, w1, w2, distributions: (w2[a][b], Fraction(0)),
                    "the baseline reads the token itself": lambda a, b, w1, w2, distributions: (
                        Fraction(0),
                        w2[a][b] / 2,
                    ),
                },
                "exact",
            ),
            Identity(
                "history baselines as black boxes",
                r"E_p[\textstyle\sum_n (w_n - E_p[w|h_n]) s_n] = E_p[\sum_n w_n s_n]",
                _check_history,
                _mean_given_history,
                {
                    "the next token's weight": _next_weight,
                    "half of its own weight": lambda r, d: d.weight(r.log_u.detach()) / 2,
                },
            ),
            Identity(
                "for the reverse KL it is minus the KL",
                r"E_p[\log u \mid h] = -KL(p\|q)(h)",
                _check_mean_is_kl,
                lambda reverse, forward: -reverse,
                {"sign flipped": lambda reverse, forward: reverse, "forward KL": lambda reverse, forward: -forward},
                "rigorous",
                1e-40,
            ),
            Identity(
                "it may raise the variance",
                r"\mathrm{Var}[(w - E_p w)s] > \mathrm{Var}[w s] \iff |E_p w - b^*| > |b^*|",
                _check_may_cost,
                _beyond_optimal,
                {"never": lambda p, w: False, "always": lambda p, w: True},
                "exact",
            ),
        ),
    )


def _vocabulary() -> Theorem:
    return Theorem(
        number="T7c",
        name="the whole vocabulary is the Rao-Blackwellisation",
        statement=r"\nabla \textstyle\sum_a p_a f(q_a/p_a) = E_p[-w_f(u)\,s \mid h]; \quad "
        r"\mathrm{Var}(\hat g) = \mathrm{Var}(\hat g_{\mathrm{vocab}}) "
        r"+ \textstyle\sum_n E\,\mathrm{Var}(w_n s_n \mid h_n) + 2\sum_{n<m} E\langle \delta_n, m_m(h_m)\rangle, "
        r"\text{ the last sum zero where rows share no parameters}",
        hypotheses=(
            "delta_n = -w_n s_n - E[-w_n s_n | h_n] and m_n(h_n) = E[-w_n s_n | h_n]",
            "never a larger variance: for one step, for each position's term by itself, and for tables of logits; "
            "with shared parameters the whole vocabulary may have the larger variance, as the last check shows",
        ),
        source="Rao-Blackwell; the cross term derived here",
        advice="Sum over the vocabulary where logits are at hand; what is left is the noise of the histories, which in "
        "a network of shared parameters is not always the smaller one.",
        derivation=(
            Step(
                r"\partial_{z} \textstyle\sum_a p_a f(q_a/p_a) = -E_p[w_f(u)\,s]",
                "T1 on one row: the sampled gradient's mean given the history, which does not depend on y_n",
                _inner_mean,
            ),
            Step(
                r"E|X + m|^2 = E|X - EX|^2 + |EX + m|^2",
                "the spread within a history adds to whatever is fixed by it; with disjoint rows nothing else does",
                _total_variance,
            ),
        ),
        identities=(
            Identity(
                "law of total variance",
                r"\mathrm{Var}(\hat g) - \mathrm{Var}(\hat g_{\mathrm{vocab}}) = "
                r"\textstyle\sum_h P(h)\,(E_p[w^2|s|^2] - |E_p[w s]|^2)",
                _check_total_variance,
                _conditional_variance,
                {
                    "squared mean dropped": lambda p, w: (
                        p * w.square() * (1 - 2 * p + p.square().sum(-1, keepdim=True))
                    ).sum(-1),
                    "variance of the weight alone": lambda p, w: (p * w.square()).sum(-1) - (p * w).sum(-1).square(),
                },
            ),
            Identity(
                "one step leaves no variance",
                r"\mathrm{Var}(\hat g_{\mathrm{vocab}} \mid h) = 0",
                _check_one_step_is_certain,
                "full_vocab",
                {"one sampled token": "opd_plus"},
            ),
            Identity(
                "a shared row can turn it round",
                r"\mathrm{Var}(\hat g) - \mathrm{Var}(\hat g_{\mathrm{vocab}}) = "
                r"E|\delta_1|^2 + E|\delta_2|^2 + 2 E\langle\delta_1, m_2(h_2)\rangle, \text{ negative for one pair}",
                _check_tied,
                lambda own, later, cross: own + later + 2 * cross,
                {
                    "cross term dropped (never larger)": lambda own, later, cross: own + later,
                    "cross term once": lambda own, later, cross: own + later + cross,
                },
                "exact",
            ),
        ),
    )


def _check_two_steps(baseline: TwoStep) -> Cases:
    r"""$E_p[\sum_n (w_n - b_n) s_n]$ over all rollouts of two tokens, in fractions, row by row."""
    distributions = [pair for pair in rational_distributions() if len(pair[0]) == 3]
    p, q = distributions[0]
    later = [distributions[1], distributions[0], (distributions[1][1], distributions[0][0])]
    for name in RATIONAL:
        w1, w2 = weights(name, p, q), [weights(name, *pair) for pair in later]
        total = [[Fraction(0)] * 3 for _ in range(4)]
        for a in range(3):
            for b in range(3):
                reach = p[a] * later[a][0][b]
                b1, b2 = baseline(a, b, w1, w2, [p, *(pair[0] for pair in later)])
                for k in range(3):
                    total[0][k] -= reach * (w1[a] - b1) * score(p, a)[k]
                    total[1 + a][k] -= reach * (w2[a][b] - b2) * score(later[a][0], b)[k]
        exact = [mean_gradient(p, w1)]
        exact += [[p[a] * g for g in mean_gradient(later[a][0], w2[a])] for a in range(3)]
        for row, expected in zip(total, exact, strict=True):
            yield same(row, expected, name)


def _check_history(baseline: Callable[[Rollouts, Any], Tensor]) -> Cases:
    """Score-function losses with a baseline, run on every rollout, against the oracle."""
    for name in ("reverse_kl", "forward_kl", "jsd"):
        divergence = divergences.divergence(name)

        def loss(r: Rollouts, d: Any = divergence) -> Tensor:
            advantage = d.weight(r.log_u.detach()) - baseline(r, d)
            return r.token_sum(-advantage * r.student_logprobs)

        for pair in pairs()[1:3]:
            yield close(expected_gradient(loss, *pair), exact_gradient(*pair, divergence), name, pair)


def _mean_given_history(r: Rollouts, d: Any) -> Tensor:
    log_p, log_q = (torch.log_softmax(z.detach(), -1) for z in (r.student_logits, r.teacher_logits))
    return (log_p.exp() * d.weight(log_q - log_p)).sum(-1)


def _next_weight(r: Rollouts, d: Any) -> Tensor:
    own = r.mask * d.weight(r.log_u.detach())
    return torch.cat([own[:, 1:], torch.zeros_like(own[:, :1])], -1)


def _check_mean_is_kl(value: Callable[[Any, Any], Any]) -> Cases:
    r"""$E_p[\log u]$, the centred reverse-KL weight's mean, enclosed."""
    for student, teacher in rational_distributions():
        p, q = intervals(student), intervals(teacher)
        mean = expectation(p, [w + 1 for w in weights_enclosed("reverse_kl", student, teacher)])
        yield overlap(mean, value(kl(p, q), kl(q, p)), student, teacher)


def _check_may_cost(rises: Callable[[list[Fraction], list[Fraction]], bool]) -> Cases:
    r"""Whether $E_p[w]$ as a baseline raises the variance: for $\chi^2$ it does on one pair and does not on another."""
    sevenths, eighths = tuple(Fraction(n, 7) for n in (2, 4, 1)), tuple(Fraction(n, 8) for n in (1, 6, 1))
    for p, q in ((sevenths, eighths), *rational_distributions()):
        w = weights("chi2", p, q)
        mean = expectation(p, w)
        yield holds((variance(p, [x - mean for x in w]) > variance(p, w)) == rises(list(p), w), p, q)


def _beyond_optimal(p: list[Fraction], w: list[Fraction]) -> bool:
    best, mean = optimal_baseline(p, w), expectation(p, w)
    return bool(abs(mean - best) > abs(best))


# T7c: the whole vocabulary.


def _check_total_variance(spread: Callable[[Tensor, Tensor], Tensor]) -> Cases:
    """Variance of the sampled estimator minus that of the whole vocabulary, both as black boxes."""
    for name in SMOOTH:
        divergence = divergences.divergence(name)
        for pair in pairs():
            sampled, whole = (_variance(each, name, pair) for each in ("opd_plus", "full_vocab"))
            yield holds(whole <= sampled, name, pair)
            tree = Tree.build(*pair)
            inside = torch.zeros((), dtype=torch.float64)
            for n in range(tree.horizon):
                p, w = tree.log_p[n].exp(), divergence.weight(tree.log_q[n] - tree.log_p[n])
                inside = inside + (tree.reach(n) * spread(p, w)).sum()
            yield close(torch.tensor(sampled - whole, dtype=torch.float64), inside, name, pair)


@functools.cache
def _variance(each: str, name: str, pair: Pair) -> float:
    return gradient_moments(estimator(each, name), *pair).variance


def _conditional_variance(p: Tensor, w: Tensor) -> Tensor:
    norms = 1 - 2 * p + p.square().sum(-1, keepdim=True)
    mean = p * (w - (p * w).sum(-1, keepdim=True))
    return (p * w.square() * norms).sum(-1) - mean.square().sum(-1)


def _check_one_step_is_certain(name: str) -> Cases:
    """One token, the whole vocabulary: the same gradient on every rollout."""
    for divergence in SMOOTH:
        for pair in pairs():
            row = first_rows(pair)
            yield close(
                torch.tensor(gradient_moments(estimator(name, divergence), *row).variance),
                torch.tensor(0.0),
                divergence,
                pair,
            )


def _check_tied(difference: Callable[[Fraction, Fraction, Fraction], Fraction]) -> Cases:
    r"""Two steps that share one softmax row: variances of the sampled and the whole-vocabulary gradient, in fractions.

    The weight is $u - 1$. The pairs are such that the whole vocabulary has the larger variance on the first.
    """

    def distribution(*parts: int) -> list[Fraction]:
        return [Fraction(part, sum(parts)) for part in parts]

    worse = []
    for p, first, second in (
        (distribution(3, 4), distribution(1, 3), (distribution(1, 1), distribution(2, 3))),
        (distribution(1, 2), distribution(2, 1), (distribution(3, 1), distribution(1, 3))),
        (
            distribution(1, 2, 3),
            distribution(3, 2, 1),
            (distribution(1, 1, 1), distribution(5, 1, 2), distribution(1, 4, 1)),
        ),
    ):
        size = len(p)

        def parts(q: list[Fraction], p: list[Fraction] = p) -> tuple[list[Fraction], list[list[Fraction]]]:
            w = [u - 1 for u in ratios(p, q)]
            mean = mean_gradient(p, w)
            noise = [[-w[a] * s - m for s, m in zip(score(p, a), mean, strict=True)] for a in range(len(p))]
            return mean, noise

        mean, noise = parts(first)
        later = [parts(q) for q in second]
        middle = [expectation(p, [m[k] for m, _ in later]) for k in range(size)]
        moves = [[m[k] - middle[k] for k in range(size)] for m, _ in later]
        yield same(
            [expectation(p, column) for column in zip(*moves, strict=True)], [Fraction(0)] * size, p, first, second
        )
        whole = expectation(p, [square(move) for move in moves])
        sampled = sum(
            p[a] * p[b] * square([noise[a][k] + moves[a][k] + later[a][1][b][k] for k in range(size)])
            for a in range(size)
            for b in range(size)
        )
        own = expectation(p, [square(x) for x in noise])
        own_later = expectation(p, [expectation(p, [square(x) for x in later[a][1]]) for a in range(size)])
        cross = expectation(p, [sum(x * y for x, y in zip(noise[a], moves[a], strict=True)) for a in range(size)])
        yield same(sampled - whole, difference(own, own_later, cross), p, first, second)
        worse.append(whole > sampled)
    yield holds(worse[0] and not all(worse))


# The derivation.


def _given_history() -> bool:
    """Two steps of two tokens, everything undefined: a baseline of the history leaves the mean, row by row."""
    t, b, reach = sympy.Symbol("theta", real=True), sympy.symbols("b0:2"), sympy.symbols("p0:2")
    later = [sympy.Function(f"r{a}", positive=True)(t) for a in range(2)]
    total = sum(
        reach[a] * chance * b[a] * sympy.diff(sympy.log(chance), t)
        for a in range(2)
        for chance in (later[a], 1 - later[a])
    )
    return sympy.simplify(total) == 0


def _later_token_biases() -> bool:
    r"""$b(y_2) = 1$ for one of two tokens: $E[b(y_2) s_1] = p(1-p)(r_0 - r_1)$, with the chance $r_a$ after $a$."""
    p, r0, r1 = sympy.symbols("p r0 r1")
    first, later = [p, 1 - p], (r0, r1)
    found = expectation(first, [later[a] * score(first, a)[0] for a in range(2)])
    return sympy.expand(found - p * (1 - p) * (r0 - r1)) == 0


def _mean_is_best_for_squares() -> bool:
    p, w, _ = three_atoms()
    b = sympy.Symbol("b", real=True)
    mean = sum(x * y for x, y in zip(p, w, strict=True))
    gap = sum(a * (x - b) ** 2 - a * (x - mean) ** 2 for a, x in zip(p, w, strict=True))
    return sympy.expand(gap - (b - mean) ** 2) == 0


def _inner_mean() -> bool:
    r"""$-\sum_a p_a w_a s_a$ for softmax scores is the gradient of $\sum_a p_a f(q_a/p_a)$ in the logits."""
    z = sympy.symbols("z0:3", real=True)
    q = sympy.symbols("q0:3", positive=True)
    u, f = sympy.Symbol("u", positive=True), sympy.Function("f")
    total = sum(sympy.exp(x) for x in z)
    p = [sympy.exp(x) / total for x in z]
    loss = sum(a * f(b / a) for a, b in zip(p, q, strict=True))
    w = [(u * sympy.diff(f(u), u) - f(u)).subs(u, b / a).doit() for a, b in zip(p, q, strict=True)]
    mean = sum(a * x for a, x in zip(p, w, strict=True))
    return sympy.simplify((sympy.diff(loss, z[0]) + p[0] * (w[0] - mean)).doit()) == 0


def _total_variance() -> bool:
    """Three atoms, two components: the square splits into the mean's and the spread's."""
    p, w, s = three_atoms()
    mean = [sum(p[a] * w[a] * s[a][k] for a in range(3)) for k in range(2)]
    m = sympy.symbols("m0:2", real=True)
    left = sum(p[a] * (w[a] * s[a][k] + m[k]) ** 2 for a in range(3) for k in range(2))
    spread = sum(p[a] * (w[a] * s[a][k] - mean[k]) ** 2 for a in range(3) for k in range(2))
    right = spread + sum((mean[k] + m[k]) ** 2 for k in range(2))
    return sympy.simplify(left - right) == 0
