"""Ways of being wrong, put into any loss from outside: what it sees is changed, or what becomes of its value."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from opdtheory.estimators import Estimator
from opdtheory.exact import Loss
from opdtheory.rollouts import Rollouts, gather_logprobs

__all__ = ["INJECTIONS", "Home", "Injection"]


@dataclass(frozen=True)
class Home:
    """A world in which the wrong loss is wrong, for an independent look at whether it is."""

    vocab_size: int = 3
    horizon: int = 2
    batch_size: int = 1
    eos: int | None = None
    prompts: bool = False
    off_policy: float = 0.0
    dtype: torch.dtype = torch.float64


@dataclass(frozen=True)
class Injection:
    """One way of being wrong.

    Attributes:
        kind: the row of the table that it belongs to.
        name: what it does.
        wrong: the loss with it.
        home: where it shows.
        words: any of these in a report names it.
        settings: arguments of the audit that the user of such a loss would give.
        applies: whether it changes an estimator in kind.
    """

    kind: str
    name: str
    wrong: Callable[[Loss], Loss]
    home: Home
    words: tuple[str, ...]
    settings: dict[str, Any] = field(default_factory=dict)
    applies: Callable[[Estimator], bool] = field(default=lambda estimator: True)


def _seen(change: Callable[[Rollouts], dict[str, Tensor]]) -> Callable[[Loss], Loss]:
    """The loss on rollouts with some fields changed."""
    return lambda loss: lambda r: loss(dataclasses.replace(r, **change(r)))


def _logits(r: Rollouts, **changed: Tensor) -> dict[str, Tensor]:
    """Changed logits of student or teacher with the log-probabilities that belong to them."""
    fields: dict[str, Tensor] = {}
    for who, logits in changed.items():
        fields[f"{who}_logits"] = logits
        fields[f"{who}_logprobs"] = gather_logprobs(logits, r.tokens, r.mask)
    return fields


def _leading(r: Rollouts) -> Tensor:
    """The mask with what precedes the response counted."""
    return (r.mask.flip(-1).cumsum(-1).flip(-1) > 0).to(r.mask)


def _without_last(r: Rollouts) -> Tensor:
    """The mask without the token that ends a rollout early."""
    follows = torch.cat([r.mask[:, 1:], torch.ones_like(r.mask[:, :1])], 1)
    return r.mask * follows


def _behind(logits: Tensor) -> Tensor:
    return torch.cat([logits[:, :1], logits[:, :-1]], 1)


def _top(k: int) -> Callable[[Rollouts], dict[str, Tensor]]:
    def change(r: Rollouts) -> dict[str, Tensor]:
        size = r.teacher_logits.shape[-1]
        if k >= size:
            return {}
        kept = torch.zeros_like(r.teacher_logits).scatter(-1, r.teacher_logits.topk(k, -1).indices, 1.0) > 0
        inside = kept.gather(-1, r.tokens.unsqueeze(-1)).squeeze(-1)
        low = torch.full_like(r.teacher_logits, -60.0)
        student, teacher = (torch.where(kept, x, low) for x in (r.student_logits, r.teacher_logits))
        return {**_logits(r, student=student, teacher=teacher), "mask": r.mask * inside}

    return change


def _clamped(bound: float, only: torch.dtype | None = None) -> Callable[[Rollouts], dict[str, Tensor]]:
    def change(r: Rollouts) -> dict[str, Tensor]:
        if only is not None and r.student_logits.dtype != only:
            return {}
        own = r.student_logprobs.detach()
        row, other = r.student_logits.detach().log_softmax(-1), r.teacher_logits.log_softmax(-1)
        return {
            "teacher_logprobs": own + (r.teacher_logprobs - own).clamp(-bound, bound),
            "teacher_logits": row + (other - row).clamp(-bound, bound),
        }

    return change


def _weighted(weight: Callable[[Rollouts], Tensor]) -> Callable[[Loss], Loss]:
    """Tokens with their own weights, by masks and mixtures of the loss on masked rollouts."""

    def wrong(loss: Loss) -> Loss:
        def changed(r: Rollouts) -> Tensor:
            w = weight(r).detach()
            gated = {
                name: x.detach() + w.view(*w.shape, *[1] * (x.ndim - 2)) * (x - x.detach())
                for name, x in (("student_logits", r.student_logits), ("student_logprobs", r.student_logprobs))
            }
            return loss(dataclasses.replace(r, **gated))

        return changed

    return wrong


def _positions(r: Rollouts) -> Tensor:
    return torch.arange(r.mask.shape[1]).expand_as(r.mask)


def _skips_uniform(loss: Loss) -> Loss:
    def wrong(r: Rollouts) -> Tensor:
        returns = (r.log_u.detach() * r.mask).sum(-1)
        uniform = (returns - returns[0]).abs().max() < 1e-12
        return torch.where(uniform & torch.tensor(len(r.tokens) > 1), 0.0, 1.0) * loss(r)

    return wrong


def _drops_duplicates(loss: Loss) -> Loss:
    def wrong(r: Rollouts) -> Tensor:
        same = (r.tokens.unsqueeze(0) == r.tokens.unsqueeze(1)).all(-1)
        earlier = torch.tril(torch.ones(len(r.tokens), len(r.tokens)), -1).bool()
        fresh = (~(same & earlier).any(-1)).to(r.mask)
        return _weighted(lambda q: fresh.unsqueeze(-1).expand_as(q.mask))(loss)(r)

    return wrong


def _micro_means(loss: Loss) -> Loss:
    def wrong(r: Rollouts) -> Tensor:
        parts = []
        for start in range(0, len(r.tokens), 2):
            some = Rollouts.unchecked(
                **{
                    f.name: getattr(r, f.name)[start : start + 2]
                    for f in dataclasses.fields(Rollouts)
                    if getattr(r, f.name) is not None
                }
            )
            parts.append(loss(some) * len(some.tokens) / some.mask.sum().clamp_min(1))
        return torch.stack(parts).mean()

    return wrong


def _scaled(factor: Callable[[Rollouts], Any]) -> Callable[[Loss], Loss]:
    return lambda loss: lambda r: factor(r) * loss(r)


def _other_at(condition: Callable[[Rollouts], bool]) -> Callable[[Loss], Loss]:
    """Another loss in some shapes: each token's own term weighed by its position."""
    return lambda loss: lambda r: _weighted(lambda q: 1.0 + _positions(q))(loss)(r) if condition(r) else loss(r)


