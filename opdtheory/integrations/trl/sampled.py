"""TRL's `GRPOTrainer` with the OPD+ weight of a teacher as the advantage of each sampled token."""

from __future__ import annotations

import warnings
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from opdtheory.divergences import Divergence
from opdtheory.divergences import divergence as as_divergence
from opdtheory.errors import InvalidArgumentError
from opdtheory.integrations.trl.exact_top import (
    ExactTop,
    check_settings,
    check_the_same,
    last_hidden_states,
    output_layer,
)
from opdtheory.integrations.trl.means import Mean, disturbances, mean_of, reduced
from opdtheory.integrations.trl.weights import SampledBaseline, TokenWeight
from opdtheory.kernels.chosen import OutputLayer, chosen_log_probs, likeliest
from opdtheory.kernels.products import product_dtype

__all__ = ["OPDPlusTrainer"]

# Where a micro-batch keeps the teacher's log-probabilities for further passes over it.
_TEACHER = "teacher_per_token_logps"
_TOP_IDS, _TOP_LOGPS = "teacher_top_ids", "teacher_top_logps"


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

    With `top_k`, the teacher's $k$ likeliest tokens $S$ enter exactly, and the sampled token $y$ stands for the others
    alone (T13):

    $$\sum_{a \in S} p_a f(q_a / p_a) + c\, p(S) - 1[y \notin S]\,\mathrm{sg}(w_f(u_y) - c) \log p(y)$$

    The expected gradient is the same for every $f$, as a rule with less variance, most of all with `baseline="rest"`.
    The last term is TRL's loss with that advantage; the others are added under the same mean over tokens, without an
    importance ratio, as they have no sampled token. With `dapo`, `bnpo` and `grpo` they do not see that the divisor
    depends on the sampled token: the expected gradient is then another one than without `top_k`, unless all rollouts
    have one length. Hidden states come from the passes that TRL makes; each output layer is multiplied once more, a
    chunk of positions at a time. The models must be whole in each process: neither DeepSpeed nor FSDP.

    Args:
        model: the student, as for `GRPOTrainer`.
        teacher_model: a model, or the path or name of one; it shares the student's tokens.
        reward_funcs: as for `GRPOTrainer`; none by default.
        args: a `GRPOConfig`; by default one with `loss_type="dr_grpo"`.
        divergence: an object or a catalogue name.
        clip_log_ratio: a bound of $|\log u|$; where it is met, the weight is biased.
        clip_weight: a bound of the weight, after `centred` and before the baseline; it biases too.
        centred: whether $w_f(1)$ is subtracted, which changes the variance alone (T7a).
        top_k: $k$, the number of the teacher's likeliest tokens that are exact; none by default. Needs a `loss_type` of
            `dr_grpo`, `dapo`, `bnpo`, `grpo` or `luspo`, and no bounds. Not the configuration's, which is of sampling.
        baseline: `constant` or `leave_one_out`, see `TokenWeight`; no bias. With `top_k`, it is $c$:
            `constant`, or `rest` for $c = w_f(q(T)/p(T))$, with $T$ all tokens outside $S$ (T19b).
        baseline_value: the constant.
        reward_weight: what GRPO's own advantage is multiplied with before it is added.
        teacher_model_init_kwargs: how a teacher that is named is loaded.
        kwargs: as for `GRPOTrainer`.

    Raises:
        InvalidArgumentError: there is no teacher, a number is out of range, the configuration asks for TRL's Liger
            loss, or `top_k` does not go with another setting.
        IntegrationError: with `top_k`, in the first step, if the output layer does not give TRL's log-probabilities.

    References: T1, T5, T7, T11, T13, T15, T19b of the theory.
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
        top_k: int | None = None,
        baseline: SampledBaseline | Literal["rest"] | None = None,
        baseline_value: float = 0.0,
        reward_weight: float = 0.0,
        teacher_model_init_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if teacher_model is model and not isinstance(model, str):
            raise InvalidArgumentError("teacher_model", "must be another model than the student")
        if top_k is None and baseline == "rest":
            raise InvalidArgumentError("baseline", "'rest' needs top_k")
        kept: Any = None if baseline == "rest" else baseline
        self.token_weight = TokenWeight(
            as_divergence(divergence), clip_log_ratio, clip_weight, centred, kept, baseline_value
        )
        self.exact_top = None if top_k is None else exact_top(self.token_weight, top_k, baseline == "rest")
        if reward_weight and reward_funcs is None:
            raise InvalidArgumentError("reward_weight", "needs reward_funcs")
        self.reward_weight = float(reward_weight)
        if args is None:
            args = GRPOConfig(loss_type="dr_grpo")
        rewards: Any = no_reward if reward_funcs is None else reward_funcs
        super().__init__(model, rewards, args, **kwargs)
        if getattr(self, "use_liger_kernel", False):
            raise InvalidArgumentError("use_liger_kernel", "must be False: TRL's Liger loss takes no weights of tokens")
        if self.exact_top is not None:
            check_settings(self.exact_top.k, self.args, self.accelerator.unwrap_model(self.model))
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:
                raise InvalidArgumentError(
                    "top_k", "needs models that are whole in each process, not DeepSpeed or FSDP"
                )
        self.teacher_model = self._prepared(teacher_model, teacher_model_init_kwargs or {})
        self._scored: dict[str, Any] | None = None
        self._micro_batch: dict[str, Any] = {}
        self._exact: Tensor | None = None
        self._compared = False
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
            return loss if self._exact is None else loss + self._mean_of(self._exact, inputs).to(loss.dtype)
        finally:
            self._scored = self._exact = None

    def _get_per_token_logps_and_entropies(self, model: Any, *args: Any, **kwargs: Any) -> Any:
        if self._scored is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        scored, self._scored = self._scored, None
        found, states = self._forward(model, *args, **kwargs)
        theirs = None
        if _TEACHER not in self._micro_batch:
            plain = {name: value for name, value in kwargs.items() if not name.startswith("compute_")}
            with torch.no_grad():
                scores, theirs = self._forward(self.teacher_model, *args, **plain)
            self._micro_batch[_TEACHER] = scores[0]
        if self.exact_top is None:
            scored["advantages"] = self._advantages(found[0], self._micro_batch[_TEACHER], scored)
        else:
            scored["advantages"], self._exact = self._split(self.exact_top, found[0], states, theirs, scored)
        return found

    def _forward(self, model: Any, *args: Any, **kwargs: Any) -> tuple[Any, Tensor | None]:
        """TRL's scores of the completions, and with `top_k` the hidden states that they are of, `(B, T, D)`."""
        if self.exact_top is None:
            return super()._get_per_token_logps_and_entropies(model, *args, **kwargs), None
        with last_hidden_states(self.accelerator.unwrap_model(model)) as states:
            found = super()._get_per_token_logps_and_entropies(model, *args, **kwargs)
        return found, torch.cat(states)[:, :-1][:, -found[0].shape[1] :]

    def _split(
        self, exact_top: ExactTop, student: Tensor, states: Any, theirs: Tensor | None, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        """The advantages, and what is exact of the loss of each token, `(B, T)` both."""
        kept, alive = self._micro_batch, self._mask(inputs) > 0
        tokens, ours = inputs["completion_ids"][alive], self._layer(self.model)
        if theirs is not None:
            layer = self._layer(self.teacher_model)
            ids, logs, scores = likeliest(
                theirs[alive].to(layer.weight.device),
                layer,
                exact_top.k,
                len(ours.weight),
                tokens.to(layer.weight.device),
            )
            if not self._compared:
                check_the_same("teacher", scores.to(alive.device), kept[_TEACHER][alive])
            kept[_TOP_IDS], kept[_TOP_LOGPS] = ids.to(alive.device), logs.to(alive.device)
        top = kept[_TOP_IDS]
        both = torch.cat([top, tokens.unsqueeze(-1)], -1)
        device = ours.weight.device
        log_p = chosen_log_probs(states[alive].to(device), ours, both.to(device)).to(alive.device)
        if not self._compared:
            check_the_same("student", log_p[:, -1], student[alive])
            self._compared = True
        outside = ~(top == tokens.unsqueeze(-1)).any(-1)
        log_u = (kept[_TEACHER] - student).detach()[alive]
        weights, exact = exact_top.parts(log_p[:, :-1], kept[_TOP_LOGPS], log_u, outside)
        empty = torch.zeros(alive.shape, dtype=torch.float64, device=alive.device)
        advantages = empty.masked_scatter(alive, weights).to(student.dtype)
        return self._with_rewards(advantages, inputs), empty.masked_scatter(alive, exact)

    def _layer(self, model: Any) -> OutputLayer:
        """The output layer of a model, in the dtype in which TRL multiplies with it."""
        model = self.accelerator.unwrap_model(model)
        settings: Any = self.args
        with self.accelerator.autocast():
            layer = output_layer(model, self.temperature, None)
            wide = torch.float32 if settings.cast_lm_head_to_fp32 else product_dtype(layer.weight)
        return layer._replace(dtype=wide)

    def _mean_of(self, values: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The mean over tokens that `loss_type` is, as TRL takes it."""
        student: Any = self.model
        settings: Any = self.args
        steps = self.current_gradient_accumulation_steps if student.training else 1
        items = None
        if self.loss_type == "dapo":
            # Counted over the rollouts that are generated at a time.
            windows = settings.steps_per_generation / steps if student.training else 1
            items = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes / windows
        return reduced(self.loss_type, values, self._mask(inputs), settings.max_completion_length, steps, items)

    @staticmethod
    def _mask(inputs: dict[str, Any]) -> Tensor:
        """1 on the tokens that the student sampled."""
        mask: Tensor = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        return mask

    def _advantages(self, student: Tensor, teacher: Tensor, inputs: dict[str, Any]) -> Tensor:
        """The advantage of each token of a micro-batch, `(B, T)`."""
        return self._with_rewards(self.token_weight(student.detach(), teacher, self._mask(inputs)), inputs)

    def _with_rewards(self, advantages: Tensor, inputs: dict[str, Any]) -> Tensor:
        if self.reward_weight:
            given = inputs["advantages"]
            advantages = advantages + self.reward_weight * (given if given.dim() == 2 else given.unsqueeze(1))
        return advantages


def exact_top(weight: TokenWeight, k: int, rest: bool) -> ExactTop:
    r"""The exact part that goes with a weight of sampled tokens.

    Args:
        weight: without bounds, and without a baseline other than a constant.
        k: the number of exact tokens.
        rest: whether $c$ is the weight of all other tokens as one.

    Raises:
        InvalidArgumentError: the weight has what does not go with it.
    """
    for name in ("clip_log_ratio", "clip_weight"):
        if getattr(weight, name) is not None:
            raise InvalidArgumentError(name, "must be None with top_k")
    if weight.baseline == "leave_one_out":
        raise InvalidArgumentError("baseline", "must be None, 'constant' or 'rest' with top_k")
    gauge = float(weight.divergence.weight(torch.zeros(1, dtype=torch.float64))) if weight.centred else 0.0
    return ExactTop(weight.divergence, k, "rest" if rest else weight.baseline_value + gauge)


def no_reward(completions: list[Any], **_: Any) -> list[float]:
    """A reward of zero for every completion.

    Args:
        completions: what the student wrote.
    """
    return [0.0] * len(completions)
