"""Faults put into TRL's GKD one at a time are caught, and named in words; the sound trainer passes."""

from __future__ import annotations

import pytest

from opdtheory.end_to_end import audit_trainer
from opdtheory.errors import BudgetExceededError, InvalidArgumentError, LossError
from tests.end_to_end import gkd_faults, grpo_faults
from tests.sparse import some

pytest.importorskip("trl")

# The gradient of a table is right in either mode.
_MODES = ("eval mode", "teacher in train mode")


@pytest.mark.parametrize("name", some(gkd_faults.FAULTS, 8))
def test_a_fault_is_named(name: str) -> None:
    build, phrase = gkd_faults.FAULTS[name]
    found = audit_trainer(build, "reverse_kl", variants=False)
    assert phrase in " ".join(found.words), str(found)
    assert found.passes is (name in _MODES), str(found)


@pytest.mark.parametrize("name", some(gkd_faults.REFUSED))
def test_what_cannot_be_played_is_refused(name: str) -> None:
    build, message = gkd_faults.REFUSED[name]
    with pytest.raises((InvalidArgumentError, LossError), match=message):
        audit_trainer(build, "reverse_kl", variants=False)


def test_the_sound_trainer_passes_in_every_variant() -> None:
    found = audit_trainer(gkd_faults.sound, "reverse_kl")
    assert found.passes and found.verdict == "exact_up_to_scale" and found.error < 1e-7
    assert (
        found.scale == pytest.approx(0.5, abs=1e-7) and "tokens of the dataset's reference answers" in found.scale_cause
    )
    assert all(variant.holds for variant in found.variants) and len(found.variants) == 4
    assert found.where == {"response": 1.0}
    scales = {variant.name: variant.scale for variant in found.variants}
    assert scales["reference answers of two lengths"] == pytest.approx(2 / 2.5)
    assert found.outcomes == 49


@pytest.mark.slow
def test_a_fault_of_one_setting_shows_in_its_variant_alone() -> None:
    """Padding that is taken for the end of the sequence, and means of micro-batches, are right in the main setting."""
    end_is_padding = audit_trainer(gkd_faults.masks_by_token, "reverse_kl")
    assert end_is_padding.verdict == "exact_up_to_scale" and not end_is_padding.passes
    assert [v.name for v in end_is_padding.variants if v.holds is False] == ["padding that is the end of the sequence"]
    means = audit_trainer(gkd_faults.FAULTS["means of micro-batches"][0], "reverse_kl", reduction="token_mean")
    assert means.verdict == "exact" and not means.passes
    failed = [v for v in means.variants if v.holds is False]
    assert [v.name for v in failed] == ["2 micro-batches of 1"] and "changes" in failed[0].words


@pytest.mark.parametrize("name", some(grpo_faults.FAULTS, 4))
def test_a_fault_of_a_policy_gradient_is_named(name: str) -> None:
    build, phrase = grpo_faults.FAULTS[name]
    found = audit_trainer(build, "reverse_kl", variants=False)
    assert phrase in " ".join(found.words) and not found.passes, str(found)


@pytest.mark.slow
def test_a_sound_policy_gradient_passes() -> None:
    found = audit_trainer(grpo_faults.sound, "reverse_kl", variants=False)
    assert found.passes and found.error < 1e-6 and found.scale == pytest.approx(0.5, abs=1e-6)
    for build in grpo_faults.HARMLESS.values():
        assert audit_trainer(build, "reverse_kl", variants=False).passes
    for build in grpo_faults.CAUGHT.values():
        assert not audit_trainer(build, "reverse_kl", variants=False).passes


def likelihood(pair, **settings):
    from trl import SFTConfig, SFTTrainer

    return SFTTrainer(
        model=pair.student,
        args=SFTConfig(**pair.arguments, max_length=64, **settings),
        train_dataset=pair.dataset.select_columns(["prompt", "completion"]),
        processing_class=pair.tokenizer,
    )


@pytest.mark.slow
def test_the_likelihood_of_the_teachers_answers_is_the_forward_kl_of_sequences() -> None:
    asked = {"teacher_answers": True, "variants": False}
    mean = audit_trainer(likelihood, "forward_kl", "sequence", reduction="token_mean", **asked)
    assert mean.verdict == "exact" and mean.error < 1e-6 and mean.outcomes == 9, str(mean)
    assert mean.descends == "forward_kl (sequence)"
    summed = audit_trainer(likelihood, "forward_kl", "sequence", **asked)
    assert not summed.passes and "1/N within a batch" in " ".join(summed.words)
    other = audit_trainer(likelihood, "reverse_kl", "sequence", reduction="any", **asked)
    assert other.verdict == "other_objective" and "descends forward_kl (sequence)" in " ".join(other.words)


@pytest.mark.slow
def test_a_prompt_in_the_likelihood_and_a_trainer_that_samples_are_seen() -> None:
    asked = {"teacher_answers": True, "variants": False, "reduction": "any"}
    leaking = audit_trainer(
        lambda pair: likelihood(pair, completion_only_loss=False), "forward_kl", "sequence", **asked
    )
    assert not leaking.passes and leaking.where["inside a prompt"] > 0, str(leaking)
    assert "reads the prompt" in " ".join(leaking.words) or "The prompt's tokens carry" in " ".join(leaking.words)
    # There is nothing to sample: every answer is played, within the limit.
    assert audit_trainer(likelihood, "forward_kl", "sequence", method="monte_carlo", **asked).monte_carlo is None
    with pytest.raises(BudgetExceededError, match="fewer rollouts"):
        audit_trainer(likelihood, "forward_kl", "sequence", method="exact", limit=5, **asked)
    with pytest.raises(LossError, match="generates, although"):
        audit_trainer(gkd_faults.sound, "forward_kl", "sequence", **asked)
