"""Which name of a record is what, and which trainer's it is."""

from __future__ import annotations

import itertools

import pytest

from opdtheory.monitoring.files.fields import (
    OWN,
    STEPS,
    TRAINERS,
    Mapped,
    chosen,
    flattened,
    no_field,
    step_entries,
    whole,
)


@pytest.mark.parametrize("names", TRAINERS, ids=lambda names: names.trainer)
def test_a_record_with_all_names_of_a_trainer_is_that_trainers(names):
    found = chosen(sorted(names.all))
    assert found.trainer == names.trainer
    assert (found.student, found.teacher, found.behavior) == (names.student[0], names.teacher[0], names.behavior[0])
    assert found.masks == names.masks
    assert found.rollout_masks == names.rollout_masks


@pytest.mark.parametrize("names", TRAINERS, ids=lambda names: names.trainer)
def test_the_order_of_a_records_names_does_not_matter(names):
    some = [*names.student, *names.teacher, *names.behavior, *names.masks]
    assert len({chosen(order) for order in itertools.islice(itertools.permutations(some), 200)}) == 1


def test_no_name_has_two_roles_with_one_trainer():
    for names in TRAINERS:
        fields = (names.student, names.teacher, names.behavior, names.masks, names.rollout_masks, names.entropy)
        every = [name for roles in fields for name in roles]
        assert len(every) == len(set(every)), names.trainer
    assert len({names.trainer for names in TRAINERS}) == len(TRAINERS)


@pytest.mark.parametrize(
    ("record", "trainer", "student", "teacher", "behavior"),
    [
        # log_probs of verl are those of the policy in its update; old_log_probs those of the policy that sampled.
        (["log_probs", "old_log_probs", "ref_log_prob"], "verl", "old_log_probs", "ref_log_prob", None),
        (["log_probs", "ref_log_prob", "response_mask"], "verl", "log_probs", "ref_log_prob", None),
        (["log_probs", "teacher_log_probs", "loss_masks"], "slime", "log_probs", "teacher_log_probs", None),
        (["old_per_token_logps", "ref_per_token_logps"], "TRL", "old_per_token_logps", "ref_per_token_logps", None),
        (
            ["old_per_token_logps", "ref_per_token_logps", "teacher_per_token_logps"],
            *("ms-swift", "old_per_token_logps", "teacher_per_token_logps", None),
        ),
        (["action_log_probs", "rollout_log_probs"], "OpenRLHF", "action_log_probs", None, "rollout_log_probs"),
        (["trainer_logprobs", "inference_logprobs"], "prime-rl", "trainer_logprobs", None, "inference_logprobs"),
        (["prev_logprobs", "generation_logprobs"], "NeMo-RL", "prev_logprobs", None, "generation_logprobs"),
        (["trainer_logprobs", "teacher_logprobs", "entropy"], "prime-rl", "trainer_logprobs", "teacher_logprobs", None),
        (["reward", "text"], None, None, None, None),
    ],
)
def test_names_that_several_trainers_share(record, trainer, student, teacher, behavior):
    found = chosen(record)
    assert (found.trainer, found.student, found.teacher, found.behavior) == (trainer, student, teacher, behavior)


def test_the_engines_log_probabilities_stand_in_for_the_students():
    found = chosen(["sampling_per_token_logps", "ref_per_token_logps"])
    assert (found.student, found.behavior, found.stands_in) == ("sampling_per_token_logps", None, True)
    named = chosen(["mine", "sampling_per_token_logps", "ref_per_token_logps"], Mapped(student="mine"))
    assert (named.student, named.behavior, named.stands_in) == ("mine", "sampling_per_token_logps", False)
    sampler = chosen(["sampling_per_token_logps", "ref_per_token_logps"], Mapped(behavior="sampling_per_token_logps"))
    assert (sampler.student, sampler.behavior, sampler.usable) == (None, "sampling_per_token_logps", False)


def test_names_may_be_nested_and_are_given_by_either_spelling():
    flat = flattened({"batch": {"old_log_probs": [1], "x": {"teacher": [2]}}, "old_log_probs": [3], "none": None})
    assert flat == {"batch.old_log_probs": [1], "batch.x.teacher": [2], "old_log_probs": [3]}
    assert chosen(flat, Mapped(teacher="teacher")).teacher == "batch.x.teacher"
    assert chosen(flat, Mapped(student="batch.old_log_probs")).student == "batch.old_log_probs"
    assert chosen(flat).student == "old_log_probs"
    assert chosen(["a.b.old_log_probs", "batch.old_log_probs"]).student == "batch.old_log_probs"


def test_a_tensordict_is_a_record():
    tensordict = pytest.importorskip("tensordict")
    import torch

    data = tensordict.TensorDict({"old_log_probs": torch.zeros(2, 3)}, batch_size=[2])
    assert list(flattened({"batch": data})) == ["batch.old_log_probs"]


def test_the_step_is_a_whole_number():
    assert [whole(value) for value in (3, 3.0, [3, 3], [3, 4], [], True, 3.5, float("nan"), "3", None)] == (
        [3, 3, 3, None, None, None, None, None, None, None]
    )
    assert whole(float("inf")) is None
    assert step_entries(["rollout_id", "meta_info.global_steps", "step"]) == (
        "step",
        "meta_info.global_steps",
        "rollout_id",
    )
    assert not OWN.all & set(STEPS)


def test_nothing_is_wrong_where_both_fields_are_found():
    assert no_field(Mapped(), ["student_logprobs", "teacher_logprobs"], []) is None
    found = no_field(Mapped(teacher="teacher_logprob"), ["student_logprobs", "teacher_logprobs"], [])
    assert found is not None and "did you mean 'teacher_logprobs'?" in str(found)
    assert "Fields found: none" in str(no_field(Mapped(), [], []))
