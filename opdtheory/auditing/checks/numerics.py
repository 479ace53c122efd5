"""Where a loss overflows, or loses or reverses its gradient, in float32, bfloat16 and float16."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from opdtheory.errors import InvalidArgumentError, check_integer
from opdtheory.exact import Loss
from opdtheory.exact.modes import plain_modes
from opdtheory.rollouts import Rollouts

__all__ = ["DTYPES", "DtypeResult", "numerics", "realistic_logits"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# Tokens and vocabulary of the realistic batch, and the vocabulary for a slow loss: one whose call would take this many
# seconds, extrapolated from two smaller vocabularies, the second twice the first.
_TOKENS, _VOCABULARY, _SMALL_VOCABULARY = 16, 2048, 128
_TRIAL_VOCABULARIES, _SLOW_SECONDS = (128, 256), 0.1

# Log-probability under the policy that favours the token: ordinary, near one, or very rare under both; and the
# log-ratios, of either sign, that are tried there.
_ORDINARY, _NEAR_ONE, _RARE = math.log(0.5), math.log1p(-1e-3), math.log(1e-30)
_LOG_RATIOS = {
    _ORDINARY: (0.004, 1.3, 10.0, 20.0, 40.0, 80.0, 90.0, 120.0),
    _NEAR_ONE: (1.3, 90.0),
    _RARE: (1.3,),
}
_FEW = 64

# Bisection steps between two listed log-ratios to find where an overflow starts.
_BISECTIONS = 7

# Gradients this small relative to that at |log u| about 1 (realistic: the median) do not matter.
_NEGLIGIBLE = 1e-3

_LOST = 0.01


Regime = Literal["realistic", "adversarial"]


@dataclass(frozen=True)
class DtypeResult:
    """What a loss's gradient loses in one dtype, compared with float64 on the same rounded inputs.

    Attributes:
        dtype: `float32`, `bfloat16` or `float16`.
        regime: `realistic` or `adversarial`.
        overflow: log-ratios of the sampled token, at most one of either sign and the nearest to zero, at which the
            gradient is NaN or inf though float64's is not; None if there is none.
        lost_gradient: likewise, where the gradient is below 1% of float64's, unless that is negligible.
        sign_changed: likewise, where the gradient points against float64's.
        worst_error: largest relative error of a token's gradient where it is finite; NaN if nothing could be compared.
        words: one sentence.
    """

    dtype: str
    regime: Regime
    overflow: list[float] | None
    lost_gradient: list[float] | None
    sign_changed: list[float] | None
    worst_error: float
    words: str


@dataclass(frozen=True)
class _Token:
    """One token's gradient in a dtype compared with float64's."""

    log_u: float
    size: float
    error: float
    cosine: float
    kept: float


class _RefusalError(Exception):
    """The loss raised; the message says which error."""


def numerics(
    loss: Loss, dtypes: Sequence[str] = tuple(DTYPES), *, batch_size: int = 1, seed: int = 0
) -> list[DtypeResult]:
    r"""Call a loss with rollouts in narrow dtypes and compare each token's gradient with float64's.

    A token's gradient is the vector of $\partial L/\partial \log p(y_n|h_n)$ and $\partial L/\partial z_n$, with the
    inputs treated as independent. float64 gets the same rounded numbers, so only the loss's own arithmetic is judged; a
    loss that casts to float32 itself is compared with itself in float32. There are two regimes: `realistic` (see
    `realistic_logits`) and `adversarial`, one token at a time with $|\log u|$ from 0.004 to 120, at ordinary
    probabilities, near one and near 1e-30.

    Args:
        loss: a function of rollouts that returns a scalar, deterministic and stateless.
        dtypes: names from `DTYPES`.
        batch_size: number of rollouts that the loss sees at once.
        seed: seed of the realistic batch.

    Returns:
        Two results per dtype. If the loss raises or returns no gradient in a dtype, the words say so.

    Raises:
        InvalidArgumentError: a dtype is unknown, or the batch size is below one.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise InvalidArgumentError("dtypes", f"must be among {', '.join(DTYPES)}, got {name!r}")
    check_integer("batch_size", batch_size)
    with plain_modes():
        vocabulary = _SMALL_VOCABULARY if _is_slow(loss, batch_size, seed) else _VOCABULARY
        results = []
        for name in dtypes:
            realistic = functools.partial(_realistic, loss, name, batch_size, vocabulary, seed)
            results.append(_measured(name, "realistic", realistic))
            results.append(_measured(name, "adversarial", functools.partial(_adversarial, loss, name, batch_size)))
        return results


