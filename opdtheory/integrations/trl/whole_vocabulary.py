"""TRL's `DistillationTrainer` for any f-divergence."""

from __future__ import annotations

import functools
import warnings
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from trl import DistillationTrainer

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.integrations.trl.means import other_laws
from opdtheory.integrations.trl.substitution import check_loss, in_place_of_trl_loss
from opdtheory.kernels import fused_linear_divergence

__all__ = ["OPDTrainer", "Per"]

Per = Literal["rollout", "token"]


class OPDTrainer(DistillationTrainer):
    r"""`DistillationTrainer` for any divergence of the whole next-token distributions, $D_f(q_n \| p_n)$ (T12).

    The student samples, and teacher and student are compared on the student's own histories, as in TRL. `beta` of the
    configuration is not read. With `per="rollout"` the loss of a step is the sum over the tokens of its rollouts,
    divided by their number: its expected gradient is that of `token_local` exactly, at scale 1, whatever the batch,
    the gradient accumulation and the number of processes, as long as the student samples from its whole distribution
    at the configuration's `temperature`, which both distributions of the loss have too. With `per="token"` the sum is
    divided by the number of tokens in the step, as TRL does: longer rollouts then count more, and the expected gradient
    is not a multiple of that of `token_local` unless all have one length (T11).

    Heads with a bias, a logit scale or soft-capped logits are supported; logits are held for a chunk of positions at a
    time.

    Args:
        args: as for `DistillationTrainer`.
        divergence: an object or a catalogue name.
        per: the unit that the loss is a mean over.
        kwargs: as for `DistillationTrainer`.

    Raises:
        IntegrationError: TRL's own loss takes other arguments than in the supported versions.
        InvalidArgumentError: `per` is neither, the configuration asks for TRL's Liger loss, or the output layer of a
            model has an adapter of PEFT.

    References: T11, T12, T16c of the theory.
    """

    def __init__(
        self, *args: Any, divergence: str | Divergence = "reverse_kl", per: Per = "rollout", **kwargs: Any
    ) -> None:
        check_loss()
        if per not in get_args(Per):
            raise InvalidArgumentError("per", f"must be 'rollout' or 'token', got {per!r}")
        self.divergence = as_divergence(divergence)
        self.per = per
        super().__init__(*args, **kwargs)
        if hasattr(self, "liger_loss"):
            raise InvalidArgumentError("use_liger_kernel", "must be False: TRL's Liger loss has no other divergences")
        for name in ("model", "teacher_model"):
            _check_head(name, self.accelerator.unwrap_model(getattr(self, name)))
        for words in other_laws(self.args):
            warnings.warn(f"the expected gradient is that at histories of another law: {words}", stacklevel=2)

    def _compute_loss(
        self, unwrapped_student: Any, inputs: dict[str, Any], num_items_in_batch: Tensor | int | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.per == "rollout":
            # Of this process: the gradients of processes are averaged.
            training = unwrapped_student.training
            steps = self.current_gradient_accumulation_steps if training else 1
            num_items_in_batch = len(inputs["completion_ids"]) * steps
        with in_place_of_trl_loss(functools.partial(_loss, divergence=self.divergence)):
            found: tuple[Tensor, Tensor, Tensor] = super()._compute_loss(unwrapped_student, inputs, num_items_in_batch)
        return found


def _check_head(name: str, model: Any) -> None:
    """Raise if the output layer has an adapter: TRL hands over the weight of the layer below it."""
    # What adapts a layer in PEFT keeps it under this name.
    if hasattr(model.get_output_embeddings(), "base_layer"):
        raise InvalidArgumentError(
            name, "must have no adapter on its output layer, since the loss would be that without it; merge it first"
        )


def _loss(
    student_hidden_states: Tensor,
    teacher_hidden_states: Tensor,
    student_lm_head_weight: Tensor,
    teacher_lm_head_weight: Tensor,
    completion_mask: Tensor,
    num_items_in_batch: Tensor | int | None,
    student_lm_head_bias: Tensor | None,
    teacher_lm_head_bias: Tensor | None,
    student_logit_scale: float,
    teacher_logit_scale: float,
    student_final_logit_softcapping: float | None,
    teacher_final_logit_softcapping: float | None,
    temperature: float,
    divergence: Divergence,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, the student's entropy summed over the tokens, and their number; the arguments are those of TRL."""
    count = completion_mask.count_nonzero()
    entropy = torch.zeros(completion_mask.shape, device=student_hidden_states.device)
    values = fused_linear_divergence(
        student_hidden_states,
        _whole(student_lm_head_weight, student_hidden_states),
        teacher_hidden_states,
        _whole(teacher_lm_head_weight, teacher_hidden_states),
        divergence,
        completion_mask,
        temperature,
        student_bias=_whole(student_lm_head_bias),
        teacher_bias=_whole(teacher_lm_head_bias),
        student_scale=student_logit_scale,
        teacher_scale=teacher_logit_scale,
        student_softcap=student_final_logit_softcapping,
        teacher_softcap=teacher_final_logit_softcapping,
        entropy=entropy,
    )
    divisor = count.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    if isinstance(divisor, Tensor):
        divisor = divisor.to(values.device)
    return values.sum() / divisor, entropy.sum(), count


def _whole(parameter: Any, states: Tensor | None = None) -> Any:
    """A parameter gathered from all processes where it is sharded, in the dtype of the hidden states."""
    if parameter is None:
        return None
    if hasattr(parameter, "full_tensor"):
        parameter = parameter.full_tensor()
    if states is None or torch.is_autocast_enabled(states.device.type):
        return parameter
    return parameter.to(states.dtype)
