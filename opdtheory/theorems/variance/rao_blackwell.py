"""T7b and T7c: baselines that read the history, and the whole vocabulary in place of one token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.exact import exact_gradient, expected_gradient
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    distribution,
    pairs,
    rational_distributions,
    sampled_variance,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    OfPair,
    dot,
    expectation,
    first_rows,
    intervals,
    kl,
    mean_gradient,
    minus,
    optimal_baseline,
    ratios,
    score,
    softmax,
    square,
    three_atoms,
    variance,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.instances.two_steps import weight_at
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

TwoStep = Callable[[int, int, Sequence[Fraction], Sequence[Sequence[Fraction]], Any], tuple[Fraction, Fraction]]


def theorems() -> list[Theorem]:
    """T7b and T7c."""
    return [_history(), _vocabulary()]


def _history() -> Theorem:
    return Theorem(
        number="T7b",
        name="baselines that read the history",
        meaning=(
            r"A baseline may read all that was written before the token, and both models' logits there, without"
            r" changing the mean of the gradient. The mean of the weight at that history is one such baseline; for"
            r" $\log u$, the centred weight of the reverse KL, it is minus the KL divergence there. It does not"
            r" always lower the variance."
        ),
        statement=(
            r"E_p\Big[\sum_n b_n(h_n)\,s_n\Big] = 0;\quad"
            r" E_p[\log u \mid h] = -\mathrm{KL}(p\|q)(h);\quad"
            r" b_n = E_p[w \mid h_n] \text{ lowers the variance of } w\,s \iff |b_n - b^*| < |b^*|"
        ),
        hypotheses=(
            "the baseline $b_n$ depends on the history $h_n$, not on $y_n$ or on later tokens",
            "the third claim is about one softmax row and compares with no baseline; $b^*$ is that of T7a",
        ),
        source="vOPD, arXiv 2605.07865; the third claim derived here",
        advice=(
            r"A baseline computed from both models' logits at the history never changes the mean. Measure whether it"
            r" lowers the variance: for $\chi^2$ it may raise it."
        ),
        derivation=(
            Step(
                r"E_p[b(h)\,s \mid h] = b(h)\,\textstyle\sum_a \partial p_a = 0",
                "given the history, the baseline is a constant, and the probabilities of the next token sum to one."
                " Sympy confirms it for two steps of two tokens, with probabilities that are undefined functions of a"
                " parameter",
                _given_history,
            ),
            Step(
                r"E_p[b(y_{>n})\,s_n] \ne 0 \text{ in general}",
                r"the distribution of later tokens depends on $y_n$, so a baseline must not read them. Two steps with"
                r" the tokens 0 and 1 show it: let $p$ be the probability that the first token is 0, and let the"
                r" baseline be 1 if the second token is 0, which has probability $r_a$ after the first token $a$, and"
                r" 0 otherwise. Then the mean of baseline times first score is $p(1-p)(r_0 - r_1)$ in the logit of"
                r" token 0",
                _later_token_biases,
            ),
            Step(
                r"E_p[(w-b)^2] = E_p[(w - E_p w)^2] + (b - E_p w)^2",
                r"complete the square: the conditional mean is the best baseline for the mean square of the weight,"
                r" but not for that of $w\,s$, where T7a's $b^*$ is the best. By T7a the variance exceeds the least"
                r" one by $(b - b^*)^2\,E_p|s|^2$ with a baseline $b$, and by $(b^*)^2\,E_p|s|^2$ without one, which"
                r" gives the third claim",
                _mean_is_best_for_squares,
            ),
        ),
        identities=(
            Identity(
                "two steps in fractions",
                r"E_p[\textstyle\sum_n (w_n - b_n(h_n)) s_n] = E_p[\sum_n w_n s_n]",
                _check_two_steps,
                lambda a, b, w1, w2, rows: (expectation(rows[0], w1), expectation(rows[1 + a], w2[a])),
                {
                    "the baseline reads the next token": lambda a, b, w1, w2, rows: (w2[a][b], Fraction(0)),
                    "the baseline reads the token itself": lambda a, b, w1, w2, rows: (Fraction(0), w2[a][b] / 2),
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
                r"E_p[\log u \mid h] = -\mathrm{KL}(p\|q)(h)",
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
        meaning=(
            "A loss that sums over the vocabulary has, at each history, the mean of the sampled gradient as its"
            " gradient: the noise of the token's choice is gone, and the noise of the histories stays. Where"
            " positions share no parameters, its variance is never the larger one. Where they do, an early token's"
            " noise may happen to cancel what it does to later means, and then the sampled gradient can have the"
            " smaller variance."
        ),
        statement=(
            r"\nabla \textstyle\sum_a p_a f(q_a/p_a) = E_p[-w_f(u)\,s \mid h];\quad"
            r" \mathrm{Var}(\hat g) = \mathrm{Var}(\hat g_{\mathrm{vocab}}) + \textstyle\sum_n E\,\mathrm{Var}(w_n"
            r" s_n \mid h_n) + 2\sum_{n<m} E\langle \delta_n, m_m(h_m)\rangle;\quad"
            r" \textstyle\sum_{n<m} E\langle \delta_n, m_m(h_m)\rangle = 0 \text{ where rows share no parameters}"
        ),
        hypotheses=(
            r"$\hat g = -\sum_n w_n s_n$ is the sampled gradient; $m_n(h_n) = E[-w_n s_n \mid h_n]$ is the mean of"
            r" its term at position $n$ given the history, and $\delta_n = -w_n s_n - m_n(h_n)$ is what the sampled"
            r" token adds to that mean; $\hat g_{\mathrm{vocab}} = \sum_n m_n(h_n)$",
            "the whole vocabulary never has the larger variance for one step, for each position's term by itself, and"
            " for tables of logits; with shared parameters it may, as the last check shows",
        ),
        source="Rao-Blackwell; the cross term derived here",
        advice=(
            "Sum over the vocabulary if you have the logits. The noise of the histories remains; in a network, which"
            " shares parameters, the total is not always smaller."
        ),
        derivation=(
            Step(
                r"\partial_{z} \textstyle\sum_a p_a f(q_a/p_a) = -E_p[w_f(u)\,s]",
                "this is T1 on one row of logits $z$. The left-hand side does not contain the sampled token $y_n$,"
                " and the right-hand side is the mean of the sampled gradient given the history",
                _inner_mean,
            ),
            Step(
                r"E|X + m|^2 = E|X - EX|^2 + |EX + m|^2",
                r"let $X$ be one position's term and $m$ any vector that the history fixes: the spread within a"
                r" history adds to what the history fixes. Between positions, $\delta_n$ has mean zero given $h_n$,"
                r" so only its products with later means can remain. Where rows share no parameters these are zero,"
                r" as the two vectors have no coordinate in common",
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
                    "squared mean dropped": lambda p, w: (p * w.square() * _norms(p)).sum(-1),
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
    first, second = (pair for pair in rational_distributions() if len(pair[0]) == 3)
    (p, q), later = first, [second, first, (second[1], first[0])]
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
        yield same(total[0], mean_gradient(p, w1), name, "first row")
        for a in range(3):
            exact = [p[a] * g for g in mean_gradient(later[a][0], w2[a])]
            yield same(total[1 + a], exact, name, f"row after token {a}")


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


def _check_mean_is_kl(value: OfPair) -> Cases:
    r"""$E_p[\log u]$, the mean of the reverse KL's centred weight, enclosed."""
    for student, teacher in rational_distributions():
        p, q = intervals(student), intervals(teacher)
        mean = expectation(p, [w + 1 for w in weights_enclosed("reverse_kl", student, teacher)])
        yield overlap(mean, value(kl(p, q), kl(q, p)), student, teacher)


