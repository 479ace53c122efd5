"""Calls of `Rollouts` and of the estimators on them, beside plain sums over tokens."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor

import opdtheory as opd
from opdtheory import Rollouts
from tests.fuzz.calls import Call, Parts, chosen
from tests.fuzz.corruptions import FLOATS, rearranged, strange

__all__ = ["estimators", "options", "rollouts"]

_DIGITS = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def _fields(rng: random.Random, dtypes: tuple[torch.dtype, ...]) -> dict[str, Any]:
    batch, length, size = chosen(rng, 1, 2, 3), chosen(rng, 1, 2, 4), chosen(rng, 2, 5)
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    shape = (batch, length)
    tokens = torch.randint(size, shape, generator=generator)
    mask = torch.randint(2, shape, generator=generator).double()
    mask[:, 0] = 1.0
    logits = [torch.randn(*shape, size, generator=generator, dtype=torch.float64) for _ in range(3)]
    gathered = [torch.log_softmax(z, -1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for z in logits]
    dtype = chosen(rng, *dtypes)
    return {
        "tokens": tokens,
        "mask": mask.to(dtype),
        "student_logits": logits[0].to(dtype),
        "teacher_logits": logits[1].to(dtype),
        "student_logprobs": gathered[0].to(dtype),
        "teacher_logprobs": gathered[1].to(dtype),
        "behavior_logprobs": gathered[2].to(dtype),
    }


def _spoilt(rng: random.Random, name: str, fields: dict[str, Any]) -> Any:
    """Something in place of a field that is not one."""
    value: Tensor = fields[name]
    if rng.random() < 0.4:
        return strange(rng, value)
    if name == "tokens":
        wrong = value.clone()
        wrong[0, 0] = chosen(rng, -1, fields["student_logits"].shape[-1], 2**40)
        return chosen(rng, wrong, value.to(torch.int32), value.double(), value[:0], value.bool())
    wrong = value.clone()
    if name == "mask":
        wrong[0, 0] = chosen(rng, 0.5, 2.0, -1.0, torch.nan, torch.inf)
        return chosen(rng, wrong, value.bool(), value.long())
    if name.endswith("logits"):
        wrong[0, 0, 0] = chosen(rng, torch.nan, torch.inf)
        return chosen(rng, wrong, value.long(), value.masked_fill(torch.ones_like(value, dtype=torch.bool), -torch.inf))
    # The first position is not masked.
    wrong[0, 0] = chosen(rng, torch.nan, torch.inf, 1.0)
    return chosen(rng, wrong, value.long())


def rollouts(rng: random.Random) -> Call:
    """The constructor, `from_logits`, the reductions and the top-k payload."""
    fields = _fields(rng, FLOATS)
    by_logits = rng.random() < 0.4
    if by_logits:
        fields = {name: fields[name] for name in ("tokens", "student_logits", "teacher_logits", "mask")}
    arguments = {name: rearranged(rng, value) for name, value in fields.items()}
    bad: set[str] = set()
    if rng.random() < 0.5:
        name = chosen(rng, *arguments)
        arguments[name] = _spoilt(rng, name, fields)
        if by_logits and name == "mask" and arguments[name] is None:
            arguments[name] = "none"
        # A field of another shape makes others the wrong ones.
        bad |= set(fields)
    method = chosen(rng, "token_sum", "sequence_mean", "token_mean", "labels", "log_u", "teacher_top_k")

    def run() -> Parts:
        r = Rollouts.from_logits(**arguments) if by_logits else Rollouts(**arguments)
        if method in ("labels", "log_u"):
            return [getattr(r, method)]
        return list(r.teacher_top_k(2)) if method == "teacher_top_k" else [getattr(r, method)(r.log_u)]

    def expected() -> Parts:
        tokens, mask = fields["tokens"], fields["mask"].double()
        if method == "labels":
            return [torch.where(mask > 0, tokens, -100)]
        logs = [torch.log_softmax(fields[f"{who}_logits"].double(), -1) for who in ("student", "teacher")]
        if method == "teacher_top_k":
            values, ids = torch.sort(logs[1], dim=-1, descending=True, stable=True)
            return [ids[..., :2], values[..., :2]]
        if by_logits:
            own = [log.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for log in logs]
        else:
            own = [fields[f"{who}_logprobs"].double() for who in ("student", "teacher")]
        log_u = own[1] - own[0]
        if method == "log_u":
            return [log_u]
        per_rollout, lengths = (mask * log_u).sum(-1), mask.sum(-1)
        means = {"token_sum": per_rollout.mean(), "sequence_mean": (per_rollout / lengths).mean()}
        return [means.get(method, per_rollout.sum() / lengths.sum())]

    digits = _DIGITS[fields["mask"].dtype]
    # In narrow dtypes equal logits are sorted by token, and their order may differ from that of wider ones.
    if method == "teacher_top_k" and fields["mask"].dtype != torch.float64:
        digits = max(digits, 5.0)
    return Call("Rollouts.from_logits" if by_logits else "Rollouts", arguments, run, expected, bad, (digits,))


_PLAIN: dict[str, Any] = {
    "opd": lambda d, t: -d.generator(t),
    "opd_plus": lambda d, t: d.weight(t),
    "k2_loss": lambda d, t: t,
    "k3_loss": lambda d, t: torch.expm1(t),
    "sign": lambda d, t: t.sign(),
}


def estimators(rng: random.Random) -> Call:
    """The gradient of an estimator, beside its score-function or whole-vocabulary sum."""
    name = chosen(rng, *_PLAIN, "full_vocab")
    divergence = chosen(rng, "reverse_kl", "forward_kl", "jsd", "chi2", "alpha(alpha=0.4)")
    reduction = chosen(rng, "token_sum", "sequence_mean", "token_mean")
    fields = _fields(rng, (torch.float64, torch.float32))
    arguments = {name: rearranged(rng, value) for name, value in fields.items()}
    takes = name in ("opd", "opd_plus", "full_vocab")

    def run() -> Parts:
        leaf = arguments["student_logits"].detach().requires_grad_()
        mask = arguments["mask"]
        r = Rollouts.from_logits(arguments["tokens"], leaf, arguments["teacher_logits"], mask)
        loss = opd.estimator(name, *([divergence] if takes else []), reduction=reduction)(r)
        return list(torch.autograd.grad(loss, leaf))

    def expected() -> Parts:
        tokens, mask = fields["tokens"], fields["mask"].double()
        log_p, log_q = (torch.log_softmax(fields[f"{who}_logits"].double(), -1) for who in ("student", "teacher"))
        p, d = log_p.exp(), opd.divergence(divergence)
        if name == "full_vocab":
            weight = d.weight(log_q - log_p)
            gradient = -p * (weight - (p * weight).sum(-1, keepdim=True))
        else:
            at = tokens.unsqueeze(-1)
            weight = _PLAIN[name](d, (log_q - log_p).gather(-1, at))
            gradient = -weight * (torch.zeros_like(p).scatter(-1, at, 1.0) - p)
        scale = {
            "token_sum": torch.full_like(mask, 1 / len(mask)),
            "sequence_mean": (1 / (mask.sum(-1, keepdim=True) * len(mask))).expand_as(mask),
            "token_mean": torch.full_like(mask, 1 / float(mask.sum())),
        }[reduction]
        return [gradient * (mask * scale).unsqueeze(-1)]

    tolerance = 1e-9 if fields["mask"].dtype == torch.float64 else 1e-3
    return Call(f"estimator({name}, {divergence}, {reduction})", arguments, run, expected, set(), (tolerance,))


_OPTIONS: dict[str, tuple[tuple[Any, ...], tuple[Any, ...]]] = {
    "reduction": (("token_sum", "sequence_mean", "token_mean"), ("mean", 3, None, "")),
    "clip_log_ratio": ((0.5, 3, None), (-1, 0, float("nan"), "1", True, [1])),
    "clip_weight": (((0.5, 1.5), None), ((1.5, 0.5), 3, "x", (1,), (float("nan"), 1.0))),
    "importance": ((None, "token", "prefix", "ppo"), ("none", 1, True)),
    "baseline": ((None, "vocabulary"), ("mean", 0, True)),
}


def options(rng: random.Random) -> Call:
    """`estimator(name, divergence, **options)`: a finite loss, or a refusal that names what is wrong."""
    name, arguments, bad = "opd_plus", {}, set()
    for option in rng.sample(sorted(_OPTIONS), rng.randrange(1, 4)):
        right, wrong = _OPTIONS[option]
        if rng.random() < 0.25:
            arguments[option] = chosen(rng, *wrong)
            bad.add(option)
        else:
            arguments[option] = chosen(rng, *right)
    if rng.random() < 0.15:
        how = rng.randrange(3)
        if how == 0:
            name = chosen(rng, "opd+", "", 3, None, "OPD")
            bad |= {"name", "estimator"}
        elif how == 1:
            arguments["k"] = 3
            bad.add("k")
        else:
            arguments["divergence"] = chosen(rng, "kl", 3, None, "jsd(1)")
            bad |= {"divergence"}
    divergence = arguments.pop("divergence", "jsd") if "divergence" in arguments else "jsd"
    fields = _fields(rng, (torch.float64,))

    def run() -> Parts:
        loss = opd.estimator(name, divergence, **arguments)(Rollouts(**fields))
        return [torch.isfinite(loss).double()]

    shown = {"name": name, "divergence": divergence, **arguments}
    return Call("estimator", shown, run, lambda: [torch.ones(()).double()], bad)
