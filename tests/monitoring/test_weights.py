"""The weight that is read from an estimator is the one that multiplies the score in its gradient."""

from __future__ import annotations

import pytest
import torch

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.monitoring.weights import weight_of
from opdtheory.rollouts import Rollouts

LOSSES = [
    *(
        opd.estimator(name, d)
        for name in ("opd", "opd_plus", "opd_plus_centred")
        for d in ("forward_kl", "jsd", "chi2")
    ),
    *(opd.estimator(name) for name in ("k1_loss", "k2_loss", "k3_loss", "k1_reward", "k2_reward", "k3_reward", "sign")),
    opd.estimator("opd_plus", "forward_kl", clip_log_ratio=0.4),
    opd.estimator("opd", "reverse_kl", clip_weight=(-0.2, 0.3)),
    opd.estimator("k3_loss", clip_log_ratio=0.5),
    opd.estimator("box_cox", alpha=0.5),
    opd.estimator("full_vocab", "jsd"),
    opd.estimator("topk_tail_sampled", "hellinger", k=1),
]


def one_step(seed: int = 0) -> Rollouts:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 40, 1, 5, dtype=torch.float64, generator=generator)
    tokens = torch.randint(5, (40, 1), generator=generator)
    return Rollouts.from_logits(tokens, logits[0].requires_grad_(), logits[1])


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.label)
def test_it_is_the_weight_of_the_gradient(loss):
    """Up to a constant of each history: the gradient is -(A - c) s, and s sums to zero."""
    rollouts = one_step()
    weight = weight_of(loss)
    if loss.name in ("full_vocab", "topk_tail_sampled"):
        # Their expected gradient is -sum p A s; that of the tail's token alone would need many draws.
        full = opd.estimator("full_vocab", loss.claim.divergence)
        (found,) = torch.autograd.grad(40 * full(rollouts), rollouts.student_logits)
        log_p, log_q = (z.detach().log_softmax(-1) for z in (rollouts.student_logits, rollouts.teacher_logits))
        a, p = weight(log_q - log_p), log_p.exp()
        expected = -p * (a - (p * a).sum(-1, keepdim=True))
    else:
        (found,) = torch.autograd.grad(40 * loss(rollouts), rollouts.student_logits)
        p = rollouts.student_logits.detach().softmax(-1)
        score = torch.nn.functional.one_hot(rollouts.tokens, 5).double() - p
        expected = -weight(rollouts.log_u.detach()).unsqueeze(-1) * score
    assert torch.allclose(found, expected, rtol=1e-12, atol=1e-14)


def test_clips_are_seen():
    weight = weight_of(opd.estimator("opd_plus", "forward_kl", clip_log_ratio=1.0, clip_weight=(0.5, 2.0)))
    log_u = torch.tensor([-2.0, -0.9, -0.5, 0.5, 0.9, 2.0], dtype=torch.float64)
    assert weight.is_clipped(log_u).tolist() == [True, True, False, False, True, True]
    assert torch.allclose(weight.unclipped(log_u), log_u.exp())
    assert weight.slope(log_u)[[0, 1, 4, 5]].abs().max() == 0.0
    assert torch.allclose(weight.slope(log_u)[2:4], log_u[2:4].exp(), rtol=1e-7)


def test_a_clip_within_a_differentiated_loss_drops_what_it_cuts():
    """Its weight falls to zero at the bound, where that of an advantage stays (T4)."""
    log_u = torch.tensor([0.45, 0.495, 0.505, 0.6], dtype=torch.float64)
    dropped, held = (weight_of(opd.estimator(name, clip_log_ratio=0.5)) for name in ("k2_loss", "k1_reward"))
    assert dropped(log_u).tolist() == pytest.approx([0.45, 0.495, 0.0, 0.0])
    assert held(log_u).tolist() == pytest.approx([0.45, 0.495, 0.5, 0.5])
    assert dropped.slope(log_u)[1] < -20 and dropped.slope(log_u)[0] == pytest.approx(1.0)
    assert held.slope(log_u).tolist() == pytest.approx([1.0, 1.0, 0.0, 0.0], abs=1e-9)


def test_the_pull_at_the_teacher_is_t5s():
    pulls = {d: weight_of(opd.estimator("opd", d)).at_teacher()[1] for d in ("reverse_kl", "forward_kl", "jsd", "chi2")}
    assert pulls == pytest.approx({"reverse_kl": 1.0, "forward_kl": -1.0, "jsd": 0.0, "chi2": 0.0}, abs=1e-6)
    assert pulls["jsd"] == pulls["chi2"] == 0.0


@pytest.mark.parametrize(
    "loss",
    [
        opd.estimator("power", alpha=0.5),
        opd.estimator("topk_truncated", "reverse_kl", k=2),
        opd.estimator("sequence_opd_plus", "jsd"),
    ],
    ids=lambda loss: loss.name,
)
def test_other_weights_are_refused_by_name(loss):
    with pytest.raises(InvalidArgumentError, match=loss.name):
        weight_of(loss)
