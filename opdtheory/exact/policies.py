"""Autoregressive policies small enough to know exactly: tables and wrapped modules."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from opdtheory.errors import BudgetExceededError, InvalidArgumentError, check_integer

__all__ = [
    "ModulePolicy",
    "Policy",
    "TabularPolicy",
    "check_eos",
    "check_logits",
    "check_scale",
    "check_sizes",
    "prefixes",
    "random_pair",
]

# Rows of logits that one policy may hold; 2**25 float64 rows of eight tokens are 2 GB.
ROW_BUDGET = 2**25

# Prefixes on which a module is evaluated at once while their activations are kept for the gradient.
PREFIXES_AT_ONCE = 2**13


class Policy(abc.ABC):
    r"""A distribution over sequences of at most `horizon` tokens, $p(y) = \prod_n p(y_n \mid h_n)$.

    Attributes:
        vocab_size: the number of tokens `V`.
        horizon: the length cap `T`.
        eos: the token that ends a sequence early, or None for sequences of exactly `T` tokens.
        environment: the positions, counted from 0, whose tokens an environment writes.
    """

    vocab_size: int
    horizon: int
    eos: int | None
    environment: tuple[int, ...] = ()

    @abc.abstractmethod
    def parameters(self) -> list[Tensor]:
        """The tensors with respect to which gradients are taken."""

    @abc.abstractmethod
    def rows(self, level: int, start: int, stop: int) -> Float[Tensor, "_ V"]:
        """Next-token logits, float64, of the prefixes `start` to `stop` of one length, read as base-`V` numbers."""

    def tables(self) -> list[Float[Tensor, "_ V"]]:
        """Next-token logits of every prefix, differentiable in `parameters()`.

        Level `n` has shape `(V**n, V)`, float64; the row is the prefix read as a base-`V` number. Rows of prefixes
        that have already ended are there too: padded positions read them.

        Raises:
            BudgetExceededError: more rows than one policy may hold.
        """
        _check_row_count(self.vocab_size, self.horizon)
        return [self.rows(n, 0, self.vocab_size**n) for n in range(self.horizon)]

    @abc.abstractmethod
    def pull_back(self, levels: list[Float[Tensor, "_ V"]]) -> list[Tensor]:
        """The gradient in `parameters()`, from the gradient in `tables()`."""

    def tabulate(self) -> TabularPolicy:
        """The same policy as a detached `TabularPolicy`."""
        tables = [table.detach().clone() for table in self.tables()]
        return TabularPolicy(tables, eos=self.eos, environment=self.environment)


class TabularPolicy(Policy):
    r"""One softmax row per history: $p(a \mid h) = \mathrm{softmax}(z_h)_a$.

    At the positions in `environment` the table is the distribution of an environment: a prompt, or a tool's result.
    These tokens are part of the history, but carry no score, no divergence and no return, and an `eos` among them
    ends nothing (T6f). Policies that are compared must have the same environment.

    Args:
        logits: float64 tensors; level `n` has shape `(V**n, V)`, and its row is the prefix read as base-`V` digits.
            `-inf` marks a token of zero probability.
        eos: the token that ends a sequence, or None.
        environment: the positions, counted from 0, whose tokens an environment writes.

    Raises:
        InvalidArgumentError: a level has a wrong shape or dtype or a row without a finite entry, or `environment`
            holds something that is not a position.

    Example:
        >>> policy = TabularPolicy.random(vocab_size=3, horizon=2, seed=0)
        >>> [tuple(level.shape) for level in policy.logits]
        [(1, 3), (3, 3)]
    """

    def __init__(
        self, logits: Sequence[Float[Tensor, "_ V"]], eos: int | None = None, environment: Iterable[int] = ()
    ) -> None:
        """See the class."""
        if not isinstance(logits, (list, tuple)) or not logits:
            kind = "an empty one" if isinstance(logits, (list, tuple)) else type(logits).__name__
            raise InvalidArgumentError("logits", f"must be a list of one tensor per position, got {kind}")
        first = logits[0]
        if not isinstance(first, Tensor) or first.ndim != 2 or first.shape[-1] == 0:
            got = tuple(first.shape) if isinstance(first, Tensor) else type(first).__name__
            raise InvalidArgumentError("logits[0]", f"must have shape (1, V), got {got}")
        vocab_size = first.shape[-1]
        for n, level in enumerate(logits):
            check_logits(f"logits[{n}]", level, (vocab_size**n, vocab_size))
        check_eos(eos, vocab_size)
        self.logits = list(logits)
        self.vocab_size = vocab_size
        self.horizon = len(logits)
        self.eos = eos
        self.environment = _positions(environment, self.horizon)

    @classmethod
    def random(
        cls,
        vocab_size: int,
        horizon: int,
        eos: int | None = None,
        scale: float = 1.0,
        seed: int = 0,
        zeros: int = 0,
        environment: Iterable[int] = (),
    ) -> TabularPolicy:
        """Independent Gaussian logits of standard deviation `scale`: 0 is uniform, 30 nearly deterministic.

        Args:
            vocab_size: the number of tokens.
            horizon: the length cap.
            eos: the token that ends a sequence, or None.
            scale: the standard deviation of the logits.
            seed: the seed of the generator; equal seeds give equal policies.
            zeros: the number of tokens, the last ones, that get zero probability everywhere.
            environment: the positions whose tokens an environment writes.

        Raises:
            InvalidArgumentError: a size is below one, `scale` is negative or not finite, `zeros` leaves no token, or
                `environment` holds something that is not a position.
            BudgetExceededError: the tables would hold too many rows.
        """
        check_sizes(vocab_size, horizon)
        _check_row_count(vocab_size, horizon)
        check_scale("scale", scale)
        check_integer("zeros", zeros, 0, vocab_size - 1)
        generator = torch.Generator().manual_seed(seed)
        logits = []
        for n in range(horizon):
            # In place, as the last level may take most of the memory.
            level = torch.randn(vocab_size**n, vocab_size, generator=generator, dtype=torch.float64).mul_(scale)
            if zeros:
                level[:, -zeros:] = -torch.inf
            logits.append(level)
        return cls(logits, eos=eos, environment=environment)

    def perturbed(self, distance: float, seed: int = 0) -> TabularPolicy:
        """The same policy with Gaussian noise of standard deviation `distance` on each logit.

        Zero probabilities stay zero, and the distribution of an environment does not change.

        Raises:
            InvalidArgumentError: `distance` is negative or not finite.
        """
        check_scale("distance", distance)
        generator = torch.Generator().manual_seed(seed)
        noise = (torch.randn(z.shape, generator=generator, dtype=z.dtype) for z in self.logits)
        noisy = [some.mul_(distance).add_(z) for some, z in zip(noise, self.logits, strict=True)]
        for n in self.environment:
            noisy[n] = self.logits[n]
        return TabularPolicy(noisy, eos=self.eos, environment=self.environment)

    def parameters(self) -> list[Tensor]:
        """The logits themselves."""
        return self.logits

    def tables(self) -> list[Float[Tensor, "_ V"]]:
        """The logits themselves."""
        return self.logits

    def rows(self, level: int, start: int, stop: int) -> Float[Tensor, "_ V"]:
        """A view of the logits."""
        return self.logits[level][start:stop]

    def pull_back(self, levels: list[Float[Tensor, "_ V"]]) -> list[Tensor]:
        """The levels themselves."""
        return levels

    def __repr__(self) -> str:
        written = f", environment={self.environment}" if self.environment else ""
        return f"TabularPolicy(vocab_size={self.vocab_size}, horizon={self.horizon}, eos={self.eos}{written})"


class ModulePolicy(Policy):
    r"""Any `nn.Module` that maps token prefixes to next-token logits.

    The module is called with int64 prefixes `(N, len(prompt) + n)` and returns `(N, V)`, or `(N, length, V)`, of which
    the last position is read. Logits are cast to float64; identities hold to 1e-12 only if the module itself computes
    in float64 (`module.double()`).

    Args:
        module: the model; its parameters that require gradients are `parameters()`.
        vocab_size: the number of tokens `V`.
        horizon: the length cap `T`.
        eos: the token that ends a sequence, or None.
        prompt: tokens before every prefix; give at least one to a module that cannot read an empty prefix.

    Raises:
        InvalidArgumentError: a size is below one, or the module returns logits of a wrong shape.
        BudgetExceededError: when tabulated, if `V**(T-1)` prefixes are too many.
    """

    def __init__(
        self,
        module: nn.Module,
        vocab_size: int,
        horizon: int,
        eos: int | None = None,
        prompt: Iterable[int] = (),
    ) -> None:
        """See the class."""
        check_sizes(vocab_size, horizon)
        check_eos(eos, vocab_size)
        self.module = module
        self.vocab_size = vocab_size
        self.horizon = horizon
        self.eos = eos
        self.prompt = tuple(prompt)

    def parameters(self) -> list[Tensor]:
        """The module's parameters that require gradients, in the module's order."""
        return [p for p in self.module.parameters() if p.requires_grad]

    def rows(self, level: int, start: int, stop: int) -> Float[Tensor, "_ V"]:
        """The module evaluated on some prefixes of one length, on its own device; the rows are on the CPU."""
        device = next((p.device for p in self.module.parameters()), torch.device("cpu"))
        tokens = prefixes(self.vocab_size, level, start, stop).to(device)
        prompt = torch.tensor(self.prompt, dtype=torch.int64, device=device).expand(tokens.shape[0], -1)
        logits = self.module(torch.cat([prompt, tokens], dim=1))
        if not isinstance(logits, Tensor):
            raise InvalidArgumentError("module", f"must return a tensor of logits, got {type(logits).__name__}")
        if logits.ndim == 3:
            logits = logits[:, -1]
        logits = logits.cpu().double()
        check_logits("module(prefixes)", logits, (tokens.shape[0], self.vocab_size))
        return logits

    def pull_back(self, levels: list[Float[Tensor, "_ V"]]) -> list[Tensor]:
        """By automatic differentiation of the module, with the activations of some prefixes at a time.

        Raises:
            InvalidArgumentError: the module has no parameter that requires a gradient.
        """
        parameters = self.parameters()
        if not parameters:
            raise InvalidArgumentError("module", "must have a parameter that requires a gradient")
        total = [torch.zeros_like(p) for p in parameters]
        for n, level in enumerate(levels):
            for start in range(0, len(level), PREFIXES_AT_ONCE):
                some = level[start : start + PREFIXES_AT_ONCE]
                with torch.inference_mode(False), torch.enable_grad():
                    rows = self.rows(n, start, start + len(some))
                    if not rows.requires_grad:
                        continue
                    # A copy, as one made in inference mode is no part of a graph.
                    found = torch.autograd.grad(
                        rows, parameters, some.clone(), allow_unused=True, materialize_grads=True
                    )
                for whole, part in zip(total, found, strict=True):
                    whole += part
        return total

    def __repr__(self) -> str:
        return (
            f"ModulePolicy({type(self.module).__name__}, vocab_size={self.vocab_size}, "
            f"horizon={self.horizon}, eos={self.eos})"
        )


def random_pair(
    vocab_size: int,
    horizon: int,
    eos: int | None = None,
    scale: float = 1.0,
    distance: float = 1.0,
    zeros: int = 0,
    seed: int = 0,
    environment: Iterable[int] = (),
) -> tuple[TabularPolicy, TabularPolicy]:
    """A random student and a teacher at a chosen distance from it.

    Args:
        vocab_size: the number of tokens.
        horizon: the length cap.
        eos: the token that ends a sequence, or None.
        scale: the sharpness of the student, as in `TabularPolicy.random`.
        distance: the standard deviation of the noise that makes the teacher; 1e-3 gives a near-equal pair.
        zeros: the number of tokens to which both give zero probability.
        seed: the seed of both generators.
        environment: the positions whose tokens an environment writes, with one distribution for both; `(0,)` is a
            prompt.

    Returns:
        `(student, teacher)`.

    Raises:
        InvalidArgumentError: as `TabularPolicy.random` and `TabularPolicy.perturbed`.
    """
    student = TabularPolicy.random(
        vocab_size, horizon, eos=eos, scale=scale, seed=2 * seed, zeros=zeros, environment=environment
    )
    return student, student.perturbed(distance, seed=2 * seed + 1)


def prefixes(vocab_size: int, length: int, start: int = 0, stop: int | None = None) -> Int64[Tensor, "prefixes length"]:
    """Prefixes of one length, all by default, in the order of the rows: base-`V` digits, most significant first."""
    index = torch.arange(start, vocab_size**length if stop is None else stop)
    powers = vocab_size ** torch.arange(length - 1, -1, -1)
    return (index.unsqueeze(1) // powers) % vocab_size


def check_logits(name: str, logits: Tensor, shape: tuple[int, ...]) -> None:
    """Raise unless logits have the shape, float64 on the CPU, and a finite entry in every row."""
    if not isinstance(logits, Tensor) or tuple(logits.shape) != shape:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidArgumentError(name, f"must have shape {shape}, got {got}")
    if logits.dtype != torch.float64:
        raise InvalidArgumentError(name, f"must have dtype torch.float64, got {logits.dtype}; call .double()")
    if logits.device.type != "cpu":
        raise InvalidArgumentError(name, f"must be on the CPU, got {logits.device}; call .cpu()")
    if not torch.isfinite(logits.detach().amax(-1)).all():
        raise InvalidArgumentError(name, "must be finite or -inf, with a finite entry in every row")


def check_sizes(vocab_size: int, horizon: int) -> None:
    """Raise unless both sizes are integers of at least one."""
    check_integer("vocab_size", vocab_size)
    check_integer("horizon", horizon)


def _check_row_count(vocab_size: int, horizon: int) -> None:
    rows = vocab_size ** (horizon - 1)
    if rows > ROW_BUDGET:
        raise BudgetExceededError(
            f"tabulating V={vocab_size}, T={horizon} row by row",
            rows,
            ROW_BUDGET,
            "lower the horizon or the vocabulary",
        )


def check_scale(name: str, value: float) -> None:
    """Raise unless a standard deviation is a finite number of at least 0."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not (number and math.isfinite(value) and value >= 0):
        raise InvalidArgumentError(name, f"must be a finite number of at least 0, got {value!r}")


def _positions(environment: Iterable[int], horizon: int) -> tuple[int, ...]:
    """The positions in ascending order, each once."""
    if isinstance(environment, str) or not isinstance(environment, Iterable):
        raise InvalidArgumentError("environment", f"must be a sequence of positions, got {environment!r}")
    given = tuple(environment)
    for n in given:
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n < horizon:
            raise InvalidArgumentError("environment", f"must hold positions in [0, {horizon}), got {n!r}")
    return tuple(sorted(set(given)))


def check_eos(eos: int | None, vocab_size: int) -> None:
    """Raise unless an end-of-sequence token is a token or None."""
    if eos is not None:
        check_integer("eos", eos, 0, vocab_size - 1)
