"""Two- and three-token policies with rational probabilities, differentiated exactly while the generator stays free.

Ratios and probabilities are fractions, so a value or a gradient is a linear combination of $f(u)$, $f'(u)$ and
$f''(u)$ at rational $u$. Two such combinations with equal coefficients are equal for every generator with $f(1) = 0$.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import sympy

from opdtheory import divergences
from opdtheory.divergences import Divergence
from opdtheory.theorems.instances.cases import RATIONAL, Distribution, distribution, enclose, interval, values_of

__all__ = [
    "Advantage",
    "Chooses",
    "Dual",
    "History",
    "Linear",
    "RationalTree",
    "Row",
    "always",
    "by_the_student",
    "direction_of",
    "field_of",
    "gradient_of",
    "product",
    "rational_tree",
    "reach",
    "total",
    "trees",
]

History = tuple[int, ...]
Advantage = Callable[["RationalTree", History, "list[Dual]", int], "Dual"]
Chooses = Callable[["RationalTree", History], bool]


class Row(NamedTuple):
    """A parameter of a tree: the logit of one token after one history."""

    history: History
    token: int

    @property
    def label(self) -> str:
        """The logit in words: `logit 1 after (0, 1)`."""
        return f"logit {self.token} after {self.history}"


class Linear:
    r"""A linear combination of $f^{(k)}(u)$ with rational coefficients, $f$ undefined but for $f(1) = 0$."""

    __slots__ = ("terms",)

    def __init__(self, terms: Mapping[tuple[int, Fraction], Fraction] | None = None) -> None:
        kept = {} if terms is None else terms
        self.terms = {key: c for key, c in kept.items() if c != 0 and key != (0, Fraction(1))}

    def __add__(self, other: Linear | Fraction) -> Linear:
        if isinstance(other, Fraction):
            if other != 0:
                raise TypeError("cannot add a nonzero constant to a combination of values of f")
            return self
        terms = dict(self.terms)
        for key, c in other.terms.items():
            terms[key] = terms.get(key, Fraction(0)) + c
        return Linear(terms)

    __radd__ = __add__

    def __mul__(self, factor: Fraction) -> Linear:
        return Linear({key: c * factor for key, c in self.terms.items()})

    __rmul__ = __mul__

    def __neg__(self) -> Linear:
        return self * Fraction(-1)

    def __sub__(self, other: Linear) -> Linear:
        return self + (-other)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Fraction):
            return other == 0 and not self.terms
        return isinstance(other, Linear) and self.terms == other.terms

    def __hash__(self) -> int:
        return hash(frozenset(self.terms.items())) if self.terms else hash(Fraction(0))

    def exactly(self, divergence: Divergence) -> Fraction:
        """Its value for a generator without logarithms or roots."""
        return sum((c * _derivative(divergence, *key) for key, c in self.terms.items()), Fraction(0))

    def enclosed(self, divergence: Divergence) -> Any:
        """An interval that encloses its value for a generator."""
        return sum((interval(c) * _derivative_enclosed(divergence, *key) for key, c in self.terms.items()), interval(0))

    def vanishes(self, divergence: Divergence) -> bool:
        """Whether it is zero: decided for a rational generator, not excluded by a 60-digit interval otherwise."""
        if divergence.name in RATIONAL:
            return self.exactly(divergence) == 0
        enclosed = self.enclosed(divergence)
        return bool(enclosed.a <= 0 <= enclosed.b)


@functools.cache
def _expression(divergence: Divergence, order: int) -> Any:
    return sympy.diff(divergence.expr, divergences.symbol(), order)


@functools.cache
def _derivative(divergence: Divergence, order: int, at: Fraction) -> Fraction:
    return values_of(_expression(divergence, order), {divergences.symbol(): at})


@functools.cache
def _derivative_enclosed(divergence: Divergence, order: int, at: Fraction) -> Any:
    if divergence.name in RATIONAL:
        return interval(_derivative(divergence, order, at))
    return enclose(_expression(divergence, order), {divergences.symbol(): interval(at)})


@dataclass(frozen=True)
class Dual:
    """A number and its derivative along one direction (default: 0, a constant); fractions or `Linear`."""

    value: Any
    slope: Any = Fraction(0)

    def __add__(self, other: Dual) -> Dual:
        return Dual(self.value + other.value, self.slope + other.slope)

    def __sub__(self, other: Dual) -> Dual:
        return Dual(self.value - other.value, self.slope - other.slope)

    def __mul__(self, other: Dual) -> Dual:
        return Dual(self.value * other.value, self.slope * other.value + self.value * other.slope)

    def scaled(self, factor: Fraction) -> Dual:
        """Times a constant."""
        return Dual(self.value * factor, self.slope * factor)

    def under(self, numerator: Fraction) -> Dual:
        """A constant over this number."""
        return Dual(numerator / self.value, -numerator * self.slope / self.value**2)

    def f(self, order: int = 0) -> Dual:
        r"""$f^{(k)}$ of this number, by the chain rule."""
        return Dual(Linear({(order, self.value): Fraction(1)}), Linear({(order + 1, self.value): Fraction(self.slope)}))

    def weight(self) -> Dual:
        r"""$w_f(u) = u f'(u) - f(u)$ of this number."""
        return self * self.f(1) - self.f()


