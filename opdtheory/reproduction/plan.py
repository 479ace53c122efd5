"""The experiment as data: which runs are compared, and in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from opdtheory.training.config import TrainConfig

# No torch here: the command line reads the plan.
__all__ = ["CONTROLS", "DIVERGENCES", "ESTIMATORS", "FULL", "QUICK", "TWINS", "Arm", "Plan", "plan_of"]

# Incremented when the same arm would be measured differently; rows of an older format are run again.
_FORMAT = 1

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger")
ESTIMATORS = ("opd", "opd_plus", "full_vocab")
TASKS = ("arithmetic", "tools")

# Chosen for reverse-KL OPD, then the same for every arm.
_SETTINGS: dict[str, Any] = {
    "prompts_per_step": 128,
    "rollouts_per_prompt": 1,
    "updates_per_batch": 1,
    "learning_rate": 2e-3,
    "warmup_steps": 20,
    "beta1": 0.9,
    "beta2": 0.999,
    "weight_decay": 0.0,
    "clip_gradient": 1.0,
    "temperature": 1.0,
    "reduction": "token_mean",
    "dtype": "float32",
}
_CLIP = 6.0
_CLIPPED = ("opd", "opd_plus", "opd_plus_centred")  # the estimators that clip the log-ratio

_JSD_CURED = "u*log(u)/2 - (u+1)*log((u+1)/2)/2 - log(2)/2*(u-1)"
OPTIMAL = "optimal"
_EXACT_OPD = {"control": "exact_opd", "clip_log_ratio": _CLIP}
_REVERSE_KL = {"estimator": "opd", "divergence": "reverse_kl"}

CONTROLS: dict[str, dict[str, Any]] = {
    "forward_kl -7(u-1)/opd": {"estimator": "opd", "divergence": "u*log(u) - 7*(u-1)"},
    "forward_kl -2(u-1)/opd": {"estimator": "opd", "divergence": "u*log(u) - 2*(u-1)"},
    "jsd -log(2)/2(u-1)/opd": {"estimator": "opd", "divergence": _JSD_CURED},
    "forward_kl/opd, whole vocabulary": {"divergence": "forward_kl", **_EXACT_OPD},
    "jsd/opd, whole vocabulary": {"divergence": "jsd", **_EXACT_OPD},
    "supervised": {"control": "supervised"},
    "constant advantage -1": {"control": "constant_advantage", "advantage": -1.0},
    "sign": {"estimator": "sign"},
    "forward_kl/opd_plus_centred": {"estimator": "opd_plus_centred", "divergence": "forward_kl"},
    "reverse_kl/opd, optimal baseline": {**_REVERSE_KL, "baseline": "constant", "baseline_value": OPTIMAL},
    "reverse_kl/opd, vocabulary baseline": {**_REVERSE_KL, "baseline": "vocabulary"},
    "reverse_kl/opd, no clip": {**_REVERSE_KL, "clip_log_ratio": None},
}
# The same arm on other rollouts, to see how much two runs with one expected gradient differ.
TWINS = {
    "reverse_kl/opd": "reverse_kl/opd, other rollouts",
    "forward_kl/opd_plus": "forward_kl/opd_plus, other rollouts",
    "jsd/opd_plus": "jsd/opd_plus, other rollouts",
}
_OTHER_ROLLOUTS = 1_000_000


@dataclass(frozen=True)
class Arm:
    """One run: a task, a student, an estimator.

    Attributes:
        name: the arm's name, the same for all seeds and tasks.
        group: `grid`, `control` or `twin`.
        task: name of the task.
        seed: seed of the student and of the rollouts.
        fields: fields of `TrainConfig`; a `baseline_value` of "optimal" is computed at the start.
    """

    name: str
    group: str
    task: str
    seed: int
    fields: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of_row(cls, row: Mapping[str, Any]) -> Arm:
        """The arm that a row was measured for."""
        return cls(row["name"], row["group"], row["task"], row["seed"], row["identity"]["fields"])

    @property
    def label(self) -> str:
        """The arm with its task and seed."""
        return f"{self.task}, {self.name}, seed {self.seed}"

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, apart from the models, whose recipes the row adds."""
        return {"format": _FORMAT, "task": self.task, "seed": self.seed, "fields": dict(self.fields)}

    @property
    def key(self) -> str:
        """The name of the row's file."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:10]
        words = re.sub(r"[^a-z0-9_]+", "-", self.name.lower()).strip("-")
        return f"{self.task}-{words}-{self.seed}-{digest}"

    def config(self, **changes: Any) -> TrainConfig:
        """The arm's configuration; an optimal baseline that is not yet computed is zero."""
        from opdtheory.training.config import TrainConfig

        values = {**self.fields, **changes}
        if values.get("baseline_value") == OPTIMAL:
            values["baseline_value"] = 0.0
        return TrainConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Plan:
    """Which arms are run.

    Attributes:
        name: `full` or `quick`.
        steps: batches of rollouts of an arm.
        seeds: number of seeds.
        tasks: names of the tasks.
        divergences: divergences of the grid.
        estimators: estimators of the grid.
        controls: names of the controls.
        twins: arms that are run twice.
        eval_examples: test problems, answered once greedily and once by sampling, at the start and at the end.
    """

    name: str
    steps: int
    seeds: int
    tasks: tuple[str, ...] = TASKS
    divergences: tuple[str, ...] = DIVERGENCES
    estimators: tuple[str, ...] = ESTIMATORS
    controls: tuple[str, ...] = tuple(CONTROLS)
    twins: tuple[str, ...] = tuple(TWINS)
    eval_examples: int = 1000

    def arms(self) -> list[Arm]:
        """The arms in order: seed by seed, on every task, the grid before twins and controls."""
        return [
            self._arm(name, group, task, seed, fields)
            for seed in range(self.seeds)
            for group, members in self._groups()
            for name, fields in members.items()
            for task in self.tasks
        ]

    def _groups(self) -> list[tuple[str, dict[str, dict[str, Any]]]]:
        grid = {
            f"{divergence}/{estimator}": {"estimator": estimator, "divergence": divergence}
            for divergence in self.divergences
            for estimator in self.estimators
        }
        twins = {TWINS[name]: grid[name] for name in self.twins}
        return [("grid", grid), ("twin", twins), ("control", {name: CONTROLS[name] for name in self.controls})]

    def _arm(self, name: str, group: str, task: str, seed: int, fields: Mapping[str, Any]) -> Arm:
        values = {"task": task, "pair_seed": seed, "seed": seed, **_SETTINGS, "steps": self.steps}
        values |= {"warmup_steps": min(_SETTINGS["warmup_steps"], self.steps // 5)}
        values |= {"eval_examples": self.eval_examples, "eval_every": 0}
        if fields.get("estimator") in _CLIPPED:
            values["clip_log_ratio"] = _CLIP
        values |= fields
        if group == "twin":
            values["seed"] += _OTHER_ROLLOUTS
        return Arm(name, group, task, seed, values)


FULL = Plan("full", steps=200, seeds=3)
QUICK = Plan(
    "quick",
    steps=100,
    seeds=1,
    divergences=("reverse_kl", "forward_kl", "jsd"),
    controls=("forward_kl -7(u-1)/opd", "jsd -log(2)/2(u-1)/opd"),
    twins=("reverse_kl/opd",),
    eval_examples=500,
)


def plan_of(
    name: str, *, seeds: int | None = None, steps: int | None = None, tasks: Sequence[str] | None = None
) -> Plan:
    """The full or the quick plan, with other seeds, steps or tasks if given.

    Raises:
        InvalidArgumentError: the name or a task is unknown, or a number is not positive.
    """
    from opdtheory.training.tasks import TASKS as KNOWN

    plans = {"full": FULL, "quick": QUICK}
    if name not in plans:
        raise InvalidArgumentError("plan", f"must be one of {', '.join(plans)}, got {name!r}")
    changes: dict[str, Any] = {key: x for key, x in (("seeds", seeds), ("steps", steps)) if x is not None}
    for argument, number in changes.items():
        if number < 1:
            raise InvalidArgumentError(argument, f"must be at least 1, got {number}")
    for task in tasks or ():
        if task not in KNOWN:
            raise InvalidArgumentError("task", f"must be one of {', '.join(KNOWN)}, got {task!r}")
    if tasks:
        changes["tasks"] = tuple(dict.fromkeys(tasks))
    return dataclasses.replace(plans[name], **changes)
