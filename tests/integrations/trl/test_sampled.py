"""The trainer on sampled tokens: its expected gradient up to the stated scale, and what is refused."""

from __future__ import annotations

import functools

import pytest
import torch

import opdtheory as opd
from opdtheory.end_to_end.auditor import audit_trainer
from opdtheory.end_to_end.pair import trainer_pair
from opdtheory.errors import InvalidArgumentError
from opdtheory.integrations.trl import OPDPlusTrainer
from opdtheory.integrations.trl.sampled import no_reward
from tests.integrations.trl.builders import quiet, sampled
from tests.sparse import some

pytestmark = quiet
audit = functools.partial(audit_trainer, variants=False, prompts=("ba",))


@pytest.mark.parametrize("name", some(["forward_kl", "reverse_kl", "chi2", "alpha"]))
def test_its_expected_gradient_is_that_of_the_divergence(name: str) -> None:
    divergence = opd.divergences.alpha(0.5) if name == "alpha" else opd.divergence(name)
    report = audit(sampled(divergence=divergence), divergence)
    assert report.verdict == "exact_up_to_scale" and report.error < 1e-6
    assert report.scale == pytest.approx(0.5, abs=1e-6)  # 1 / max_completion_length


def test_micro_batches_and_prompts_of_unequal_length() -> None:
    report = audit(sampled(divergence="jsd"), "jsd", batch_size=1, accumulate=2, prompts=("a", "ba"))
    assert report.error < 1e-6 and report.scale == pytest.approx(0.5, abs=1e-6)


@pytest.mark.parametrize("loss_type", some(["luspo", "grpo", "dapo", "cispo"], 2))
def test_other_means_are_what_they_say(loss_type: str) -> None:
    build = sampled(divergence="jsd", settings={"loss_type": loss_type})
    mean = build(trainer_pair()).mean
    report = audit(build, "jsd", reduction=mean.reduction)
    # TRL's cispo bounds the ratio by epsilon_high itself, which is 0.2.
    assert report.verdict == ("exact_up_to_scale" if loss_type == "cispo" else "exact")
    assert report.scale == pytest.approx(0.2 if loss_type == "cispo" else 1.0, abs=1e-6)
    assert mean.scale == (1.0 if loss_type == "luspo" else None)


def test_a_baseline_changes_nothing_but_the_variance() -> None:
    report = audit(sampled(divergence="forward_kl", centred=True, baseline="leave_one_out"), "forward_kl")
    assert report.error < 1e-6 and report.scale == pytest.approx(0.5, abs=1e-6)


class WithoutSlope(OPDPlusTrainer):
    """Plain OPD: the reward -f(u), whose gradient leaves out how u depends on the student."""

    def _advantages(self, student, teacher, inputs):
        return -self.token_weight.divergence.generator((teacher - student).detach())


class Uphill(OPDPlusTrainer):
    """The weight with the wrong sign."""

    def _advantages(self, student, teacher, inputs):
        return -super()._advantages(student, teacher, inputs)


@pytest.mark.parametrize("twin", [WithoutSlope, Uphill])
def test_a_wrong_twin_is_seen(twin: type) -> None:
    report = audit(sampled(twin, divergence="jsd"), "jsd")
    assert not report.passes and (report.error > 0.01 or report.scale < 0)


def test_rewards_are_added() -> None:
    build = sampled(divergence="jsd", reward_funcs=no_reward, reward_weight=0.5)
    trainer = build(trainer_pair())
    logs, mask = torch.full((2, 3), -1.0), torch.ones(2, 3)
    inputs = {"completion_mask": mask, "advantages": torch.tensor([2.0, -4.0])}
    found = trainer._advantages(logs, logs - 1, inputs)
    plain = opd.divergence("jsd").weight(torch.tensor(-1.0).double()).float()
    assert torch.allclose(found, plain + torch.tensor([[1.0], [-2.0]]).expand(2, 3))
    inputs["tool_mask"] = torch.tensor([[1, 0, 1], [1, 1, 1]])
    assert float(trainer._advantages(logs, logs - 1, inputs)[0, 1]) == 1.0  # TRL masks the token of a tool itself


@pytest.mark.bad_input
def test_what_does_not_fit_is_refused() -> None:
    pair = trainer_pair()
    with pytest.raises(InvalidArgumentError, match="^teacher_model: must be another model"):
        OPDPlusTrainer(pair.student, pair.student)
    with pytest.raises(InvalidArgumentError, match="^reward_weight: needs reward_funcs"):
        OPDPlusTrainer(pair.student, pair.teacher, reward_weight=1.0)
    with pytest.warns(UserWarning, match="not that of the divergence: mask_truncated_completions"):
        sampled(settings={"mask_truncated_completions": True})(pair)


def test_a_teacher_is_loaded_by_its_path() -> None:
    pair = trainer_pair()
    named, other = sampled()(pair), trainer_pair()
    given = OPDPlusTrainer(
        other.student,
        f"{pair.folder}/teacher",
        args=named.args,
        train_dataset=pair.dataset,
        processing_class=pair.tokenizer,
    )
    assert torch.equal(given.teacher_model.model.table, pair.teacher.model.table)
    assert not given.teacher_model.training and not given.teacher_model.model.table.requires_grad
