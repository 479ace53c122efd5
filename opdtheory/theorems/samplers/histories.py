"""T15: a token's own ratio without its prefix's: the token-local objective at the sampler's histories."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

import sympy
import torch
from torch import Tensor

from opdtheory import divergences
from opdtheory.estimators import estimator
from opdtheory.exact import TabularPolicy, expected_gradient, local_gradient
from opdtheory.theorems.instances.cases import Distribution, autograd_gradient
from opdtheory.theorems.instances.one_sample import SMOOTH
from opdtheory.theorems.instances.trees import (
    Dual,
    History,
    Linear,
    RationalTree,
    Row,
    rational_tree,
    reach,
    total,
    trees,
)
from opdtheory.theorems.samplers.behaviors import Triple, behaviors
from opdtheory.theorems.theorem import Cases, Identity, Step, Theorem, close, holds

__all__ = ["theorems"]

Policy = Mapping[History, Distribution]
# Whose prefixes an objective is taken at: a policy from the tree and the sampler.
Visits = Callable[[RationalTree, Policy], Policy]


def theorems() -> list[Theorem]:
    """T15."""
    return [
        Theorem(
            number="T15",
            name="whose histories",
            meaning=(
                r"A loss on rollouts of another policy $\mu$ that gives each token its own importance ratio, without"
                " the ratio of its prefix, follows the exact gradient of an objective: the divergence of the"
                r" next-token distributions at the histories of $\mu$. This is another objective than the one at the"
                r" student's histories, and not a biased form of it. Both have the teacher as their minimiser if $\mu$"
                " visits every history that the student visits."
            ),
            statement=(
                r"-E_\mu[\textstyle\sum_n \rho_n w_n s_n] = \nabla \sum_n E_{h_n\sim\mathrm{sg}(\mu)}"
                r" D_f(q(\cdot|h_n)\,\|\,p(\cdot|h_n));\quad \rho_n = p(y_n|h_n)/\mu(y_n|h_n);\quad \text{with }"
                r" \textstyle\prod_{m\le n}\rho_m \text{ in place of } \rho_n:\ \text{ the student's histories, }"
                r" h_n\sim\mathrm{sg}(p)"
            ),
            hypotheses=(
                r"$\mu(a|h) > 0$ where $p(a|h)$ is; $\mathrm{sg}$ says that the distribution of the histories is not"
                " differentiated",
                r"for the same minimiser, $\mu$ also visits every history that the student visits, and $D_f$ vanishes"
                " only where the two distributions agree",
            ),
            source="derived here",
            advice=(
                "A loss with the token's ratio alone is exact for the sampler's histories: audit it with"
                " `histories='sampler'`. That is another objective, not a biased form of the student's; it is"
                " minimised by the teacher at every history that the sampler visits, and says nothing of the others."
            ),
            derivation=(
                Step(
                    r"E_\mu[\rho_n w_n s_n \mid h_n] = E_p[w_n s_n \mid h_n] = -\nabla D_f(q\|p \mid h_n)",
                    "given the history, a token is one step to which T1 applies, and its ratio turns the expectation"
                    r" under $\mu$ into one under $p$. Sympy confirms it for three tokens and any $f$",
                    _given_the_history,
                ),
                Step(
                    r"E_\mu\big[\textstyle\prod_{m<n}\rho_m\, g(h_n)\big] = E_p[g(h_n)]",
                    "by the tower property: the product of the ratios of the tokens before is the ratio of the"
                    " prefix's probabilities, whatever the function $g$ of the history. Sympy confirms it for a"
                    " prefix of two tokens",
                    _prefixes_change_hands,
                ),
                Step(
                    r"\nabla\textstyle\sum_h \mu(h) D_f(h) = 0 \text{ at } p = q;\quad \textstyle\sum_h \mu(h) D_f(h)"
                    r" = 0 \iff p(\cdot|h) = q(\cdot|h) \text{ wherever } \mu(h) > 0",
                    "a sum of terms that are not negative, with positive factors, is zero exactly if each term is. So"
                    r" where $\mu$ visits all that the student visits, both objectives have the teacher as their only"
                    " minimiser",
                    _zero_iff_each,
                    in_words=True,
                ),
            ),
            identities=(
                Identity(
                    "one token's ratio or the prefix's",
                    r"-E_\mu[\textstyle\sum_n R_n w_n s_n] = \sum_h \nu(h)\,\nabla D_f(h):\ "
                    r"R_n = \rho_n,\ \nu = \mu;\quad R_n = \prod_{m\le n}\rho_m,\ \nu = p",
                    _check_ratios,
                    {"token": lambda tree, mu: mu, "prefix": lambda tree, mu: tree.student},
                    {
                        "the token's ratio serves the student's histories": {"token": lambda tree, mu: tree.student},
                        "the prefix's keeps the sampler's": {"prefix": lambda tree, mu: mu},
                        "no ratio is needed": {"none": lambda tree, mu: mu},
                        "the teacher's histories": {"token": lambda tree, mu: tree.teacher},
                    },
                    "exact",
                ),
                Identity(
                    "the whole vocabulary needs no ratio",
                    r"E_\mu[\textstyle\sum_n \nabla D_f(h_n)] = \sum_h \mu(h)\,\nabla D_f(h)",
                    _check_vocabulary,
                    "sampler",
                    {"the student's histories": "student", "the teacher's": "teacher"},
                ),
                Identity(
                    "black boxes and the oracle",
                    r"-E_\mu[\textstyle\sum_n \rho_n w_n s_n] = \sum_h \mu(h)\,\nabla D_f(h) \text{ as the exact"
                    " oracle has it}",
                    _check_oracle,
                    "sampler",
                    {"the student's histories": "student", "the teacher's": "teacher"},
                ),
                Identity(
                    "another objective",
                    r"-E_\mu[\textstyle\sum_n \rho_n w_n s_n] = \nabla\sum_h \mu(h) D_f(h),\ \mu \text{ frozen}",
                    _check_objective,
                    lambda student, behavior: behavior,
                    {
                        "at the student's histories, frozen": lambda student, behavior: student,
                        "at the student's histories, differentiated": lambda student, behavior: None,
                    },
                ),
                Identity(
                    "where the minimiser is the teacher",
                    r"p \ne q \text{ after } g \text{ only}:\ \nabla\textstyle\sum_h \nu(h) D_f(h) = 0 \iff \nu(g) = 0",
                    _check_unseen,
                    lambda chance: chance == 0,
                    {"never": lambda chance: False, "whenever it is rare": lambda chance: chance < Fraction(1, 2)},
                    "exact",
                ),
            ),
        )
    ]


# In fractions, for any generator: a second policy of the same shape samples.


def _sampler(tree: RationalTree) -> Policy:
    """Another student's rows."""
    other = rational_tree(tree.vocab_size, tree.horizon, tree.eos, seed=90 + len(tree.sequences))
    return other.student