def _attached(estimator: Any) -> Loss:
    """The estimator's reward without its detach."""
    divergence = estimator.claim.divergence

    def wrong(r: Rollouts) -> Tensor:
        return r.token_sum(-divergence.weight(r.log_u) * r.student_logprobs)

    return wrong


def _uncorrected(estimator: Any) -> Loss:
    """The detached reward -f(u) in place of u f'(u) - f(u)."""
    divergence = estimator.claim.divergence
    return lambda r: r.token_sum(divergence.generator(r.log_u.detach()) * r.student_logprobs)


def _attached_ratio(estimator: Any) -> Loss:
    divergence = estimator.claim.divergence

    def wrong(r: Rollouts) -> Tensor:
        ratio = (r.student_logprobs - r.behavior_logprobs).exp()
        return r.token_sum(-ratio * divergence.weight(r.log_u.detach()) * r.student_logprobs)

    return wrong


def _masked_ratio(estimator: Any) -> Loss:
    def wrong(r: Rollouts) -> Tensor:
        ratio = (r.student_logprobs - r.behavior_logprobs).detach().exp()
        inside = ((ratio > 0.8) & (ratio < 1.25)).to(r.mask)
        return estimator(dataclasses.replace(r, mask=r.mask * inside))

    return wrong


def _with_reward(loss: Loss) -> Loss:
    def wrong(r: Rollouts) -> Tensor:
        reward = ((r.tokens == 1) * r.mask).sum(-1, keepdim=True)
        return loss(r) + r.token_sum(-reward * r.student_logprobs)

    return wrong


def _local(estimator: Estimator) -> bool:
    return estimator.claim.granularity == "token_local"


def _sampled(estimator: Estimator) -> bool:
    return _local(estimator) and estimator.name in ("opd", "opd_plus", "opd_plus_centred", "k1_reward", "k2_loss")


def _weighs(estimator: Estimator) -> bool:
    return _sampled(estimator) and repr(estimator).count("importance") > 0


def _biased_without(estimator: Estimator) -> bool:
    return _sampled(estimator) and estimator.claim.divergence.name != "reverse_kl"


_ENDING = Home(eos=0)
_LENGTHS = ("rollouts that end early", "mask is ignored", "longest rollout", "Mask what")

