"""A monitor inside TRL: what a run's sampled tokens say, at each step and in the trainer's own log."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import TrainerCallback
from trl import DistillationTrainer, RLOOTrainer

from opdtheory.divergences import Divergence, skew_jsd
from opdtheory.errors import IntegrationError, InvalidArgumentError, check_integer
from opdtheory.estimators import Estimator
from opdtheory.integrations.trl.taps import Taken, Tap, hooked, tap_of
from opdtheory.monitoring import Monitor

__all__ = ["OPDMonitor", "own_loss", "write_rollouts"]


class OPDMonitor(TrainerCallback):
    r"""Reads the log-probabilities of each step's sampled tokens and warns once where a collapse is foreseen.

    A callback of transformers is not given the batch, so the monitor hooks methods of the one trainer that it is
    attached to, within a context:

    ```py
    with OPDMonitor("opd", "forward_kl").attach(trainer) as monitor:
        trainer.train()
    print(monitor.diagnosis())
    ```

    The results of these methods are passed on as they are: no gradient changes. What is hooked, and what it costs:

    - `GRPOTrainer`, `RLOOTrainer`, `OPDPlusTrainer`: `_compute_loss` and the `_get_per_token_logps_and_entropies` that
      it calls; nothing is computed again. The teacher is that of `OPDPlusTrainer`, else the reference model, so `beta`
      must not be 0. RLOO sums the reference's log-probabilities up, so its `_generate_and_score_completions` is hooked
      as well, to add them to what it returns.
    - `DistillationTrainer`, `OPDTrainer`: `_compute_loss` and the `_get_last_hidden_state` that it calls; no forward
      pass, but one more product of the hidden states with each output layer, without a backward pass.
    - `GKDTrainer`: `generalized_jsd_loss` and `generate_on_policy_outputs`; one more normaliser of each model's
      logits. Answers of the dataset and of the teacher are left out: the student did not sample them.

    The method `log` is hooked to add the metrics `opd/...`, each the mean over the steps since the last log. Each
    process reads its own rollouts. Log-probabilities are at the trainer's `temperature`, as in its loss.

    Args:
        estimator: what the run descends, by name or as an object; by default what the trainer does with the
            log-ratios, see `own_loss`. Rewards are not part of it.
        divergence: likewise.
        every: the number of steps from one that is read to the next.
        record: a file to write the tokens' log-probabilities to, which must not exist yet: JSON lines, one for each
            rollout of a step that is read, in TRL's names. `old_per_token_logps` is the student's at that step,
            `sampling_per_token_logps` that of the policy that sampled, if it is another. Other processes than the first
            put their number before the suffix.
        options: of the estimator, such as `clip_log_ratio`.

    Raises:
        InvalidArgumentError: an argument is out of range, or no log-probabilities of two models pass through the
            trainer.
        IntegrationError: the callback is used without `attach`, or no loss is seen in a step, as with a Liger loss.
    """

    def __init__(
        self,
        estimator: str | Estimator | None = None,
        divergence: str | Divergence | None = None,
        *,
        every: int = 1,
        record: str | Path | None = None,
        **options: Any,
    ) -> None:
        check_integer("every", every)
        if record is not None and Path(record).exists():
            raise InvalidArgumentError("record", f"must be a new file, but {record} exists")
        if estimator is None and (divergence is not None or options):
            raise InvalidArgumentError("estimator", "must be given with a divergence or options")
        self.every = every
        self.record = None if record is None else Path(record)
        self.monitor: Any = None
        self._asked = (estimator, divergence, options)
        self._file: Path | None = None
        self._tap: Tap | None = None
        self._micro_batches: list[Taken] = []
        self._since_log: list[dict[str, float]] = []

    @contextmanager
    def attach(self, trainer: Any) -> Iterator[OPDMonitor]:
        """Watch a trainer while the context lasts; its hooks and the callback are removed after it.

        Args:
            trainer: of TRL.

        Raises:
            InvalidArgumentError: see the class.
        """
        if self._tap is not None:
            raise InvalidArgumentError("trainer", "must be one at a time: this monitor is attached to another")
        tap = tap_of(trainer, lambda: trainer.state.global_step % self.every == 0, self._micro_batches.append)
        if self.monitor is None:
            self.monitor = self._made(trainer)
        if self.record is not None:
            self._file = _of_process(self.record, trainer.accelerator.process_index)

        def log(method: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
            if trainer.model.training:
                logs.update(_means(self._since_log))
                self._since_log.clear()
            method(logs, *args, **kwargs)

        known = self in trainer.callback_handler.callbacks
        if not known:
            trainer.add_callback(self)
        self._tap = tap
        try:
            with hooked(trainer, {**tap.wrappers, "log": log}):
                yield self
        finally:
            self._tap = None
            self._micro_batches.clear()
            if not known:
                trainer.remove_callback(self)

    def diagnosis(self) -> Any:
        """The diagnosis of all steps so far.

        Raises:
            IntegrationError: the monitor has not been attached yet.
        """
        if self.monitor is None:
            raise IntegrationError("trl: OPDMonitor has seen no trainer; use `with monitor.attach(trainer):`")
        return self.monitor.diagnosis()

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Refuse a run in which no batch can be seen."""
        if self._tap is None:
            raise IntegrationError(
                "trl: OPDMonitor sees no batch as a callback alone; train within `with monitor.attach(trainer):`"
            )
        self._tap.losses = 0

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the tokens of the step."""
        if self._tap is not None and not self._tap.losses:
            raise IntegrationError(
                "trl: OPDMonitor saw no loss in this step; TRL's Liger losses keep no log-probabilities"
            )
        if not self._micro_batches:
            return
        step = _joined(self._micro_batches)
        self._micro_batches.clear()
        if self._file is not None and self._tap is not None:
            write_rollouts(self._file, state.global_step, step, self._tap.teacher_name)
        self.monitor.add(step.student, step.teacher, step.behavior, step.mask, entropy=step.entropy)
        self._since_log.append(self.monitor.step(state.global_step))

    def _made(self, trainer: Any) -> Any:
        estimator, divergence, options = self._asked
        if estimator is None:
            estimator, divergence, options = own_loss(trainer)
        return Monitor(estimator, divergence, together=_together(trainer), **options)


def own_loss(trainer: Any) -> tuple[str, str | Divergence | None, dict[str, Any]]:
    r"""The estimator, divergence and options of what a trainer does with its log-ratios, rewards left aside.

    Estimators that are of the reverse KL alone have no divergence.

    GRPO's penalty is `k3_loss`, and with `use_bias_correction_kl` `k1_reward`: the gradient of
    $\rho\,(u - 1 - \log u)$ at $\rho = 1$ is $-\log u$ times the score. RLOO's is `k1_reward`, which it sums over the
    rollout.

    Args:
        trainer: of TRL.
    """
    weight = getattr(trainer, "token_weight", None)
    if weight is not None:
        bound = weight.clip_weight
        options = {
            "clip_log_ratio": weight.clip_log_ratio,
            "clip_weight": None if bound is None else (-bound, bound),
        }
        name = "opd_plus_centred" if weight.centred else "opd_plus"
        return name, weight.divergence, {key: value for key, value in options.items() if value is not None}
    if isinstance(trainer, DistillationTrainer) or hasattr(trainer, "generalized_jsd_loss"):
        ends = {0.0: "forward_kl", 1.0: "reverse_kl"}
        found: Any = getattr(trainer, "divergence", None)
        if found is None:
            found = ends.get(trainer.beta) or skew_jsd(trainer.beta)
        return "full_vocab", found, {}
    if isinstance(trainer, RLOOTrainer) or trainer.args.use_bias_correction_kl:
        return "k1_reward", None, {}
    return "k3_loss", None, {}


def _together(trainer: Any) -> int:
    """How many rollouts of one prompt stand next to each other once those of a step are sorted by prompt."""
    count = getattr(trainer, "num_generations", 1)
    args = trainer.args
    steps = args.gradient_accumulation_steps
    whole = getattr(args, "steps_per_generation", steps) <= steps
    return count if whole and (args.per_device_train_batch_size * steps) % count == 0 else 1


def _joined(batches: Sequence[Taken]) -> Taken:
    """The tokens of a step on the CPU, padded to one length, rollouts of one prompt next to each other."""
    longest = max(batch.mask.shape[1] for batch in batches)
    columns: dict[str, Tensor | None] = {}
    for name in ("student", "teacher", "mask", "behavior", "entropy"):
        values = [getattr(batch, name) for batch in batches]
        # Tokens of which some micro-batches have more than others have it nowhere.
        if any(value is None for value in values):
            columns[name] = None
        else:
            columns[name] = torch.cat([pad(value, (0, longest - value.shape[1])) for value in values]).cpu()
    keys = [
        row[row >= 0].numpy().tobytes() for batch in batches if batch.prompts is not None for row in batch.prompts.cpu()
    ]
    if keys:
        first: dict[bytes, int] = {}
        places = [first.setdefault(key, len(first)) for key in keys]
        order = sorted(range(len(keys)), key=places.__getitem__)
        columns = {name: None if value is None else value[order] for name, value in columns.items()}
    return Taken(**columns)  # type: ignore[arg-type]


def _means(steps: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each metric over steps, of the numbers that are finite."""
    names = {name: None for step in steps for name in step}
    found = {name: [step[name] for step in steps if math.isfinite(step.get(name, math.nan))] for name in names}
    return {name: sum(values) / len(values) for name, values in found.items() if values}


