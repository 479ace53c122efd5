"""A batch of student rollouts scored by a teacher: the one input of every loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from opdtheory.errors import InvalidArgumentError, check_integer

__all__ = ["Extras", "Payload", "Rollouts", "Scored", "gather_logprobs"]

_IGNORED_LABEL = -100


@dataclass(frozen=True)
class Scored:
    r"""What one frozen policy gives to the tokens of rollouts.

    Attributes:
        logits: `(B, T, V)`, detached.
        logprobs: $\log q(y_n | h_n)$ of the sampled tokens, `(B, T)`, in nats; finite where masked.
    """

    logits: Float[Tensor, "B T V"]
    logprobs: Float[Tensor, "B T"]


@dataclass(frozen=True)
class Payload:
    r"""What a teacher's server sends of each next-token distribution: some tokens, as a rule its likeliest.

    Attributes:
        ids: distinct tokens, `(B, T, k)`, int64.
        logprobs: $\log q(a | h_n)$ of these, `(B, T, k)`, in nats.
    """

    ids: Int64[Tensor, "B T k"]
    logprobs: Float[Tensor, "B T k"]


@dataclass(frozen=True)
class Extras:
    """What rollouts hold besides student, teacher and sampler if a setting of an audit asks for it.

    Attributes:
        teachers: the teachers after the first one (`teachers=K`: K - 1 of them); empty where there is one teacher.
        base: a third, frozen policy (`base=True`), or None.
        rewards: a task's reward of each whole rollout (`reward=True`), `(B,)`, or None.
        payload: the teacher's likeliest tokens, where its whole distributions are not known, or None.
    """

    teachers: tuple[Scored, ...] = ()
    base: Scored | None = None
    rewards: Float[Tensor, " B"] | None = None
    payload: Payload | None = None

    def each(self, change: Callable[[Tensor], Tensor], change_rewards: Callable[[Tensor], Tensor]) -> Extras:
        """The same with every tensor of the tokens changed by one function and the rewards by another."""

        def changed(scored: Scored) -> Scored:
            return Scored(change(scored.logits), change(scored.logprobs))

        sent = self.payload
        return Extras(
            tuple(map(changed, self.teachers)),
            None if self.base is None else changed(self.base),
            None if self.rewards is None else change_rewards(self.rewards),
            None if sent is None else Payload(change(sent.ids), change(sent.logprobs)),
        )


@dataclass(frozen=True)
class Rollouts:
    r"""Samples $y \sim \mu$ with the logits and log-probabilities of the student $p$ and the teacher $q$.

    Log-probabilities are in nats. `mask` is 1 on the student's own tokens, up to and including the end-of-sequence
    token, and 0 on padding and on tokens that an environment wrote. Values at masked positions are finite and mean
    nothing. A loss is a plain function `loss(rollouts) -> scalar tensor`.

    Attributes:
        tokens: sampled tokens, `(B, T)`, int64, in `[0, V)`.
        mask: `(B, T)`, floating-point, each entry 0 or 1.
        student_logits: `(B, T, V)`; `-inf` marks a token of zero probability.
        teacher_logits: `(B, T, V)`.
        student_logprobs: `log p(y_n | h_n)`, `(B, T)`, differentiable.
        teacher_logprobs: `log q(y_n | h_n)`, `(B, T)`.
        behavior_logprobs: `log mu(y_n | h_n)` of the policy that sampled, `(B, T)`, detached.
        extras: further teachers, a base policy and rewards, which `teachers`, `base_logits`, `base_logprobs` and
            `rewards` read; None where there are none.

    Raises:
        InvalidArgumentError: a field, which the message names, has a wrong shape, dtype or value.
    """

    tokens: Int64[Tensor, "B T"]
    mask: Float[Tensor, "B T"]
    student_logits: Float[Tensor, "B T V"]
    teacher_logits: Float[Tensor, "B T V"]
    student_logprobs: Float[Tensor, "B T"]
    teacher_logprobs: Float[Tensor, "B T"]
    behavior_logprobs: Float[Tensor, "B T"]
    extras: Extras | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        # Under `torch.func.vmap` values cannot be looked at; they were when the rollouts were made.
        if any(_is_mapped(getattr(self, each.name)) for each in fields(self) if each.name != "extras"):
            return
        _check_tokens(self.tokens)
        shape = tuple(self.tokens.shape)
        device = self.tokens.device
        for name in ("mask", "student_logprobs", "teacher_logprobs", "behavior_logprobs"):
            _check_floating(name, getattr(self, name), shape, device)
        for name in ("student_logits", "teacher_logits"):
            logits = getattr(self, name)
            _check_floating(name, logits, (*shape, _vocabulary(name, logits)), device)
            # What a payload leaves open is NaN.
            known = not isinstance(self.extras, Extras) or self.extras.payload is None
            if name == "student_logits" or known:
                _check_rows(name, logits)
        _check_same_vocabulary(self.student_logits, self.teacher_logits)
        _check_range("tokens", self.tokens, self.student_logits.shape[-1])
        _check_mask(self.mask)
        for name in ("student_logprobs", "teacher_logprobs", "behavior_logprobs"):
            _check_logprobs(name, getattr(self, name), self.mask)
        if self.extras is None:
            # `vars` of rollouts then holds tensors only; the class's default is still read.
            vars(self).pop("extras", None)
        else:
            _check_extras(self.extras, self.student_logits, self.mask)

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

        Without `mask` every token counts; without `behavior_logprobs` the student sampled. A log-probability of `-inf`
        at a masked position becomes 0.

        Raises:
            InvalidArgumentError: as `Rollouts`.
        """
        _check_tokens(tokens)
        for name, logits in (("student_logits", student_logits), ("teacher_logits", teacher_logits)):
            _check_floating(name, logits, (*tokens.shape, _vocabulary(name, logits)), tokens.device)
        _check_same_vocabulary(student_logits, teacher_logits)
        _check_range("tokens", tokens, student_logits.shape[-1])
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
    def from_payload(
        cls,
        tokens: Int64[Tensor, "B T"],
        student_logits: Float[Tensor, "B T V"],
        payload: Payload,
        teacher_logprobs: Float[Tensor, "B T"],
        mask: Float[Tensor, "B T"] | None = None,
        behavior_logprobs: Float[Tensor, "B T"] | None = None,
    ) -> Rollouts:
        r"""Rollouts whose teacher is known by its likeliest tokens and the sampled one, as a server sends them.

        `teacher_logits` is NaN in every entry and takes no memory: what is not known cannot be used unnoticed, and the
        library's estimators refuse by name. `teacher_top_k` reads the payload.

        Args:
            tokens: as in `Rollouts`.
            student_logits: as in `Rollouts`.
            payload: the teacher's tokens at each position.
            teacher_logprobs: the teacher's log-probabilities of the sampled tokens.
            mask: as in `from_logits`.
            behavior_logprobs: as in `from_logits`.

        Raises:
            InvalidArgumentError: as `Rollouts`.
        """
        ours = cls.from_logits(tokens, student_logits, student_logits.detach(), mask, behavior_logprobs)
        unknown = torch.full((), torch.nan, dtype=student_logits.dtype, device=student_logits.device)
        changed = {**vars(ours), "teacher_logits": unknown.expand(student_logits.shape)}
        return cls(**{**changed, "teacher_logprobs": teacher_logprobs}, extras=Extras(payload=payload))

    @classmethod
    def unchecked(cls, **fields: Tensor | Extras | None) -> Rollouts:
        """Rollouts of tensors that are known to be valid, without a check: for loops over many batches."""
        rollouts = object.__new__(cls)
        rollouts.__dict__.update(fields)
        if fields.get("extras", rollouts) is None:
            del rollouts.__dict__["extras"]
        return rollouts

    def to(self, target: torch.device | str | torch.dtype) -> Rollouts:
        """The rollouts on another device or in another floating-point dtype, differentiable in these tensors."""
        cast = isinstance(target, torch.dtype)
        change = lambda x: x if cast and not x.dtype.is_floating_point else x.to(target)  # noqa: E731
        return self._each(change, change)

    def cut(self, length: int) -> Rollouts:
        """The first `length` positions of every rollout."""
        return self._each(lambda x: x[:, :length], lambda rewards: rewards)

    def _each(self, change: Callable[[Tensor], Tensor], change_rewards: Callable[[Tensor], Tensor]) -> Rollouts:
        changed = {name: change(value) for name, value in vars(self).items() if name != "extras"}
        extras = None if self.extras is None else self.extras.each(change, change_rewards)
        return Rollouts.unchecked(**changed, extras=extras)

    @property
    def teachers(self) -> tuple[Scored, ...]:
        """Every teacher's `.logits` and `.logprobs`; the first one is the teacher of the other fields (T16).

        Raises:
            InvalidArgumentError: there is only one teacher.
        """
        if self.extras is None or not self.extras.teachers:
            raise _absent("teachers", "teachers=2")
        return Scored(self.teacher_logits, self.teacher_logprobs), *self.extras.teachers

    @property
    def base_logits(self) -> Float[Tensor, "B T V"]:
        """The logits of a third, frozen policy.

        Raises:
            InvalidArgumentError: there is no such policy.
        """
        return self._base("base_logits").logits

    @property
    def base_logprobs(self) -> Float[Tensor, "B T"]:
        """The log-probabilities of a third, frozen policy, in nats.

        Raises:
            InvalidArgumentError: there is no such policy.
        """
        return self._base("base_logprobs").logprobs

    @property
    def rewards(self) -> Float[Tensor, " B"]:
        """A task's reward of each whole rollout.

        Raises:
            InvalidArgumentError: there is no reward.
        """
        if self.extras is None or self.extras.rewards is None:
            raise _absent("rewards", "reward=True")
        return self.extras.rewards

    @property
    def payload(self) -> Payload | None:
        """The teacher's likeliest tokens as its server sent them; None where its whole distributions are known."""
        return None if self.extras is None else self.extras.payload

    def _base(self, name: str) -> Scored:
        if self.extras is None or self.extras.base is None:
            raise _absent(name, "base=True")
        return self.extras.base

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

        They are detached and in descending order of $\log q$, equal ones in ascending order of tokens. Tokens of zero
        probability come last, at `-inf`.

        Args:
            k: the number of tokens.

        Returns:
            `(ids, logprobs)`, both `(B, T, k)`; nats.

        Raises:
            InvalidArgumentError: `k` is not an integer in `[1, V]`, or larger than the teacher's payload.
        """
        if self.payload is not None:
            check_integer("k", k, 1, self.payload.ids.shape[-1])
            values, order = torch.sort(self.payload.logprobs.detach(), dim=-1, descending=True, stable=True)
            return self.payload.ids.gather(-1, order)[..., :k], values[..., :k]
        check_integer("k", k, 1, self.teacher_logits.shape[-1])
        logprobs = torch.log_softmax(self.teacher_logits.detach(), dim=-1)
        values, ids = torch.sort(logprobs, dim=-1, descending=True, stable=True)
        return ids[..., :k], values[..., :k]

    def student_at(self, ids: Int64[Tensor, "B T k"]) -> Float[Tensor, "B T k"]:
        r"""The student's $\log p(a|h_n)$ at given tokens, such as those of `teacher_top_k`, in nats and differentiable.

        A log-probability of `-inf` at a masked position becomes 0.

        Args:
            ids: tokens in `[0, V)`, int64, `(B, T, k)`.

        Raises:
            InvalidArgumentError: `ids` has a wrong shape or dtype, or holds something that is not a token.
        """
        _check_int64("ids", ids, (*self.tokens.shape, "k"))
        if not _is_mapped(ids):
            _check_range("ids", ids, self.student_logits.shape[-1])
        values = torch.log_softmax(self.student_logits, dim=-1).gather(-1, ids)
        return torch.where((self.mask == 0).unsqueeze(-1) & torch.isneginf(values), 0.0, values)

    def token_sum(self, values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        r"""Sum over unmasked tokens, mean over rollouts: $\frac1B\sum_{b,n} m_{bn} x_{bn}$ (T11: unbiased)."""
        return self._masked(values).sum() / self.tokens.shape[0]

    def sequence_mean(self, values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        r"""Mean over each rollout's tokens, then over rollouts (T11: weights short rollouts more).

        A rollout without an unmasked token counts as zero.
        """
        lengths = self.mask.sum(-1).clamp_min(1)
        return (self._masked(values).sum(-1) / lengths).mean()

    def token_mean(self, values: Float[Tensor, "B T"]) -> Float[Tensor, ""]:
        r"""Mean over all unmasked tokens of the batch (T11: a ratio estimator when lengths vary)."""
        return self._masked(values).sum() / self.mask.sum().clamp_min(1)

    def _masked(self, values: Tensor) -> Tensor:
        if tuple(values.shape) != tuple(self.mask.shape):
            raise InvalidArgumentError(
                "values", f"must have one value per token, {tuple(self.mask.shape)}, got {tuple(values.shape)}"
            )
        # `where`, not a product: a non-finite value at a masked position must not leak as 0 * inf.
        return torch.where(self.mask > 0, values, torch.zeros_like(values))


def _is_mapped(value: object) -> bool:
    """Whether a tensor is one of a batch that `torch.func.vmap` maps over, whose values are not to be had."""
    return isinstance(value, Tensor) and bool(is_batchedtensor(value))


def gather_logprobs(logits: Tensor, tokens: Tensor, mask: Tensor) -> Tensor:
    """Log-probabilities of the tokens, with 0 in place of `-inf` at masked positions."""
    logprobs = torch.log_softmax(logits, dim=-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return torch.where((mask == 0) & torch.isneginf(logprobs), 0.0, logprobs)


def _absent(name: str, setting: str) -> InvalidArgumentError:
    return InvalidArgumentError(name, f"must be supplied: audit with {setting}, or give the rollouts `extras`")


def _check_extras(extras: Extras, logits: Tensor, mask: Tensor) -> None:
    if not isinstance(extras, Extras):
        raise InvalidArgumentError("extras", f"must be Extras, got {type(extras).__name__}")
    named = {f"teachers[{k + 1}]": scored for k, scored in enumerate(extras.teachers)}
    if extras.base is not None:
        named["base"] = extras.base
    for name, scored in named.items():
        _check_floating(f"{name}.logits", scored.logits, tuple(logits.shape), logits.device)
        _check_rows(f"{name}.logits", scored.logits)
        _check_floating(f"{name}.logprobs", scored.logprobs, tuple(mask.shape), logits.device)
        _check_logprobs(f"{name}.logprobs", scored.logprobs, mask)
    if extras.payload is not None:
        _check_payload(extras.payload, logits, mask)
    if extras.rewards is not None:
        _check_floating("rewards", extras.rewards, (mask.shape[0],), logits.device)


def _check_payload(payload: Payload, logits: Tensor, mask: Tensor) -> None:
    if not isinstance(payload, Payload):
        raise InvalidArgumentError("payload", f"must be Payload, got {type(payload).__name__}")
    ids, logprobs = payload.ids, payload.logprobs
    _check_int64("payload.ids", ids, (*mask.shape, "k"))
    if ids.device != logits.device:
        raise InvalidArgumentError("payload.ids", f"must be on {logits.device} like tokens, got {ids.device}")
    _check_range("payload.ids", ids, logits.shape[-1])
    _check_floating("payload.logprobs", logprobs, tuple(ids.shape), logits.device)
    # A row may hold no more than the whole distribution, where it counts.
    counts = mask.unsqueeze(-1).expand_as(logprobs)
    _check_logprobs("payload.logprobs", logprobs, counts)
    total = (logprobs.detach().double().exp() * counts).sum(-1)
    if (total > 1 + 1e-3).any():
        raise InvalidArgumentError(
            "payload.logprobs", f"must be of one distribution, got a sum of probabilities of {float(total.max()):.4g}"
        )
    ordered = ids.sort(-1).values
    if bool(((ordered.diff(dim=-1) == 0) & (mask.unsqueeze(-1) > 0)).any()):
        raise InvalidArgumentError("payload.ids", "must be distinct tokens at each position, got one twice")


def _check_tokens(tokens: Tensor) -> None:
    _check_int64("tokens", tokens, ("B", "T"))
    if tokens.device.type == "meta":
        raise InvalidArgumentError("tokens", "must not be on the meta device, which holds no values")


def _check_int64(name: str, value: Tensor, shape: tuple[int | str, ...]) -> None:
    _check_shape(name, value, shape)
    if value.dtype != torch.int64:
        raise InvalidArgumentError(name, f"must have dtype torch.int64, got {value.dtype}")
    if value.numel() == 0:
        raise InvalidArgumentError(name, f"must not be empty, got shape {tuple(value.shape)}")


def _check_shape(name: str, value: object, shape: tuple[int | str, ...]) -> None:
    """Raise unless a tensor has a shape, in which letters stand for any size."""
    found = tuple(value.shape) if isinstance(value, Tensor) else ()
    if len(found) != len(shape) or any(isinstance(n, int) and n != size for n, size in zip(shape, found, strict=True)):
        got = found if isinstance(value, Tensor) else type(value).__name__
        raise InvalidArgumentError(name, f"must have shape ({', '.join(map(str, shape))}), got {got}")


def _vocabulary(name: str, logits: Tensor) -> int:
    _check_shape(name, logits, ("B", "T", "V"))
    return logits.shape[-1]


def _check_floating(name: str, value: Tensor, shape: tuple[int, ...], device: torch.device) -> None:
    _check_shape(name, value, shape)
    if not value.dtype.is_floating_point:
        raise InvalidArgumentError(name, f"must have a floating-point dtype, got {value.dtype}")
    if value.device != device:
        raise InvalidArgumentError(name, f"must be on {device} like tokens, got {value.device}")


def _check_same_vocabulary(student_logits: Tensor, teacher_logits: Tensor) -> None:
    ours, theirs = student_logits.shape[-1], teacher_logits.shape[-1]
    if ours != theirs:
        raise InvalidArgumentError("teacher_logits", f"must have the student's vocabulary of {ours}, got {theirs}")


def _check_rows(name: str, logits: Tensor) -> None:
    # One reduction serves both: a row's maximum is NaN, +inf or -inf exactly when the row is unusable.
    row_max = logits.detach().amax(-1)
    if not torch.isfinite(row_max).all():
        bad = int((~torch.isfinite(row_max)).sum())
        raise InvalidArgumentError(
            name, f"must be finite or -inf, and not all -inf; {bad} of {row_max.numel()} rows are not"
        )


def _check_range(name: str, tokens: Tensor, vocabulary: int) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= vocabulary:
        raise InvalidArgumentError(name, f"must lie in [0, {vocabulary}), got {low} to {high}")


def _check_mask(mask: Tensor) -> None:
    if not ((mask == 0) | (mask == 1)).all():
        raise InvalidArgumentError("mask", "must hold only 0 and 1")


def _check_logprobs(name: str, value: Tensor, mask: Tensor) -> None:
    value = value.detach()
    if torch.isnan(value).any() or (value == torch.inf).any():
        raise InvalidArgumentError(name, "must be finite or -inf, got NaN or +inf")
    # Rounding may leave log p a few ulp above zero.
    if (value * mask > 1e-3).any():
        raise InvalidArgumentError(name, f"must be at most 0, got {float((value * mask).max()):.3g}")
