"""Policies that depend on a state alone, so that any horizon is exact: automata, n-grams and Markov chains."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import BudgetExceededError, InvalidArgumentError, check_integer
from opdtheory.exact.policies import Policy, check_eos, check_logits, check_scale, check_sizes, prefixes

__all__ = ["FiniteStatePolicy", "MarkovPolicy"]

# Logits of one row per state: 256 MB.
_TABLE_BUDGET = 2**25


class FiniteStatePolicy(Policy):
    r"""A policy with one row per state, $p(y_n \mid h_n) = \mathrm{softmax}(z_{x_n})$, $x_{n+1} = \delta(x_n, y_n)$.

    The exact objectives of two such policies are sums over pairs of their states, at any horizon; the two need not
    have the same states. `exact_value`, `exact_gradient` and `rollout_moments` make use of that.

    Args:
        table: logits by state, `(S, V)`, float64; `-inf` marks a token of zero probability.
        successors: the state that follows each state and token, `(S, V)`, int64.
        horizon: length cap `T`.
        eos: the token that ends a sequence, or None.
        start: the state before the first token.

    Raises:
        InvalidArgumentError: a wrong shape or dtype, a row without a finite entry, or a state that does not exist.

    Example:
        >>> policy = FiniteStatePolicy.ngram(vocab_size=3, horizon=10_000, order=2, seed=0)
        >>> policy
        FiniteStatePolicy(vocab_size=3, horizon=10000, eos=None, states=13)
    """

    def __init__(
        self,
        table: Float[Tensor, "S V"],
        successors: Int64[Tensor, "S V"],
        horizon: int,
        eos: int | None = None,
        start: int = 0,
    ) -> None:
        """See the class."""
        if not isinstance(table, Tensor) or table.ndim != 2:
            got = tuple(table.shape) if isinstance(table, Tensor) else type(table).__name__
            raise InvalidArgumentError("table", f"must be logits of shape (states, vocabulary), got {got}")
        states, vocab_size = table.shape
        check_sizes(vocab_size, horizon)
        check_logits("table", table, (states, vocab_size))
        check_eos(eos, vocab_size)
        _check_successors(successors, states, vocab_size)
        check_integer("start", start, 0, states - 1)
        self.table = table
        self.successors = successors
        self.vocab_size = vocab_size
        self.horizon = horizon
        self.eos = eos
        self.start = start

    @classmethod
    def random(
        cls, vocab_size: int, horizon: int, states: int, eos: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> FiniteStatePolicy:
        """A random automaton with independent Gaussian logits of standard deviation `scale`.

        Raises:
            InvalidArgumentError: a size is below one, or `scale` is negative or not finite.
        """
        check_sizes(vocab_size, horizon)
        check_scale("scale", scale)
        check_integer("states", states)
        generator = torch.Generator().manual_seed(seed)
        successors = torch.randint(states, (states, vocab_size), generator=generator)
        table = scale * torch.randn(states, vocab_size, generator=generator, dtype=torch.float64)
        return cls(table, successors, horizon, eos=eos)

    @classmethod
    def ngram(
        cls, vocab_size: int, horizon: int, order: int, eos: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> FiniteStatePolicy:
        """One row of independent Gaussian logits for each history of the last `order` tokens or fewer.

        Raises:
            InvalidArgumentError: a size is below one, or `scale` is negative or not finite.
            BudgetExceededError: more states than fit.
        """
        check_sizes(vocab_size, horizon)
        check_scale("scale", scale)
        check_integer("order", order, 0)
        sizes = [vocab_size**n for n in range(order + 1)]
        if sum(sizes) * vocab_size > _TABLE_BUDGET:
            what = f"the table of the last {order} of {vocab_size} tokens"
            raise BudgetExceededError(what, sum(sizes) * vocab_size, _TABLE_BUDGET, "lower the order or the vocabulary")
        # A history of n tokens is the state first[n] + its base-V number.
        first = [sum(sizes[:n]) for n in range(order + 1)]
        successors = []
        for n, size in enumerate(sizes):
            longer = torch.arange(size).unsqueeze(-1) * vocab_size + torch.arange(vocab_size)
            kept = min(n + 1, order)
            successors.append(first[kept] + longer % sizes[kept])
        generator = torch.Generator().manual_seed(seed)
        table = scale * torch.randn(sum(sizes), vocab_size, generator=generator, dtype=torch.float64)
        return cls(table, torch.cat(successors), horizon, eos=eos)

    @property
    def logits(self) -> list[Tensor]:
        """`[table]`."""
        return self.parameters()

    @property
    def state_logits(self) -> Float[Tensor, "S V"]:
        """Next-token logits of every state, differentiable in `parameters()`."""
        return self.table

    def parameters(self) -> list[Tensor]:
        """`[table]`."""
        return [self.table]

    def rows(self, level: int, start: int, stop: int) -> Float[Tensor, "_ V"]:
        """The rows of the states that the prefixes reach."""
        tokens = prefixes(self.vocab_size, level, start, stop)
        states = torch.full((len(tokens),), self.start)
        for n in range(level):
            states = self.successors[states, tokens[:, n]]
        return self.state_logits[states]

    def pull_back(self, levels: list[Float[Tensor, "_ V"]]) -> list[Tensor]:
        """The sum over all prefixes that reach a state."""
        total = torch.zeros(self.successors.shape, dtype=torch.float64)
        states = torch.tensor([self.start])
        for level in levels:
            total.index_add_(0, states, level)
            states = self.successors[states].flatten()
        return self.by_parameter(total)

    def by_parameter(self, gradient: Float[Tensor, "S V"]) -> list[Tensor]:
        """The gradient in `parameters()`, from the gradient in `state_logits`."""
        return [gradient]

    def __repr__(self) -> str:
        name, states = type(self).__name__, len(self.successors)
        return f"{name}(vocab_size={self.vocab_size}, horizon={self.horizon}, eos={self.eos}, states={states})"


class MarkovPolicy(FiniteStatePolicy):
    r"""A chain whose row depends on the last token only: $p(y_n \mid h_n) = p(y_n \mid y_{n-1})$.

    Args:
        initial: logits of the first token, `(V,)`, float64.
        transition: logits of the next token given the last one, `(V, V)`, float64.
        horizon: length cap `T`.
        eos: the token that ends a sequence, or None.

    Raises:
        InvalidArgumentError: a wrong shape or dtype, or a row without a finite entry.
    """

    def __init__(
        self,
        initial: Float[Tensor, " V"],
        transition: Float[Tensor, "V V"],
        horizon: int,
        eos: int | None = None,
    ) -> None:
        """See the class."""
        vocab_size = transition.shape[-1]
        check_sizes(vocab_size, horizon)
        check_logits("initial", initial, (vocab_size,))
        check_logits("transition", transition, (vocab_size, vocab_size))
        check_eos(eos, vocab_size)
        self.initial = initial
        self.transition = transition
        # State 0 is before the first token, state 1 + a after the token a.
        self.successors = 1 + torch.arange(vocab_size).expand(vocab_size + 1, -1)
        self.start = 0
        self.vocab_size = vocab_size
        self.horizon = horizon
        self.eos = eos

    @classmethod
    def random(  # type: ignore[override]  # a chain has as many states as it has tokens
        cls, vocab_size: int, horizon: int, eos: int | None = None, scale: float = 1.0, seed: int = 0
    ) -> MarkovPolicy:
        """Independent Gaussian logits of standard deviation `scale`.

        Raises:
            InvalidArgumentError: a size is below one, or `scale` is negative or not finite.
        """
        check_sizes(vocab_size, horizon)
        check_scale("scale", scale)
        generator = torch.Generator().manual_seed(seed)
        rows = scale * torch.randn(vocab_size + 1, vocab_size, generator=generator, dtype=torch.float64)
        return cls(rows[0], rows[1:], horizon, eos=eos)

    @property
    def state_logits(self) -> Float[Tensor, "S V"]:
        """The row of the first token, then one row per last token."""
        return torch.cat([self.initial.unsqueeze(0), self.transition])

    def parameters(self) -> list[Tensor]:
        """`[initial, transition]`."""
        return [self.initial, self.transition]

    def by_parameter(self, gradient: Float[Tensor, "S V"]) -> list[Tensor]:
        """The first row and the others."""
        return [gradient[0], gradient[1:]]

    def __repr__(self) -> str:
        return f"MarkovPolicy(vocab_size={self.vocab_size}, horizon={self.horizon}, eos={self.eos})"


def _check_successors(successors: Tensor, states: int, vocab_size: int) -> None:
    if not isinstance(successors, Tensor) or tuple(successors.shape) != (states, vocab_size):
        got = tuple(successors.shape) if isinstance(successors, Tensor) else type(successors).__name__
        raise InvalidArgumentError("successors", f"must have shape {(states, vocab_size)}, got {got}")
    if successors.dtype != torch.int64:
        raise InvalidArgumentError("successors", f"must have dtype torch.int64, got {successors.dtype}")
    if bool(((successors < 0) | (successors >= states)).any()):
        low, high = int(successors.min()), int(successors.max())
        raise InvalidArgumentError("successors", f"must hold states in [0, {states}), got {low} to {high}")
