"""What a GPU benchmark compares: each loss of ours, its textbook formula, compiled and not, and those of packages.

Every loss is the mean over the positions, so that all subjects of a kind compute the same number.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import opdtheory as opd

OURS, EAGER, COMPILED = "ours", "eager", "torch.compile"
LIGER, TRL = "Liger", "TRL"
CHUNKED, FUSED = "Liger's chunked loss", "Liger's fused linear loss"

# What computes each divergence, for each kind of input.
PLAN: dict[str, dict[str, tuple[str, ...]]] = {
    "logits": {
        "reverse_kl": (OURS, EAGER, COMPILED, LIGER),
        "forward_kl": (OURS, EAGER, COMPILED, LIGER),
        "jsd": (OURS, EAGER, COMPILED, LIGER, TRL),
        "hellinger": (OURS, EAGER),
    },
    "hidden": {"jsd": (OURS, EAGER, COMPILED, CHUNKED, FUSED), "reverse_kl": (OURS, EAGER)},
    "frozen": {"jsd": (OURS, EAGER, FUSED)},
    "top_k": {"jsd": (OURS, EAGER, COMPILED), "reverse_kl": (OURS, EAGER)},
    "sampled_tail": {"jsd": (OURS, EAGER)},
}
# Readings and writings of the logits that no loss can do without; the others are held to their matrix products.
TRANSFERS = {"logits": 3, "top_k": 2, "sampled_tail": 2}
# Products as large as the student's logits: two for logits, one for the gradient of the states, one for the head's.
PRODUCTS = {"hidden": 4, "frozen": 3}
K = 64
# Where torch.compile sends the formulas.
BACKEND = "inductor"

Loss = Callable[[], Tensor]
Key = tuple[str, str]


class Inputs(NamedTuple):
    """The tensors of a loss by name, and which of them get a gradient."""

    kind: str
    tensors: dict[str, Tensor]
    leaves: tuple[str, ...]

    @property
    def rows(self) -> int:
        return len(self.tensors["student"])

    @property
    def words(self) -> int:
        return self.tensors["head" if "head" in self.tensors else "student"].shape[0 if "head" in self.tensors else 1]

    def forget(self) -> None:
        """Clear the gradients."""
        for name in self.leaves:
            self.tensors[name].grad = None


# Tensors that belong to no position.
WHOLE = ("head", "teacher_head")


def inputs_of(
    kind: str, rows: int, words: int, width: int, dtype: torch.dtype, device: str, near: bool = False
) -> Inputs:
    """Random inputs with the spread of a language model's logits; `near` puts the teacher next to the student."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    if kind in PRODUCTS:
        student, head = normal(rows, width), (0.05 * normal(words, width)).to(dtype)
        if near:
            teacher, teacher_head = student.to(dtype).float() + 0.03 * normal(rows, width), head.clone()
        else:
            teacher, teacher_head = normal(rows, width), (0.05 * normal(words, width)).to(dtype)
        leaves = ("student", "head") if kind == "hidden" else ("student",)
        held = {"student": student.to(dtype), "head": head}
        held |= {"teacher": teacher.to(dtype), "teacher_head": teacher_head}
    else:
        logits = normal(rows, words).mul_(3.0).to(dtype)
        other = normal(rows, words).mul_(1e-2 if near else 1.0).add_(logits).to(dtype)
        leaves, held = ("student",), {"student": logits, "teacher": other}
        if kind != "logits":
            held = _payload(kind, held, generator)
    for name in leaves:
        held[name].requires_grad_()
    return Inputs(kind, held, leaves)


def _payload(kind: str, logits: dict[str, Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """What a teacher's server sends: its likeliest tokens, and a token that the student sampled."""
    log_q = torch.log_softmax(logits["teacher"].float(), -1)
    logprobs, ids = log_q.topk(min(K, log_q.shape[-1]), -1)
    held = {"student": logits["student"], "ids": ids, "logprobs": logprobs}
    if kind == "sampled_tail":
        p = torch.softmax(logits["student"].float(), -1)
        tokens = torch.multinomial(p, 1, generator=generator)
        held |= {"tokens": tokens[:, 0], "token_logprobs": log_q.gather(-1, tokens)[:, 0]}
    return held


def subjects(inputs: Inputs) -> dict[Key, Callable[[], Loss]]:
    """By divergence and by who computes it, what makes the loss; that raises where a package is missing."""
    return {
        (divergence, by): subject(inputs, divergence, by)
        for divergence, names in PLAN[inputs.kind].items()
        for by in names
    }


def subject(inputs: Inputs, divergence: str, by: str) -> Callable[[], Loss]:
    """What makes one loss, whether or not it is in the plan."""
    return partial(_MAKERS[by], inputs, divergence)


def _of_logs(divergence: str, log_p: Tensor, log_q: Tensor) -> Tensor:
    """The textbook formula of a divergence of two distributions."""
    if divergence == "reverse_kl":
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    if divergence == "forward_kl":
        return (log_q.exp() * (log_q - log_p)).sum(-1)
    if divergence == "hellinger":
        return ((0.5 * log_q).exp() - (0.5 * log_p).exp()).square().sum(-1)
    assert divergence == "jsd"
    log_m = torch.logaddexp(log_p, log_q) - math.log(2.0)
    return 0.5 * (log_p.exp() * (log_p - log_m) + log_q.exp() * (log_q - log_m)).sum(-1)


def _log_softmax(logits: Tensor) -> Tensor:
    return torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), -1)


