"""The trainer over the whole vocabulary: its expected gradient, exactly, and what is refused."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.end_to_end.auditor import audit_trainer
from opdtheory.end_to_end.pair import trainer_pair
from opdtheory.errors import IntegrationError, InvalidArgumentError
from opdtheory.integrations.trl import OPDTrainer, substitution, whole_vocabulary
from tests.integrations.trl.builders import quiet, whole
from tests.sparse import some
from tests.tolerances import ALGEBRA

pytestmark = quiet
audit = functools.partial(audit_trainer, variants=False)


@pytest.mark.parametrize("name", some(["jsd", "reverse_kl", "forward_kl", "chi2", "alpha"]))
def test_its_expected_gradient_is_that_of_the_divergence(name: str) -> None:
    divergence = opd.divergences.alpha(0.5) if name == "alpha" else opd.divergence(name)
    report = audit(whole(divergence=divergence), divergence)
    assert report.verdict == "exact" and report.relative_bias < 1e-6
    assert report.where["response"] == pytest.approx(1.0, abs=ALGEBRA)


def test_micro_batches_leave_it_alone() -> None:
    report = audit(whole(divergence="jsd"), "jsd", batch_size=1, accumulate=2)
    assert report.verdict == "exact" and report.relative_bias < 1e-6


@pytest.mark.slow
def test_a_mean_over_tokens_is_another_objective() -> None:
    build = whole(divergence="jsd", per="token")
    assert audit(build, "jsd").verdict == "biased"
    assert audit(build, "jsd", reduction="token_mean").verdict == "exact"


class WithoutSteps(OPDTrainer):
    """Divides by the rollouts of a micro-batch."""

    def _compute_loss(self, *args: Any) -> Any:
        loss, *rest = super()._compute_loss(*args)
        return loss * self.current_gradient_accumulation_steps, *rest


def test_a_twin_that_forgets_the_accumulation_is_seen() -> None:
    report = audit(whole(WithoutSteps, divergence="jsd"), "jsd", batch_size=1, accumulate=2)
    assert report.verdict == "exact_up_to_scale" and report.scale == pytest.approx(2.0)


def test_a_twin_that_forgets_the_mask_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    right = whole_vocabulary._loss

    def unmasked(completion_mask: Tensor, **others: Any) -> Any:
        return right(completion_mask=torch.ones_like(completion_mask), **others)

    monkeypatch.setattr(whole_vocabulary, "_loss", unmasked)
    report = audit(whole(divergence="jsd"), "jsd")
    assert not report.passes and report.error > 0.01


@pytest.mark.parametrize("width", [None, 3])
def test_any_head_has_the_loss_of_its_logits(width: int | None) -> None:
    """Bias, scale, cap and temperature, against logits that autograd differentiates."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    hidden, head, bias = draw(2, 3, 4), draw(7, 4), draw(7)
    other, other_head, other_bias = draw(2, 3, 5), draw(7, 5), draw(7)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    leaves = [x.requires_grad_() for x in (hidden, head, bias)]
    loss, entropy, count = whole_vocabulary._loss(
        student_hidden_states=hidden,
        teacher_hidden_states=other,
        student_lm_head_weight=head,
        teacher_lm_head_weight=other_head,
        completion_mask=mask,
        num_items_in_batch=width,
        student_lm_head_bias=bias,
        teacher_lm_head_bias=other_bias,
        student_logit_scale=0.7,
        teacher_logit_scale=1.2,
        student_final_logit_softcapping=2.0,
        teacher_final_logit_softcapping=None,
        temperature=1.5,
        divergence=opd.divergence("jsd"),
        beta=0.3,
    )
    ours = 2.0 * torch.tanh((hidden @ head.T + bias) * 0.7 / 2.0)
    theirs = (other @ other_head.T + other_bias) * 1.2
    values = opd.fused_divergence(ours, theirs, "jsd", mask, 1.5)
    wanted = values.sum() / (3 if width is None else width)
    logs = (ours / 1.5).log_softmax(-1)
    assert int(count) == 3 and abs((loss - wanted).item()) < ALGEBRA
    assert entropy.item() == pytest.approx(-(logs.exp() * logs).sum(-1)[mask > 0].sum().item(), rel=1e-6)
    for mine, theirs in zip(torch.autograd.grad(loss, leaves), torch.autograd.grad(wanted, leaves), strict=True):
        assert float((mine - theirs).abs().max()) < ALGEBRA


@pytest.mark.bad_input
def test_what_does_not_fit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidArgumentError, match="^per: must be 'rollout' or 'token', got 'batch'"):
        OPDTrainer(per="batch")
    monkeypatch.setattr(substitution.distillation_trainer, "_chunked_divergence_loss", lambda completion_mask: None)
    with pytest.raises(IntegrationError, match="does not take num_items_in_batch, student_final"):
        OPDTrainer()


class Adapted(torch.nn.Module):
    """A layer with an adapter, as PEFT makes it: its weight is that of the layer below."""

    def __init__(self, base_layer: torch.nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.weight, self.bias = base_layer.weight, base_layer.bias


@pytest.mark.bad_input
@pytest.mark.parametrize(("whose", "name"), [("student", "model"), ("teacher", "teacher_model")])
def test_an_adapter_on_the_output_layer_is_refused(whose: str, name: str) -> None:
    pair = trainer_pair()
    model = getattr(pair, whose)
    model.set_output_embeddings(Adapted(model.get_output_embeddings()))
    with pytest.raises(InvalidArgumentError, match=f"^{name}: must have no adapter on its output layer"):
        whole(divergence="jsd")(pair)


def test_the_function_of_trl_is_put_back() -> None:
    before = substitution.distillation_trainer._chunked_divergence_loss
    with pytest.raises(ZeroDivisionError), substitution.in_place_of_trl_loss(lambda **_: 1 / 0):
        substitution.distillation_trainer._chunked_divergence_loss(1, 2, 3, 4, 5, 6)
    assert substitution.distillation_trainer._chunked_divergence_loss is before


def test_sampling_from_another_law_is_said() -> None:
    with pytest.warns(UserWarning, match="histories of another law: top_p=0.9"):
        whole(settings={"top_p": 0.9})(trainer_pair())
