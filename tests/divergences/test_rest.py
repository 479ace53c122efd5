"""The weight of all other tokens as one."""

from __future__ import annotations

import pytest
import torch

from opdtheory import divergence as catalogue
from opdtheory.divergences.rest import LEAST_REST, rest_weight
from tests.tolerances import ALGEBRA


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "chi2"])
def test_it_is_the_weight_of_a_bucket(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    log_p, log_q = (torch.randn(5, 6, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    divergence = catalogue(name)
    found = rest_weight(divergence, log_p[:, :2], log_q[:, :2])
    bucket = divergence.weight(log_q[:, 2:].logsumexp(-1) - log_p[:, 2:].logsumexp(-1))
    assert float((found - bucket).abs().max()) < ALGEBRA
    # The twin: the weight of the listed tokens as one.
    listed = divergence.weight(log_q[:, :2].logsumexp(-1) - log_p[:, :2].logsumexp(-1))
    assert float((found - listed).abs().max()) > 1e-2


def test_an_empty_rest_counts_as_little() -> None:
    everything, half = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), 0.5, dtype=torch.float64).log()
    divergence = catalogue("reverse_kl")
    assert float(rest_weight(divergence, everything, everything)) == float(divergence.weight(torch.zeros(())))
    far = rest_weight(divergence, half, everything)
    assert float(far) == pytest.approx(float(divergence.weight(torch.tensor(LEAST_REST / 0.5).double().log())))
