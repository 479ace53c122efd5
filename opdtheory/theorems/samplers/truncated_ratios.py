"""T14: importance ratios of tokens that are truncated (TIS) or masked (IcePop, MIS)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import sympy
import torch
from mpmath import iv
from torch import Tensor

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.exact import TabularPolicy, expected_gradient
from opdtheory.exact.tree import Tree
from opdtheory.rollouts import Rollouts
from opdtheory.theorems.instances.cases import (
    RATIONAL,
    Distribution,
    autograd_gradient,
    distribution,
    rational_distributions,
)
from opdtheory.theorems.instances.one_sample import (
    SMOOTH,
    intervals,
    mean_gradient,
    score_norms,
    three_atoms,
    weights,
    weights_enclosed,
)
from opdtheory.theorems.samplers.behaviors import CAP, HIGH, LOW, Triple, log_ratios, near_and_far
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds, overlap, same

__all__ = ["theorems"]

# What a ratio is replaced by.
Factor = Callable[[Fraction], Fraction]


class Replaced(NamedTuple):
    """A sampled loss's factor in place of the ratio, and what it leaves of the weight under the student."""

    factor: Factor
    left: Factor


TRUNCATED = Replaced(lambda rho: min(rho, CAP), lambda rho: min(Fraction(1), CAP / rho))
MASKED = Replaced(lambda rho: rho * _kept(rho), lambda rho: _kept(rho))


def theorems() -> list[Theorem]:
    """T14."""
    return [_tokens()]


def _kept(rho: Fraction) -> Fraction:
    """One where the mask keeps a ratio, else zero."""
    return Fraction(LOW <= rho <= HIGH)


