"""A batch of student rollouts scored by a teacher: the one input of every loss."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from opdtheory.errors import InvalidArgumentError

__all__ = ["Rollouts", "gather_logprobs"]

_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Rollouts:
    r"""On-policy samples $y \sim \mu$ with what the student $p$ and the teacher $q$ say of them.

    Log-probabilities are in nats. `mask` is 1 on the student's own tokens, up to and including
    the end-of-sequence token, and 0 on padding and on tokens that an environment wrote. Values at
    masked positions are finite and mean nothing. A loss is a plain function
    `loss(rollouts) -> scalar tensor`.

    Attributes:
        tokens: sampled tokens, `(B, T)`, int64, in `[0, V)`.
        mask: `(B, T)`, floating, each entry 0 or 1.
        student_logits: `(B, T, V)`; `-inf` marks a token of zero probability.
        teacher_logits: `(B, T, V)`.
        student_logprobs: `log p(y_n | h_n)`, `(B, T)`, differentiable.
        teacher_logprobs: `log q(y_n | h_n)`, `(B, T)`.
        behavior_logprobs: `log mu(y_n | h_n)` of the policy that sampled, `(B, T)`, detached.

    Raises:
        InvalidArgumentError: a `ValueError` that names the field with a wrong shape, dtype or value.
    """

    tokens: Int64[Tensor, "B T"]
    mask: Float[Tensor, "B T"]
    student_logits: Float[Tensor, "B T V"]
    teacher_logits: Float[Tensor, "B T V"]
    student_logprobs: Float[Tensor, "B T"]
    teacher_logprobs: Float[Tensor, "B T"]
    behavior_logprobs: Float[Tensor, "B T"]

    def __post_init__(self) -> None:
        _check_tokens(self.tokens)
        shape = tuple(self.tokens.shape)
        device = self.tokens.device
        for name in ("mask", "student_logprobs", "teacher_logprobs", "behavior_logprobs"):
            _check_floating(name, getattr(self, name), shape, device)
        for name in ("student_logits", "teacher_logits"):
            logits = getattr(self, name)
            _check_floating(name, logits, (*shape, _vocabulary(name, logits)), device)
            _check_rows(name, logits)
        _check_same_vocabulary(self.student_logits, self.teacher_logits)
        _check_range(self.tokens, self.student_logits.shape[-1])
        _check_mask(self.mask)
        for name in ("student_logprobs", "teacher_logprobs", "behavior_logprobs"):
            _check_logprobs(name, getattr(self, name), self.mask)

    @classmethod
    def from_logits(
        cls,
        tokens: Int64[Tensor, "B T"],
        student_logits: Float[Tensor, "B T V"],
        teacher_logits: Float[Tensor, "B T V"],
        mask: Float[Tensor, "B T"] | None = None,
        behavior_logprobs: Float[Tensor, "B T"] | None = None,
    ) -> Rollouts:
        r"""Rollouts whose log-probabilities are gathered from the logits, $\log\mathrm{softmax}(z)_{y}$.

        Without `mask` every token counts; without `behavior_logprobs` the student itself sampled. At a masked
        position a log-probability of `-inf` becomes 0.

        Raises:
            InvalidArgumentError: as `Rollouts`.
        """
        _check_tokens(tokens)
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            _check_floating(name, logits, (*tokens.shape, _vocabulary(name, logits)), tokens.device)
        _check_same_vocabulary(student_logits, teacher_logits)
        _check_range(tokens, student_logits.shape[-1])
        if mask is None:
            mask = torch.ones(tokens.shape, dtype=student_logits.dtype, device=student_logits.device)
        else:
            _check_floating("mask", mask, tuple(tokens.shape), tokens.device)
        student_logprobs = gather_logprobs(student_logits, tokens, mask)
        return cls(
            tokens=tokens,
            mask=mask,
            student_logits=student_logits,
            teacher_logits=teacher_logits,
            student_logprobs=student_logprobs,
            teacher_logprobs=gather_logprobs(teacher_logits, tokens, mask),
            behavior_logprobs=student_logprobs.detach() if behavior_logprobs is None else behavior_logprobs,
        )

    @classmethod
    def unchecked(cls, **fields: Tensor) -> Rollouts:
        """Rollouts of tensors that are known to be valid, without looking at them: for loops over many batches."""
        rollouts = object.__new__(cls)
        rollouts.__dict__.update(fields)
        return rollouts

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rollouts on another device, differentiable in the tensors here: to audit a loss that runs there."""
        return Rollouts.unchecked(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    @property
    def log_u(self) -> Float[Tensor, "B T"]:
        r"""The log-ratio $\log u_n = \log q(y_n|h_n) - \log p(y_n|h_n)$, differentiable in the student."""
        return self.teacher_logprobs - self.student_logprobs

    @property
    def labels(self) -> Int64[Tensor, "B T"]:
        """The tokens, with -100 where masked, as trainers expect."""
        return torch.where(self.mask > 0, self.tokens, torch.full_like(self.tokens, _IGNORED_LABEL))

    def teacher_top_k(self, k: int) -> tuple[Int64[Tensor, "B T k"], Float[Tensor, "B T k"]]:
        r"""The teacher's `k` likeliest tokens and their log-probabilities, as a teacher server sends them.

        In descending order of $\log q$, equal ones by ascending token; detached. Tokens of zero probability
        come last, at `-inf`.

        Args:
            k: how many.

        Returns:
            `(ids, logprobs)`, both `(B, T, k)`; nats.

        Raises:
            InvalidArgumentError: `k` is no integer in `[1, V]`.
        """
        vocab_size = self.teacher_logits.shape[-1]
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= vocab_size:
            raise InvalidArgumentError("k", f"is {k!r}; an integer in [1, {vocab_size}] is needed")
        logprobs = torch.log_softmax(self.teacher_logits.detach(), dim=-1)
        values, ids = torch.sort(logprobs, dim=-1, descending=True, stable=True)
        return ids[..., :k], values[..., :k]

    def student_at(self, ids: Int64[Tensor, "B T k"]) -> Float[Tensor, "B T k"]:
        r"""The student's $\log p(a|h_n)$ at given tokens, differentiable, as with `teacher_top_k`; nats.

        At a masked position a log-probability of `-inf` becomes 0.

        Args:
            ids: tokens in `[0, V)`, int64, `(B, T, k)`.

        Raises:
            InvalidArgumentError: `ids` has a wrong shape or dtype, or holds what is no token.
        """
        _check_ids(ids, tuple(self.tokens.shape), self.student_logits.shape[-1])
        values = torch.log_softmax(self.student_logits, dim=-1).gather(-1, ids)
        return torch.where((self.mask == 0).unsqueeze(-1) & torch.isneginf(values), 0.0, values)

    def token_sum(self, values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        r"""Sum over the unmasked tokens, mean over rollouts: $\frac1B\sum_{b,n} m_{bn} x_{bn}$ (T11: unbiased)."""
        return self._masked(values).sum() / self.tokens.shape[0]

    def sequence_mean(self, values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        r"""Mean over each rollout's tokens, then over rollouts (T11: weights short rollouts more).

        A rollout without any unmasked token counts as zero.
        """
        lengths = self.mask.sum(-1).clamp_min(1)
        return (self._masked(values).sum(-1) / lengths).mean()

    def token_mean(self, values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        r"""Mean over all unmasked tokens of the batch (T11: a ratio estimator when lengths vary)."""
        return self._masked(values).sum() / self.mask.sum().clamp_min(1)

    def _masked(self, values: Tensor) -> Tensor:
        if tuple(values.shape) != tuple(self.mask.shape):
            raise InvalidArgumentError(
                "values", f"has shape {tuple(values.shape)}; one value per token, {tuple(self.mask.shape)}, is needed"
            )
        # `where`, not a product: a non-finite value at a masked position must not leak as 0 * inf.
        return torch.where(self.mask > 0, values, torch.zeros_like(values))


def gather_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the tokens; at masked positions `-inf` becomes 0."""
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where((mask == 0) & torch.isneginf(logprobs), 0.0, logprobs)


def _check_tokens(tokens: Tensor) -> None:
    if not isinstance(tokens, Tensor) or tokens.ndim != 2:
        got = tuple(tokens.shape) if isinstance(tokens, Tensor) else type(tokens).__name__
        raise InvalidArgumentError("tokens", f"got {got}; a tensor of shape (B, T) is needed")
    if tokens.dtype != torch.int64:
        raise InvalidArgumentError("tokens", f"has dtype {tokens.dtype}; torch.int64 is needed")
    if tokens.device.type == "meta":
        raise InvalidArgumentError("tokens", "is on the meta device, which holds no values")
    if tokens.numel() == 0:
        raise InvalidArgumentError(
            "tokens", f"has shape {tuple(tokens.shape)}; at least one rollout and token is needed"
        )


def _vocabulary(name: str, logits: Tensor) -> int:
    if not isinstance(logits, Tensor) or logits.ndim != 3:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise InvalidArgumentError(name, f"got {got}; a tensor of shape (B, T, V) is needed")
    return logits.shape[-1]


def _check_floating(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape:
        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise InvalidArgumentError(name, f"got {got}; a tensor of shape {shape} is needed to match tokens")
    if not value.dtype.is_floating_point:
        raise InvalidArgumentError(name, f"has dtype {value.dtype}; a floating dtype is needed")
    if value.device != device:
        raise InvalidArgumentError(name, f"is on {value.device}, tokens on {device}; move one of them")


def _check_same_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> None:
    if student_logits.shape[-1] != teacher_logits.shape[-1]:
        raise InvalidArgumentError(
            "teacher_logits",
            f"has a vocabulary of {teacher_logits.shape[-1]}, the student of {student_logits.shape[-1]}; "
            "both must score the same tokens",
        )


def _check_rows(name: str, logits: Tensor) -> None:
    # One reduction serves both: a row's maximum is NaN, +inf or -inf exactly when the row is unusable.
    row_max = logits.detach().amax(-1)
    if not torch.isfinite(row_max).all():
        bad = int((~torch.isfinite(row_max)).sum())
        raise InvalidArgumentError(
            name, f"{bad} of {row_max.numel()} rows hold NaN, +inf or only -inf; logits must be finite or -inf"
        )


def _check_range(tokens: Tensor, vocabulary: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InvalidArgumentError("tokens", f"range over [{low}, {high}]; every token must lie in [0, {vocabulary})")


def _check_ids(ids: Tensor, shape: tuple[int, ...], vocabulary: int) -> None:
    if not isinstance(ids, Tensor) or ids.ndim != 3 or tuple(ids.shape[:2]) != shape:
        got = tuple(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InvalidArgumentError("ids", f"got {got}; a tensor of shape {(*shape, 'k')} is needed to match tokens")
    if ids.dtype != torch.int64:
        raise InvalidArgumentError("ids", f"has dtype {ids.dtype}; torch.int64 is needed")
    if ids.numel() == 0:
        raise InvalidArgumentError("ids", f"has shape {tuple(ids.shape)}; at least one token is needed")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= vocabulary:
        raise InvalidArgumentError("ids", f"range over [{low}, {high}]; every token must lie in [0, {vocabulary})")


def _check_mask(mask: Tensor) -> None:
    if not ((mask == 0) | (mask == 1)).all():
        raise InvalidArgumentError("mask", "holds a value other than 0 and 1")


def _check_logprobs(name: str, value: Tensor, mask: Tensor) -> None:
    value = value.detach()
    if torch.isnan(value).any() or (value == torch.inf).any():
        raise InvalidArgumentError(name, "holds NaN or +inf; log-probabilities must be finite or -inf")
    # Rounding may leave log p a few ulp above zero.
    if (value * mask > 1e-3).any():
        raise InvalidArgumentError(name, f"holds {float((value * mask).max()):.3g} > 0, which is no log-probability")