def _measured(dtype: str, regime: Regime, measure: Callable[[], DtypeResult]) -> DtypeResult:
    try:
        return measure()
    except _RefusalError as error:
        return DtypeResult(dtype, regime, None, None, None, math.nan, f"In {dtype} the loss raises {error}")


@functools.lru_cache(maxsize=4)
def realistic_logits(
    tokens: int = _TOKENS, vocabulary: int = _VOCABULARY, seed: int = 0
) -> tuple[Float[Tensor, "N V"], Float[Tensor, "N V"]]:
    r"""Synthetic logits that resemble those of a small language model as student and of another as teacher.

    $$z_{na} = \beta_n(-1.1 \log \mathrm{rank}_{na} + \tfrac12 g_{na}),\qquad
      z'_{na} = z_{na} + 0.5\, t_{na}$$

    where the ranks order the vocabulary at random for each token (Zipf's law), $g$ is standard normal, $t$ is Student's
    t with five degrees of freedom (most log-ratios are below one, a few exceed three), and $\log \beta_n$ is uniform
    between $\log 0.5$ and $\log 8$: entropies range from a few nats to almost none.

    Args:
        tokens: number of rows.
        vocabulary: length of a row.
        seed: equal seeds give equal logits.

    Returns:
        `(student, teacher)`, both float64.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal() -> Tensor:
        return torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64)

    ranks = normal().argsort(-1).argsort(-1).double() + 1.0
    sharpness = 0.5 * 16.0 ** torch.rand(tokens, 1, generator=generator, dtype=torch.float64)
    student = sharpness * (-1.1 * ranks.log() + 0.5 * normal())
    heavy = normal() / (torch.stack([normal().square() for _ in range(5)]).mean(0)).sqrt()
    return student, student + 0.5 * heavy


def _is_slow(loss: Loss, batch_size: int, seed: int) -> bool:
    """Whether a call would be slow over the whole vocabulary, as for a loss that builds and inverts an output layer."""
    first, second = (_seconds(loss, batch_size, vocabulary, seed) for vocabulary in _TRIAL_VOCABULARIES)
    # Between a constant cost and a cubic one, whatever the clock says.
    growth = min(max(second / max(first, 1e-9), 1.0), 8.0)
    doublings = math.log2(_VOCABULARY / _TRIAL_VOCABULARIES[1])
    return second * growth**doublings > _SLOW_SECONDS


def _seconds(loss: Loss, batch_size: int, vocabulary: int, seed: int) -> float:
    """CPU time of one call, the shorter of two."""
    batch = _realistic_batch(torch.float64, batch_size, vocabulary, seed)
    taken = []
    for _ in range(2):
        start = time.process_time()
        with contextlib.suppress(_RefusalError):
            _gradient(loss, batch)
        taken.append(time.process_time() - start)
    return min(taken)


def _realistic_batch(dtype: torch.dtype, batch_size: int, vocabulary: int, seed: int) -> Rollouts:
    student, teacher = realistic_logits(_TOKENS, vocabulary, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    tokens = torch.multinomial(student.softmax(-1), 1, generator=generator).squeeze(-1)
    rows = -(-_TOKENS // batch_size) * batch_size
    index = (torch.arange(rows) % _TOKENS).view(batch_size, -1)
    return _rollouts(student[index], teacher[index], tokens[index], dtype)


def _realistic(loss: Loss, dtype: str, batch_size: int, vocabulary: int, seed: int) -> DtypeResult:
    found = _compare(loss, _realistic_batch(DTYPES[dtype], batch_size, vocabulary, seed), None)
    sizes = sorted(token.size for token in found)
    negligible = _NEGLIGIBLE * sizes[len(sizes) // 2] if sizes else 0.0
    return _result(dtype, "realistic", found, negligible, f", over {vocabulary} tokens,")


def _adversarial(loss: Loss, dtype: str, batch_size: int) -> DtypeResult:
    found: list[_Token] = []
    for likely, log_ratios in _LOG_RATIOS.items():
        for log_u in (sign * t for t in log_ratios for sign in (1, -1)):
            found += _one_token(loss, DTYPES[dtype], log_u, likely, batch_size)
    scale = max((token.size for token in found if 0.1 < abs(token.log_u) < 2.0), default=0.0)
    found += _bisected(loss, DTYPES[dtype], found, batch_size)
    return _result(dtype, "adversarial", found, _NEGLIGIBLE * scale, "")


def _bisected(loss: Loss, dtype: torch.dtype, found: list[_Token], batch_size: int) -> list[_Token]:
    """Tokens that bracket the log-ratio where an overflow starts, for either sign."""
    more = []
    for sign in (1, -1):
        side = sorted((abs(t.log_u), math.isnan(t.error)) for t in found if sign * t.log_u > 0)
        first = next((u for u, bad in side if bad), None)
        if first is None:
            continue
        low, high = max((u for u, bad in side if not bad and u < first), default=0.0), first
        for _ in range(_BISECTIONS):
            middle = (low + high) / 2
            bad = [t for t in _one_token(loss, dtype, sign * middle, _ORDINARY, batch_size) if math.isnan(t.error)]
            more += bad
            low, high = (low, middle) if bad else (middle, high)
    return more


def _one_token(loss: Loss, dtype: torch.dtype, log_u: float, likely: float, batch_size: int) -> list[_Token]:
    """A rollout of one token with this log-ratio, compared; the rest of the batch is ordinary."""
    log_p = [likely - max(log_u, 0.0)] + [math.log(0.25)] * (batch_size - 1)
    others = [0.7 * (-1.0) ** i for i in range(batch_size - 1)]
    log_q = [likely + min(log_u, 0.0)] + [math.log(0.25) + t for t in others]
    student, teacher = (_row(torch.tensor(x, dtype=torch.float64)).unsqueeze(1) for x in (log_p, log_q))
    tokens = torch.zeros(batch_size, 1, dtype=torch.int64)
    return _compare(loss, _rollouts(student, teacher, tokens, dtype), 1)


def _row(log_p: Float[Tensor, " B"]) -> Float[Tensor, "B V"]:
    """Log-probabilities of a first token, and of the others, which share the rest."""
    rest = torch.log(-torch.expm1(log_p)) - math.log(_FEW - 1)
    return torch.cat([log_p.unsqueeze(-1), rest.unsqueeze(-1).expand(-1, _FEW - 1)], dim=-1)


def _rollouts(student: Tensor, teacher: Tensor, tokens: Tensor, dtype: torch.dtype) -> Rollouts:
    """A detached batch in a dtype; log-probabilities are computed in float64 and then rounded."""
    return _cast(Rollouts.from_logits(tokens, student, teacher), dtype)


def _cast(rollouts: Rollouts, dtype: torch.dtype) -> Rollouts:
    return _with(rollouts, **{name: x.to(dtype) for name, x in vars(rollouts).items() if x.is_floating_point()})


def _with(rollouts: Rollouts, **fields: Tensor) -> Rollouts:
    # Validating hundreds of one-token batches would take longer than the losses.
    return Rollouts.unchecked(**{**vars(rollouts), **fields})


def _compare(loss: Loss, rollouts: Rollouts, first: int | None) -> list[_Token]:
    """Each token's gradient compared with float64's on the same numbers, for the first rollouts or for all."""
    wide = _cast(rollouts, torch.float64)
    try:
        exact = _gradient(loss, wide)
    except _RefusalError as error:
        shape = tuple(rollouts.student_logits.shape)
        raise _RefusalError(f"{error} (in float64 too, on logits of shape {shape})") from error
    narrow = _gradient(loss, rollouts)
    log_u = wide.log_u[:first].flatten().tolist()
    return [
        token
        for args in zip(log_u, narrow[:first].flatten(0, 1), exact[:first].flatten(0, 1), strict=True)
        if (token := _token(*args)) is not None
    ]


def _gradient(loss: Loss, rollouts: Rollouts) -> Float[Tensor, "B T entries"]:
    """The gradient in each token's log-probability and logits, as float64."""
    logprobs = rollouts.student_logprobs.detach().clone().requires_grad_()
    logits = rollouts.student_logits.detach().clone().requires_grad_()
    try:
        with torch.enable_grad():
            value = loss(_with(rollouts, student_logprobs=logprobs, student_logits=logits))
        gradients = torch.autograd.grad(value, (logprobs, logits), allow_unused=True)
    except Exception as error:  # whatever the loss raises is the finding
        reason = str(error).strip().splitlines() or [""]
        raise _RefusalError(f"{type(error).__name__}: {reason[0]}") from error
    by_token, by_logit = (
        torch.zeros_like(x) if g is None else g for g, x in zip(gradients, (logprobs, logits), strict=True)
    )
    return torch.cat([by_token.unsqueeze(-1), by_logit], dim=-1).double()