def _tokens() -> Theorem:
    return Theorem(
        number="T14",
        name="truncated and masked ratios",
        meaning=(
            r"An importance ratio $\rho = p/\mu$ that is truncated at $C$, or masked outside an interval, leaves a"
            " factor $F$ on the weight of each token, which is 1 where the ratio was left alone. The gradient is then"
            r" biased unless the dropped part of the weight, $(1 - F)\,w$, is the same for every token. Where the"
            " student is the teacher, $w_f(1)$ times the mean of $F s$ remains. Under truncation the teacher is"
            " therefore a fixed point for every sampler only if $w_f(1) = 0$; under a mask that keeps the ratio 1 the"
            " same holds for three tokens or more."
        ),
        statement=(
            r"E_\mu[\min(\rho, C)\,w s] = E_p[\min(1, C/\rho)\,w s],\ \rho = p/\mu;\quad"
            r" E_\mu[1_{\alpha\le\rho\le\beta}\,\rho\,w s] = E_p[1_{\alpha\le\rho\le\beta}\,w s];\quad F = \min(1,"
            r" C/\rho) \text{ or } F = 1_{\alpha\le\rho\le\beta}:\ \text{ no bias} \iff (1 - F)\,w \text{ is"
            r" constant};\quad p = q:\ E_p[F w s] = w_f(1)\,E_p[F s]"
        ),
        hypotheses=(
            "there is one softmax row",
            r"$\mu > 0$ where $p$ is; $\mu$ is another policy, or the same one as an inference engine computes it",
        ),
        source="IcePop, TIS and MIS as trainers document them; the algebra derived here",
        advice=(
            "Truncate and mask ratios only with a centred weight, $w_f(u) - w_f(1)$: with any other there are samplers"
            " for which the teacher is no fixed point. The bias that remains is the weight of the tokens whose ratio"
            " leaves the interval."
        ),
        derivation=(
            Step(
                r"\mu \min(p/\mu, C) = p \min(1, C\mu/p);\quad \mu\,1_{\alpha\le\rho\le\beta}\,p/\mu ="
                r" p\,1_{\alpha\le\rho\le\beta}",
                "compare the two sides token by token, with the ratio above the bound and below it. Summed over the"
                " tokens, these are the first two claims",
                _atom_by_atom,
            ),
            Step(
                r"E_p[(1 - F)\,w s] = 0 \iff (1 - F)\,w = E_p[(1 - F)\,w] \text{ where } p > 0",
                "the gradient of a softmax row with the weight $A$ is $-p_a (A_a - E_p A)$ in the logits, which is"
                r" zero exactly if $A$ does not depend on the token; here $A = (1 - F)\,w$. Sympy shows it for three"
                " tokens",
                _only_constants_vanish,
            ),
            Step(
                r"p = q:\quad w_f(u) = w_f(1) = f'(1)",
                "where student and teacher agree, $u = 1$ for every token, so the weight is the constant $w_f(1)$ and"
                r" the factor $F$ alone decides. If some $\mu$ leaves $F$ different at two tokens, the gradient"
                r" vanishes for every $\mu$ only if $w_f(1) = 0$. Under truncation let $\mu$ take almost all mass from"
                " one token. Under a mask that keeps the ratio 1, give that mass to a second token and leave a third"
                r" alone. Two tokens are not enough there: at $p = (\frac12, \frac12)$ the mask $[\frac23, 2]$ keeps"
                r" both or none, because $1/\rho_1 + 1/\rho_2 = 2$",
                _weight_at_one,
                in_words=True,
            ),
        ),
        identities=(
            Identity(
                "truncation",
                r"E_\mu[\min(\rho, C)\,w s] = E_p[\min(1, C/\rho)\,w s]",
                _check_factor,
                TRUNCATED,
                {
                    "unbiased": TRUNCATED._replace(left=lambda rho: Fraction(1)),
                    "C/rho everywhere": TRUNCATED._replace(left=lambda rho: CAP / rho),
                    "the factor itself": TRUNCATED._replace(left=TRUNCATED.factor),
                    "cut from below": TRUNCATED._replace(left=lambda rho: max(Fraction(1), CAP / rho)),
                },
                "exact",
            ),
            Identity(
                "mask, with and without the ratio",
                r"E_\mu[1_{\mathrm{kept}}\,\rho\,w s] = E_p[1_{\mathrm{kept}}\,w s];\quad E_\mu[1_{\mathrm{kept}}\,w"
                r" s] = E_p[1_{\mathrm{kept}}\,w s / \rho]",
                _check_factors,
                (MASKED, Replaced(_kept, lambda rho: _kept(rho) / rho)),
                {
                    "unbiased": (MASKED._replace(left=lambda rho: Fraction(1)),),
                    "what it drops": (MASKED._replace(left=lambda rho: 1 - _kept(rho)),),
                    "the ratio makes no difference": (Replaced(_kept, _kept),),
                },
                "exact",
            ),
            Identity(
                "when there is no bias",
                r"E_\mu[F\rho\,w s] = E_p[w s] \iff (1 - F)\,w \text{ is constant}",
                _check_no_bias,
                lambda rho, w, left: len({(1 - x) * y for x, y in zip(left, w, strict=True)}) == 1,
                {
                    "only if every ratio stays inside": lambda rho, w, left: set(left) == {1},
                    "if the mean ratio does": lambda rho, w, left: sum(left) * 2 > len(left),
                    "always": lambda rho, w, left: True,
                    "never": lambda rho, w, left: False,
                },
                "exact",
            ),
            Identity(
                "for every weight",
                r"\forall w:\ E_\mu[F\rho\,w s] = E_p[w s] \iff \rho \text{ stays inside}",
                _check_every_weight,
                lambda left: set(left) == {1},
                {
                    "if one ratio does": lambda left: 1 in left,
                    "if F is constant": lambda left: len(set(left)) == 1,
                },
                "exact",
            ),
            Identity(
                "drift at the teacher",
                r"p = q:\ -E_\mu[\min(\rho, C)\,w_f s]_a = -w_f(1)\,p_a\,(F_a - E_p F)",
                _check_at_teacher,
                lambda at_one, p, left: [at_one * x for x in mean_gradient(p, left)],
                {
                    "none": lambda at_one, p, left: [0 * x for x in p],
                    "sign flipped": lambda at_one, p, left: [-at_one * x for x in mean_gradient(p, left)],
                    "as without a ratio": lambda at_one, p, left: [
                        at_one * x for x in mean_gradient(p, [1 / y for y in left])
                    ],
                },
                "rigorous",
                1e-40,
            ),
            Identity(
                "when some sampler splits the tokens",
                r"p = (\tfrac1n, \dots, \tfrac1n):\ \exists\,\mu \text{ with } 1_{2/3\le\rho\le2} \text{ not"
                r" constant} \iff n \ge 3,\quad \exists\,\mu \text{ with } \min(1, C/\rho) \text{ not constant}",
                _check_split,
                {"truncated": lambda n: True, "masked": lambda n: n >= 3},
                {
                    "under every mask": {"truncated": lambda n: True, "masked": lambda n: True},
                    "under no mask": {"truncated": lambda n: True, "masked": lambda n: False},
                    "two tokens alike": {"truncated": lambda n: n >= 3, "masked": lambda n: n >= 3},
                },
                "exact",
            ),
            Identity(
                "what truncation buys",
                r"E_\mu[\min(\rho, C)^2 w^2|s|^2] = E_p[\min(\rho, C^2/\rho)\,w^2|s|^2]",
                _check_second_moment,
                lambda rho: min(rho, CAP**2 / rho),
                {
                    "the full ratio's": lambda rho: rho,
                    "C at most": lambda rho: min(rho, CAP),
                    "F squared": lambda rho: min(Fraction(1), CAP / rho) ** 2,
                },
                "exact",
            ),
            Identity(
                "black boxes, one token and several",
                r"E_\mu[\textstyle\sum_n \min(\rho_n, C)\,w_n s_n] = "
                r"\sum_n E_{h\sim\mu}\,E_p[\min(1, C/\rho)\,w s \mid h]",
                _check_black_box,
                "sampler",
                {"at the student's histories": "student", "unbiased there": "unbiased"},
            ),
        ),
    )


