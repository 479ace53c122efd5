"""Calls of the fused losses, beside a textbook sum in float64."""

from __future__ import annotations

import math
import random
from typing import Any

import torch
from torch import Tensor

import opdtheory as opd
from tests.fuzz.calls import Call, Parts, chosen
from tests.fuzz.corruptions import FLOATS, JUNK, NOT_POSITIVE, harmed, rearranged, strange

__all__ = ["fused", "linear", "top_k"]

NAMES = (
    "reverse_kl",
    "forward_kl",
    "jsd",
    "skew_jsd(beta=0.3)",
    "chi2",
    "neyman_chi2",
    "hellinger",
    "total_variation",
    "le_cam",
    "jeffreys",
    "alpha(alpha=0.4)",
    "alpha(alpha=1.5)",
    "skew_forward_kl(lam=0.2)",
    "skew_reverse_kl(lam=0.2)",
    "skew_jsd(beta=0.01)",
)
# Of values and gradients, on the scale of the largest: by the dtype that results.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 3e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def textbook(student: Tensor, teacher: Tensor, name: Any, weights: Tensor, temperature: float) -> Parts:
    """Value and gradient of the weighted sum, position by position, with T10's conventions."""
    d = opd.divergence(name)
    log_p, log_q = (torch.log_softmax(z.detach().double() / temperature, -1) for z in (student, teacher))
    in_p, in_q = log_p > -math.inf, log_q > -math.inf
    both = in_p & in_q
    log_u = torch.where(both, log_q - log_p, 0.0)
    p, q = log_p.exp(), log_q.exp()
    terms = torch.where(both, p * d.generator(log_u), 0.0)
    terms = terms + _times(p, in_p & ~in_q, d.at_zero) + _times(q, in_q & ~in_p, d.slope_at_infinity)
    mass = torch.where(both, p * d.weight(log_u), 0.0) - _times(p, in_p & ~in_q, d.at_zero)
    mass = torch.where(torch.isfinite(mass), mass, 0.0)
    gradient = -(mass - p * mass.sum(-1, keepdim=True)) * weights.unsqueeze(-1) / temperature
    seen = weights != 0
    return [torch.where(seen, weights * terms.sum(-1), 0.0), torch.where(seen.unsqueeze(-1), gradient, 0.0)]


def _times(mass: Tensor, where: Tensor, limit: float) -> Tensor:
    return torch.where(where, mass * limit, 0.0) if math.isfinite(limit) else torch.where(where, limit, 0.0).double()


def _batch(rng: random.Random) -> tuple[int, ...]:
    return chosen(rng, (), (1,), (3,), (2, 2), (0,), (2, 0), (1, 1, 2))


def _logits(rng: random.Random, shape: tuple[int, ...]) -> Tensor:
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    values = chosen(rng, 0.0, 1.0, 1.0, 4.0) * torch.randn(shape, generator=generator, dtype=torch.float64)
    values = values + chosen(rng, 0.0, 0.0, 30.0)
    if rng.random() < 0.2 and values.numel() and shape[-1] > 1:
        # Not the first token, so that no row is without a distribution.
        values[..., 1 + rng.randrange(shape[-1] - 1)] = -torch.inf
    return values


def _mask(rng: random.Random, batch: tuple[int, ...], row: tuple[int, ...]) -> Tensor | None:
    if rng.random() < 0.4:
        return None
    generator = torch.Generator().manual_seed(rng.randrange(2**31))
    mask = torch.randint(2, batch, generator=generator).double()
    if rng.random() < 0.3:
        mask = mask * 0.25 - 0.5
    if not mask.numel():
        return mask
    # The corrupted rows are not skipped.
    mask[row] = 1.0
    dtypes = (
        (torch.float64, torch.float32, torch.float16) if bool((mask % 1).any()) else (*FLOATS, torch.int64, torch.uint8)
    )
    if bool((mask < 0).any()) and not bool((mask % 1).any()):
        dtypes = (torch.float64, torch.int64, torch.int32)
    elif bool(((mask == 0) | (mask == 1)).all()):
        dtypes = (*dtypes, torch.bool)
    return mask.to(chosen(rng, *dtypes))


def _common(rng: random.Random, batch: tuple[int, ...]) -> tuple[dict[str, Any], tuple[int, ...], set[str]]:
    row = tuple(rng.randrange(n) if n else 0 for n in batch)
    arguments: dict[str, Any] = {
        "divergence": chosen(rng, *NAMES),
        "mask": _mask(rng, batch, row),
        "temperature": chosen(rng, 1.0, 1.0, 0.5, 2, 3.7),
        "chunk_size": chosen(rng, None, None, 1, 2, 1000),
    }
    bad: set[str] = set()
    if rng.random() < 0.35:
        name = chosen(rng, *arguments)
        bad.add(name)
        if name == "divergence":
            arguments[name] = chosen(rng, "kl", "", None, 3, "alpha", "jsd(beta=0.5)", "skew_jsd(beta=2)", object())
            # An entry's own parameter may be what is named.
            bad |= {"alpha", "beta"}
        elif name == "mask":
            arguments[name] = _wrong_mask(rng, batch, row)
        elif name == "temperature":
            arguments[name] = chosen(rng, *NOT_POSITIVE)
        else:
            arguments[name] = chosen(rng, 0, -3, 1.5, True, "2", [1])
    return arguments, row, bad


