"""Helpers that bring a loss written elsewhere into the form `loss(rollouts) -> scalar`."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.choices import REDUCTIONS
from opdtheory.divergences.divergence import transforms_active
from opdtheory.errors import InvalidArgumentError, check_integer
from opdtheory.rollouts import Rollouts

__all__ = ["bind", "from_advantage", "from_hidden", "from_logits", "from_logprobs", "from_top_k"]

R = TypeVar("R")
Loss = Callable[[Rollouts], Tensor]

_ADVANTAGES = ("logprobs", "log_u")

# Singular values of the random output layer lie in [1/2, 2], so that solving with it loses less than a digit.
_LARGEST_SINGULAR_VALUE = 2.0
_REFLECTIONS = 4

# Heads up to this size are kept; of larger ones, which take megabytes, those of one call.
_KEPT = 128


class _Attributes(SimpleNamespace):
    """A stand-in for `self` that names a missing attribute."""

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the bound method reads self.{name}; pass it as bind(..., {name}=...)")


def bind(method: Callable[..., R], /, **attributes: Any) -> Callable[..., R]:
    """Call a trainer's unbound method on a plain namespace, without building the trainer.

    `bind(Trainer._loss, beta=0.5)(x)` is `Trainer._loss(self, x)` with a `self` that has only `beta`.

    Args:
        method: the function on the class, `Trainer._loss`.
        **attributes: the attributes that the method reads from `self`.

    Raises:
        InvalidArgumentError: the method is bound to an instance or a class already.
        AttributeError: when called, if the method reads an attribute that was not given.

    Example:
        >>> class Trainer:
        ...     def _scaled(self, x):
        ...         return self.beta * x
        >>> bind(Trainer._scaled, beta=0.5)(4.0)
        2.0
    """
    if inspect.ismethod(method):
        owner = method.__self__ if isinstance(method.__self__, type) else type(method.__self__)
        name = f"{owner.__name__}.{method.__name__}"
        raise InvalidArgumentError(
            "method", f"must be a function as on its class, {name}, got one that is bound already"
        )
    bound = functools.partial(method, _Attributes(**attributes))
    # Reports show the name of a function.
    vars(bound)["__name__"] = getattr(method, "__name__", type(method).__name__)
    return bound


def from_logprobs(
    f: Callable[..., Tensor], *, reduction: str = "token_sum", names: Sequence[str | None] | None = None
) -> Loss:
    r"""A loss from a function of the sampled tokens' log-probabilities, `f(student_logprobs, teacher_logprobs)`.

    Both arguments are `(B, T)`, in nats; values at masked positions are finite and mean nothing. `f` returns one value
    per token, which is masked and reduced here, or a scalar, which stays as it is.

    Args:
        f: the function.
        reduction: of one value per token: `token_sum` (sum over tokens, mean over rollouts), `token_mean` or
            `sequence_mean` (T11).
        names: the keywords of `f` for its arguments, in this order, None for an argument that it does not take
            (default: all are positional).

    Raises:
        InvalidArgumentError: the reduction is unknown or the number of names is wrong; when called, if the result is
            neither a scalar nor one value per token.

    Example:
        >>> import opdtheory as opd
        >>> def k3(student_logprobs, teacher_logprobs):
        ...     log_u = teacher_logprobs - student_logprobs
        ...     return log_u.expm1() - log_u
        >>> opd.audit(from_logprobs(k3), "reverse_kl").descends
        'forward_kl'
    """
    call = _caller(f, names, ("student_logprobs", "teacher_logprobs"))
    reduce = _reducer(reduction)

    def loss(rollouts: Rollouts) -> Tensor:
        return reduce(rollouts, call(rollouts.student_logprobs, rollouts.teacher_logprobs))

    return _named(loss, f)


def from_logits(
    f: Callable[..., Tensor],
    *,
    shifted: bool = False,
    reduction: str = "token_sum",
    names: Sequence[str | None] | None = None,
) -> Loss:
    """A loss from a function of whole-vocabulary logits, `f(student_logits, teacher_logits, labels)`.

    The logits are `(B, T, V)`, the labels `(B, T)`: the tokens, and -100 where masked. `f` returns a scalar or one
    value per token.

    Args:
        f: the function.
        shifted: for trainers that drop the last row of logits and the first label themselves, since row n scores token
            n + 1. They get `T + 1` positions: a masked first label, and a last row of logits that repeats the one
            before, so that a loss which forgets to drop it is caught.
        reduction: as in `from_logprobs`.
        names: as in `from_logprobs`.

    Raises:
        InvalidArgumentError: as `from_logprobs`.

    Example:
        >>> import opdtheory as opd
        >>> def kl(student, teacher):
        ...     log_p, log_q = student.log_softmax(-1), teacher.log_softmax(-1)
        ...     return (log_p.exp() * (log_p - log_q)).sum(-1)
        >>> opd.audit(from_logits(kl, names=("student", "teacher", None)), "reverse_kl").verdict
        'exact'
    """
    call = _caller(f, names, ("student_logits", "teacher_logits", "labels"))
    reduce = _reducer(reduction)

    def loss(rollouts: Rollouts) -> Tensor:
        student, teacher, labels = rollouts.student_logits, rollouts.teacher_logits, rollouts.labels
        if shifted:
            student, teacher = (torch.cat([logits, logits[:, -1:]], 1) for logits in (student, teacher))
            labels = torch.cat([torch.full_like(labels[:, :1], -100), labels], 1)
        return reduce(rollouts, call(student, teacher, labels))

    return _named(loss, f)


def from_advantage(
    advantage: Callable[..., Tensor],
    *,
    detach: bool,
    of: str = "logprobs",
    importance_ratio: bool = False,
    reduction: str = "token_sum",
) -> Loss:
    r"""A policy-gradient loss, $-A_n \log p(y_n|h_n)$ per token, from its advantage $A$.

    What is minimised depends on `detach`, which therefore has no default: with `detach=True` the gradient is the
    advantage times the score, `-A s`; otherwise it includes the derivative of `A`, `-A s - log p dA`.

    Args:
        advantage: `advantage(student_logprobs, teacher_logprobs)` or `advantage(log_u)`, `(B, T)` each.
        detach: whether to stop the gradient through the advantage.
        of: the arguments of the advantage, `logprobs` or `log_u`.
        importance_ratio: whether to replace log p by the ratio p/mu to the policy that sampled: `-A p/mu`.
        reduction: as in `from_logprobs`.

    Raises:
        InvalidArgumentError: `of` or the reduction is unknown; when called, if the advantage is not one value per
            token.

    Example:
        >>> import opdtheory as opd
        >>> opd.audit(from_advantage(lambda log_u: log_u, of="log_u", detach=True), "reverse_kl").verdict
        'exact'
    """
    if of not in _ADVANTAGES:
        raise InvalidArgumentError("of", f"must be one of {', '.join(_ADVANTAGES)}, got {of!r}")
    reduce = _reducer(reduction)

    def loss(rollouts: Rollouts) -> Tensor:
        log_p, log_q = rollouts.student_logprobs, rollouts.teacher_logprobs
        values = advantage(rollouts.log_u) if of == "log_u" else advantage(log_p, log_q)
        _check_result("advantage", values)
        if values.shape != log_p.shape:
            problem = f"must return one value per token, {tuple(log_p.shape)}, got shape {tuple(values.shape)}"
            if tuple(values.shape) == tuple(log_p.shape[:1]):
                problem += ", one per rollout; .unsqueeze(-1).expand_as(log_p) gives it to each of its tokens"
            raise InvalidArgumentError("advantage", problem)
        score = (log_p - rollouts.behavior_logprobs).exp() if importance_ratio else log_p
        return reduce(rollouts, -(values.detach() if detach else values) * score)

    return _named(loss, advantage)


def from_hidden(
    f: Callable[..., Tensor],
    *,
    flat: bool = False,
    seed: int = 0,
    reduction: str = "token_sum",
    names: Sequence[str | None] | None = None,
) -> Loss:
    """A loss from a fused one, `f(student_hidden, student_head, teacher_hidden, teacher_head, labels)`.

    A fused loss takes hidden states `(B, T, H)` and the weights of an output layer `(V, H)` and never holds all logits
    at once. Here `H = V`, the two heads are random invertible matrices with singular values between 1/2 and 2, and
    `hidden @ head.T` equals the logits. No head is symmetric, so that transposed or exchanged heads are caught.

    Args:
        f: the function.
        flat: whether to pass rows, `(B T, H)` and `(B T,)`, instead of rollouts.
        seed: the seed of the heads.
        reduction: as in `from_logprobs`.
        names: as in `from_logprobs`.

    Raises:
        InvalidArgumentError: as `from_logprobs`; and when called, if a logit is -inf, which no hidden state gives.

    Example:
        >>> import opdtheory as opd
        >>> def fused(student_hidden, student_head, teacher_hidden, teacher_head, labels):
        ...     log_p = (student_hidden @ student_head.T).log_softmax(-1)
        ...     log_q = (teacher_hidden @ teacher_head.T).log_softmax(-1)
        ...     return (log_q.exp() * (log_q - log_p)).sum(-1)
        >>> opd.audit(from_hidden(fused), "forward_kl").verdict
        'exact'
    """
    call = _caller(f, names, ("student_hidden", "student_head", "teacher_hidden", "teacher_head", "labels"))
    reduce = _reducer(reduction)

    def loss(rollouts: Rollouts) -> Tensor:
        student, student_head = _hidden("student_logits", rollouts.student_logits, 2 * seed)
        teacher, teacher_head = _hidden("teacher_logits", rollouts.teacher_logits, 2 * seed + 1)
        labels = rollouts.labels
        if flat:
            student, teacher, labels = student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()
        value = call(student, student_head, teacher, teacher_head, labels)
        if flat and isinstance(value, Tensor) and value.shape == labels.shape:
            value = value.reshape(rollouts.labels.shape)
        return reduce(rollouts, value)

    return _named(loss, f)


def from_top_k(
    f: Callable[..., Tensor], k: int, *, reduction: str = "token_sum", names: Sequence[str | None] | None = None
) -> Loss:
    """A loss that gets only the teacher's `k` likeliest tokens, `f(student_logits, ids, logprobs, labels)`.

    `student_logits` are `(B, T, V)`, `ids` and `logprobs` are `Rollouts.teacher_top_k`, `(B, T, k)` each, and the
    labels `(B, T)`, -100 where masked.

    Args:
        f: the function.
        k: the number of tokens; all if the vocabulary is smaller.
        reduction: as in `from_logprobs`.
        names: as in `from_logprobs`.

    Raises:
        InvalidArgumentError: `k` is below one, or as `from_logprobs`.

    Example:
        >>> import opdtheory as opd
        >>> def forward_kl(student_logits, ids, logprobs, labels):
        ...     log_p = student_logits.log_softmax(-1).gather(-1, ids)
        ...     return (logprobs.exp() * (logprobs - log_p)).sum(-1)
        >>> opd.audit(from_top_k(forward_kl, 4), "forward_kl").verdict  # over a vocabulary of six tokens (T9a)
        'biased'
        >>> opd.audit(from_top_k(forward_kl, 2), "forward_kl").verdict
        'biased'
    """
    check_integer("k", k)
    call = _caller(f, names, ("student_logits", "ids", "logprobs", "labels"))
    reduce = _reducer(reduction)

    def loss(rollouts: Rollouts) -> Tensor:
        ids, logprobs = rollouts.teacher_top_k(min(k, rollouts.teacher_logits.shape[-1]))
        return reduce(rollouts, call(rollouts.student_logits, ids, logprobs, rollouts.labels))

    return _named(loss, f)


def _caller(f: Callable[..., Tensor], names: Sequence[str | None] | None, given: tuple[str, ...]) -> Callable[..., Any]:
    """`f` as a function of positional arguments, passed on by keyword if there are names."""
    if not callable(f):
        raise InvalidArgumentError("f", f"must be a function of {', '.join(given)}, got {f!r}")
    if names is None:
        _check_takes(f, given)
        return f
    if isinstance(names, str) or len(names) != len(given):
        raise InvalidArgumentError("names", f"must be {len(given)} names, for {', '.join(given)}, got {names!r}")
    keywords = tuple(names)

    def call(*arguments: Tensor) -> Any:
        return f(**{name: value for name, value in zip(keywords, arguments, strict=True) if name is not None})

    return call


def _check_takes(f: Callable[..., Any], given: tuple[str, ...]) -> None:
    """Raise if a function cannot be called with what an adapter passes, as far as its signature tells."""
    try:
        signature = inspect.signature(f, follow_wrapped=False)
    except (TypeError, ValueError):  # a builtin may have none
        return
    try:
        signature.bind(*given)
    except TypeError as error:
        problem = f"must take {len(given)} arguments, {', '.join(given)}, got {_signed(f, signature)}: {error}"
        raise InvalidArgumentError("f", f"{problem}; names=(...) passes them by keyword, None leaves one out") from None


def _signed(f: Callable[..., Any], signature: inspect.Signature) -> str:
    return f"{getattr(f, '__name__', type(f).__name__)}({', '.join(signature.parameters)})"


def _reducer(reduction: str) -> Callable[[Rollouts, Any], Tensor]:
    if reduction not in REDUCTIONS:
        raise InvalidArgumentError("reduction", f"must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")

    def reduce(rollouts: Rollouts, value: Any) -> Tensor:
        _check_result("f", value)
        if value.ndim == 0:
            return value
        if value.shape != rollouts.mask.shape:
            shape = tuple(rollouts.mask.shape)
            problem = f"must return a scalar or one value per token, {shape}, got shape {tuple(value.shape)}"
            raise InvalidArgumentError("f", f"{problem}{_mended(value.shape, shape)}")
        reduced: Tensor = getattr(rollouts, reduction)(value)
        return reduced

    return reduce


def _mended(got: Sequence[int], shape: tuple[int, ...]) -> str:
    """How to make one value per token, or a scalar, of a shape that a trainer's code often gives."""
    if tuple(got) == shape[:1]:
        return ", one value per rollout; .mean() makes a scalar of it"
    if tuple(got[:2]) == shape and len(got) == 3:
        return ", one value per entry of the vocabulary; .sum(-1) adds them up"
    if tuple(got) == (math.prod(shape),):
        return f", all tokens in a row; .reshape{shape} brings them back"
    return ""