_RATIOS: dict[str, Callable[[list[Fraction]], Fraction]] = {
    "none": lambda ratios: Fraction(1),
    "token": lambda ratios: ratios[-1],
    "prefix": lambda ratios: functools.reduce(lambda a, b: a * b, ratios, Fraction(1)),
}


def _sampled(tree: RationalTree, mu: Policy, ratio: str) -> list[Linear]:
    r"""$-E_\mu[\sum_n R_n w_n s_n]$ in every logit, summed over the sampler's sequences."""
    rows = tree.rows(None)
    found = {row: Dual(Fraction(0)) for row in tree.logits}
    for y, _, ratios in tree.walk(rows):
        chance, factors = reach(mu, y), []
        for n, taken in enumerate(y):
            history = y[:n]
            factors.append(tree.student[history][taken] / mu[history][taken])
            pushed = ratios[n].weight().scaled(chance * _RATIOS[ratio](factors))
            for a, p in enumerate(rows[history]):
                row = Row(history, a)
                found[row] = found[row] + (Dual(Fraction(a == taken)) - p) * pushed.scaled(Fraction(-1))
    return [entry.value for entry in found.values()]


@functools.cache
def _row_gradient(tree: RationalTree, row: Row) -> Linear:
    r"""The derivative of $D_f(q(\cdot|h)\|p(\cdot|h))$ in one of the row's logits, from its definition."""
    student, teacher = tree.rows(row)[row.history], tree.teacher[row.history]
    slope: Linear = total(p * p.under(q).f() for p, q in zip(student, teacher, strict=True)).slope
    return slope


def _at(tree: RationalTree, visits: Policy) -> list[Any]:
    r"""$\sum_h \nu(h) \nabla D_f(h)$ in every logit."""
    return [reach(visits, row.history) * _row_gradient(tree, row) for row in tree.logits]


def _check_ratios(claim: dict[str, Visits]) -> Cases:
    """The sampled weights of every sequence against the rows' own divergences, for any generator."""
    for tree in trees():
        mu = _sampler(tree)
        for ratio, visits in claim.items():
            found, claimed = _sampled(tree, mu, ratio), _at(tree, visits(tree, mu))
            for row, left, right in zip(tree.logits, found, claimed, strict=True):
                yield holds(left - right == Fraction(0), tree, ratio, row)


def _check_unseen(unnoticed: Callable[[Fraction], bool]) -> Cases:
    """A student that differs from the teacher after one history only, and samplers that visit it or do not."""
    tree = rational_tree(2, 2, seed=1)
    for seed in range(3):
        for seen in (Fraction(0), Fraction(1, 3), Fraction(1)):
            mu = dict(rational_tree(2, 2, seed=20 + seed).student)
            mu[()] = (1 - seen, seen)
            for history in ((0,), (1,)):
                student = dict(tree.teacher)
                student[history] = tree.student[history]
                lone = RationalTree(student, tree.teacher, {}, tree.sequences, tree.horizon, tree.eos)
                rests = all(entry == Fraction(0) for entry in _at(lone, mu))
                yield holds(rests == unnoticed(reach(mu, history)), f"sampler {seed}", f"seen {seen}", Row(history, 0))


# In float64, as black boxes.


def _visiting(triple: Triple, whose: str) -> TabularPolicy:
    return {"sampler": triple.behavior, "student": triple.student, "teacher": triple.teacher}[whose]


