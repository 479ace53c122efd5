"""On-policy distillation of the Tinker cookbook as functions `loss(rollouts) -> scalar`.

`incorporate_kl_penalty` makes the advantages; the adapter imports it and calls it with a teacher that answers from the
rollouts. The loss itself is computed on Tinker's servers. As their documentation describes `importance_sampling`, it is
minus the sum of advantage times the ratio p/mu, and that line is ours.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace

import torch
from torch import Tensor

import opdtheory as opd


def tinker_opd(r: opd.Rollouts) -> Tensor:
    """At the default `kl_discount_factor = 0`."""
    return _tinker(r, discount=0.0)


def tinker_opd_discounted(r: opd.Rollouts) -> Tensor:
    """At `kl_discount_factor = 1`: a token is charged with the log-ratios of all tokens after it as well."""
    return _tinker(r, discount=1.0)


def _tinker(r: opd.Rollouts, discount: float) -> Tensor:
    import tinker
    from tinker_cookbook.distillation.train_on_policy import incorporate_kl_penalty

    def datum(b: int) -> tinker.Datum:
        of = tinker.TensorData.from_torch
        inputs = {"target_tokens": of(r.tokens[b]), "logprobs": of(r.behavior_logprobs[b].float())}
        inputs |= {"mask": of(r.mask[b].float()), "advantages": of(torch.zeros_like(r.mask[b]).float())}
        prompt_and_shifted = [0, *r.tokens[b, :-1].tolist()]
        return tinker.Datum(model_input=tinker.ModelInput.from_ints(prompt_and_shifted), loss_fn_inputs=inputs)

    data = [datum(b) for b in range(len(r.tokens))]
    teachers = [_teacher(r.teacher_logprobs[b]) for b in range(len(r.tokens))]
    asyncio.run(incorporate_kl_penalty(data, teachers, [0] * len(data), 1.0, discount))
    advantages = torch.stack([d.loss_fn_inputs["advantages"].to_torch() for d in data])
    ratio = (r.student_logprobs - r.behavior_logprobs).exp()
    # Advantages travel in float32, so that is the precision of the whole.
    return r.token_sum(-advantages * ratio).float()


def _teacher(logprobs: Tensor) -> SimpleNamespace:
    """A sampling client that scores the one sequence it is asked about; the first token has no prefix."""

    async def answer() -> list[float | None]:
        return [None, *logprobs.tolist()]

    return SimpleNamespace(compute_logprobs=lambda sequence: SimpleNamespace(coroutine=answer))