def _check_may_cost(rises: Callable[[list[Fraction], list[Fraction]], bool]) -> Cases:
    r"""Whether $E_p[w]$ as a baseline raises the variance: for $\chi^2$ it does on one pair and does not on another."""
    for p, q in ((distribution(2, 4, 1), distribution(1, 6, 1)), *rational_distributions()):
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
            sampled, whole = (sampled_variance(each, name, pair) for each in ("opd_plus", "full_vocab"))
            yield holds(bool(whole <= sampled), name, pair, "not larger")
            tree = Tree.build(*pair)
            inside = torch.zeros((), dtype=torch.float64)
            for n in range(tree.horizon):
                p, w = tree.log_p[n].exp(), divergence.weight(tree.log_q[n] - tree.log_p[n])
                inside = inside + (tree.reach(n) * spread(p, w)).sum()
            yield close(sampled - whole, inside, name, pair, "difference")


def _norms(p: Tensor) -> Tensor:
    r"""$|s_a|^2 = 1 - 2 p_a + |p|^2$ of softmax rows."""
    return 1 - 2 * p + p.square().sum(-1, keepdim=True)


def _conditional_variance(p: Tensor, w: Tensor) -> Tensor:
    mean = p * (w - (p * w).sum(-1, keepdim=True))
    return (p * w.square() * _norms(p)).sum(-1) - mean.square().sum(-1)