# In fractions: a third distribution samples.


def _samplers() -> Iterator[tuple[Distribution, Distribution, Distribution]]:
    """Student, teacher and sampler, some of whose ratios leave every interval, and one where none does."""
    for p, q in rational_distributions():
        yield p, q, p[::-1]
        yield p, q, p
        yield p, q, distribution(*(x + y for x, y in zip(p, q, strict=True)))
        yield p, q, distribution(*(20 * x + y for x, y in zip(p, q, strict=True)))


def _ratios(p: Distribution, mu: Distribution) -> list[Fraction]:
    return [a / m for a, m in zip(p, mu, strict=True)]


def _check_factor(claim: Replaced, *where: object) -> Cases:
    """The factor under the sampler against what it leaves under the student, from the scores."""
    for name in RATIONAL:
        for p, q, mu in _samplers():
            w, rho = weights(name, p, q), _ratios(p, mu)
            found = mean_gradient(p, [claim.factor(r) * x for r, x in zip(rho, w, strict=True)], mu)
            left = mean_gradient(p, [claim.left(r) * x for r, x in zip(rho, w, strict=True)])
            yield same(found, left, name, p, q, mu, *where)


def _check_factors(claims: tuple[Replaced, ...]) -> Cases:
    for claim, factor in zip(claims, ("with the ratio", "without"), strict=False):
        yield from _check_factor(claim, factor)


def _some_weights(p: Distribution, q: Distribution, left: list[Fraction]) -> Iterator[list[Fraction]]:
    """Weights of the catalogue, the same where the ratio stays inside only, and those whose dropped part is level."""
    for name in RATIONAL:
        w = weights(name, p, q)
        yield w
        yield [x * (y == 1) for x, y in zip(w, left, strict=True)]
    if 1 not in left:
        yield [1 / (1 - y) for y in left]