def _token(log_u: float, narrow: Tensor, exact: Tensor) -> _Token | None:
    """The comparison of one token; None where float64 itself is not finite."""
    size = float(exact.norm())
    if not math.isfinite(size):
        return None
    if not bool(torch.isfinite(narrow).all()):
        return _Token(log_u, size, math.nan, math.nan, math.nan)
    length = float(narrow.norm())
    scale = max(size, 1e-300)
    error = float((narrow - exact).norm()) / scale
    cosine = float(narrow @ exact) / (size * length) if size * length > 0.0 else 0.0
    return _Token(log_u, size, error, cosine, length / scale)


def _result(dtype: str, regime: Regime, found: list[_Token], negligible: float, over: str) -> DtypeResult:
    # A gradient that is negligible in float64 may be lost, but may not overflow.
    overflow = _nearest([t.log_u for t in found if math.isnan(t.error)])
    telling = [t for t in found if not math.isnan(t.error) and t.size > negligible]
    lost = _nearest([t.log_u for t in telling if t.kept < _LOST])
    turned = _nearest([t.log_u for t in telling if t.kept >= _LOST and t.cosine < 0])
    worst = max(telling, key=lambda t: t.error, default=None)
    words = _words(overflow, lost, turned, worst)
    error = math.nan if worst is None else worst.error
    return DtypeResult(dtype, regime, overflow, lost, turned, error, f"In {dtype}{over} the gradient {words}.")


def _words(
    overflow: list[float] | None, lost: list[float] | None, turned: list[float] | None, worst: _Token | None
) -> str:
    parts = [
        f"{verb} log u = {' and '.join(f'{x:.3g}' for x in where)}"
        for verb, where in (("overflows from", overflow), ("is lost at", lost), ("changes sign at", turned))
        if where is not None
    ]
    if worst is not None:
        off = f"is off by up to {_share(worst.error)} (at log u = {worst.log_u:.3g})" if worst.error else "is exact"
        parts.append(f"where finite it {off}" if parts else off)
    return ", ".join(parts) or "is negligible"


def _share(error: float) -> str:
    if error > 0.995:
        return f"{error:.2g} times itself"
    return f"{100.0 * error:.2g}%" if error > 1e-4 else f"{error:.1g} of itself"


def _nearest(log_u: list[float]) -> list[float] | None:
    """The log-ratio nearest to zero of either sign, in ascending order."""
    below, above = [x for x in log_u if x < 0], [x for x in log_u if x >= 0]
    return ([max(below)] if below else []) + ([min(above)] if above else []) or None