def _of_process(path: Path, number: int) -> Path:
    return path if number == 0 else path.with_name(f"{path.stem}.{number}{path.suffix}")


def write_rollouts(path: Path, number: int, step: Taken, teacher_name: str) -> None:
    """Append the rollouts of a step to a file of JSON lines, each up to its last token that counts.

    Args:
        path: the file.
        number: of the step.
        step: the tokens, on the CPU.
        teacher_name: TRL's name of the teacher's log-probabilities.
    """
    columns = {"completion_mask": step.mask, "old_per_token_logps": step.student, teacher_name: step.teacher}
    if step.behavior is not None:
        columns["sampling_per_token_logps"] = step.behavior
    with path.open("a", encoding="utf-8") as file:
        for row in range(len(step.mask)):
            alive = step.mask[row].nonzero()
            length = int(alive[-1]) + 1 if len(alive) else 0
            fields = {name: _numbers(value[row, :length]) for name, value in columns.items()}
            file.write(json.dumps({"step": number, **fields}) + "\n")


def _numbers(values: Tensor) -> list[float | int | None]:
    """As many digits as the dtype has; None for what JSON has no number for."""
    if not values.is_floating_point():
        return values.tolist()
    digits = 17 if values.dtype == torch.float64 else 9
    return [float(f"{x:.{digits}g}") if math.isfinite(x) else None for x in values.tolist()]
