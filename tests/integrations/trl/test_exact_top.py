"""The trainer with the teacher's likeliest tokens exact: its expected gradient, its variance, its means, its models."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
)
from trl import GRPOTrainer

import opdtheory as opd
from opdtheory.end_to_end.auditor import audit_trainer
from opdtheory.end_to_end.pair import TrainerPair, trainer_pair
from opdtheory.errors import IntegrationError, InvalidArgumentError
from opdtheory.integrations.trl import sampled as module
from opdtheory.integrations.trl.exact_top import ExactTop, _scale, check_the_same, last_hidden_states, output_layer
from opdtheory.kernels.chosen import chosen_log_probs
from tests.integrations.trl.builders import quiet, sampled
from tests.sparse import some
from tests.tolerances import ALGEBRA

pytestmark = quiet
audit = functools.partial(audit_trainer, variants=False)
NAMES = ["reverse_kl", "forward_kl", "jsd", "chi2", "alpha"]


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(name: str) -> opd.Divergence:
    return opd.divergences.alpha(0.5) if name == "alpha" else opd.divergence(name)


@pytest.mark.parametrize(("k", "baseline"), some([(1, "rest"), (2, None)], 2))
@pytest.mark.parametrize("name", some(NAMES))
def test_its_expected_gradient_is_that_of_the_divergence(name: str, k: int, baseline: Any) -> None:
    report = audit(sampled(divergence=named(name), top_k=k, baseline=baseline), named(name), prompts=("a", "ba"))
    assert report.verdict == "exact_up_to_scale" and report.error < 1e-6
    assert report.scale == pytest.approx(0.5, abs=1e-6)  # 1 / max_completion_length
    # Of the trainer without exact tokens, rounded down.
    without = {"reverse_kl": 2.07, "forward_kl": 1.78, "jsd": 0.67, "chi2": 1.26, "alpha": 0.69}
    assert report.variance < without[name]


@pytest.mark.slow
def test_its_variance_is_lower() -> None:
    plain = audit(sampled(divergence="jsd"), "jsd", prompts=("ba",))
    split = audit(sampled(divergence="jsd", top_k=1, baseline="rest"), "jsd", prompts=("ba",))
    assert split.variance < 0.75 * plain.variance


@pytest.mark.slow
def test_micro_batches() -> None:
    build = sampled(divergence="jsd", top_k=2, baseline="constant", baseline_value=0.3, centred=True)
    report = audit(build, "jsd", batch_size=1, accumulate=2, prompts=("a", "ba"))
    assert report.error < 1e-6 and report.scale == pytest.approx(0.5, abs=1e-6)


class Counted(ExactTop):
    """Counts the sampled token although it is one of the exact ones."""

    def parts(self, log_p, log_q, log_u, outside):
        return super().parts(log_p, log_q, log_u, torch.ones_like(outside))


class Dropped(ExactTop):
    """Leaves the other tokens out, as a loss on the teacher's top k does."""

    def parts(self, log_p, log_q, log_u, outside):
        weights, exact = super().parts(log_p, log_q, log_u, outside)
        return torch.zeros_like(weights), exact


class Unbalanced(ExactTop):
    """Subtracts the constant from the sampled token alone."""

    def parts(self, log_p, log_q, log_u, outside):
        weights, _ = super().parts(log_p, log_q, log_u, outside)
        return weights, ExactTop(self.divergence, self.k).parts(log_p, log_q, log_u, outside)[1]


@pytest.mark.parametrize("twin", some([Counted, Dropped, Unbalanced]))
def test_a_wrong_twin_is_seen(twin: type) -> None:
    def build(pair: TrainerPair) -> Any:
        trainer = sampled(divergence="jsd", top_k=1, baseline="constant", baseline_value=0.5)(pair)
        right = trainer.exact_top
        trainer.exact_top = twin(right.divergence, right.k, right.constant)
        return trainer

    report = audit(build, "jsd", prompts=("ba",))
    assert not report.passes and report.error > 0.01