def _check_result(argument: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise InvalidArgumentError(argument, f"must return a tensor, got {type(value).__name__}")


def _hidden(name: str, logits: Float[Tensor, "B T V"], seed: int) -> tuple[Tensor, Tensor]:
    """Hidden states and a random head `(V, V)`, with `hidden @ head.T` equal to the logits."""
    # Under vmap no branch may depend on values; what is infinite becomes NaN there, which no audit accepts.
    if not transforms_active() and bool(torch.isinf(logits.detach()).any()):
        raise InvalidArgumentError(name, "must be finite, as no hidden state gives -inf")
    size = logits.shape[-1]
    if size <= _KEPT:
        head, inverse = _kept_head(size, seed)
        return logits @ inverse.to(logits), head.to(logits)
    return _head(size, seed, invert=True).apply(logits), _large_head(size, seed).to(logits)


@dataclass(frozen=True)
class _Head:
    """A matrix `M + U W^T`, with `M` a scaled permutation and few columns in `U` and `W`.

    Attributes:
        order: the column of the entry of each row of `M`.
        scale: the entry of each column of `M`.
        left: the columns of `U`.
        right: the columns of `W`.
    """

    order: Int64[Tensor, " V"]
    scale: Float[Tensor, " V"]
    left: list[Float[Tensor, " V"]]
    right: list[Float[Tensor, " V"]]

    def reflected(self, left: Float[Tensor, "r V"], right: Float[Tensor, "r V"]) -> _Head:
        """The matrix between reflections at unit vectors, `I - 2 v v^T` each."""
        back = self.order.argsort()
        u, w = list(self.left), list(self.right)
        for v in left:
            new = self.scale * v[back] + sum(b * (a @ v) for a, b in zip(u, w, strict=True))
            u, w = [*u, -2.0 * v], [*w, new]
        for v in right:
            new = (self.scale * v)[self.order] + sum(a * (b @ v) for a, b in zip(u, w, strict=True))
            u, w = [*u, -2.0 * new], [*w, v]
        return _Head(self.order, self.scale, u, w)

    def dense(self) -> Float[Tensor, "V V"]:
        """The matrix itself."""
        return torch.addmm(torch.diag(self.scale)[self.order], torch.stack(self.left, 1), torch.stack(self.right))

    def apply(self, rows: Float[Tensor, "B T V"]) -> Float[Tensor, "B T V"]:
        """`rows @ matrix`, in the dtype of the rows."""
        u, w = torch.stack(self.left, 1).to(rows), torch.stack(self.right).to(rows)
        return rows[..., self.order.argsort()] * self.scale.to(rows) + rows @ u @ w


def _head(size: int, seed: int, invert: bool = False) -> _Head:
    """A random head `(V, V)` or the transpose of its inverse, `L D R^T` or `L D^-1 R^T` with orthogonal L and R.

    L and R are a permutation and a few reflections, which take `V^2` steps where a random rotation would take `V^3`.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(size, generator=generator)
    reflections = torch.randn(2, _REFLECTIONS, size, generator=generator, dtype=torch.float64)
    left, right = reflections / reflections.norm(dim=-1, keepdim=True)
    end = math.log(_LARGEST_SINGULAR_VALUE)
    values = torch.linspace(-end, end, size, dtype=torch.float64)
    return _Head(order, (-values if invert else values).exp(), [], []).reflected(left, right)


# Thousands of calls of one audit meet the same few vocabularies.
@functools.lru_cache(maxsize=64)
def _kept_head(size: int, seed: int) -> tuple[Tensor, Tensor]:
    return _head(size, seed).dense(), _head(size, seed, invert=True).dense()


@functools.lru_cache(maxsize=2)
def _large_head(size: int, seed: int) -> Tensor:
    return _head(size, seed).dense()


def _named(loss: Loss, f: Callable[..., Tensor]) -> Loss:
    """The loss under the name of the function, which reports show."""
    loss.__name__ = getattr(f, "__name__", type(f).__name__)
    return loss
