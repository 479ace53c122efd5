"""Where the log-probabilities of sampled tokens pass through a trainer of TRL, and how they are taken there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from jaxtyping import Float, Int64, Shaped
from torch import Tensor
from trl import DistillationTrainer, GRPOTrainer, RLOOTrainer

from opdtheory.errors import IntegrationError, InvalidArgumentError
from opdtheory.integrations.trl.exact_top import output_layer
from opdtheory.kernels.chosen import chosen_log_probs
from opdtheory.kernels.products import product_dtype

__all__ = ["Tap", "Taken", "hooked", "tap_of"]


class Taken(NamedTuple):
    r"""The sampled tokens of a micro-batch, detached, where the trainer has them.

    Attributes:
        student: $\log p$, of the student of the moment.
        teacher: $\log q$, of the teacher or reference model.
        mask: 1 on the tokens that count in the loss.
        behavior: $\log\mu$ of the policy that sampled; None where it is the student of the moment.
        entropy: that of the student; None where the trainer has none.
        prompts: the tokens of each rollout's prompt, -1 on padding; None if unknown.
    """

    student: Float[Tensor, "B T"]
    teacher: Float[Tensor, "B T"]
    mask: Shaped[Tensor, "B T"]
    behavior: Float[Tensor, "B T"] | None = None
    entropy: Float[Tensor, "B T"] | None = None
    prompts: Int64[Tensor, "B P"] | None = None


Take = Callable[[Taken], None]
Wrapper = Callable[..., Any]


class Tap(Protocol):
    """What takes the tokens from one kind of trainer.

    Attributes:
        losses: how many losses have been seen in training.
        teacher_name: TRL's name of the teacher's log-probabilities.
    """

    losses: int
    teacher_name: str

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """By the name of a method, what is called in its place; its first argument is the method itself."""


@contextmanager
def hooked(trainer: Any, wrappers: Mapping[str, Wrapper]) -> Iterator[None]:
    """Call other functions in place of methods of one trainer while the context lasts.

    Args:
        trainer: of which the methods are hooked; others of its class are left alone.
        wrappers: by the name of a method; each is given the method, then its arguments.
    """
    own = {name: vars(trainer)[name] for name in wrappers if name in vars(trainer)}
    for name, wrapper in wrappers.items():
        setattr(trainer, name, functools.partial(wrapper, getattr(trainer, name)))
    try:
        yield
    finally:
        for name in wrappers:
            if name in own:
                setattr(trainer, name, own[name])
            else:
                delattr(trainer, name)


def tap_of(trainer: Any, wanted: Callable[[], bool], take: Take) -> Tap:
    """The tap that fits a trainer.

    Args:
        trainer: of TRL.
        wanted: whether the tokens of the moment are to be taken.
        take: what is done with those of a micro-batch.

    Raises:
        InvalidArgumentError: no log-probabilities of both models pass through it.
    """
    if isinstance(trainer, GRPOTrainer | RLOOTrainer):
        if not trainer.beta and not hasattr(trainer, "teacher_model"):
            raise InvalidArgumentError("beta", "must not be 0: without a reference model no teacher is scored")
        return PolicyGradientTap(trainer, wanted, take)
    if isinstance(trainer, DistillationTrainer):
        if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled:
            raise InvalidArgumentError(
                "trainer", "must hold whole models in each process for OPDMonitor, not with DeepSpeed or FSDP"
            )
        return HiddenStatesTap(trainer, wanted, take)
    if any(each.__name__ == "GKDTrainer" for each in type(trainer).__mro__):
        return LogitsTap(trainer, wanted, take)
    raise InvalidArgumentError(
        "trainer",
        "must be a GRPOTrainer, RLOOTrainer, DistillationTrainer or GKDTrainer of TRL, or one that extends these, "
        f"got {type(trainer).__name__}",
    )


class PolicyGradientTap:
    """`GRPOTrainer`, `RLOOTrainer` and what extends them: all are at hand, nothing is computed."""

    def __init__(self, trainer: Any, wanted: Callable[[], bool], take: Take) -> None:
        self.losses = 0
        self.teacher_name = "teacher_per_token_logps" if hasattr(trainer, "teacher_model") else "ref_per_token_logps"
        self._trainer, self._wanted, self._take = trainer, wanted, take
        # The scores of one call of the trainer, while it lasts.
        self._scores: list[Any] | None = None

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """See `Tap`."""
        found = {"_compute_loss": self._loss, "_get_per_token_logps_and_entropies": self._score}
        if isinstance(self._trainer, RLOOTrainer):
            # It drops the tokens' log-probabilities once they are summed.
            found["_generate_and_score_completions"] = self._generation
        return found

    def _score(self, method: Wrapper, *args: Any, **kwargs: Any) -> Any:
        found = method(*args, **kwargs)
        if self._scores is not None:
            self._scores.append(found)
        return found

    def _generation(self, method: Wrapper, *args: Any, **kwargs: Any) -> Any:
        self._scores = []
        try:
            output = method(*args, **kwargs)
            scores = self._scores
        finally:
            self._scores = None
        if len(scores) != 2:
            raise IntegrationError(f"trl: OPDMonitor expects RLOO to score rollouts by 2 models, got {len(scores)}")
        # TRL shuffles and splits whatever this holds.
        names = ("old_per_token_logps", "ref_per_token_logps")
        return {**output, **{name: found[0] for name, found in zip(names, scores, strict=True)}}

    def _loss(self, method: Wrapper, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        self._scores = []
        try:
            loss = method(model, inputs, *args, **kwargs)
            scores = self._scores
        finally:
            self._scores = None
        if self._trainer.model.training:
            self.losses += 1
            if self._wanted():
                self._take(self._taken(scores, inputs))
        return loss

    def _taken(self, scores: list[Any], inputs: dict[str, Any]) -> Taken:
        teacher = inputs.get(self.teacher_name)
        if not scores or teacher is None:
            missing = "log-probabilities of the student" if not scores else self.teacher_name
            raise IntegrationError(f"trl: OPDMonitor finds no {missing} in the loss of {type(self._trainer).__name__}")
        student, entropy = scores[0][:2]
        behavior = inputs.get("sampling_per_token_logps", inputs.get("old_per_token_logps"))
        return Taken(
            student.detach(),
            teacher.detach(),
            inputs["completion_mask"] * inputs.get("tool_mask", 1),
            behavior,
            None if entropy is None else entropy.detach(),
            inputs["prompt_ids"].masked_fill(inputs["prompt_mask"] == 0, -1),
        )


class HiddenStatesTap:
    """`DistillationTrainer`: hidden states are at hand; each output layer is multiplied once more, in chunks."""

    teacher_name = "teacher_per_token_logps"

    def __init__(self, trainer: Any, wanted: Callable[[], bool], take: Take) -> None:
        self.losses = 0
        self._trainer, self._wanted, self._take = trainer, wanted, take
        self._states: list[tuple[Any, Tensor]] | None = None

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """See `Tap`."""
        return {"_compute_loss": self._loss, "_get_last_hidden_state": self._hidden}

    def _hidden(self, method: Wrapper, model: Any, *args: Any, **kwargs: Any) -> Tensor:
        found: Tensor = method(model, *args, **kwargs)
        if self._states is not None:
            self._states.append((model, found.detach()))
        return found

    def _loss(self, method: Wrapper, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        training = self._trainer.model.training
        if not training or not self._wanted():
            self.losses += int(training)
            return method(model, inputs, *args, **kwargs)
        self._states = []
        try:
            loss = method(model, inputs, *args, **kwargs)
            states = self._states
        finally:
            self._states = None
        self.losses += 1
        if len(states) != 2:
            raise IntegrationError(f"trl: OPDMonitor expects hidden states of 2 models, got {len(states)}")
        mask = inputs["completion_mask"] * inputs.get("tool_mask", 1)
        found = [self._log_probs(each, hidden, inputs["completion_ids"], mask > 0) for each, hidden in states]
        prompts = inputs["prompt_ids"].masked_fill(inputs["prompt_mask"] == 0, -1)
        self._take(Taken(found[0], found[1], mask, prompts=prompts))
        return loss

    @torch.no_grad()
    def _log_probs(self, model: Any, hidden: Tensor, ids: Tensor, alive: Tensor) -> Tensor:
        layer = output_layer(model, self._trainer.temperature, None, argument="trainer")
        layer = layer._replace(dtype=product_dtype(layer.weight))
        device = layer.weight.device
        chosen = chosen_log_probs(hidden[alive].to(device), layer, ids[alive].unsqueeze(-1).to(device))
        values = torch.zeros(alive.shape, dtype=chosen.dtype, device=alive.device)
        values[alive] = chosen[:, 0].to(alive.device)
        return values


class LogitsTap:
    """`GKDTrainer`: logits are at hand; their normaliser is computed once more, a rollout at a time."""

    teacher_name = "teacher_per_token_logps"

    def __init__(self, trainer: Any, wanted: Callable[[], bool], take: Take) -> None:
        self.losses = 0
        self._trainer, self._wanted, self._take = trainer, wanted, take
        self._signature = inspect.signature(trainer.generalized_jsd_loss)
        self._sampled = False

    @property
    def wrappers(self) -> Mapping[str, Wrapper]:
        """See `Tap`."""
        return {"generate_on_policy_outputs": self._generation, "generalized_jsd_loss": self._loss}

    def _generation(self, method: Wrapper, model: Any, *args: Any, **kwargs: Any) -> Any:
        unwrap = self._trainer.accelerator.unwrap_model
        # With `seq_kd` the teacher writes too.
        self._sampled = unwrap(model) is unwrap(self._trainer.model)
        return method(model, *args, **kwargs)

    def _loss(self, method: Wrapper, *args: Any, **kwargs: Any) -> Any:
        if self._trainer.model.training:
            self.losses += 1
            sampled, self._sampled = self._sampled, False
            if sampled and self._wanted():
                bound = self._signature.bind(*args, **kwargs)
                bound.apply_defaults()
                self._take(self._taken(bound.arguments))
        return method(*args, **kwargs)

    @torch.no_grad()
    def _taken(self, given: Mapping[str, Any]) -> Taken:
        student, teacher, labels = given["student_logits"], given["teacher_logits"], given["labels"]
        scored, sampled = given["temperature"], self._trainer.generation_config.temperature
        found = [_log_probs(logits, labels, scored) for logits in (student, teacher)]
        behavior = None if sampled == scored else _log_probs(student, labels, sampled)
        return Taken(found[0], found[1], (labels != -100).long(), behavior)


def _log_probs(logits: Float[Tensor, "B T V"], labels: Int64[Tensor, "B T"], temperature: float) -> Tensor:
    """Those of the labels, zero where there is none."""
    values = torch.zeros(labels.shape, dtype=torch.float32, device=logits.device)
    for row, own, ids in zip(values, logits, labels, strict=True):
        alive = ids != -100
        scaled = own[alive].float() / temperature
        row[alive] = scaled.gather(-1, ids[alive].unsqueeze(-1)).squeeze(-1) - scaled.logsumexp(-1)
    return values
