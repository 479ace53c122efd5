r"""The variance of one rollout's gradient at any horizon, by a recursion over the states of a pair.

With $x_n$ the state, $s_n = e_{y_n} - p(x_n)$ the score in the row of $x_n$ and $R_{n+1} = \sum_{m>n}
\gamma^{m-n-1} c(u_m)$ the cost to come, one rollout's gradient is $-G_1$ of

$$G_n = k(x_n) + (o(x_n, y_n) - \gamma R_{n+1})\, s_n + \gamma\, G_{n+1},$$

where $k$ is the part summed over tokens exactly and $o$ the part of the sampled token. Scores of positions in one state
are not orthogonal, so that $E|G_n|^2$ needs $E[G_{n+1} \mid x_{n+1}]$, and with a cost to come also $E[R_{n+1}]$,
$E[R_{n+1}^2]$ and $E[R_{n+1} G_{n+1}]$. All of these obey linear recursions from the last position up.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import BudgetExceededError, InvalidArgumentError, check_integer
from opdtheory.exact.chain import Chain
from opdtheory.exact.finite_state import FiniteStatePolicy
from opdtheory.exact.tree import check_pair
from opdtheory.objective import check_discount

__all__ = ["RolloutMoments", "rollout_moments"]

# Numbers in one table of expected gradients, by row of the pair, state and token: 256 MB.
_TABLE_BUDGET = 2**25

OfLogU = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class RolloutMoments:
    """The exact first two moments of one rollout's gradient.

    Attributes:
        mean: the expected gradient, a list like `student.parameters()`.
        variance: the trace of the covariance; for the mean over `B` independent rollouts, divide by `B`.
        second_moment: `E |g|^2`.
    """

    mean: list[Tensor]
    variance: float
    second_moment: float


def rollout_moments(
    student: FiniteStatePolicy,
    teacher: FiniteStatePolicy,
    weight: OfLogU,
    cost: OfLogU | None = None,
    gamma: float = 1.0,
    summed_tokens: int = 0,
) -> RolloutMoments:
    r"""Mean and variance of $g = -\sum_n \gamma^{n-1} A_n s_n$ under the student, at any horizon.

    $A_n = w(u_n) - \sum_{m>n} \gamma^{m-n} c(u_m)$ with the given $w$ and $c$: OPD is $w = -f$, OPD+ is $w = w_f$, and
    $c = f$ makes either a return-to-go (T6). The gradient is in the parameters that the positions share, so that the
    scores of different positions are correlated. Unlike the enumeration of `gradient_moments`, nothing grows with the
    number of sequences: time is linear in the horizon.

    Args:
        student: the policy `p`, which is trained and samples.
        teacher: the policy `q`.
        weight: the function $w$ of `log_u`, such as a divergence's `weight`.
        cost: the function $c$ of `log_u`, such as a divergence's `generator` (default: no cost to come).
        gamma: the discount, in [0, 1]; it must be 1 without a cost.
        summed_tokens: how many of the most probable tokens of each of the student's rows have their own term summed
            rather than sampled; all of them give the whole-vocabulary gradient (T7c). The cost to come stays sampled.

    Raises:
        InvalidArgumentError: policies that do not match or are not `FiniteStatePolicy`, a number out of range, or a
            weight or cost that is not finite at a token that can be sampled.
        BudgetExceededError: too many states for the table of expected gradients.

    Example:
        >>> import opdtheory as opd
        >>> student, teacher = (opd.MarkovPolicy.random(4, 1_000, seed=s) for s in (0, 1))
        >>> jsd = opd.divergence("jsd")
        >>> sampled, summed = (rollout_moments(student, teacher, jsd.weight, summed_tokens=k) for k in (0, 4))
        >>> sampled.variance > summed.variance
        True
    """
    _check(student, teacher, gamma, summed_tokens, cost)
    chain = Chain.build(student, teacher)
    states, size = student.successors.shape
    count = (chain.rows + 1) * states * size
    if count > _TABLE_BUDGET:
        what = f"expected gradients of {states} states by {size} tokens from each of {chain.rows} rows"
        raise BudgetExceededError(what, count, _TABLE_BUDGET, "lower the number of states or the vocabulary")
    with torch.no_grad():
        recursion = _Recursion(chain, states, weight, cost, gamma, summed_tokens)
        for _ in range(chain.horizon):
            recursion.step()
    mean = [-g for g in student.by_parameter(recursion.mean[0])]
    second = float(recursion.square[0])
    norm = sum(float(g.square().sum()) for g in mean)
    return RolloutMoments(mean, max(second - norm, 0.0), second)


class _Recursion:
    """The expectations from each row on; the last row is the end of the sequence, from which nothing comes.

    Attributes:
        mean: $E[G_n]$, `(S + 1, states, V)`.
        square: $E|G_n|^2$, `(S + 1,)`.
    """

    def __init__(
        self, chain: Chain, states: int, weight: OfLogU, cost: OfLogU | None, gamma: float, summed: int
    ) -> None:
        self.chain, self.gamma = chain, gamma
        self.p: Float[Tensor, "S V"] = chain.log_p.exp()
        possible = self.p > 0
        log_u = torch.where(possible, chain.log_u, 0.0)
        weights = _finite("weight", weight, log_u, possible)
        self.cost = None if cost is None else _finite("cost", cost, log_u, possible)
        kept = torch.zeros_like(possible).scatter_(-1, self.p.topk(summed).indices, True)
        self.own = torch.where(kept, 0.0, weights)
        self.summed = _centred(self.p, torch.where(kept, weights, 0.0))
        # |e_a - p|^2
        self.norms = 1.0 - 2.0 * self.p + self.p.square().sum(-1, keepdim=True)
        self.rows = torch.arange(chain.rows)
        self.onward = self._steps(self.p)
        self.priced = None if self.cost is None else self._steps(self.p * self.cost)
        self.mean = torch.zeros(chain.rows + 1, states, self.p.shape[-1], dtype=torch.float64)
        self.square = torch.zeros(chain.rows + 1, dtype=torch.float64)
        # The moments of the cost to come, and its product with the gradient.
        self.first, self.second = torch.zeros_like(self.square), torch.zeros_like(self.square)
        self.product = torch.zeros_like(self.mean)

    def step(self) -> None:
        """Go from a position to the one before it."""
        p, gamma, after = self.p, self.gamma, self.chain.successors
        first, second = self.first[after], self.second[after]
        factor = self.own - gamma * first
        sampled = _centred(p, factor)
        squared = self.own.square() - 2.0 * gamma * self.own * first + gamma**2 * second
        square = (
            self.summed.square().sum(-1) + 2.0 * (self.summed * sampled).sum(-1) + (p * squared * self.norms).sum(-1)
        )
        square += 2.0 * gamma * self._with_later()
        square += gamma**2 * (p * self.square[after]).sum(-1)
        mean = gamma * self._carried(self.onward, self.mean)
        mean[self.rows, self.chain.student_states] += self.summed + sampled
        if self.cost is not None and self.priced is not None:
            # E[(c + gamma R)(k + (o - gamma R) s)] in the row's own state, E[(c + gamma R) gamma G] in all.
            own = self.cost * self.own + gamma * first * (self.own - self.cost) - gamma**2 * second
            cost = (p * (self.cost + gamma * first)).sum(-1)
            product = gamma**2 * self._carried(self.onward, self.product)
            product += gamma * self._carried(self.priced, self.mean)
            product[self.rows, self.chain.student_states] += cost.unsqueeze(-1) * self.summed + _centred(p, own)
            later = (p * (self.cost.square() + 2.0 * gamma * self.cost * first + gamma**2 * second)).sum(-1)
            self.product[:-1], self.first[:-1], self.second[:-1] = product, cost, later
        self.mean[:-1], self.square[:-1] = mean, square

    def _with_later(self) -> Tensor:
        """The product of a position's part with all that follows in the parameters of the same state."""
        p = self.p
        total = (self.summed * self._expected_later()).sum(-1) + (p * self.own * self._along_score(self.mean)).sum(-1)
        if self.cost is not None:
            total -= self.gamma * (p * self._along_score(self.product)).sum(-1)
        return total

    def _expected_later(self) -> Tensor:
        """The part of $E[G_{n+1} | x_n]$ in the parameters of $x_n$, `(S, V)`."""
        return torch.einsum("xy,yxv->xv", self.onward, self.mean[:, self.chain.student_states])

    def _along_score(self, table: Tensor) -> Tensor:
        r"""The product of $s_n$ with what a table expects after each token, `(S, V)`."""
        p, states, after = self.p, self.chain.student_states.unsqueeze(-1), self.chain.successors
        along = torch.einsum("xv,yxv->xy", p, table[:, self.chain.student_states])
        tokens = torch.arange(p.shape[-1])
        return table[after, states, tokens] - along.gather(1, after)

    def _carried(self, steps: Tensor, table: Tensor) -> Tensor:
        return (steps @ table.flatten(1)).view(-1, *table.shape[1:])

    def _steps(self, weights: Tensor) -> Tensor:
        """The sum of the weights of the tokens that lead from each row to each, `(S, S + 1)`."""
        steps = torch.zeros(self.chain.rows, self.chain.rows + 1, dtype=torch.float64)
        return steps.scatter_add_(1, self.chain.successors, weights)