def _check_one_step_is_certain(name: str) -> Cases:
    """One token, the whole vocabulary: the same gradient on every rollout."""
    for divergence in SMOOTH:
        for pair in pairs():
            left = sampled_variance(name, divergence, first_rows(pair))
            yield close(left, torch.zeros_like(left), divergence, pair)


def _mean_and_noise(p: Distribution, q: Distribution) -> tuple[list[Fraction], list[list[Fraction]]]:
    """The mean gradient for the weight $u - 1$, and what each token's gradient adds to it."""
    w = [u - 1 for u in ratios(p, q)]
    mean = mean_gradient(p, w)
    return mean, [minus([-w[a] * s for s in score(p, a)], mean) for a in range(len(p))]


def _check_tied(difference: Callable[[Fraction, Fraction, Fraction], Fraction]) -> Cases:
    r"""Two steps that share one softmax row: variances of the sampled and the whole-vocabulary gradient, in fractions.

    For the first of the instances the whole vocabulary has the larger variance.
    """
    d = distribution
    worse = []
    for p, first, second in (
        (d(3, 4), d(1, 3), (d(1, 1), d(2, 3))),
        (d(1, 2), d(2, 1), (d(3, 1), d(1, 3))),
        (d(1, 2, 3), d(3, 2, 1), (d(1, 1, 1), d(5, 1, 2), d(1, 4, 1))),
    ):
        size = range(len(p))
        _, noise = _mean_and_noise(p, first)
        later = [_mean_and_noise(p, q) for q in second]
        middle = [expectation(p, [mean[k] for mean, _ in later]) for k in size]
        moves = [minus(mean, middle) for mean, _ in later]
        yield same([expectation(p, [move[k] for move in moves]) for k in size], [0] * len(p), p, first, "moves")
        whole = expectation(p, [square(move) for move in moves])
        sampled = sum(
            p[a] * p[b] * square([noise[a][k] + moves[a][k] + later[a][1][b][k] for k in size])
            for a in size
            for b in size
        )
        own = expectation(p, [square(x) for x in noise])
        own_later = expectation(p, [expectation(p, [square(x) for x in rest]) for _, rest in later])
        cross = expectation(p, [dot(x, move) for x, move in zip(noise, moves, strict=True)])
        yield same(sampled - whole, difference(own, own_later, cross), p, first, "difference")
        worse.append(whole > sampled)
    yield holds(worse[0] and not all(worse), "the first instance is worse")


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
    b, mean = sympy.Symbol("b", real=True), expectation(p, w)
    gap = expectation(p, [(x - b) ** 2 - (x - mean) ** 2 for x in w])
    return sympy.expand(gap - (b - mean) ** 2) == 0


def _inner_mean() -> bool:
    r"""$-\sum_a p_a w_a s_a$ for softmax scores is the gradient of $\sum_a p_a f(q_a/p_a)$ in the logits."""
    z, p = softmax()
    q, f = sympy.symbols("q0:3", positive=True), sympy.Function("f")
    loss = expectation(p, [f(u) for u in ratios(p, q)])
    w = [weight_at(f, u) for u in ratios(p, q)]
    return sympy.simplify((sympy.diff(loss, z[0]) + p[0] * (w[0] - expectation(p, w))).doit()) == 0


def _total_variance() -> bool:
    """Three atoms, two components: the square splits into the mean's and the spread's."""
    p, w, s = three_atoms()
    mean = [sum(p[a] * w[a] * s[a][k] for a in range(3)) for k in range(2)]
    m = sympy.symbols("m0:2", real=True)
    left = sum(p[a] * (w[a] * s[a][k] + m[k]) ** 2 for a in range(3) for k in range(2))
    spread = sum(p[a] * (w[a] * s[a][k] - mean[k]) ** 2 for a in range(3) for k in range(2))
    right = spread + sum((mean[k] + m[k]) ** 2 for k in range(2))
    return sympy.simplify(left - right) == 0
