"""What all estimators share: masks, how they print, and claims as text."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch

from opdtheory import divergences
from opdtheory.estimators import Estimator, estimator
from tests.estimators.pairs import CLAIMS, EOS, pair, ragged, value_of


@pytest.mark.parametrize("loss", CLAIMS, ids=repr)
def test_masked_positions_have_exactly_zero_gradient(loss: Estimator) -> None:
    policies = pair(seed=4, eos=True)
    rollouts = policies.batch(((1, 2), (EOS,), (3, 1)))
    leaves = [rollouts.student_logprobs.detach().requires_grad_(), rollouts.student_logits.detach().requires_grad_()]
    value = loss(replace(rollouts, student_logprobs=leaves[0], student_logits=leaves[1]))
    assert value.ndim == 0
    assert torch.isfinite(value)
    if not value.requires_grad:
        return
    grads = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
    for grad in grads:
        assert torch.isfinite(grad).all()
        assert (grad[1, 1] == 0).all()


def test_repr_shows_the_call() -> None:
    loss = estimator("return_to_go", "jsd", gamma=0.5, baseline="leave_one_out", reduction="token_mean")
    shown = "estimator('return_to_go', 'jsd', reduction='token_mean', baseline='leave_one_out', gamma=0.5)"
    assert repr(loss) == shown


def test_claims_print_and_serialise() -> None:
    claim = estimator("k3_loss").claim
    assert str(claim).startswith("other_objective for the token_local objective of reverse_kl; descends forward_kl")
    assert claim.to_dict()["divergence"] == "reverse_kl"
    assert estimator("opd_plus", divergences.alpha(0.5)).claim.to_dict()["divergence"] == "alpha(alpha=0.5)"


def test_estimators_survive_pickling() -> None:
    rollouts = ragged()
    loss = estimator("opd_plus_centred", "jsd", baseline="vocabulary")
    assert value_of(pickle.loads(pickle.dumps(loss)), rollouts) == value_of(loss, rollouts)