# Factors in place of the ratio, by name.
_REPLACED = {
    "truncated": TRUNCATED,
    "masked": MASKED,
    "halved": Replaced(lambda rho: rho / 2, lambda rho: Fraction(1, 2)),
}


def _check_no_bias(predicted: Callable[[list[Fraction], list[Fraction], list[Fraction]], bool]) -> Cases:
    """Whether the loss is unbiased, as it comes out in fractions, against the criterion."""
    for factor, replaced in _REPLACED.items():
        for p, q, mu in _samplers():
            rho = _ratios(p, mu)
            left = [replaced.left(r) for r in rho]
            for number, w in enumerate(_some_weights(p, q, left)):
                found = mean_gradient(p, [replaced.factor(r) * x for r, x in zip(rho, w, strict=True)], mu)
                yield holds(
                    (found == mean_gradient(p, w)) == predicted(rho, w, left), factor, p, q, mu, f"weight {number}"
                )


def _check_every_weight(predicted: Callable[[list[Fraction]], bool]) -> Cases:
    """Unbiased for the weights that are one on a single token, and so for all, by linearity."""
    for factor, replaced in _REPLACED.items():
        for p, _, mu in _samplers():
            rho = _ratios(p, mu)
            unbiased = True
            for token in range(len(p)):
                w = [Fraction(a == token) for a in range(len(p))]
                found = mean_gradient(p, [replaced.factor(r) * x for r, x in zip(rho, w, strict=True)], mu)
                unbiased &= found == mean_gradient(p, w)
            yield holds(unbiased == predicted([replaced.left(r) for r in rho]), factor, p, mu)


def _check_at_teacher(value: Callable[[Any, Any, Any], list[Any]]) -> Cases:
    r"""$-E_\mu[\min(\rho, C) w_f s]$ at $p = q$, enclosed, for the catalogue's own gauges."""
    for name in SMOOTH:
        for _, q, mu in _samplers():
            w, rho = weights_enclosed(name, q, q), _ratios(q, mu)
            factors = [TRUNCATED.factor(r) for r in rho]
            cut = [iv.mpf(r.numerator) / r.denominator * x for r, x in zip(factors, w, strict=True)]
            found = mean_gradient(intervals(q), cut, intervals(mu))
            claimed = value(w[0], intervals(q), intervals([TRUNCATED.left(r) for r in rho]))
            for k, (left, right) in enumerate(zip(found, claimed, strict=True)):
                yield overlap(left, right, name, q, mu, f"logit {k}")


def _check_split(predicted: dict[str, Callable[[int], bool]]) -> Cases:
    """Whether any sampler on a grid leaves different factors at two equally likely tokens, in fractions."""
    left: dict[str, Factor] = {
        "truncated": TRUNCATED.left,
        "masked": lambda rho: Fraction(Fraction(2, 3) <= rho <= 2),
    }
    for n in (2, 3, 4):
        for factor, claim in predicted.items():
            splits = any(len({left[factor](1 / (n * m)) for m in mu}) > 1 for mu in _grid(n, 24))
            yield holds(splits == claim(n), f"{n} tokens", factor)


def _grid(n: int, parts: int) -> Iterator[Distribution]:
    """Every distribution of n tokens in whole parts, each token with one part or more."""
    for cuts in itertools.combinations(range(1, parts), n - 1):
        yield distribution(*(Fraction(b - a) for a, b in itertools.pairwise((0, *cuts, parts))))


def _check_second_moment(left: Factor) -> Cases:
    r"""$E_\mu[\min(\rho, C)^2 w^2 |s|^2]$ with the scores' own norms."""
    for name in RATIONAL:
        for p, q, mu in _samplers():
            w, norms = weights(name, p, q), score_norms(p)
            found, claimed = Fraction(0), Fraction(0)
            for a, m, x, norm in zip(p, mu, w, norms, strict=True):
                found += m * TRUNCATED.factor(a / m) ** 2 * x * x * norm
                claimed += a * left(a / m) * x * x * norm
            yield same(found, claimed, name, p, q, mu)


