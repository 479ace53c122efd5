r"""The experiment as data: which runs are compared, in which order, and what theory says of each before it starts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from opdtheory.training.config import TrainConfig

# No torch here: the scheduler only hands the plan on.
__all__ = ["CONTROLS", "DIVERGENCES", "ESTIMATORS", "FULL", "QUICK", "TWINS", "Arm", "Plan", "plan_of"]

# Raised when the same arm would be measured otherwise; finished rows of an older format are run again.
_FORMAT = 1

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger")
ESTIMATORS = ("opd", "opd_plus", "full_vocab")
TASKS = ("arithmetic", "tools")

# Fixed on the reverse-KL baseline, then the same for every arm.
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
_CLIPPED = ("opd", "opd_plus", "opd_plus_centred")  # the estimators that have a clip of the log-ratio

_JSD_CURED = "u*log(u)/2 - (u+1)*log((u+1)/2)/2 - log(2)/2*(u-1)"
OPTIMAL = "optimal"

CONTROLS: dict[str, dict[str, Any]] = {
    "forward_kl -7(u-1)/opd": {"estimator": "opd", "divergence": "u*log(u) - 7*(u-1)"},
    "forward_kl -2(u-1)/opd": {"estimator": "opd", "divergence": "u*log(u) - 2*(u-1)"},
    "jsd -log(2)/2(u-1)/opd": {"estimator": "opd", "divergence": _JSD_CURED},
    "forward_kl/opd, whole vocabulary": {
        "control": "exact_opd",
        "divergence": "forward_kl",
        "clip_log_ratio": _CLIP,
    },
    "jsd/opd, whole vocabulary": {"control": "exact_opd", "divergence": "jsd", "clip_log_ratio": _CLIP},
    "supervised": {"control": "supervised"},
    "constant advantage -1": {"control": "constant_advantage", "advantage": -1.0},
    "sign": {"estimator": "sign"},
    "forward_kl/opd_plus_centred": {"estimator": "opd_plus_centred", "divergence": "forward_kl"},
    "reverse_kl/opd, optimal baseline": {
        "estimator": "opd",
        "divergence": "reverse_kl",
        "baseline": "constant",
        "baseline_value": OPTIMAL,
    },
    "reverse_kl/opd, vocabulary baseline": {
        "estimator": "opd",
        "divergence": "reverse_kl",
        "baseline": "vocabulary",
    },
    "reverse_kl/opd, no clip": {"estimator": "opd", "divergence": "reverse_kl", "clip_log_ratio": None},
}
# The same arm on other rollouts: what two runs of one expected gradient differ by.
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
        name: the same for all seeds and tasks.
        group: `grid`, `control` or `twin`.
        task: its name.
        seed: of the student and of the rollouts.
        fields: of `TrainConfig`; a `baseline_value` of "optimal" is worked out at the start.
    """

    name: str
    group: str
    task: str
    seed: int
    fields: Mapping[str, Any] = field(repr=False)

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, but for the models, whose recipes the row adds."""
        return {"format": _FORMAT, "task": self.task, "seed": self.seed, "fields": dict(self.fields)}

    @property
    def key(self) -> str:
        """The name of its file."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:10]
        words = re.sub(r"[^a-z0-9_]+", "-", self.name.lower()).strip("-")
        return f"{self.task}-{words}-{self.seed}-{digest}"

    def config(self, **changes: Any) -> TrainConfig:
        """Its configuration; without a value, the optimal baseline stands as zero."""
        from opdtheory.training.config import TrainConfig

        values = {**self.fields, **changes}
        if values.get("baseline_value") == OPTIMAL:
            values["baseline_value"] = 0.0
        return TrainConfig.from_dict(values)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "group": self.group,
            "task": self.task,
            "seed": self.seed,
            "fields": dict(self.fields),
        }


@dataclass(frozen=True)
class Plan:
    """Which arms are run.

    Attributes:
        name: `full` or `quick`.
        steps: batches of rollouts an arm.
        seeds: how many.
        tasks: their names.
        divergences: of the grid.
        estimators: of the grid.
        controls: names.
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
        """The arms in order: the grid of a seed on every task before its controls, a seed before the next."""
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
        controls = {name: CONTROLS[name] for name in self.controls}
        return [
            ("grid", grid),
            ("twin", {TWINS[name]: grid[name] for name in self.twins}),
            ("control", controls),
        ]

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
        InvalidArgumentError: an unknown name or task, or a number that is not positive.
    """
    import dataclasses

    from opdtheory.training.tasks import TASKS as KNOWN

    plans = {"full": FULL, "quick": QUICK}
    if name not in plans:
        raise InvalidArgumentError("plan", f"is {name!r}; one of {', '.join(plans)} is needed")
    changes: dict[str, Any] = {}
    for argument, number in (("seeds", seeds), ("steps", steps)):
        if number is not None:
            if number < 1:
                raise InvalidArgumentError(argument, f"is {number}; at least 1 is needed")
            changes[argument] = number
    for task in tasks or ():
        if task not in KNOWN:
            raise InvalidArgumentError("task", f"is {task!r}; one of {', '.join(KNOWN)} is needed")
    if tasks:
        changes["tasks"] = tuple(dict.fromkeys(tasks))
    return dataclasses.replace(plans[name], **changes)
