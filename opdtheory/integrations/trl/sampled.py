"""TRL's `GRPOTrainer` with the OPD+ weight of a teacher as the advantage of each sampled token."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.integrations.trl.means import Mean, disturbances, mean_of
from opdtheory.integrations.trl.weights import SampledBaseline, TokenWeight

__all__ = ["OPDPlusTrainer"]

# Where a micro-batch keeps the teacher's log-probabilities for further passes over it.
_TEACHER = "teacher_per_token_logps"


class OPDPlusTrainer(GRPOTrainer):
    r"""`GRPOTrainer` whose advantage of a token is $w_f(u_n) = u_n f'(u_n) - f(u_n)$, with $u_n = q/p$ of a teacher.

    Its expected gradient is that of $D_f$ at each of the student's own histories (T1, T5), from the log-probabilities
    of the sampled tokens alone. $p$ is the student of the moment, not the one that sampled, so with `dr_grpo` TRL's
    importance ratio keeps later passes over the same rollouts exact at the histories of the sampler (T15), until its
    clip is met. What the mean over tokens makes of it depends on `loss_type` (T11):

    - `dr_grpo`: exact, times 1 / `max_completion_length`; `luspo` with `importance_sampling_level="token"`: exact, at
      scale 1. Both hold for any batch, accumulation and number of processes.
    - `dapo` (TRL's default), `vespo`, `cispo` (times `epsilon_high` where that is below 1): the sum over tokens divided
      by their number in the step; `bnpo`: by that in the micro-batch. Rollouts of unequal length weigh
      differently: `token_mean`, no multiple of `token_local`.
    - `grpo`, `sapo`: each rollout's sum divided by its own length: `sequence_mean`, no multiple of it either.

    This is of the first pass over rollouts; in later ones each `loss_type` treats the importance ratio in its own way.

    `mean` names the reduction and the scale. `beta` keeps TRL's meaning: with a number above 0, a penalty towards the
    initial student is added. Rewards are optional; `num_generations` only groups prompts without them.

    Args:
        model: the student, as for `GRPOTrainer`.
        teacher_model: a model, or the path or name of one; it shares the student's tokens.
        reward_funcs: as for `GRPOTrainer`; none by default.
        args: a `GRPOConfig`; by default one with `loss_type="dr_grpo"`.
        divergence: an object or a catalogue name.
        clip_log_ratio: a bound of $|\log u|$; where it is met, the weight is biased.
        clip_weight: a bound of the weight, after `centred` and before the baseline; it biases too.
        centred: whether $w_f(1)$ is subtracted, which changes the variance alone (T7a).
        baseline: `constant` or `leave_one_out`, see `TokenWeight`; no bias.
        baseline_value: the constant.
        reward_weight: what GRPO's own advantage is multiplied with before it is added.
        teacher_model_init_kwargs: how a teacher that is named is loaded.
        kwargs: as for `GRPOTrainer`.

    Raises:
        InvalidArgumentError: there is no teacher, a number is out of range, or the configuration asks for TRL's Liger
            loss.

    References: T1, T5, T7, T11, T15 of the theory.
    """

    def __init__(
        self,
        model: Any,
        teacher_model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: GRPOConfig | None = None,
        *,
        divergence: str | Divergence = "reverse_kl",
        clip_log_ratio: float | None = None,
        clip_weight: float | None = None,
        centred: bool = False,
        baseline: SampledBaseline | None = None,
        baseline_value: float = 0.0,
        reward_weight: float = 0.0,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher_model is model and not isinstance(model, str):
            raise InvalidArgumentError("teacher_model", "must be another model than the student")
        self.token_weight = TokenWeight(
            as_divergence(divergence), clip_log_ratio, clip_weight, centred, baseline, baseline_value
        )
        if reward_weight and reward_funcs is None:
            raise InvalidArgumentError("reward_weight", "needs reward_funcs")
        self.reward_weight = float(reward_weight)
        if args is None:
            args = GRPOConfig(loss_type="dr_grpo")
        rewards: Any = no_reward if reward_funcs is None else reward_funcs
        super().__init__(model, rewards, args, **kwargs)
        if getattr(self, "use_liger_kernel", False):
            raise InvalidArgumentError("use_liger_kernel", "must be False: TRL's Liger loss takes no weights of tokens")
        self.teacher_model = self._prepared(teacher_model, teacher_model_init_kwargs or {})
        self._scored: dict[str, Any] | None = None
        self._micro_batch: dict[str, Any] = {}
        for words in disturbances(self.args):
            warnings.warn(f"the expected gradient is not that of the divergence: {words}", stacklevel=2)

    @property
    def mean(self) -> Mean:
        """The reduction that `loss_type` is, and its scale."""
        settings: Any = self.args
        return mean_of(settings.loss_type, settings.max_completion_length)

    def _prepared(self, teacher: str | PreTrainedModel, options: dict[str, Any]) -> Any:
        """The teacher, frozen, and placed as TRL places a reference model."""
        student: Any = self.model
        settings: Any = self.args
        if isinstance(teacher, str):
            options = {"dtype": student.dtype, **options}
            if settings.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                options["device_map"] = None
            teacher = grpo_trainer.create_model_from_path(teacher, **options)
        teacher.eval().requires_grad_(False)
        # Later versions score in chunks, by a head that they put on.
        put_on = getattr(grpo_trainer, "add_fused_lm_head", None)
        if put_on is not None:
            put_on(teacher, temperature=self.temperature, cast_lm_head_to_fp32=settings.cast_lm_head_to_fp32)
        if self.is_deepspeed_enabled:
            return grpo_trainer.prepare_deepspeed(teacher, self.accelerator)
        if self.is_fsdp_enabled:
            return grpo_trainer.prepare_fsdp(teacher, self.accelerator)
        return self.accelerator.prepare_model(teacher, evaluation_mode=True)

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        # The advantages are looked up after the student's log-probabilities are computed, and need these.
        self._scored = dict(inputs)
        self._micro_batch = inputs
        try:
            loss: Tensor = super()._compute_loss(model, self._scored)
            return loss
        finally:
            self._scored = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        if self._scored is not None:
            scored, self._scored = self._scored, None
            if _TEACHER not in self._micro_batch:
                plain = {name: value for name, value in kwargs.items() if not name.startswith("compute_")}
                with torch.no_grad():
                    theirs = super()._get_per_token_logps_and_entropies(self.teacher_model, *args, **plain)
                self._micro_batch[_TEACHER] = theirs[0]
            scored["advantages"] = self._advantages(found[0], self._micro_batch[_TEACHER], scored)
        return found

    def _advantages(self, student: Tensor, teacher: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The advantage of each token of a micro-batch, `(B, T)`."""
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        advantages = self.token_weight(student.detach(), teacher, mask)
        if self.reward_weight:
            given = inputs["advantages"]
            advantages = advantages + self.reward_weight * (given if given.dim() == 2 else given.unsqueeze(1))
        return advantages


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """A reward of zero for every completion.

    Args:
        completions: what the student wrote.
    """
    return [0.0] * len(completions)