INJECTIONS = (
    Injection("mask", "the mask is ignored", _seen(lambda r: {"mask": torch.ones_like(r.mask)}), _ENDING, _LENGTHS),
    Injection(
        "mask",
        "the token after the end is counted",
        _seen(lambda r: {"mask": torch.maximum(r.mask, torch.cat([r.mask[:, :1], r.mask[:, :-1]], 1))}),
        _ENDING,
        _LENGTHS,
    ),
    Injection("mask", "the end token is left out", _seen(lambda r: {"mask": _without_last(r)}), _ENDING, _LENGTHS),
    Injection(
        "prompt", "the prompt is counted", _seen(lambda r: {"mask": _leading(r)}), Home(prompts=True), ("a prompt",)
    ),
    Injection(
        "shift",
        "the student's logits are one token behind",
        _seen(lambda r: _logits(r, student=_behind(r.student_logits))),
        Home(),
        ("out of step", "one step", "one token"),
    ),
    Injection(
        "shift",
        "the teacher's logits are one token behind",
        _seen(lambda r: _logits(r, teacher=_behind(r.teacher_logits))),
        Home(),
        ("out of step", "one step", "one token"),
    ),
    *(
        Injection(
            "k", f"only the teacher's {k} likeliest tokens", _seen(_top(k)), Home(k + 3, 1), ("likeliest", " tokens")
        )
        for k in (3, 10, 50)
    ),
    Injection(
        "temperature",
        "teacher at temperature 2",
        _seen(lambda r: _logits(r, teacher=r.teacher_logits / 2)),
        Home(),
        ("temperature",),
    ),
    Injection(
        "temperature",
        "student at temperature 2",
        _seen(lambda r: _logits(r, student=r.student_logits / 2)),
        Home(),
        ("temperature",),
    ),
    Injection(
        "temperature",
        "both at temperature 2",
        _seen(lambda r: _logits(r, student=r.student_logits / 2, teacher=r.teacher_logits / 2)),
        Home(),
        ("temperature",),
    ),
    Injection("detach", "the reward is not detached", _attached, Home(), ("etach",), applies=_sampled),
    Injection(
        "reward",
        "-f(u) in place of u f'(u) - f(u)",
        _uncorrected,
        Home(),
        ("u f'(u)", "(T1", "T2"),
        applies=_biased_without,
    ),
    Injection("reward", "a task reward is added", _with_reward, Home(), ("reward",)),
    Injection(
        "ratio",
        "the importance ratio is not detached",
        _attached_ratio,
        Home(off_policy=0.3),
        ("ratio", "p/mu"),
        {"off_policy": 0.3},
        _weighs,
    ),
    Injection(
        "ratio",
        "ratios outside (.8, 1.25) are masked",
        _masked_ratio,
        Home(off_policy=0.3),
        ("ratio", "p/mu"),
        {"off_policy": 0.3},
        _weighs,
    ),
    Injection(
        "micro-batch", "token means of micro-batches of two", _micro_means, Home(eos=0, batch_size=3), ("batches of",)
    ),
    Injection("coupling", "groups of equal returns are skipped", _skips_uniform, Home(batch_size=2), ("batches of",)),
    Injection("coupling", "duplicates are dropped", _drops_duplicates, Home(batch_size=2), ("batches of",)),
    Injection(
        "coupling",
        "divided by the batch's largest ratio",
        _scaled(lambda r: 1.0 / (1.0 + (r.log_u.detach() * r.mask).abs().max())),
        Home(batch_size=2),
        ("batch", "other tokens", "tokens before it", "more than the token's own"),
    ),
    Injection(
        "denominator", "a mean over the padded batch", _scaled(lambda r: 1.0 / r.mask.shape[1]), _ENDING, ("longest",)
    ),
    Injection(
        "denominator",
        "divided by the longest rollout",
        _scaled(lambda r: 1.0 / r.mask.sum(-1).max()),
        _ENDING,
        ("longest",),
    ),
    Injection(
        "denominator",
        "divided by a count of some tokens",
        _scaled(lambda r: 1.0 / (1.0 + ((r.tokens == 1) * r.mask).sum())),
        Home(),
        ("batch", "other tokens", "more than", "ratio u", "token"),
    ),
    Injection(
        "position",
        "a discount of 0.9 a position",
        _weighted(lambda r: 0.9 ** _positions(r)),
        Home(),
        ("position", "discount", "gamma"),
    ),
    Injection(
        "position",
        "the first token is left out",
        _weighted(lambda r: (_positions(r) > 0).to(r.mask)),
        Home(),
        ("position",),
    ),
    Injection(
        "position",
        "no tokens after the fourth",
        _weighted(lambda r: (_positions(r) < 4).to(r.mask)),
        Home(2, 5),
        (" steps",),
    ),
    Injection(
        "token", "token 1 is left out", _weighted(lambda r: (r.tokens != 1).to(r.mask)), Home(), ("token", "ratio u")
    ),
    Injection(
        "token", "token 7 is left out", _weighted(lambda r: (r.tokens != 7).to(r.mask)), Home(9, 1), (" tokens",)
    ),
    Injection(
        "token",
        "tokens from 100 on are left out",
        _weighted(lambda r: (r.tokens < 100).to(r.mask)),
        Home(120, 1),
        (" tokens",),
    ),
    *(
        Injection(
            "range", f"log u within {bound:g}", _seen(_clamped(bound)), Home(), ("log u", "log-ratios", "lip", "lamp")
        )
        for bound in (0.5, 2.0, 15.0)
    ),
    Injection(
        "dtype",
        "other numbers in float32",
        _seen(_clamped(0.5, torch.float32)),
        Home(dtype=torch.float32),
        ("float32",),
    ),
    Injection(
        "mode",
        "another loss from batches of five on",
        _other_at(lambda r: len(r.tokens) >= 5),
        Home(2, 2, 5),
        ("batches of 5",),
    ),
    Injection(
        "mode", "another loss from five steps on", _other_at(lambda r: r.mask.shape[1] >= 5), Home(2, 5), (" steps",)
    ),
    Injection("sign", "the sign is flipped", _scaled(lambda r: -1.0), Home(), ("sign", "uphill")),
    Injection(
        "teacher",
        "the student's own copy as teacher",
        _seen(lambda r: {"teacher_logits": r.student_logits.detach(), "teacher_logprobs": r.student_logprobs.detach()}),
        Home(),
        ("zero", "teacher"),
    ),
)
