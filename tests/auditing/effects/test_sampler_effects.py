"""The policy that sampled: importance weights and their clips."""

from __future__ import annotations

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.rollouts import Rollouts
from tests.auditing.effects.subjects import Loss, of
from tests.labels import label


def truncated(bound: float) -> Loss:
    def loss(r: Rollouts) -> Tensor:
        rho = (r.student_logprobs - r.behavior_logprobs).detach().exp().clamp(max=bound)
        return r.token_sum(-rho * r.log_u.detach() * r.student_logprobs)

    return loss


def masked(r: Rollouts) -> Tensor:
    rho = (r.student_logprobs - r.behavior_logprobs).detach().exp()
    return r.token_sum(-(rho < 2).double() * r.log_u.detach() * r.student_logprobs)


def against_sampler(r: Rollouts) -> Tensor:
    return r.token_sum(-(r.teacher_logprobs - r.behavior_logprobs) * r.student_logprobs)


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (opd.estimator("opd_plus", "jsd", importance="token"), "the token's own p/mu (importance-weighted, T8)."),
        (opd.estimator("opd_plus", "jsd", importance="prefix"), "p/mu up to the token"),
        (opd.estimator("opd_plus", "jsd", importance="sequence"), "p/mu over the whole rollout"),
        (opd.estimator("full_vocab", "jsd", importance="prefix"), "p/mu before the token"),
        (opd.estimator("opd_plus", "jsd", importance="ppo", clip_range=0.28), "zero above 1.28 for the weights of one"),
        (truncated(1.7), "clipped: held at 1.7 above."),
        (masked, "only where it is far from the student"),
        (against_sampler, "of q/mu in place of q/p"),
        (opd.estimator("opd_plus", "jsd"), None),
    ],
    ids=label,
)
def test_sampling_policy(loss: Loss, words: str | None) -> None:
    found = of(loss)
    assert found.sampling_policy == (words is not None)
    assert words is None or any(words in text for text in found.words)