@pytest.mark.parametrize("constant", [0.0, 0.4, "rest"])
@pytest.mark.parametrize("name", NAMES)
def test_the_parts_are_the_loss_of_the_kernel(name: str, constant: Any) -> None:
    logits, teacher = drawn(6, 5).requires_grad_(), drawn(6, 5, seed=1).log_softmax(-1)
    tokens, top = torch.tensor([0, 1, 2, 3, 4, 0]), teacher.topk(2, -1)
    log_q = teacher.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    logs = logits.log_softmax(-1)
    log_p = logs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    outside = ~(top.indices == tokens.unsqueeze(-1)).any(-1)
    weights, exact = ExactTop(named(name), 2, constant).parts(
        logs.gather(-1, top.indices), top.values, log_q - log_p, outside
    )
    mine = exact - weights * log_p
    theirs = opd.fused_sampled_tail(logits, top.indices, top.values, tokens, log_q, named(name), constant=constant)
    assert 0 < int(outside.sum()) < 6 and float((mine - theirs).detach().abs().max()) < ALGEBRA
    ours, kernels = (torch.autograd.grad(each.sum(), logits)[0] for each in (mine, theirs))
    assert float((ours - kernels).abs().max()) < ALGEBRA


def test_a_token_that_the_student_lacks_has_no_gradient() -> None:
    log_p = torch.tensor([[-torch.inf, -1.0]], requires_grad=True)
    _, exact = ExactTop(opd.divergence("jsd"), 2).parts(
        log_p, torch.tensor([[-1.0, -1.0]]), torch.tensor([0.0]), torch.tensor([False])
    )
    (found,) = torch.autograd.grad(exact.sum(), log_p)
    assert bool(torch.isfinite(exact)) and found[0, 0] == 0 and bool(torch.isfinite(found[0, 1]))


@pytest.mark.parametrize("loss_type", ["dr_grpo", "dapo", "bnpo", "grpo", "luspo"])
@pytest.mark.parametrize("training", [True, False])
def test_the_mean_is_that_of_trl(loss_type: str, training: bool) -> None:
    """The exact part of random values is TRL's own loss with the advantages of opposite sign."""
    trainer = sampled(divergence="jsd", settings={"loss_type": loss_type}, top_k=1)(trainer_pair(accumulate=2))
    trainer.model.train(training)
    trainer.current_gradient_accumulation_steps = 2
    values = drawn(2, 2).float()
    inputs = {
        "prompt_ids": torch.ones(2, 1, dtype=torch.long),
        "prompt_mask": torch.ones(2, 1, dtype=torch.long),
        "completion_ids": torch.ones(2, 2, dtype=torch.long),
        "completion_mask": torch.tensor([[1, 1], [1, 0]]),
        "advantages": -values,
        "num_items_in_batch": torch.tensor(7.0),
    }
    wanted = GRPOTrainer._compute_loss(trainer, trainer.model, inputs)
    assert trainer._mean_of(values, inputs).item() == pytest.approx(wanted.item(), rel=1e-6)


def test_a_sum_over_tokens_is_exact_at_scale_one() -> None:
    report = audit(sampled(divergence="jsd", settings={"loss_type": "luspo"}, top_k=1), "jsd", prompts=("ba",))
    assert report.verdict == "exact" and report.relative_bias < 1e-6


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
@pytest.mark.slow
def test_one_token_makes_all_means_the_same(loss_type: str) -> None:
    build = sampled(divergence="jsd", settings={"loss_type": loss_type}, top_k=1, baseline="rest")
    report = audit(build, "jsd", batch_size=1, accumulate=2, horizon=1, prompts=("a", "ba"))
    assert report.verdict == "exact" and report.relative_bias < 1e-6


def test_the_teacher_is_read_once_for_all_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counted(*args: Any) -> Any:
        calls.append(args[2])
        return likeliest(*args)

    likeliest = module.likeliest
    monkeypatch.setattr(module, "likeliest", counted)
    pair = trainer_pair(prompts=("a", "ba"))
    trainer = sampled(divergence="jsd", settings={"num_iterations": 3}, top_k=2, baseline="rest")(pair)
    trainer.args.max_steps = 3
    trainer.train()
    assert calls == [2] and trainer.state.global_step == 3


@pytest.mark.parametrize(("known", "exact"), [(True, True), (False, False)])
def test_later_passes_are_exact_at_the_histories_of_the_sampler(known: bool, exact: bool) -> None:
    """All tokens of one position, weighted as another student samples them; the twin takes them for the student's."""
    pair = trainer_pair()
    trainer = sampled(divergence="jsd", settings={"epsilon": 50.0}, top_k=1, baseline="rest")(pair)
    table, prompt = pair.student.model.table, torch.tensor([[1]])
    ours, theirs = pair.student(prompt).logits[0, -1], pair.teacher(prompt).logits[0, -1]
    sampler = (0.5 * ours + 0.5 * drawn(len(ours)).float()).log_softmax(-1).detach()
    found = torch.zeros_like(table)
    for token, log_mu in enumerate(sampler):
        inputs = {
            "prompt_ids": prompt,
            "prompt_mask": torch.ones_like(prompt),
            "completion_ids": torch.tensor([[token]]),
            "completion_mask": torch.ones_like(prompt),
            "advantages": torch.zeros(1),
            "num_items_in_batch": torch.tensor(1.0),
            **({"old_per_token_logps": log_mu.reshape(1, 1)} if known else {}),
        }
        trainer.current_gradient_accumulation_steps = 1
        found += log_mu.exp() * torch.autograd.grad(trainer._compute_loss(trainer.model, inputs), table)[0]
    loss = opd.fused_divergence(ours, theirs, "jsd") / trainer.max_completion_length
    (wanted,) = torch.autograd.grad(loss, table)
    assert (float((found - wanted).norm() / wanted.norm()) < 1e-5) == exact