# As black boxes: a stale student, a perturbed engine, logits in bfloat16.


@functools.cache
def _token_gradient(name: str, triple: Triple) -> list[Tensor]:
    """Expected gradient of truncation token by token, as a black box."""
    divergence = divergences.divergence(name)

    def loss(r: Rollouts) -> Tensor:
        weight = divergence.weight(r.log_u).detach()
        return r.token_sum(-log_ratios(r).exp().clamp(max=float(CAP)) * weight * r.student_logprobs)

    return expected_gradient(loss, *triple.pair, behavior=triple.behavior)


def _check_black_box(histories: str) -> Cases:
    """Truncation token by token as a sampled loss, against rows that are weighted by the sampler's reach."""
    for name in SMOOTH:
        for triple in near_and_far():
            rows = _truncated_rows(triple, divergences.divergence(name), histories)
            yield close(_token_gradient(name, triple), rows, triple, name)


def _truncated_rows(triple: Triple, divergence: Divergence, histories: str) -> list[Tensor]:
    r"""$\sum_h \nu(h)\,E_p[F w s \mid h]$, by autograd of the objective that has the weights frozen."""
    nu = triple.student if histories == "student" else triple.behavior
    visits = Tree.build(nu, nu)

    def value(student: TabularPolicy) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n, (z, other, mu) in enumerate(
            zip(student.logits, triple.teacher.logits, triple.behavior.logits, strict=True)
        ):
            log_p, log_q, log_mu = (each.log_softmax(-1) for each in (z, other, mu))
            frozen = log_p.detach()
            factor = (float(CAP) * (log_mu - frozen).exp()).clamp(max=1.0)
            kept = torch.ones_like(factor) if histories == "unbiased" else factor
            per_row = -(log_p.exp() * (kept * divergence.weight(log_q - frozen))).sum(-1)
            total = total + (visits.reach(n) * per_row).sum()
        return total

    return autograd_gradient(triple.pair, value)


# The derivation.


def _atom_by_atom() -> bool:
    """Either side of the bound: a ratio above or below it by a positive gap."""
    mu, cap, gap = sympy.symbols("mu C gap", positive=True)
    above, below = mu * (cap + gap), mu * cap / (1 + gap)  # p, with p / mu above and below the cap
    beyond = sympy.simplify(mu * cap - above * (cap * mu / above))
    within = sympy.simplify(mu * (below / mu) - below)
    ordered = (above / mu - cap).is_positive and sympy.simplify(cap - below / mu).is_positive
    return beyond == 0 and within == 0 and bool(ordered)


def _only_constants_vanish() -> bool:
    """A softmax row of three tokens: the gradient vanishes on a line, that of equal advantages."""
    p, a, _ = three_atoms()
    row = [x * (y - sum(b * c for b, c in zip(p, a, strict=True))) for x, y in zip(p, a, strict=True)]
    matrix = sympy.Matrix([[sympy.diff(entry, x) for x in a] for entry in row])
    level = sympy.simplify(matrix * sympy.ones(3, 1)) == sympy.zeros(3, 1)
    # Rank two: the product of the first two probabilities times the third is a minor, and no probability is zero.
    minor = sympy.factor(matrix[:2, :2].det())
    return level and sympy.simplify(minor - p[0] * p[1] * p[2]) == 0


def _weight_at_one() -> bool:
    u = sympy.Symbol("u", positive=True)
    f = sympy.Function("f")
    slope = sympy.Symbol("slope")
    w = u * sympy.diff(f(u), u) - f(u)
    at_one = w.subs(sympy.diff(f(u), u), slope).subs(u, 1).subs(f(1), 0)
    return sympy.simplify(at_one - slope) == 0