def _centred(p: Tensor, weight: Tensor) -> Tensor:
    r"""The expectation $\sum_a p_a w_a (e_a - p)$."""
    return p * (weight - (p * weight).sum(-1, keepdim=True))


def _finite(name: str, function: OfLogU, log_u: Tensor, possible: Tensor) -> Tensor:
    if not callable(function):
        raise InvalidArgumentError(name, f"must be a function of log_u, got {type(function).__name__}")
    values = function(log_u)
    if not isinstance(values, Tensor) or values.shape != log_u.shape or not values.is_floating_point():
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InvalidArgumentError(name, f"must return floating-point values of shape {tuple(log_u.shape)}, got {got}")
    values = torch.where(possible, values.double(), 0.0)
    if not bool(torch.isfinite(values).all()):
        at = float(log_u[~torch.isfinite(values)][0])
        raise InvalidArgumentError(name, f"must be finite at every token that can be sampled, is not at log u = {at}")
    return values


def _check(student: object, teacher: object, gamma: float, summed_tokens: int, cost: OfLogU | None) -> None:
    for name, policy in (("student", student), ("teacher", teacher)):
        if not isinstance(policy, FiniteStatePolicy):
            raise InvalidArgumentError(name, f"must be a FiniteStatePolicy, got {type(policy).__name__}")
    assert isinstance(student, FiniteStatePolicy) and isinstance(teacher, FiniteStatePolicy)
    check_pair(student, teacher)
    check_discount(gamma)
    if gamma != 1.0 and cost is None:
        raise InvalidArgumentError("gamma", f"must be 1 without a cost, got {gamma!r}")
    check_integer("summed_tokens", summed_tokens, 0, student.vocab_size)