@dataclass(frozen=True, eq=False)
class RationalTree:
    """A student and a teacher with a rational distribution after every history; trees are compared by identity.

    Attributes:
        student: the student's distributions by history, also where the environment writes.
        teacher: the teacher's distributions.
        world: the environment's distributions, at the histories where it writes.
        sequences: every complete sequence.
        horizon: the length cap.
        eos: the token that ends a sequence, or None.
    """

    student: Mapping[History, Distribution]
    teacher: Mapping[History, Distribution]
    world: Mapping[History, Distribution]
    sequences: tuple[History, ...]
    horizon: int
    eos: int | None

    @property
    def vocab_size(self) -> int:
        """The number of tokens."""
        return len(self.student[()])

    @property
    def logits(self) -> list[Row]:
        """The student's parameters: one logit for each history and token."""
        return [Row(history, a) for history, row in self.student.items() for a in range(len(row))]

    def rows(self, seed: Row | None) -> dict[History, list[Dual]]:
        """The student's softmax rows with their derivatives in one logit."""
        rows = {history: [Dual(p) for p in row] for history, row in self.student.items()}
        if seed is not None:
            row = self.student[seed.history]
            rows[seed.history] = [Dual(p, p * (Fraction(seed.token == b) - row[seed.token])) for b, p in enumerate(row)]
        return rows

    def walk(self, rows: dict[History, list[Dual]]) -> Iterator[tuple[History, Dual, list[Dual]]]:
        """Each sequence, its probability and the ratio of each token, 1 for the environment's."""
        for y in self.sequences:
            probability, ratios = Dual(Fraction(1)), []
            for n, a in enumerate(y):
                history = y[:n]
                if history in self.world:
                    probability = probability.scaled(self.world[history][a])
                    ratios.append(Dual(Fraction(1)))
                else:
                    probability = probability * rows[history][a]
                    ratios.append(rows[history][a].under(self.teacher[history][a]))
            yield y, probability, ratios

    def value(self, objective: str, gamma: Fraction = Fraction(1), seed: Row | None = None) -> Dual:
        """The objective by its definition, and its derivative in one logit."""
        rewards = []
        for _, probability, ratios in self.walk(self.rows(seed)):
            if objective == "sequence":
                reward = product(ratios).f()
            else:
                reward = total(u.f().scaled(gamma**n) for n, u in enumerate(ratios))
            rewards.append(probability * reward)
        return total(rewards)


def product(ratios: list[Dual]) -> Dual:
    """The ratio of the whole sequence."""
    return functools.reduce(lambda a, b: a * b, ratios, Dual(Fraction(1)))


def total(terms: Iterable[Dual]) -> Dual:
    """The sum."""
    return functools.reduce(lambda a, b: a + b, terms, Dual(Fraction(0)))


def reach(policy: Mapping[History, Distribution], history: History) -> Fraction:
    """The probability of a history under the student or the teacher."""
    return math.prod((policy[history[:n]][a] for n, a in enumerate(history)), start=Fraction(1))


@functools.cache
def gradient_of(tree: RationalTree, objective: str, gamma: Fraction = Fraction(1)) -> list[Linear]:
    """Derivative of the objective in every logit, from its definition."""
    return [tree.value(objective, gamma, seed).slope for seed in tree.logits]


def by_the_student(tree: RationalTree, history: History) -> bool:
    """Whether the student writes the token after a history."""
    return history not in tree.world


def always(tree: RationalTree, history: History) -> bool:
    """True of every history and sequence."""
    return True


def field_of(
    tree: RationalTree,
    advantage: Advantage,
    seed: Row | None = None,
    scored: Chooses = by_the_student,
    counted: Chooses = always,
) -> list[Dual]:
    r"""$-E_p[\sum_n A_n s_n]$ in every logit, and its derivative in one of them.

    Args:
        tree: the policies.
        advantage: $A_n$ from the tree, the sequence, its ratios and the position.
        seed: the logit to differentiate in.
        scored: whether the token after a history carries a score.
        counted: whether a sequence takes part.
    """
    rows = tree.rows(seed)
    field = {row: Dual(Fraction(0)) for row in tree.logits}
    for y, probability, ratios in tree.walk(rows):
        if not counted(tree, y):
            continue
        for n, taken in enumerate(y):
            history = y[:n]
            if not scored(tree, history):
                continue
            pushed = probability * advantage(tree, y, ratios, n)
            for a, p in enumerate(rows[history]):
                score = Dual(Fraction(a == taken)) - p
                row = Row(history, a)
                field[row] = field[row] + (score * pushed).scaled(Fraction(-1))
    return list(field.values())


def direction_of(
    tree: RationalTree, advantage: Advantage, scored: Chooses = by_the_student, counted: Chooses = always
) -> list[Any]:
    """The values of `field_of`, without a derivative."""
    return [entry.value for entry in field_of(tree, advantage, None, scored, counted)]


@functools.cache
def rational_tree(
    size: int, horizon: int, eos: int | None = None, environment: tuple[int, ...] = (), seed: int = 0
) -> RationalTree:
    """A tree with small random integer weights in every row; an environment writes at the given positions."""
    draw = random.Random(seed)

    def row() -> Distribution:
        return distribution(*(draw.randint(1, 7) for _ in range(size)))

    histories = [
        history
        for n in range(horizon)
        for history in itertools.product(range(size), repeat=n)
        if eos is None or eos not in history
    ]
    sequences = tuple(
        (*history, a) for history in histories for a in range(size) if a == eos or len(history) + 1 == horizon
    )
    student, teacher = ({history: row() for history in histories} for _ in range(2))
    world = {history: row() for history in histories if len(history) in environment}
    return RationalTree(student, teacher, world, sequences, horizon, eos)


def trees() -> tuple[RationalTree, ...]:
    """Trees of fixed and variable length, with two and three tokens."""
    return (
        rational_tree(2, 2, seed=1),
        rational_tree(3, 2, seed=2),
        rational_tree(2, 3, seed=3),
        rational_tree(2, 3, eos=1, seed=4),
        rational_tree(3, 2, eos=0, seed=5),
    )