def _wrong_mask(rng: random.Random, batch: tuple[int, ...], row: tuple[int, ...]) -> Any:
    ones = torch.ones(batch)
    if math.prod(batch) and rng.random() < 0.4:
        ones[row] = chosen(rng, torch.nan, torch.inf, -torch.inf)
        return ones
    junk = [torch.ones(*batch, 1), torch.ones((*batch, 3)), ones.to("meta"), ones.to(torch.complex64), 1.0, "1", [1.0]]
    return chosen(rng, *junk, torch.ones(batch, requires_grad=True))


def _weights(mask: Tensor | None, batch: tuple[int, ...]) -> Tensor:
    return torch.ones(batch, dtype=torch.float64) if mask is None else mask.double()


def _damaged(rng: random.Random, arguments: dict[str, Any], name: str, row: tuple[int, ...], bad: set[str]) -> None:
    tensor = arguments[name]
    if not tensor.numel():
        arguments[name] = chosen(rng, *JUNK)
    else:
        arguments[name] = harmed(rng, tensor, row)
    bad.add(name)


def fused(rng: random.Random) -> Call:
    """A call of `fused_divergence`, value and gradient."""
    batch, size = _batch(rng), chosen(rng, 1, 2, 5, 17)
    tail, row, bad = _common(rng, batch)
    arguments: dict[str, Any] = {
        name: rearranged(rng, _logits(rng, (*batch, size)).to(chosen(rng, *FLOATS)))
        for name in ("student_logits", "teacher_logits")
    }
    if rng.random() < 0.35:
        _damaged(rng, arguments, chosen(rng, *arguments), row, bad)
        # Another shape or device of the one is a mismatch of the other.
        bad |= {"student_logits", "teacher_logits", "mask"}
    arguments |= tail
    student = arguments["student_logits"]
    recorded = rng.random() < 0.8
    if recorded and isinstance(student, Tensor) and student.is_floating_point():
        arguments["student_logits"] = student = student.detach().requires_grad_()

    def run() -> Parts:
        return _descended(opd.fused_divergence(**arguments), [student] if recorded else [], not bad)

    def expected() -> Parts:
        weights = _weights(arguments["mask"], batch)
        teacher = arguments["teacher_logits"]
        value, slope = textbook(student, teacher, arguments["divergence"], weights, arguments["temperature"])
        # The gradient is rounded to the student's dtype, and may leave its range.
        return [value, slope.to(student.dtype)] if recorded else [value]

    both = [arguments[name].dtype for name in ("student_logits", "teacher_logits")] if not bad else []
    value = torch.float64 if torch.float64 in both else torch.float32
    slope = _TOLERANCE[student.dtype] if both else 0.0
    return Call("fused_divergence", arguments, run, expected, bad, (_TOLERANCE[value], max(slope, _TOLERANCE[value])))


def _descended(values: Tensor, leaves: list[Tensor], upstream: bool) -> Parts:
    if not leaves or not upstream:
        return [values]
    return [values, *torch.autograd.grad(values.sum(), leaves)]


def linear(rng: random.Random) -> Call:
    """A call of `fused_linear_divergence`, with the gradients of hidden states and head."""
    batch, size = _batch(rng), chosen(rng, 2, 5, 9)
    tail, row, bad = _common(rng, batch)
    dtype = chosen(rng, torch.float64, torch.float32)
    arguments: dict[str, Any] = {}
    for who, width in (("student", chosen(rng, 1, 3)), ("teacher", chosen(rng, 2, 4))):
        generator = torch.Generator().manual_seed(rng.randrange(2**31))
        for part, shape in (("hidden", (*batch, width)), ("head", (size, width))):
            tensor = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
            arguments[f"{who}_{part}"] = rearranged(rng, tensor)
    if rng.random() < 0.35:
        name = chosen(rng, *arguments)
        arguments[name] = _harmed_factor(rng, arguments[name], math.prod(batch))
        bad |= {*arguments, "logits", "mask"}
    arguments |= tail
    leaves: list[Tensor] = []
    for name in ("student_hidden", "student_head"):
        if isinstance(arguments[name], Tensor) and arguments[name].is_floating_point():
            arguments[name] = arguments[name].detach().requires_grad_()
            leaves.append(arguments[name])

    def run() -> Parts:
        return _descended(opd.fused_linear_divergence(**arguments), leaves, not bad)

    def expected() -> Parts:
        copies = [leaf.detach().double().requires_grad_() for leaf in leaves]
        logits = copies[0] @ copies[1].T
        teacher = arguments["teacher_hidden"].double() @ arguments["teacher_head"].double().T
        weights = _weights(arguments["mask"], batch)
        values, slope = textbook(logits, teacher, arguments["divergence"], weights, arguments["temperature"])
        return [values, *torch.autograd.grad(logits, copies, slope)]

    return Call("fused_linear_divergence", arguments, run, expected, bad, (10 * _TOLERANCE[dtype],))


