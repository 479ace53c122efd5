"""What a run descends: divergences as text, and the controls."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.divergences import symbol
from opdtheory.training.measures import clipped
from opdtheory.training.objective import divergence_text, parse_divergence
from tests.tolerances import ALGEBRA
from tests.training.runs import config, distance, gradients


@pytest.mark.parametrize("shift", [-7.0, -2.0, 0.5])
def test_regauged_generators_are_read_from_text(shift: float) -> None:
    log_u = torch.linspace(-6, 6, 41, dtype=torch.float64)
    found = parse_divergence(f"u*log(u) + {shift}*(u - 1)").generator(log_u)
    expected = log_u.exp() * log_u + shift * log_u.expm1()
    assert torch.allclose(found, expected, rtol=ALGEBRA, atol=ALGEBRA)
    # The twin, in the usual gauge, is another stop-gradient estimator.
    assert not torch.allclose(found, opd.divergences.forward_kl.generator(log_u), rtol=1e-3)


def test_numbers_in_a_generator_are_exact() -> None:
    assert parse_divergence("-log(u) + 0.1*(u-1)").expr.subs(symbol(), 1) == 0
    given = opd.Divergence.from_expr(symbol() ** 2 - symbol())
    assert parse_divergence(divergence_text(given)).expr == given.expr


@pytest.mark.slow
def test_a_generator_of_one_s_own_is_not_taken_for_the_entry_of_its_name() -> None:
    given = opd.Divergence.from_expr(2 * opd.divergence("jsd").expr, name="jsd")
    assert parse_divergence(divergence_text(given)).expr.equals(given.expr)
    assert divergence_text(opd.divergence("jsd")) == "jsd"


def test_constant_advantage_is_the_k1_loss() -> None:
    settings = config(estimator="k1_loss", clip_gradient=None)
    k1, _, _ = gradients(settings)
    constant, _, _ = gradients(settings.replace(estimator="opd_plus", control="constant_advantage", advantage=-1.0))
    assert distance(constant, k1) < ALGEBRA
    reward, _, _ = gradients(settings.replace(estimator="k1_reward"))
    assert distance(reward, k1) > 1e-3


@pytest.mark.parametrize("clip", [None, 0.5])
def test_exact_opd_is_the_expectation_of_opd(clip: float | None) -> None:
    settings = config(estimator="opd", divergence="forward_kl", clip_log_ratio=clip)
    logits = torch.randn(2, 1, 1, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    student, teacher = logits[0].requires_grad_(), logits[1]

    def gradient(settings: opd.TrainConfig, token: int) -> torch.Tensor:
        rollouts = opd.Rollouts.from_logits(torch.tensor([[token]]), student, teacher)
        return torch.autograd.grad(settings.loss()(rollouts), student)[0]

    p = student.detach().softmax(-1).flatten()
    expected = sum(p[a] * gradient(settings, a) for a in range(5))
    exact = [gradient(settings.replace(control="exact_opd"), a) for a in (0, 3)]
    assert torch.equal(exact[0], exact[1])
    assert float((exact[0] - expected).abs().max()) < 1e-15
    # Of the same tokens the same ones are clipped.
    rollouts = opd.Rollouts.from_logits(torch.arange(5).unsqueeze(0), student.expand(1, 5, 5), teacher.expand(1, 5, 5))
    counts = [int(clipped(each.loss(), rollouts)) for each in (settings, settings.replace(control="exact_opd"))]
    assert counts[0] == counts[1] and (counts[0] > 0) == (clip is not None)
    corrected = gradient(settings.replace(estimator="full_vocab", clip_log_ratio=None), 0)
    assert float((exact[0] - corrected).abs().max()) > 1e-2
