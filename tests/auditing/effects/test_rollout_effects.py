"""Position and other tokens of the rollout: losses whose weights depend on them, and losses whose weights do not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.rollouts import Rollouts
from tests.auditing.effects.subjects import Loss, of


def weighted_by_position(weight: Callable[[Tensor, int], Tensor]) -> Loss:
    def loss(r: Rollouts) -> Tensor:
        horizon = r.tokens.shape[1]
        n = 1.0 + torch.arange(horizon, dtype=torch.float64)
        return r.token_sum(-weight(n, horizon) * r.log_u.detach() * r.student_logprobs)

    return loss


@pytest.mark.parametrize(
    ("weight", "position", "label"),
    [
        (lambda n, horizon: 0.9 ** (n - 1), [1.0, 0.9, 0.81], "geometric with factor 0.9"),
        (lambda n, horizon: n, [1.0, 2.0, 3.0], "proportional to the position n"),
        (lambda n, horizon: 1 / n, [1.0, 0.5, 1 / 3], "proportional to 1/n of the position n"),
        (lambda n, horizon: horizon + 1 - n, [1.0, 2 / 3, 1 / 3], "proportional to the number of positions left"),
        (lambda n, horizon: (n == horizon).double(), [0.0, 0.0, 1.0], "the last position only"),
        (lambda n, horizon: (n == 1).double(), [1.0, 0.0, 0.0], "the first position only"),
        (lambda n, horizon: 1 + 0.1 * n, [1.0, 1.2 / 1.1, 1.3 / 1.1], "linear, by +0.0909091 of the first's weight"),
        (lambda n, horizon: n.cos().abs(), None, "no simple pattern"),
    ],
)
def test_position(weight: Callable[[Tensor, int], Tensor], position: list[float] | None, label: str) -> None:
    found = of(weighted_by_position(weight))
    assert not found.ratio_only and not found.other_tokens
    assert found.position is not None and found.position_label is not None
    if position is not None:
        assert found.position == pytest.approx(position, abs=1e-9)
    assert found.position_label.startswith(label)


def test_return_to_go_and_the_discount_outside() -> None:
    plain = of(opd.estimator("return_to_go", "jsd", gamma=1.0))
    assert plain.other_tokens and plain.position is None and "no discount" in plain.words[0]
    inner = of(opd.estimator("return_to_go", "jsd", gamma=0.5))
    assert inner.position is None and "0.5 times as much, without the outer" in inner.words[0]
    outer = of(opd.estimator("return_to_go", "jsd", gamma=0.5, discounted=True))
    assert outer.position == [1.0, 0.5, 0.25] and "with the outer gamma^(n-1)" in outer.words[1]


def test_whole_rollout() -> None:
    found = of(opd.estimator("sequence_opd_plus", "jsd"))
    assert found.other_tokens and "before it and after it" in found.words[0]
    # T6c: of the reverse KL the whole rollout's weight is in expectation a return-to-go.
    assert "after it, as a return-to-go" in of(opd.estimator("sequence_opd_plus", "reverse_kl")).words[0]

    def earlier(r: Rollouts) -> Tensor:
        before = r.log_u.detach().cumsum(-1) - r.log_u.detach()
        return r.token_sum(-(r.log_u.detach() * before.exp()) * r.student_logprobs)

    assert "before it (T6)" in of(earlier).words[0]


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_division_by_length(reduction: str) -> None:
    found = of(opd.estimator("opd_plus", "jsd", reduction=reduction))
    assert "divided by the number of tokens" in found.words[0]
    grouped = of(opd.estimator("opd_plus", "jsd", reduction=reduction), batch_size=2)
    assert any("lengths of the others" in text for text in grouped.words) == (reduction == "token_mean")


def test_later_tokens_themselves_are_told_from_their_ratios() -> None:
    """A reward of the tokens that follow is no return of ratios."""

    def rewarded(r: Rollouts) -> Tensor:
        reward = (r.tokens == 1).to(r.mask).sum(-1, keepdim=True)
        return r.token_sum(-(reward + r.log_u.detach()) * r.student_logprobs)

    found = of(rewarded)
    assert found.other_tokens and any("whatever their ratios" in text for text in found.words)
    for estimator in (
        opd.estimator("return_to_go", "jsd", gamma=1.0),
        opd.estimator("return_to_go", "forward_kl", gamma=0.5),
    ):
        assert not any("whatever their ratios" in text for text in of(estimator).words)