def _from_logits(divergence: str, student: Tensor, teacher: Tensor) -> Tensor:
    return _of_logs(divergence, _log_softmax(student), _log_softmax(teacher))


def _from_hidden(divergence: str, student: Tensor, head: Tensor, teacher: Tensor, teacher_head: Tensor) -> Tensor:
    return _from_logits(divergence, student @ head.T, teacher @ teacher_head.T)


def _of_top_k(divergence: str, student: Tensor, ids: Tensor, logprobs: Tensor) -> Tensor:
    log_p, log_q = _log_softmax(student).gather(-1, ids), logprobs
    rest = [torch.log1p(-each.exp().sum(-1, keepdim=True)) for each in (log_p, log_q)]
    return _of_logs(divergence, torch.cat([log_p, rest[0]], -1), torch.cat([log_q, rest[1]], -1))


def _of_sampled_tail(
    divergence: str, student: Tensor, ids: Tensor, logprobs: Tensor, tokens: Tensor, token_logprobs: Tensor
) -> Tensor:
    d, log_p = opd.divergence(divergence), _log_softmax(student)
    on_set, drawn = log_p.gather(-1, ids), log_p.gather(-1, tokens[:, None])[:, 0]
    weight = d.weight(token_logprobs - drawn).detach()
    outside = (ids != tokens[:, None]).all(-1)
    return (on_set.exp() * d.generator(logprobs - on_set)).sum(-1) - outside * weight * drawn


# The value of each position by the textbook, from the tensors of the inputs.
FORMULA: dict[str, Callable[..., Tensor]] = {
    "logits": _from_logits,
    "hidden": _from_hidden,
    "frozen": _from_hidden,
    "top_k": _of_top_k,
    "sampled_tail": _of_sampled_tail,
}
_FUSED: dict[str, Callable[..., Tensor]] = {
    "logits": opd.fused_divergence,
    "hidden": opd.fused_linear_divergence,
    "frozen": opd.fused_linear_divergence,
    "top_k": opd.fused_top_k_divergence,
    "sampled_tail": opd.fused_sampled_tail,
}


def _ours(inputs: Inputs, divergence: str) -> Loss:
    weights = torch.full((inputs.rows,), 1 / inputs.rows, device=inputs.tensors["student"].device)
    tensors = inputs.tensors.values()
    return lambda: _FUSED[inputs.kind](*tensors, divergence, mask=weights).sum()


def _eager(inputs: Inputs, divergence: str) -> Loss:
    return lambda: FORMULA[inputs.kind](divergence, **inputs.tensors).mean()


def _compiled(inputs: Inputs, divergence: str) -> Loss:
    formula = FORMULA[inputs.kind]

    def loss(tensors: dict[str, Tensor]) -> Tensor:
        return formula(divergence, **tensors).mean()

    # A graph of all that raises rather than falling back to eager operations.
    compiled = torch.compile(loss, dynamic=False, fullgraph=True, backend=BACKEND)
    return lambda: compiled(inputs.tensors)


# Liger's and TRL's weight of the teacher in the mixture; 0 and 1 mean the KL divergences.
_BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}


def _liger(inputs: Inputs, divergence: str) -> Loss:
    from liger_kernel.ops.jsd import LigerJSDFunction  # type: ignore[import-not-found, unused-ignore]

    student, teacher = inputs.tensors["student"], inputs.tensors["teacher"]

    def loss() -> Tensor:
        found: Any = LigerJSDFunction.apply(_log_softmax(student), _log_softmax(teacher), None, _BETA[divergence], -100)
        return found

    return loss


def _trl(inputs: Inputs, divergence: str) -> Loss:
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.gkd.gkd_trainer import GKDTrainer

    student, teacher = inputs.tensors["student"], inputs.tensors["teacher"]
    return lambda: GKDTrainer.generalized_jsd_loss(student, teacher, beta=_BETA[divergence])


def _liger_chunked(inputs: Inputs, divergence: str) -> Loss:
    from liger_kernel.chunked_loss import (  # type: ignore[import-not-found, unused-ignore]
        LigerFusedLinearJSDLoss,
    )

    loss = LigerFusedLinearJSDLoss(weight_hard_loss=0.0, weight_soft_loss=1.0, beta=_BETA[divergence])
    labels = torch.zeros(inputs.rows, dtype=torch.long, device=inputs.tensors["student"].device)
    return lambda: loss(*inputs.tensors.values(), labels)


def _liger_fused(inputs: Inputs, divergence: str) -> Loss:
    from liger_kernel.transformers import (  # type: ignore[import-not-found, unused-ignore]
        LigerFusedLinearJSD,
    )

    loss = LigerFusedLinearJSD(jsd_beta=_BETA[divergence])
    return lambda: loss(*inputs.tensors.values(), None)


_MAKERS: dict[str, Callable[[Inputs, str], Loss]] = {
    OURS: _ours,
    EAGER: _eager,
    COMPILED: _compiled,
    LIGER: _liger,
    TRL: _trl,
    CHUNKED: _liger_chunked,
    FUSED: _liger_fused,
}
