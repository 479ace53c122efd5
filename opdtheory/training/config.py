"""What a training run is: one flat, checked dataclass, read from TOML and from the command line."""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import math
import sys
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from opdtheory.choices import Control
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators import Estimator

if TYPE_CHECKING:
    from opdtheory.estimators import Estimator

# No torch here: the command line reads the fields for its help.
__all__ = ["ESTIMATOR_OPTIONS", "RUNTIME", "TrainConfig", "check_can_validate"]

_NUMBER_NEEDED = {int: "a whole number", float: "a finite number"}


def _option(default: Any, text: str, **limits: Any) -> Any:
    return field(default=default, metadata={"help": text, **limits})


@dataclass(frozen=True)
class TrainConfig:
    r"""A training run in one value: the same configuration gives the same parameters, bit for bit.

    Every field is checked on construction, the estimator's options by `opdtheory.estimator` itself. Fields that are
    None are off, or take the task's or the estimator's own default.

    Raises:
        InvalidArgumentError: a `ValueError` that names the field with its value and what is needed.

    Example:
        >>> config = TrainConfig(divergence="jsd", clip_log_ratio=6.0, reduction="token_mean")
        >>> config.loss()
        estimator('opd_plus', 'jsd', reduction='token_mean', clip_log_ratio=6.0)
        >>> TrainConfig(divergence="u*log(u) - 7*(u - 1)", estimator="opd").loss().claim.divergence.expr
        u*log(u) - 7*u + 7
    """

    # What is learned, and from whom
    task: str = _option("arithmetic", "the task, which makes prompts and verifies answers")
    pair_seed: int = _option(0, "seed of the task's own teacher and student", low=0)
    student: str | None = _option(
        None, "folder or name of a causal language model, or smollm2, in place of the task's student"
    )
    teacher: str | None = _option(
        None, "folder or name of a causal language model, or smollm2, in place of the task's teacher"
    )
    # The estimator
    estimator: str = _option("opd_plus", "a name of opdtheory.estimator_names()")
    divergence: str | None = _option(
        None, "a catalogue name such as jsd or 'skew_jsd(beta=0.1)', or a generator in u such as 'u*log(u)-7*(u-1)'"
    )
    reduction: Literal["token_sum", "token_mean", "sequence_mean"] = _option(
        "token_mean", "over the whole batch, however it is split"
    )
    baseline: Literal["constant", "group_mean", "leave_one_out", "vocabulary"] | None = _option(
        None, "group_mean and leave_one_out are taken over the rollouts of one prompt"
    )
    baseline_value: float | None = _option(None, "the constant, in the unit of the advantage")
    zscore: bool = _option(False, "centre and scale within the rollouts of one prompt")
    eps: float | None = _option(None, "added to the standard deviation of zscore")
    importance: Literal["token", "prefix", "sequence", "ppo"] | None = _option(
        None, "weights for what the sampling policy drew"
    )
    clip_range: float | None = _option(None, "of importance ppo")
    clip_log_ratio: float | None = _option(None, "clamp log u to [-C, C] nats: an estimator of its own, with a bias")
    clip_weight: tuple[float, float] | None = _option(None, "clamp the advantage to [low, high]")
    gamma: float | None = _option(None, "discount of return_to_go")
    discounted: bool = _option(False, "return_to_go with the outer discount")
    alpha: float | None = _option(None, "of box_cox and power")
    k: int | None = _option(None, "tokens of the top-k estimators")
    support: Literal["teacher", "student"] | None = _option(None, "whose k likeliest tokens")
    control: Control | None = _option(
        None,
        "a control in place of the estimator: every token has the advantage --advantage; or the loss is that of more "
        "demonstrations, as many as rollouts; or OPD's reward is summed over the whole vocabulary, without noise",
    )
    advantage: float | None = _option(None, "the constant of the control constant_advantage")
    # Rollouts
    prompts_per_step: int = _option(128, "prompts in the global batch", low=1)
    rollouts_per_prompt: int = _option(1, "rollouts of each prompt: a group", low=1)
    updates_per_batch: int = _option(1, "optimiser steps on each batch of rollouts", low=1)
    microbatch: int | None = _option(
        None, "rollouts in one backward pass, whole groups; changes nothing but rounding", low=1
    )
    temperature: float = _option(1.0, "divides the logits of both models, in sampling and in the loss", above=0.0)
    max_new_tokens: int | None = _option(None, "longest response (the task's own)", low=1)
    # The optimiser
    steps: int = _option(200, "batches of rollouts", low=1)
    learning_rate: float = _option(7e-4, "AdamW's, at its peak", above=0.0)
    warmup_steps: int = _option(20, "steps of linear warm-up, before linear decay to zero", low=0)
    beta1: float = _option(0.9, "AdamW's average of gradients", low=0.0, below=1.0)
    beta2: float = _option(0.999, "AdamW's average of squared gradients", low=0.0, below=1.0)
    weight_decay: float = _option(0.0, "AdamW's", low=0.0)
    clip_gradient: float | None = _option(1.0, "largest norm of the gradient", above=0.0)
    seed: int = _option(0, "of prompts and samples", low=0)
    # Evaluation, on the task's test split
    eval_every: int = _option(50, "steps between evaluations; 0: at the start and the end only", low=0)
    eval_examples: int = _option(256, "test problems, answered greedily and by sampling; 0: no evaluation", low=0)
    validate_every: int = _option(0, "steps between checks of the gradient against theory; 0: none", low=0)
    # The machine
    device: str = _option("auto", "cpu, cuda, cuda:1; auto takes a GPU where there is one")
    dtype: Literal["float32", "float64"] = _option("float32", "of parameters and arithmetic")
    threads: int | None = _option(None, "of torch on the CPU", low=1)
    check_rollouts: bool = _option(True, "validate every batch: cheap on a CPU, a few waits for the device on a GPU")
    # What is kept
    out: str | None = _option(None, "folder of the run: metrics, checkpoints, failures; resumed if it holds some")
    checkpoint_every: int = _option(1, "steps between checkpoints; 0: the last step only", low=0)
    keep_checkpoints: int = _option(2, "how many of them stay", low=1)
    tensorboard: bool = _option(False, "write TensorBoard event files beside the metrics")
    progress: bool = _option(True, "a progress bar with live metrics on a terminal")
    cache: str | None = _option(None, "folder of trained teachers and students")

    def __post_init__(self) -> None:
        if self.divergence is not None and not isinstance(self.divergence, str):
            from opdtheory.training.objective import divergence_text

            object.__setattr__(self, "divergence", divergence_text(self.divergence))
        hints = typing.get_type_hints(type(self))
        for each in dataclasses.fields(self):
            value = _checked(each.name, getattr(self, each.name), hints[each.name], each.metadata)
            object.__setattr__(self, each.name, value)
        self._check_together()
        self.loss()

    def loss(self) -> Estimator:
        """The loss that the run descends."""
        from opdtheory.training.objective import objective

        options = {name: getattr(self, name) for name in ESTIMATOR_OPTIONS}
        return objective(self.estimator, self.divergence, options, self.control, self.advantage)

    @property
    def batch_size(self) -> int:
        """Rollouts in the global batch."""
        return self.prompts_per_step * self.rollouts_per_prompt

    def learning_rate_at(self, step: int) -> float:
        """The rate of step number `step`, from 0: up linearly over the warm-up, down linearly to zero at the end."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        return self.learning_rate * (self.steps - step) / max(1, self.steps - self.warmup_steps)

    def is_due(self, finished: int, every: int) -> bool:
        """Whether what happens every so many steps, and after the last, happens after this many."""
        return finished == self.steps or (every > 0 and finished % every == 0)

    def replace(self, **changes: Any) -> TrainConfig:
        """The same configuration with some fields changed; an unknown name is refused."""
        _refuse_unknown(changes)
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainConfig:
        """A configuration of named values; an unknown name is refused."""
        _refuse_unknown(values)
        # JSON and TOML have no tuples.
        given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
        return cls(**given)

    @classmethod
    def from_toml(cls, path: str | Path, **overrides: Any) -> TrainConfig:
        """A configuration from a TOML file of fields, without tables; the text none is None. `overrides` win.

        Raises:
            InvalidArgumentError: the file is missing or no TOML, or as for the class.
        """
        written = {name: None if value == "none" else value for name, value in _read_toml(Path(path)).items()}
        return cls.from_dict({**written, **overrides})

    def to_dict(self) -> dict[str, Any]:
        """Every field as a JSON value."""
        values = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}

    def to_toml(self) -> str:
        """The fields that are not at their default, as `from_toml` reads them."""
        given = self.to_dict()
        changed = {each.name: given[each.name] for each in dataclasses.fields(self) if given[each.name] != each.default}
        lines = (f"{name} = {json.dumps('none' if value is None else value)}" for name, value in changed.items())
        return "".join(f"{line}\n" for line in lines)

    def identity(self) -> dict[str, Any]:
        """The fields that the trained parameters depend on: all but those of the machine and of what is kept."""
        return {name: value for name, value in self.to_dict().items() if name not in RUNTIME}

    def _check_together(self) -> None:
        grouped = self.zscore or self.baseline in ("group_mean", "leave_one_out")
        if grouped and self.rollouts_per_prompt < 2:
            which = "zscore" if self.zscore else f"baseline {self.baseline!r}"
            raise InvalidArgumentError(
                "rollouts_per_prompt", f"is {self.rollouts_per_prompt}; {which} needs at least 2 in each group"
            )
        if self.microbatch is not None and self.microbatch % self.rollouts_per_prompt:
            raise InvalidArgumentError(
                "microbatch",
                f"is {self.microbatch}; whole groups, a multiple of rollouts_per_prompt={self.rollouts_per_prompt}, "
                "are needed",
            )
        if self.warmup_steps > self.steps:
            raise InvalidArgumentError(
                "warmup_steps", f"is {self.warmup_steps}; at most steps={self.steps} can be warm-up"
            )
        if self.validate_every:
            check_can_validate(self.loss())
        if self.control is not None and self.updates_per_batch > 1:
            raise InvalidArgumentError("updates_per_batch", f"is {self.updates_per_batch}; a control takes one")


ESTIMATOR_OPTIONS = (
    *("reduction", "baseline", "baseline_value", "zscore", "eps", "importance", "clip_range", "clip_log_ratio"),
    *("clip_weight", "gamma", "discounted", "alpha", "k", "support"),
)
RUNTIME = frozenset(
    {
        "validate_every",
        "threads",
        "check_rollouts",
        "out",
        "checkpoint_every",
        "keep_checkpoints",
        "tensorboard",
        "progress",
        "cache",
    }
)


def _refuse_unknown(values: Iterable[str]) -> None:
    known = [each.name for each in dataclasses.fields(TrainConfig)]
    for name in values:
        if name not in known:
            near = difflib.get_close_matches(str(name), known, n=1)
            hint = f", did you mean {near[0]!r}?" if near else f"; known: {', '.join(known)}"
            raise InvalidArgumentError(str(name), f"is no field of TrainConfig{hint}")


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        parser = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
    except ImportError:
        raise InvalidArgumentError("config", 'TOML needs Python 3.11 or pip install "opdtheory[train]"') from None
    try:
        values: dict[str, Any] = parser.loads(path.read_text(encoding="utf-8"))
        return values
    except OSError as error:
        raise InvalidArgumentError("config", f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise InvalidArgumentError("config", f"{path} is no TOML: {error}") from None


def _checked(name: str, value: Any, hint: Any, limits: Mapping[str, Any]) -> Any:
    """The value, in the type that the annotation names, within its limits."""
    if value is None:
        if type(None) in typing.get_args(hint):
            return None
        raise InvalidArgumentError(name, "is None; a value is needed")
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if _is_union(hint) else [hint]
    kind = kinds[0]
    if typing.get_origin(kind) is Literal:
        allowed = typing.get_args(kind)
        if value not in allowed:
            raise InvalidArgumentError(name, f"got {value!r}; one of {', '.join(allowed)} is needed")
        return value
    if typing.get_origin(kind) is tuple:
        return tuple(value) if isinstance(value, list) else value  # the estimator checks it
    if kind in (int, float):
        return _number(name, value, kind, limits)
    if not isinstance(value, kind) or value == "":
        raise InvalidArgumentError(name, f"got {value!r}; {'True or False' if kind is bool else 'a text'} is needed")
    return value


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)


def _number(name: str, value: Any, kind: type, limits: Mapping[str, Any]) -> int | float:
    right = isinstance(value, int if kind is int else Real) and not isinstance(value, bool) and math.isfinite(value)
    if not right:
        raise InvalidArgumentError(name, f"got {value!r}; {_NUMBER_NEEDED[kind]} is needed")
    for limit, holds, words in (
        ("low", lambda bound: value >= bound, "at least"),
        ("above", lambda bound: value > bound, "more than"),
        ("below", lambda bound: value < bound, "less than"),
    ):
        if limit in limits and not holds(limits[limit]):
            raise InvalidArgumentError(name, f"is {value!r}; {words} {limits[limit]:g} is needed")
    return int(value) if kind is int else float(value)


def check_can_validate(loss: Estimator) -> None:
    """Refuse to validate a run whose loss looks beyond the next token, or at no rollouts at all.

    Raises:
        InvalidArgumentError: names `validate_every`.
    """
    if loss.name == "supervised" or not loss.is_token_local:
        why = "it has no rollouts" if loss.name == "supervised" else "its weights look beyond the next token"
        raise InvalidArgumentError("validate_every", f"does not apply to {loss.name}: {why}")
