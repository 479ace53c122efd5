"""The rest of the batch: baselines, z-scores and other couplings."""

from __future__ import annotations

import pytest
from torch import Tensor

import opdtheory as opd
from opdtheory.rollouts import Rollouts
from tests.auditing.effects.subjects import of


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"baseline": "group_mean"}, "the group's mean, the rollout's own included"),
        ({"baseline": "leave_one_out"}, "leave-one-out"),
        ({"zscore": True}, "position by position (z-score with divisor G-1)"),
        ({}, None),
    ],
)
def test_batch(options: dict[str, object], words: str | None) -> None:
    found = of(opd.estimator("opd_plus", "reverse_kl", **options), batch_size=2)  # type: ignore[arg-type]
    assert found.batch == (words is not None)
    assert words is None or words in " ".join(found.words)


def test_batch_of_other_kinds() -> None:
    def by_population_deviation(r: Rollouts) -> Tensor:
        a = r.log_u.detach().sum(-1, keepdim=True)
        a = (a - a.mean()) / (a.std(correction=0) + 1e-9)
        return r.token_sum(-a * r.student_logprobs)

    assert "(z-score with divisor G)" in " ".join(of(by_population_deviation, batch_size=2).words)

    def by_largest(r: Rollouts) -> Tensor:
        a = r.log_u.detach()
        return r.token_sum(-a / (0.1 + a.abs().max()) * r.student_logprobs)

    assert "rescaled by a function of the others" in " ".join(of(by_largest, batch_size=2).words)