def _several_steps() -> list[Triple]:
    """The behaviors on rollouts of more than one token, and one far from the student."""
    found = [triple for triple in behaviors() if triple.student.horizon > 1]
    return [*found, found[0]._replace(behavior=found[0].student.perturbed(1.0, seed=8), name="another policy")]


@functools.cache
def _on_vocabulary(name: str, triple: Triple) -> list[Tensor]:
    return expected_gradient(estimator("full_vocab", name), *triple.pair, behavior=triple.behavior)


def _check_vocabulary(whose: str) -> Cases:
    """The whole-vocabulary loss on the sampler's rollouts, such as data that were written beforehand."""
    for name in SMOOTH:
        for triple in _several_steps():
            exact = local_gradient(*triple.pair, name, histories=_visiting(triple, whose))
            yield close(_on_vocabulary(name, triple), exact, triple, name)


def _check_oracle(whose: str) -> Cases:
    """The library's token ratio against the oracle's local gradient."""
    for name in SMOOTH:
        for triple in _several_steps():
            exact = local_gradient(*triple.pair, name, histories=_visiting(triple, whose))
            yield close(triple.gradient("opd_plus", name, "token"), exact, triple, name)


def _check_objective(visiting: Callable[[TabularPolicy, TabularPolicy], TabularPolicy | None]) -> Cases:
    """The token's ratio against the slope of a value, differentiated by autograd; None: visits are differentiated."""

    def value(student: TabularPolicy, triple: Triple, name: str) -> Tensor:
        frozen = visiting(triple.student, triple.behavior)
        policy = student if frozen is None else frozen
        divergence = divergences.divergence(name)
        result, visits = torch.zeros((), dtype=torch.float64), torch.ones(1, dtype=torch.float64)
        for z, other, at in zip(student.logits, triple.teacher.logits, policy.logits, strict=True):
            log_p, log_q = z.log_softmax(-1), other.log_softmax(-1)
            rows = (log_p.exp() * divergence.generator(log_q - log_p)).sum(-1)
            result = result + (visits * rows).sum()
            chances = at.softmax(-1)
            if student.eos is not None:  # a sequence that has ended is visited no more
                chances = chances * (torch.arange(chances.shape[-1]) != student.eos)
            visits = (visits.unsqueeze(-1) * chances).flatten()
        return result

    for name in ("reverse_kl", "chi2"):
        for triple in _several_steps():
            slope = autograd_gradient(triple.pair, value, triple, name)
            yield close(triple.gradient("opd_plus", name, "token"), slope, triple, name)


# The derivation.


def _given_the_history() -> bool:
    """One row of three tokens: the ratio changes the law, and the weight is the row's slope."""
    theta = sympy.Symbol("theta")
    f, u = sympy.Function("f"), sympy.Symbol("u", positive=True)
    first, second = (sympy.Function(name, positive=True)(theta) for name in ("a", "b"))
    p, q, mu = [first, second, 1 - first - second], sympy.symbols("q0:3"), sympy.symbols("mu0:3", positive=True)
    weight = u * sympy.diff(f(u), u) - f(u)

    def at(expression: sympy.Expr, ratio: sympy.Expr) -> sympy.Expr:
        return expression.subs(u, ratio).doit()

    sampled = sum(
        m * (x / m) * at(weight, y / x) * sympy.diff(sympy.log(x), theta) for x, y, m in zip(p, q, mu, strict=True)
    )
    slope = sympy.diff(sum(x * f(y / x) for x, y in zip(p, q, strict=True)), theta)
    return sympy.simplify((sampled + slope).doit()) == 0


def _prefixes_change_hands() -> bool:
    """Two tokens before: the sum over prefixes under either law, with any function of the prefix."""
    p, mu = sympy.symbols("p0:2 r0:2", positive=True), sympy.symbols("m0:2 n0:2", positive=True)
    g = sympy.symbols("g0:4")
    gap = sum(
        mu[a] * mu[2 + b] * (p[a] / mu[a]) * (p[2 + b] / mu[2 + b]) * g[2 * a + b] - p[a] * p[2 + b] * g[2 * a + b]
        for a in range(2)
        for b in range(2)
    )
    return sympy.simplify(gap) == 0


def _zero_iff_each() -> bool:
    r"""$\chi^2$ of two rows: a sum of squares over positive numbers, zero only where both rows are the teacher's."""
    visits = sympy.symbols("m0:2", positive=True)
    p, gaps = sympy.symbols("p0:2", positive=True), sympy.symbols("d0:2", real=True)
    objective = sum(m * (d**2 / x + d**2 / (1 - x)) for m, x, d in zip(visits, p, gaps, strict=True))
    apart = [m * d**2 / (x * (1 - x)) for m, x, d in zip(visits, p, gaps, strict=True)]
    at_teacher = objective.subs(dict.fromkeys(gaps, 0))
    slopes = [sympy.diff(objective, d).subs(dict.fromkeys(gaps, 0)) for d in gaps]
    return sympy.simplify(objective - sum(apart)) == 0 and at_teacher == 0 and slopes == [0, 0]
