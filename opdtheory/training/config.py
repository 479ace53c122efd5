"""What a training run is: one flat, checked dataclass, read from TOML and from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from opdtheory.choices import Baseline, Control, Importance, Reduction, Support
from opdtheory.errors import InvalidArgumentError
from opdtheory.toml import read_toml

if TYPE_CHECKING:
    from opdtheory.estimators import Estimator

# No count or seed of a run is larger; torch and numpy refuse larger seeds.
_LARGEST = 2**32 - 1

# Steps of warm-up where a run has as many and does not say.
_WARMUP = 20

# Characters of a wrong value that an error shows.
_LONGEST = 60

_UNUSABLE = re.compile("[\0\ud800-\udfff]")

# No torch here: the command line reads the fields for its help.
__all__ = ["ESTIMATOR_OPTIONS", "RUNTIME", "TrainConfig", "field_kinds"]


def _field(default: Any, text: str, of: str = "run", **limits: Any) -> Any:
    return field(default=default, metadata={"help": text, "of": of, **limits})


# Options of the estimator, and fields that do not affect the trained parameters.
_option = functools.partial(_field, of="estimator")
_runtime = functools.partial(_field, of="runtime")


@dataclass(frozen=True)
class TrainConfig:
    r"""The settings of a training run: the same configuration gives the same parameters, bit for bit.

    Every field is checked on construction, the estimator's options by `opdtheory.estimator` itself. A field that is
    None is off, or takes the default of the task or the estimator.

    Raises:
        InvalidArgumentError: a field has a wrong type or value, or fields do not fit together; the error, a
            `ValueError`, names the field.

    Example:
        >>> config = TrainConfig(divergence="jsd", clip_log_ratio=6.0, reduction="token_mean")
        >>> config.loss()
        estimator('opd_plus', 'jsd', reduction='token_mean', clip_log_ratio=6.0)
        >>> TrainConfig(divergence="u*log(u) - 7*(u - 1)", estimator="opd").loss().claim.divergence.expr
        u*log(u) - 7*u + 7
    """

    # The task and the models
    task: str = _field("arithmetic", "the task, which makes prompts and verifies answers")
    pair_seed: int = _field(0, "seed of the task's own teacher and student", low=0)
    student: str | None = _field(
        None, "folder or name of a causal language model, or smollm2, in place of the task's student"
    )
    teacher: str | None = _field(
        None, "folder or name of a causal language model, or smollm2, in place of the task's teacher"
    )
    # The estimator
    estimator: str = _field("opd_plus", "one of opdtheory.estimator_names()")
    divergence: str | None = _field(
        None,
        "a catalogue name such as jsd or 'skew_jsd(beta=0.1)', or a generator in u such as 'u*log(u)-7*(u-1)'; "
        "without one, the command takes reverse_kl",
    )
    reduction: Reduction = _option("token_mean", "reduction over the whole batch, however it is split")
    baseline: Baseline | None = _option(None, "baseline; group_mean and leave_one_out use the rollouts of one prompt")
    baseline_value: float | None = _option(None, "value of the constant baseline, in the unit of the advantage")
    zscore: bool = _option(False, "centre and scale advantages within the rollouts of one prompt")
    eps: float | None = _option(None, "added to the standard deviation of zscore")
    importance: Importance | None = _option(None, "importance weights for rollouts of the sampling policy")
    clip_range: float | None = _option(None, "clip range of importance ppo, largest ratio of importance tis")
    keep_range: tuple[float, float] | None = _option(None, "ratios that importance mask and sequence_mask keep")
    clip_log_ratio: float | None = _option(None, "clamp log u to [-C, C] nats: a different estimator, with a bias")
    clip_weight: tuple[float, float] | None = _option(None, "clamp the advantage to [low, high]")
    gamma: float | None = _option(None, "discount of return_to_go")
    discounted: bool = _option(False, "return_to_go with the outer discount")
    alpha: float | None = _option(None, "exponent of box_cox and power")
    k: int | None = _option(None, "number of tokens of the top-k estimators")
    support: Support | None = _option(None, "whose k likeliest tokens the top-k estimators use")
    control: Control | None = _field(
        None,
        "a control in place of the estimator: every token has the advantage --advantage; or the loss is that of "
        "further demonstrations, as many as there are rollouts; or OPD's reward is summed over the whole vocabulary, "
        "without noise",
    )
    advantage: float | None = _field(None, "advantage of the control constant_advantage")
    # Rollouts
    prompts_per_step: int = _field(128, "prompts in the global batch", low=1)
    rollouts_per_prompt: int = _field(1, "rollouts of each prompt, which form a group", low=1)
    updates_per_batch: int = _field(1, "optimiser steps on each batch of rollouts", low=1)
    microbatch: int | None = _field(
        None, "rollouts in one backward pass, in whole groups; affects only rounding", low=1
    )
    temperature: float = _field(1.0, "divides the logits of both models, in sampling and in the loss", above=0.0)
    sampling_temperature: float | None = _field(
        None,
        "divides the student's logits in sampling alone, as an inference engine would that samples at another "
        "temperature than the trainer scores at (default: the temperature)",
        above=0.0,
    )
    max_new_tokens: int | None = _field(None, "longest response (default: the task's own)", low=1)
    # The optimiser
    steps: int = _field(200, "batches of rollouts", low=1)
    learning_rate: float = _field(7e-4, "peak learning rate of AdamW", above=0.0)
    # None only on construction.
    warmup_steps: int = _field(
        None,
        "steps of linear warm-up, followed by linear decay to zero "
        f"(default: {_WARMUP}, or all steps if there are fewer)",
        low=0,
    )
    beta1: float = _field(0.9, "AdamW's decay rate of the average gradient", low=0.0, below=1.0)
    beta2: float = _field(0.999, "AdamW's decay rate of the average squared gradient", low=0.0, below=1.0)
    weight_decay: float = _field(0.0, "AdamW's weight decay", low=0.0)
    clip_gradient: float | None = _field(1.0, "largest norm of the gradient", above=0.0)
    seed: int = _field(0, "seed of prompts and samples", low=0)
    # Evaluation, on the task's test split
    eval_every: int = _field(50, "steps between evaluations; 0: only at the start and the end", low=0)
    eval_examples: int = _field(256, "test problems, answered greedily and by sampling; 0: no evaluation", low=0)
    validate_every: int = _runtime(0, "steps between checks of the gradient against theory; 0: none", low=0)
    # The machine
    device: str = _field("auto", "cpu, cuda, cuda:1; auto uses a GPU if there is one")
    dtype: Literal["float32", "float64"] = _field("float32", "dtype of parameters and arithmetic")
    threads: int | None = _runtime(
        None, "number of torch's threads on the CPU; the command takes 1 for the task's own models", low=1, high=1024
    )
    check_rollouts: bool = _runtime(True, "validate every batch: cheap on a CPU, a few waits for the device on a GPU")
    # What is kept
    out: str | None = _runtime(
        None, "folder of the run: metrics, checkpoints, failures; a run that it holds is resumed"
    )
    checkpoint_every: int = _runtime(1, "steps between checkpoints; 0: only after the last step", low=0)
    keep_checkpoints: int = _runtime(2, "number of checkpoints to keep", low=1)
    record_every: int = _runtime(0, "steps between records of rollouts in the folder of the run; 0: none", low=0)
    record_logits: bool = _runtime(False, "record whole rows of logits too, which takes space")
    monitor: bool = _runtime(False, "add what foresees a collapse to the metrics of every step, and warn of one")
    tensorboard: bool = _runtime(False, "also write TensorBoard event files")
    progress: bool = _runtime(
        True,
        "progress bar with live metrics on a terminal; the command also tells of models in the making, and into "
        "a pipe or a log it writes a line now and then",
    )
    cache: str | None = _runtime(None, "folder of trained teachers and students")

    # Whether the warm-up was not given; no field.
    _warms_up_by_itself: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.divergence is not None and not isinstance(self.divergence, str):
            from opdtheory.training.objective import divergence_text

            object.__setattr__(self, "divergence", divergence_text(self.divergence))
        kinds = field_kinds()
        object.__setattr__(self, "_warms_up_by_itself", self.warmup_steps is None)
        for each in dataclasses.fields(self):
            if each.name == "warmup_steps" and self._warms_up_by_itself:
                object.__setattr__(self, each.name, self._own_warmup)
            value = _checked(each.name, getattr(self, each.name), *kinds[each.name], each.metadata)
            object.__setattr__(self, each.name, value)
        self._check_together()

    def loss(self) -> Estimator:
        """The loss that the run descends."""
        from opdtheory.training.objective import objective

        options = {name: getattr(self, name) for name in ESTIMATOR_OPTIONS}
        return objective(self.estimator, self.divergence, options, self.control, self.advantage)

    @property
    def _own_warmup(self) -> int:
        return min(_WARMUP, self.steps)

    @property
    def batch_size(self) -> int:
        """Rollouts in the global batch."""
        return self.prompts_per_step * self.rollouts_per_prompt

    @property
    def rollout_temperature(self) -> float:
        """What divides the student's logits where rollouts are sampled."""
        return self.temperature if self.sampling_temperature is None else self.sampling_temperature

    @property
    def samples_itself(self) -> bool:
        """Whether the student whose tokens are scored is the policy that samples them."""
        return self.rollout_temperature == self.temperature

    def records(self, finished: int) -> bool:
        """Whether the rollouts of step number `finished`, counted from 1, are recorded."""
        return self.record_every > 0 and self.is_due(finished, self.record_every)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of step number `step`, from 0: linear warm-up, then linear decay to zero."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup_steps)

    def is_due(self, finished: int, every: int) -> bool:
        """Whether something due every `every` steps, and at the end, is due after step `finished`."""
        return finished == self.steps or (every > 0 and finished % every == 0)

    def replace(self, **changes: Any) -> TrainConfig:
        """The same configuration with some fields changed; raises for an unknown name.

        A warm-up that was not given follows the steps.
        """
        _check_names(changes)
        if self._warms_up_by_itself:
            changes = {"warmup_steps": None, **changes}
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration from a mapping of field names; raises for an unknown name."""
        _check_names(values)
        # JSON and TOML have no tuples.
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**given)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """A configuration from a TOML file of fields, without tables; the text none is None. `overrides` win.

        Raises:
            InvalidArgumentError: the file is missing or is not valid TOML, or as for the class.
        """
        written = {name: None if value == "none" else value for name, value in read_toml("config", Path(path)).items()}
        return cls.from_dict({**written, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_toml(self) -> str:
        """The fields that differ from their default, as `from_toml` reads them."""
        given = self.to_dict()
        defaults = {each.name: each.default for each in dataclasses.fields(self)}
        defaults["warmup_steps"] = self._own_warmup if self._warms_up_by_itself else None
        changed = {name: value for name, value in given.items() if value != defaults[name]}
        return "".join(f"{name} = {_as_toml('none' if value is None else value)}\n" for name, value in changed.items())

    def identity(self) -> dict[str, Any]:
        """The fields that the trained parameters depend on: all but those in `RUNTIME`.

        A sampling temperature that changes nothing is left out, as in runs from before there was one.
        """
        without = RUNTIME | {"sampling_temperature"} if self.samples_itself else RUNTIME
        return {name: value for name, value in self.to_dict().items() if name not in without}

    def _check_together(self) -> None:
        grouped = self.zscore or self.baseline in ("group_mean", "leave_one_out")
        if grouped and self.rollouts_per_prompt < 2:
            which = "zscore" if self.zscore else f"baseline {self.baseline!r}"
            raise InvalidArgumentError(
                "rollouts_per_prompt", f"must be at least 2 for {which}, got {self.rollouts_per_prompt}"
            )
        if self.microbatch is not None and self.microbatch % self.rollouts_per_prompt:
            raise InvalidArgumentError(
                "microbatch",
                f"must be a multiple of rollouts_per_prompt={self.rollouts_per_prompt}, got {self.microbatch}",
            )
        if self.warmup_steps > self.steps:
            raise InvalidArgumentError("warmup_steps", f"must be at most steps={self.steps}, got {self.warmup_steps}")
        loss = self.loss()
        unstated = {"supervised": "it has no rollouts", "exact_opd": "no weight of a sampled token is stated"}
        if self.validate_every and (loss.name in unstated or not loss.is_token_local):
            why = unstated.get(loss.name, "its weights look beyond the next token")
            raise InvalidArgumentError("validate_every", f"does not apply to {loss.name}: {why}")
        if self.validate_every and not self.samples_itself:
            self._check_validation_off_policy(loss)
        if self.control is not None and self.updates_per_batch > 1:
            raise InvalidArgumentError("updates_per_batch", f"must be 1 for a control, got {self.updates_per_batch}")
        self._check_logs(loss)

    def _check_validation_off_policy(self, loss: Estimator) -> None:
        from opdtheory.training.objective import unpredicted_off_policy

        why = unpredicted_off_policy(loss)
        if why is not None:
            raise InvalidArgumentError(
                "validate_every",
                f"does not apply to {loss.label} with sampling_temperature={self.sampling_temperature:g}: {why}",
            )

    def _check_logs(self, loss: Estimator) -> None:
        if self.record_logits and not self.record_every:
            raise InvalidArgumentError("record_logits", "applies only with record_every, the steps between records")
        if self.record_every and self.out is None:
            raise InvalidArgumentError("record_every", "must have a folder: set out, the folder of the run")
        if self.record_every and loss.name == "supervised":
            raise InvalidArgumentError("record_every", "does not apply to supervised: it has no rollouts")
        if self.monitor:
            from opdtheory.monitoring.weights import weight_of

            try:
                weight_of(loss)
            except InvalidArgumentError:
                raise InvalidArgumentError(
                    "monitor", f"does not apply to {loss.label}: its advantage is no function of the token's own ratio"
                ) from None


def _fields_of(part: str) -> tuple[str, ...]:
    return tuple(each.name for each in dataclasses.fields(TrainConfig) if each.metadata["of"] == part)


ESTIMATOR_OPTIONS = _fields_of("estimator")
RUNTIME = frozenset(_fields_of("runtime"))


def field_kinds() -> dict[str, tuple[Any, bool]]:
    """The type of each field of `TrainConfig` without None, and whether None is allowed."""
    kinds = {}
    for name, hint in typing.get_type_hints(TrainConfig).items():
        optional = type(None) in typing.get_args(hint)
        kinds[name] = (typing.get_args(hint)[0] if optional else hint, optional)
    return kinds


def _check_names(values: Iterable[str]) -> None:
    known = [each.name for each in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; the fields are {', '.join(known)}"
            raise InvalidArgumentError(str(name) or '""', f"is not a field of TrainConfig{hint}")


def _as_toml(value: Any) -> str:
    """A value as TOML writes it: like JSON, but with characters as they are, except for DEL."""
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _checked(name: str, value: Any, kind: Any, optional: bool, limits: Mapping[str, Any]) -> Any:
    """The value, in the type of the field, within its limits."""
    if value is None and optional:
        return None
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise InvalidArgumentError(name, f"must be one of {', '.join(allowed)}, got {value!r}")
        return value
    if typing.get_origin(kind) is tuple:
        # The estimator checks how many there are.
        return tuple(_number(name, each, float, {}) for each in value) if isinstance(value, list | tuple) else value
    if kind in (int, float):
        return _number(name, value, kind, limits)
    if not isinstance(value, kind) or value == "":
        needed = "True or False" if kind is bool else "a non-empty string"
        raise InvalidArgumentError(name, f"must be {needed}, got {value!r}")
    if kind is str and _UNUSABLE.search(value):
        # No path has the character NUL, and half a surrogate pair cannot be written to a file.
        raise InvalidArgumentError(name, f"must be a string without NUL that UTF-8 can encode, got {value!r}")
    return value


def _number(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> int | float:
    right = isinstance(value, int) if kind is int else isinstance(value, Real) and _is_finite(value)
    if not right or isinstance(value, bool):
        wanted = "an integer" if kind is int else "a finite number"
        raise InvalidArgumentError(name, f"must be {wanted}, got {_shown(value)}")
    if kind is int:
        limits = {"high": _LARGEST, **limits}
    for limit, holds, words in (
        ("low", lambda bound: value >= bound, "at least"),
        ("above", lambda bound: value > bound, "greater than"),
        ("below", lambda bound: value < bound, "less than"),
        ("high", lambda bound: value <= bound, "at most"),
    ):
        if limit in limits and not holds(limits[limit]):
            raise InvalidArgumentError(name, f"must be {words} {limits[limit]:.10g}, got {_shown(value)}")
    return int(value) if kind is int else float(value)


def _is_finite(value: Any) -> bool:
    """Whether a number is finite as a float; an integer may be too large for one."""
    try:
        return math.isfinite(float(value))
    except OverflowError:
        return False


def _shown(value: object) -> str:
    """A value as an error shows it; thousands of digits say no more than their number."""
    try:
        text = repr(value)
    except ValueError:  # more digits than Python converts
        return "a huge integer"
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}... ({len(text)} characters)"
