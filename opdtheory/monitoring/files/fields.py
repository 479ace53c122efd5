"""The names under which trainers keep the log-probabilities of sampled tokens, and which name of a record is what.

A record's names are flattened: `rollout_data.log_probs` is the entry `log_probs` of the entry `rollout_data`, and it
answers to either spelling. The trainer is the one of `TRAINERS` whose name for the student the record has; of several,
one whose name for the sampler it has; of several still, the one that has most of the record's names, the first in their
order. Names for the teacher, the mask and the entropy alone tell little, since several trainers share them. A trainer's
names for a role are taken in their order, so `old_log_probs` goes before `log_probs` in a record of verl. A role that
the trainer has no field for may be filled under this library's own name.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

from opdtheory.errors import InvalidArgumentError

__all__ = [
    "OWN",
    "ROLES",
    "ROLLOUT_MASKS",
    "STEPS",
    "TRAINERS",
    "Fields",
    "Mapped",
    "Names",
    "chosen",
    "flattened",
    "no_field",
    "step_entries",
    "whole",
]

# What may be named by the user, in the order of `read_run`.
ROLES = ("student", "teacher", "behavior", "mask")

# Names of the step; the first that a record has is taken.
STEPS = (
    *("step", "global_step", "global_steps", "train_step", "training_step", "iteration", "iter"),
    "rollout_id",
)


@dataclass(frozen=True)
class Names:
    """The names that one trainer uses; of several for a role, the first that a record has is taken.

    Attributes:
        trainer: its name.
        student: of the policy that is trained, as the trainer computes them.
        teacher: of the teacher, or of the reference policy that stands in its place.
        behavior: of the engine or policy that sampled.
        masks: 1 on tokens that count; the product of those that a record has.
        rollout_masks: 1 on rollouts that count, one number for each.
        entropy: of the student, in nats.
        whole: names of rows over prompt and response, the number of a token one place before it.
        remark: what a reader of its files should know.
    """

    trainer: str
    student: tuple[str, ...]
    teacher: tuple[str, ...] = ()
    behavior: tuple[str, ...] = ()
    masks: tuple[str, ...] = ()
    rollout_masks: tuple[str, ...] = ()
    entropy: tuple[str, ...] = ()
    whole: tuple[str, ...] = ()
    remark: str = ""

    @property
    def all(self) -> frozenset[str]:
        """Every name."""
        known = (self.student, self.teacher, self.behavior, self.masks, self.rollout_masks, self.entropy)
        return frozenset(name for names in known for name in names)


OWN = Names(
    "opdtheory",
    student=("student_logprobs",),
    teacher=("teacher_logprobs",),
    behavior=("behavior_logprobs",),
    masks=("mask",),
    entropy=("entropy",),
    remark="what `opdtheory train` writes",
)

# In order of precedence: where two have equally many of a record's names, the first is taken.
TRAINERS: tuple[Names, ...] = (
    OWN,
    Names(
        "TRL",
        student=("old_per_token_logps",),
        teacher=("ref_per_token_logps",),
        behavior=("sampling_per_token_logps",),
        masks=("completion_mask", "tool_mask"),
        remark="the batch of GRPOTrainer; `old_per_token_logps` is absent where every batch is used once, on-policy",
    ),
    Names(
        "verl",
        student=("old_log_probs", "log_probs"),
        teacher=("teacher_logprobs", "teacher_log_probs", "ref_log_prob"),
        behavior=("rollout_log_probs",),
        masks=("response_mask",),
        entropy=("entropys",),
        whole=("teacher_logprobs",),
        remark="`batch` of a DataProto; `log_probs` are those of the policy while it is updated",
    ),
    Names(
        "slime",
        student=("log_probs",),
        teacher=("teacher_log_probs", "ref_log_probs"),
        behavior=("rollout_log_probs",),
        masks=("loss_masks",),
        entropy=("entropy",),
        remark="`--save-debug-train-data`; the names lie under `rollout_data` or, in newer files, in each of `samples`",
    ),
    Names(
        "prime-rl",
        student=("trainer_logprobs",),
        teacher=("ref_logprobs",),
        behavior=("inference_logprobs",),
        masks=("loss_mask",),
        entropy=("entropy",),
        remark="`token_exports/step_*/rank_*.jsonl`, which leave the teacher out",
    ),
    Names(
        "NeMo-RL",
        student=("prev_logprobs",),
        teacher=("teacher_reference_logprobs", "reference_policy_logprobs"),
        behavior=("generation_logprobs",),
        masks=("token_loss_mask", "token_mask"),
        rollout_masks=("sample_loss_mask", "sample_mask"),
        remark="`train_data_step*.jsonl`, without the teacher; `prev_logprobs` are 0 if `force_on_policy_ratio`",
    ),
    Names(
        "ms-swift",
        student=("old_per_token_logps",),
        teacher=("teacher_per_token_logps", "ref_per_token_logps"),
        behavior=("rollout_per_token_logps",),
        masks=("completion_mask",),
        remark="the fields of `GRPOBatch`",
    ),
    Names(
        "OpenRLHF",
        student=("action_log_probs",),
        teacher=("base_action_log_probs",),
        behavior=("rollout_log_probs",),
        masks=("action_mask",),
        remark="the fields of `Experience`",
    ),
)

# By trainer, the names of rows over prompt and response.
WHOLE = {names.trainer: frozenset(names.whole) for names in TRAINERS if names.whole}

# Names of what is one number for each rollout.
ROLLOUT_MASKS = frozenset(name for names in TRAINERS for name in names.rollout_masks)


@dataclass(frozen=True)
class Mapped:
    """Names given by the user; each goes before every name of a trainer."""

    student: str | None = None
    teacher: str | None = None
    behavior: str | None = None
    mask: str | None = None

    def given(self) -> dict[str, str]:
        """Those that are given, by role."""
        return {role: name for role in ROLES if (name := getattr(self, role)) is not None}


@dataclass(frozen=True)
class Fields:
    """Which entries of a record hold what; the student or the teacher is None where the record has none.

    Attributes:
        trainer: the trainer that was recognised; None if no name is known.
        student: the entry with the student's log-probabilities.
        teacher: the teacher's.
        behavior: those of the policy that sampled.
        masks: masks of tokens.
        rollout_masks: masks of rollouts.
        entropy: entropies of the student.
        lacking: the roles for which the user named a field that the record has not.
        stands_in: whether the sampling engine's log-probabilities are taken for the student's, because the trainer
            logged no others: on-policy they are the same policy's, but a mismatch of the two cannot be seen.
    """

    trainer: str | None
    student: str | None
    teacher: str | None
    behavior: str | None = None
    masks: tuple[str, ...] = ()
    rollout_masks: tuple[str, ...] = ()
    entropy: str | None = None
    lacking: tuple[str, ...] = ()
    stands_in: bool = False

    @property
    def usable(self) -> bool:
        """Whether there are a student, a teacher and all fields that the user named."""
        return self.student is not None and self.teacher is not None and not self.lacking

    @property
    def needed(self) -> tuple[str, ...]:
        """The entries to read."""
        single = (self.student, self.teacher, self.behavior, self.entropy)
        return (*(name for name in single if name is not None), *self.masks, *self.rollout_masks)


def chosen(entries: Iterable[str], mapped: Mapped | None = None) -> Fields:
    """Which of a record's flattened entries hold what.

    Examples:
        >>> found = chosen(["log_probs", "old_log_probs", "ref_log_prob", "response_mask"])
        >>> found.trainer, found.student, found.teacher
        ('verl', 'old_log_probs', 'ref_log_prob')
    """
    mapped, places = mapped or Mapped(), _places(entries)
    best = max(TRAINERS, key=lambda names: _score(names, places.keys()))
    trainer = best if best.all & places.keys() else None
    known = trainer or OWN
    found = {
        role: _first(places, names, fallback)
        for role, names, fallback in (
            ("student", known.student, OWN.student),
            ("teacher", known.teacher, OWN.teacher),
            ("behavior", known.behavior, OWN.behavior),
            ("entropy", known.entropy, OWN.entropy),
        )
    }
    masks = tuple(places[name] for name in known.masks if name in places)
    if not masks and (own := _first(places, OWN.masks, ())):
        masks = (own,)
    rollout_masks = tuple(places[name] for name in known.rollout_masks if name in places)
    stands_in = found["student"] is None and found["behavior"] is not None and mapped.student is None
    if stands_in:
        found["student"], found["behavior"] = found["behavior"], None
    for role, name in mapped.given().items():
        if role == "mask":
            masks, rollout_masks = (places[name],) if name in places else (), ()
        else:
            found[role] = places.get(name)
    if mapped.behavior is not None and stands_in:
        # The field that the user calls the sampler's is not also the student's.
        found["student"] = found["student"] if found["student"] != found["behavior"] else None
    if found["behavior"] == found["student"] and mapped.behavior is None:
        # The user calls the sampler's field the student's.
        found["behavior"] = None
    return Fields(
        trainer.trainer if trainer else None,
        found["student"],
        found["teacher"],
        found["behavior"],
        masks,
        rollout_masks,
        found["entropy"],
        tuple(role for role, name in mapped.given().items() if name not in places),
        stands_in and found["student"] is not None,
    )


def _score(names: Names, present: Set[str]) -> tuple[bool, bool, int]:
    # max() keeps the first of equals.
    return (not present.isdisjoint(names.student), not present.isdisjoint(names.behavior), len(names.all & present))


def _places(entries: Iterable[str]) -> dict[str, str]:
    """The entry that each spelling stands for: the full one, or its last part (of the least nested entry)."""
    ordered = sorted(entries, key=lambda entry: entry.count("."))
    places: dict[str, str] = {}
    for entry in ordered:
        places.setdefault(entry.rpartition(".")[2], entry)
    return places | {entry: entry for entry in ordered}


def _first(places: Mapping[str, str], names: Iterable[str], fallback: Iterable[str]) -> str | None:
    return next((places[name] for name in (*names, *fallback) if name in places), None)


def flattened(record: Mapping[Any, Any], depth: int = 3) -> dict[str, Any]:
    """The entries of a record and of the mappings in it, by dotted names; what is None is left out.

    Examples:
        >>> flattened({"rollout_data": {"log_probs": [-1.0]}, "step": 3, "extra": None})
        {'rollout_data.log_probs': [-1.0], 'step': 3}
    """
    found: dict[str, Any] = {}
    for key, value in record.items():
        if value is None:
            continue
        if depth and hasattr(value, "items"):
            for name, inner in flattened(value, depth - 1).items():
                found[f"{key}.{name}"] = inner
        else:
            found[str(key)] = value
    return found


def step_entries(entries: Iterable[str]) -> tuple[str, ...]:
    """The flattened entries that may hold the step, the likeliest first."""
    places = _places(entries)
    return tuple(places[name] for name in STEPS if name in places)


def whole(value: Any) -> int | None:
    """A whole number, or rows of one and the same; None if it is none."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list | tuple):
        return whole(value[0]) if value and all(each == value[0] for each in value) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not float(value).is_integer():
        return None
    return int(value)


def no_field(mapped: Mapped, found: Collection[str], trainers: Collection[str]) -> InvalidArgumentError | None:
    """The error of a run none of whose records can be used, for want of a field; None if both fields are there.

    Args:
        mapped: the user's names.
        found: every flattened entry of numbers that any record has.
        trainers: those recognised.
    """
    listed = ", ".join(sorted(found)[:40]) or "none"
    places = _places(found)
    for role, name in mapped.given().items():
        if name not in places:
            near = difflib.get_close_matches(name, places, 1, 0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            return InvalidArgumentError(role, f"no record has a field {name!r}{hint}. Fields found: {listed}")
    fields = chosen(found, mapped)
    for role in ("student", "teacher"):
        if getattr(fields, role) is not None:
            continue
        whose = f"the records are {' or '.join(sorted(trainers))}'s, but " if trainers else ""
        remarks = [f" ({names.trainer}: {names.remark})" for names in TRAINERS if names.trainer in trainers]
        return InvalidArgumentError(
            role,
            f"{whose}no field holds the log-probabilities of the {role}{''.join(remarks)}. Name one with {role}=. "
            f"Fields found: {listed}",
        )
    return None
