"""Moments over the vocabulary are those of draws."""

from __future__ import annotations

import pytest
import torch

from opdtheory.training.validation import Prefixes, expectation
from opdtheory.training.validation.expectation import Pairs, moments
from tests.tolerances import ALGEBRA
from tests.training.validation.pairs import E


def test_variance_over_the_vocabulary_is_that_of_draws(prefixes: Prefixes) -> None:
    image = prefixes.push_forward(prefixes.random(0))
    generator = torch.Generator().manual_seed(0)
    for loss, group in ((E("opd_plus", "jsd"), 1), (E("opd_plus", "jsd", baseline="leave_one_out"), 2)):
        distribution = moments(loss, prefixes.log_p, prefixes.log_q, prefixes.log_mu, group)
        p = distribution.p[:1]
        centred = (image[:1] - (p * image[:1]).sum(-1, keepdim=True))[0]
        tokens = torch.multinomial(p[0], 200_000 * group, replacement=True, generator=generator).view(-1, group)
        if isinstance(distribution, Pairs):
            one, two = tokens.unbind(-1)
            values = (
                distribution.first[0, one, two] * centred[one] + distribution.second[0, one, two] * centred[two]
            ) / 2
        else:
            values = (distribution.kappa[0] * centred)[tokens]
        assert float(values.var()) == pytest.approx(float(distribution.variance(image)[0]), rel=0.05)
        assert float(values.mean()) == pytest.approx(
            float((distribution.mean() * image)[0].sum()), abs=0.02 * float(values.std())
        )


@pytest.mark.parametrize(
    ("loss", "reads"),
    [
        (E("opd_plus", "jsd"), False),
        (E("opd_plus", "jsd", baseline="optimal"), True),
        (E("topk_tail_sampled", "jsd", k=2), True),
        (E("topk_reward", "jsd", k=2), True),
    ],
)
def test_rows_that_a_loss_reads_are_held_a_few_at_a_time(prefixes: Prefixes, monkeypatch, loss, reads: bool) -> None:
    laws = prefixes.log_p, prefixes.log_q, prefixes.log_mu
    vocabulary, seen = prefixes.log_p.shape[-1], []

    def counted(rollouts):
        seen.append(len(rollouts.tokens))
        return loss(rollouts)

    whole = moments(counted, *laws)
    assert max(seen) == vocabulary
    seen.clear()
    monkeypatch.setattr(expectation, "_HELD", 3 * vocabulary)
    parts = moments(counted, *laws)
    assert max(seen) == (3 if reads else vocabulary)
    image = prefixes.push_forward(prefixes.random(0))
    assert float((parts.mean() - whole.mean()).abs().max()) < ALGEBRA
    assert torch.allclose(parts.variance(image), whole.variance(image), rtol=1e-10, atol=0)