TINY = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "pad_token_id": 0}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "initializer_range": 1.0, "eos_token_id": 1}
MODELS = {
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**TINY, **HEADS, logits_scaling=3.0)),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**TINY, **HEADS, logit_scale=0.3)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**TINY, **HEADS, head_dim=4, final_logit_softcapping=2.0)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=11, n_embd=8, n_layer=1, n_head=2, initializer_range=1.0)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_output_layer_of_models(name: str) -> None:
    torch.manual_seed(0)
    model, ids = MODELS[name]().double().eval(), torch.tensor([[2, 3, 4, 5]])
    with last_hidden_states(model) as states:
        wanted = (model(ids).logits[0] / 0.7).log_softmax(-1).detach()
    every = torch.arange(11).expand(4, 11)
    layer = output_layer(model, 0.7, torch.float64)
    found = chosen_log_probs(states[0][0], layer, every).detach()
    assert len(states) == 1 and float((found - wanted).abs().max()) < 1e-6  # a model may keep a number in float32
    check_the_same("student", found[:, 0], wanted[:, 0])
    twin = chosen_log_probs(states[0][0], layer._replace(form=layer.form._replace(scale=10.0)), every)
    with pytest.raises(IntegrationError, match="how the teacher makes logits"):
        check_the_same("teacher", twin[:, 0], wanted[:, 0])


def test_the_other_names_of_a_scale() -> None:
    named_scale = [
        ({"output_multiplier": 0.5}, 0.5),
        ({"lm_head_multiplier": 0.2}, 0.2),
        ({"logit_scale": None, "logits_scaling": 4.0, "model_type": "minicpm3"}, 0.25),
        ({"logits_scaling": 4.0, "model_type": "hyperclovax"}, 4.0),
        ({}, 1.0),
    ]
    assert [_scale(SimpleNamespace(**given)) for given, _ in named_scale] == [wanted for _, wanted in named_scale]


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"top_k": 0}, "top_k: must be an integer in"),
        ({"top_k": 99}, "top_k: must be an integer in"),
        ({"top_k": 1, "clip_weight": 1.0}, "clip_weight: must be None with top_k"),
        ({"top_k": 1, "clip_log_ratio": 1.0}, "clip_log_ratio: must be None with top_k"),
        ({"top_k": 1, "baseline": "leave_one_out"}, "baseline: must be None, 'constant' or 'rest' with top_k"),
        ({"baseline": "rest"}, "baseline: 'rest' needs top_k"),
        ({"top_k": 1, "settings": {"loss_type": "cispo"}}, "top_k: needs a loss_type of dr_grpo, .*got 'cispo'"),
        ({"top_k": 1, "settings": {"top_entropy_quantile": 0.5}}, "top_k: needs top_entropy_quantile=1.0, got 0.5"),
        (
            {"top_k": 1, "settings": {"importance_sampling_level": "sequence"}},
            "top_k: needs importance_sampling_level='token'",
        ),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{words}"):
        sampled(divergence="jsd", **options)(trainer_pair())


@pytest.mark.bad_input
def test_models_that_do_not_fit_are_refused() -> None:
    pair = trainer_pair()
    with pytest.raises(IntegrationError, match="saw no forward pass of TabularModel"), last_hidden_states(pair.student):
        pass
    bare: Any = nn.Linear(2, 2)
    bare.base_model = bare
    with pytest.raises(IntegrationError, match="needs the last_hidden_state of Linear"), last_hidden_states(bare):
        bare(torch.ones(2))
    pair.student.lm_head = nn.Sequential(pair.student.lm_head)
    with pytest.raises(InvalidArgumentError, match="^top_k: needs models whose output layer is a torch.nn.Linear"):
        output_layer(pair.student, 1.0, None)
