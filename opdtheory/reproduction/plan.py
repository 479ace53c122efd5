"""The experiment as data: which runs are compared, and in which order."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from opdtheory.errors import InvalidArgumentError

if TYPE_CHECKING:
    from opdtheory.training.config import TrainConfig

# No torch here: the command line reads the plan.
__all__ = [
    "CONTROLS",
    "DIVERGENCES",
    "FORMS",
    "FULL",
    "PLANS",
    "QUICK",
    "RATES",
    "REFERENCE",
    "SMOLLM2",
    "STARTS",
    "TUNING_SEED",
    "Arm",
    "Group",
    "Plan",
    "plan_of",
]

# Incremented when the same arm would be measured differently; rows of an older format are run again.
_FORMAT = 2

Group = Literal["main", "control", "tuning", "tuned"]

DIVERGENCES = ("reverse_kl", "forward_kl", "jsd", "hellinger")
TASKS = ("arithmetic", "tools")

# The sampled accuracy on held-out problems at which a student's own training ends, so that all seeds start alike.
STARTS = {"arithmetic": 0.2, "tools": 0.1}

# The baseline of the field, to which every arm is compared.
REFERENCE = "reverse_kl/opd"

# Chosen for reverse-KL OPD, then the same for every arm. The learning rate is also tuned for each arm, over three
# values, on a student and rollouts of a seed that nothing else uses.
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
RATES = (7e-4, 2e-3, 5e-3)
TUNING_SEED = 100
_CLIP = 6.0

# What is done with a divergence: the stopped gradient, the corrected advantage, its least-variance baseline, the exact
# part on the teacher's k tokens with a sampled tail (T13), and the whole vocabulary. The optimal baseline needs both
# whole laws; for "no baseline" and "rest" (T19b) the top tokens and the sampled one suffice.
FORMS: dict[str, dict[str, Any]] = {
    "opd": {"estimator": "opd", "clip_log_ratio": _CLIP},
    "opd_plus": {"estimator": "opd_plus", "clip_log_ratio": _CLIP},
    "opd_plus, optimal baseline": {"estimator": "opd_plus", "baseline": "optimal", "clip_log_ratio": _CLIP},
    "top 4 and tail, no baseline": {"estimator": "topk_tail_sampled", "k": 4},
    "top 4 and tail, rest": {"estimator": "topk_tail_sampled", "k": 4, "baseline": "rest"},
    **{
        f"top {k} and tail": {"estimator": "topk_tail_sampled", "k": k, "baseline": "optimal"}
        for k in (2, 4, 8, 16, 64)
    },
    "full_vocab": {"estimator": "full_vocab"},
}
# Of the stopped gradient, only that of the reverse KL is unbiased; the others are controls.
_COMPARED = (
    *("opd_plus", "opd_plus, optimal baseline", "top 4 and tail, no baseline", "top 4 and tail, rest"),
    *("top 2 and tail", "top 4 and tail", "top 8 and tail", "full_vocab"),
)
_TUNED_FORMS = ("opd_plus", "opd_plus, optimal baseline", "top 8 and tail")

# A real language model has a vocabulary of 49,152 tokens: more of the teacher's are needed. Nothing is tuned.
_SMOLLM2_FORMS = ("opd_plus, optimal baseline", "top 16 and tail", "top 64 and tail", "full_vocab")
_SMOLLM2_SETTINGS = {"prompts_per_step": 32, "learning_rate": 5e-5, "warmup_steps": 5}

_JSD_CURED = "u*log(u)/2 - (u+1)*log((u+1)/2)/2 - log(2)/2*(u-1)"
_OPD = FORMS["opd"]

CONTROLS: dict[str, dict[str, Any]] = {
    **{f"{divergence}/opd": {**_OPD, "divergence": divergence} for divergence in ("forward_kl", "jsd", "hellinger")},
    "forward_kl -7(u-1)/opd": {**_OPD, "divergence": "u*log(u) - 7*(u-1)"},
    "jsd -log(2)/2(u-1)/opd": {**_OPD, "divergence": _JSD_CURED},
    "forward_kl/opd_plus, clip 2": {**FORMS["opd_plus"], "divergence": "forward_kl", "clip_log_ratio": 2.0},
    "constant advantage -1": {"control": "constant_advantage", "advantage": -1.0},
}


@dataclass(frozen=True)
class Arm:
    """One run: a task, a student, an estimator.

    Attributes:
        name: the arm's name, the same for all seeds and tasks.
        group: `main`, `control`, `tuning` for a learning rate that is tried, or `tuned` for one that was chosen.
        task: name of the task.
        seed: seed of the student and of the rollouts.
        fields: fields of `TrainConfig`.
    """

    name: str
    group: Group
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
        return f"{self.task}, {self.name}{self._rate}, seed {self.seed}"

    @property
    def _rate(self) -> str:
        return f", rate {self.fields['learning_rate']:g}" if self.group in ("tuning", "tuned") else ""

    @property
    def base(self) -> str | None:
        """What the student and the teacher are made from, see `Plan`."""
        base: str | None = self.fields.get("student")
        return base

    @property
    def identity(self) -> dict[str, Any]:
        """What the result depends on, apart from the models, whose recipes the row adds."""
        return {"format": _FORMAT, "task": self.task, "seed": self.seed, "fields": dict(self.fields)}

    @property
    def key(self) -> str:
        """The name of the row's file."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:10]
        words = re.sub(r"[^a-z0-9_]+", "-", f"{self.name}{self._rate}".lower()).strip("-")
        return f"{self.task}-{words}-{self.seed}-{digest}"

    def config(self, **changes: Any) -> TrainConfig:
        """The arm's configuration."""
        from opdtheory.training.config import TrainConfig

        return TrainConfig.from_dict({**self.fields, **changes})

    def at_rate(self, rate: float, group: Group, seed: int | None = None) -> Arm:
        """The same arm at another learning rate, and of another seed if one is given."""
        seed = self.seed if seed is None else seed
        fields = {**self.fields, "learning_rate": rate, "seed": seed, "pair_seed": seed}
        return Arm(self.name, group, self.task, seed, fields)

    def to_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class Plan:
    """Which arms are run.

    Attributes:
        name: `full`, `quick` or `smollm2`.
        steps: batches of rollouts of an arm.
        seeds: number of seeds of the arms that are compared.
        control_seeds: number of seeds of the controls.
        tasks: names of the tasks.
        divergences: divergences that are compared.
        forms: what is done with each, see `FORMS`.
        controls: names of the controls.
        tuned: forms whose learning rate is tuned too.
        eval_examples: test problems, answered once greedily and once by sampling, at the start and at the end.
        base: `smollm2` for students and teachers that are made from SmolLM2-135M-Instruct.
        settings: fields of `TrainConfig` that differ from those of the full plan.
        workers: number of processes at a time (default: one per core).
    """

    name: str
    steps: int
    seeds: int
    control_seeds: int
    tasks: tuple[str, ...] = TASKS
    divergences: tuple[str, ...] = DIVERGENCES
    forms: tuple[str, ...] = _COMPARED
    controls: tuple[str, ...] = tuple(CONTROLS)
    tuned: tuple[str, ...] = _TUNED_FORMS
    eval_examples: int = 1000
    base: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    workers: int | None = None

    def arms(self) -> list[Arm]:
        """The arms that no result decides, in order: seed by seed, on every task, then controls, then tuning."""
        main = [arm for seed in range(self.seeds) for arm in self._main(seed)]
        controls = [
            self._arm(name, "control", task, seed, CONTROLS[name])
            for seed in range(self.control_seeds)
            for name in self.controls
            for task in self.tasks
        ]
        tuning = [
            arm.at_rate(rate, "tuning", TUNING_SEED)
            for arm in self._main(0)
            if self._is_tuned(arm.name)
            for rate in RATES
        ]
        return [*main, *controls, *tuning]

    def tuned_arms(self, rows: Sequence[Mapping[str, Any]]) -> list[Arm]:
        """The arms at their own learning rate, where the tuning rows chose another than the common one."""
        chosen = self.chosen_rates(rows)
        return [
            arm.at_rate(rate, "tuned")
            for seed in range(self.seeds)
            for arm in self._main(seed)
            if (rate := chosen.get((arm.task, arm.name))) is not None and rate != arm.fields["learning_rate"]
        ]

    def chosen_rates(self, rows: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], float]:
        """The rate with the highest sampled accuracy for each task and arm all of whose tuning runs have ended."""
        ends: dict[tuple[str, str], dict[float, float]] = {}
        for row in rows:
            if row["group"] == "tuning":
                # A run that fails is worse than any that ends.
                end = row["end"]["test_sampled_accuracy"] if row["status"] == "finished" else -1.0
                ends.setdefault((row["task"], row["name"]), {})[row["identity"]["fields"]["learning_rate"]] = end
        return {key: max(found, key=found.__getitem__) for key, found in ends.items() if len(found) == len(RATES)}

    def _main(self, seed: int) -> list[Arm]:
        named = {REFERENCE: {**_OPD, "divergence": "reverse_kl"}}
        for divergence in self.divergences:
            for form in self.forms:
                named[f"{divergence}/{form}"] = {**FORMS[form], "divergence": divergence}
        return [self._arm(name, "main", task, seed, fields) for name, fields in named.items() for task in self.tasks]

    def _is_tuned(self, name: str) -> bool:
        return bool(self.tuned) and (name == REFERENCE or name.partition("/")[2] in self.tuned)

    def _arm(self, name: str, group: Group, task: str, seed: int, fields: Mapping[str, Any]) -> Arm:
        values = {"task": task, "pair_seed": seed, "seed": seed, **_SETTINGS, "steps": self.steps}
        values |= {"eval_examples": self.eval_examples, "eval_every": 0, **self.settings}
        values["warmup_steps"] = min(values["warmup_steps"], self.steps // 5)
        if self.base is not None:
            values |= {"student": self.base, "teacher": self.base}
        return Arm(name, group, task, seed, {**values, **fields})


FULL = Plan("full", steps=120, seeds=5, control_seeds=2)
QUICK = Plan(
    "quick",
    steps=60,
    seeds=1,
    control_seeds=1,
    divergences=("reverse_kl", "jsd"),
    forms=("opd_plus", "opd_plus, optimal baseline", "top 8 and tail", "full_vocab"),
    controls=("jsd/opd",),
    tuned=(),
    eval_examples=500,
)

SMOLLM2 = Plan(
    "smollm2",
    steps=25,
    seeds=1,
    control_seeds=1,
    divergences=("reverse_kl", "jsd"),
    forms=_SMOLLM2_FORMS,
    controls=("jsd/opd",),
    tuned=(),
    eval_examples=200,
    base="smollm2",
    settings=_SMOLLM2_SETTINGS,
    workers=2,
)
PLANS = {plan.name: plan for plan in (FULL, QUICK, SMOLLM2)}


def plan_of(
    name: str, *, seeds: int | None = None, steps: int | None = None, tasks: Sequence[str] | None = None
) -> Plan:
    """A plan by its name, with other seeds, steps or tasks if given.

    Raises:
        InvalidArgumentError: the name or a task is unknown, or a number is not positive.
    """
    from opdtheory.training.tasks import TASKS as KNOWN

    if name not in PLANS:
        raise InvalidArgumentError("plan", f"must be one of {', '.join(PLANS)}, got {name!r}")
    changes: dict[str, Any] = {key: x for key, x in (("seeds", seeds), ("steps", steps)) if x is not None}
    for argument, number in changes.items():
        if number < 1:
            raise InvalidArgumentError(argument, f"must be at least 1, got {number}")
    for task in tasks or ():
        if task not in KNOWN:
            raise InvalidArgumentError("task", f"must be one of {', '.join(KNOWN)}, got {task!r}")
    if tasks:
        changes["tasks"] = tuple(dict.fromkeys(tasks))
    if seeds is not None:
        changes["control_seeds"] = min(seeds, PLANS[name].control_seeds)
    return dataclasses.replace(PLANS[name], **changes)