def _harmed_factor(rng: random.Random, tensor: Tensor, positions: int) -> Any:
    if not tensor.numel() or rng.random() < 0.5:
        return chosen(rng, *JUNK, tensor.unsqueeze(0), tensor.to("meta"), tensor.to(torch.complex64), tensor[..., :0])
    if rng.random() < 0.4:
        return tensor.to(chosen(rng, torch.int64, torch.bool))
    # NaN everywhere, as a single entry may be at a position of weight zero; without positions nothing is checked.
    return torch.full_like(tensor, torch.nan) if positions else None


def top_k(rng: random.Random) -> Call:
    """A call of `fused_top_k_divergence`, value and gradient."""
    batch, size = _batch(rng), chosen(rng, 2, 5, 9)
    kept = chosen(rng, 1, 2, size)
    tail, row, bad = _common(rng, batch)
    student = _logits(rng, (*batch, size)).to(chosen(rng, *FLOATS))
    log_q = torch.log_softmax(_logits(rng, (*batch, size)), -1)
    ids = log_q.topk(kept).indices
    arguments: dict[str, Any] = {
        "student_logits": rearranged(rng, student),
        "teacher_ids": rearranged(rng, ids),
        "teacher_logprobs": rearranged(rng, log_q.gather(-1, ids).to(chosen(rng, torch.float64, torch.float32))),
    }
    if rng.random() < 0.4:
        name = chosen(rng, *arguments)
        if name == "student_logits":
            _damaged(rng, arguments, name, row, bad)
            if isinstance(arguments[name], Tensor) and arguments[name].shape[-1:] == (size + 1,):
                # A larger vocabulary holds the tokens too.
                arguments[name] = student[..., :0]
        elif name == "teacher_ids":
            arguments[name] = _wrong_ids(rng, ids, size, row)
        else:
            arguments[name] = _wrong_logprobs(rng, arguments[name], row)
        bad |= {"student_logits", "teacher_ids", "teacher_logprobs", "mask"}
    arguments |= tail
    leaf = arguments["student_logits"]
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        arguments["student_logits"] = leaf = leaf.detach().requires_grad_()
    # At the kink any subgradient is right, and rounding chooses.
    leaves = [] if arguments["divergence"] == "total_variation" else [leaf]

    def run() -> Parts:
        return _descended(opd.fused_top_k_divergence(**arguments), leaves, not bad)

    def expected() -> Parts:
        z = leaf.detach().double().requires_grad_()
        p = torch.softmax(z / arguments["temperature"], -1)
        chosen_p = p.gather(-1, arguments["teacher_ids"])
        whole = kept == size
        logprobs = arguments["teacher_logprobs"].double()
        rest_q = (
            torch.zeros_like(logprobs[..., :1]) if whole else (1 - logprobs.exp().sum(-1, keepdim=True)).clamp(min=0)
        )
        others = torch.ones_like(p).scatter(-1, arguments["teacher_ids"], 0.0)
        coarse_p = torch.cat([chosen_p, (p * others).sum(-1, keepdim=True)], -1)
        coarse_q = torch.cat([logprobs.exp(), rest_q], -1)
        weights = _weights(arguments["mask"], batch)
        values, slope = textbook(coarse_p.detach().log(), coarse_q.log(), arguments["divergence"], weights, 1.0)
        # The slope in the logarithms of the coarse distribution, whose normaliser is one.
        (gradient,) = torch.autograd.grad(coarse_p.clamp(min=1e-300).log(), z, torch.nan_to_num(slope))
        return [values, gradient.to(leaf.dtype)] if leaves else [values]

    tolerance = 1e-7 if not bad and leaf.dtype == torch.float64 else 1e-4
    if not bad and leaf.dtype in (torch.bfloat16, torch.float16):
        tolerance = 2e-2
    return Call("fused_top_k_divergence", arguments, run, expected, bad, (min(tolerance, 1e-4), tolerance))


def _wrong_ids(rng: random.Random, ids: Tensor, size: int, row: tuple[int, ...]) -> Any:
    if not ids.numel() or rng.random() < 0.5:
        return chosen(rng, *JUNK, ids.to(torch.int32), ids.double(), ids.unsqueeze(0), ids[..., :0], ids.to("meta"))
    wrong = ids.clone()
    if ids.shape[-1] > 1 and rng.random() < 0.5:
        wrong[row] = wrong[row][0].clone()
        return wrong
    wrong[(*row, 0)] = chosen(rng, -1, size, 2**40)
    return wrong


def _wrong_logprobs(rng: random.Random, logprobs: Tensor, row: tuple[int, ...]) -> Any:
    if not logprobs.numel() or rng.random() < 0.5:
        return strange(rng, logprobs) if logprobs.numel() else chosen(rng, *JUNK)
    wrong = logprobs.clone()
    wrong[(*row, 0)] = chosen(rng, torch.nan, torch.inf, 1.0)
    return wrong
