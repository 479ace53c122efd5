"""On what a weight depends: each experiment on losses that do and on losses that do not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.auditing.effects.dependence import Dependence, dependence
from opdtheory.auditing.naming.recover import RecoveredWeight, recover_weight
from opdtheory.auditing.scenario import Scenario
from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from tests.labels import label

Loss = Callable[[Rollouts], Tensor]
STEPS = torch.linspace(-1, 1, 5, dtype=torch.float64)
RISING = RecoveredWeight(STEPS, STEPS, 0.0, True, True, 1.0)


def of(loss: Loss, batch_size: int = 1, scale: float = 2.371) -> Dependence:
    def scaled(r: Rollouts) -> Tensor:
        return scale * loss(r)

    if batch_size > 1:
        # The bandits of a coupled loss take a second, and nothing here depends on them.
        return dependence(scaled, RISING, Scenario(batch_size))
    return dependence(scaled, recover_weight(scaled, Scenario(batch_size)), Scenario(batch_size))


def of_both(advantage: Callable[[Tensor, Tensor], Tensor]) -> Loss:
    return lambda r: r.token_sum(-advantage(r.student_logprobs.detach(), r.teacher_logprobs) * r.student_logprobs)


def weighted_by_position(weight: Callable[[Tensor, int], Tensor]) -> Loss:
    def loss(r: Rollouts) -> Tensor:
        horizon = r.tokens.shape[1]
        n = 1.0 + torch.arange(horizon, dtype=torch.float64)
        return r.token_sum(-weight(n, horizon) * r.log_u.detach() * r.student_logprobs)

    return loss


@pytest.mark.parametrize(
    "loss",
    [
        opd.estimator("k2_loss"),
        opd.estimator("opd", "forward_kl"),
        opd.estimator("full_vocab", "jsd"),
        opd.estimator("opd_plus", "reverse_kl", baseline="vocabulary"),
        opd.estimator("return_to_go", "jsd", gamma=0.0),
    ],
    ids=label,
)
def test_ratio_alone(loss: Loss) -> None:
    found = of(loss)
    assert found.ratio_only and found.position is None and not found.other_tokens
    assert not found.batch and not found.sampling_policy and found.top_k is None
    assert found.words == ["The weight of a token is a function of its own ratio alone, the same at every position."]
    json.dumps(dataclasses.asdict(found))


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
        (lambda n, horizon: n.cos().abs(), None, "no simple distribution"),
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

    assert "rescaled by what the others are" in " ".join(of(by_largest, batch_size=2).words)


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


@pytest.mark.parametrize(
    ("form", "k", "support"),
    [("topk_truncated", 2, "student"), ("topk_renormalised", 7, "teacher"), ("topk_tail", 100, "student")],
)
def test_top_k(form: str, k: int, support: str) -> None:
    found = of(opd.estimator(form, "reverse_kl", k=k, support=support))  # type: ignore[arg-type]
    assert found.top_k == k and not found.ratio_only
    assert any(f"the {support}'s {k} likeliest" in text for text in found.words)


@pytest.mark.parametrize(
    ("advantage", "name"),
    [
        (lambda p, q: q.exp() - p.exp(), "density-power divergence, alpha=1"),
        (lambda p, q: (0.37 * q).exp() - (0.37 * p).exp(), "density-power divergence, alpha=0.37"),
        (lambda p, q: (-0.5 * p).exp() - (-0.5 * q).exp(), "density-power divergence, alpha=-0.5"),
        (lambda p, q: q - 1.3 * p, "KL(p||q) plus 0.3 times the negative entropy of p"),
        (lambda p, q: q.exp() - p.exp() + q - p, "Bregman divergence"),
        (lambda p, q: q - p.exp(), "a sum of H(p, q) with dH/dp = h(p) - g(q)"),
        (lambda p, q: (p + q).exp(), "a sum of H(p, q) with dH/dp = -A"),
        (lambda p, q: -p, "a function of the student alone"),
    ],
)
def test_both_probabilities(advantage: Callable[[Tensor, Tensor], Tensor], name: str) -> None:
    found = of(of_both(advantage))
    assert not found.ratio_only
    assert found.student_and_teacher == name


def test_density_power_is_told_from_its_neighbour() -> None:
    assert of(opd.estimator("power", alpha=0.5)).student_and_teacher == "density-power divergence, alpha=0.5"
    assert of(opd.estimator("power", alpha=0.501)).student_and_teacher == "density-power divergence, alpha=0.501"


def test_more_than_the_own_probabilities() -> None:
    def loss(r: Rollouts) -> Tensor:
        collision = torch.softmax(r.student_logits.detach(), -1).square().sum(-1)
        return r.token_sum(-r.log_u.detach() * collision * r.student_logprobs)

    found = of(loss)
    assert found.student_and_teacher is None
    assert any("probabilities of other tokens of the same step" in text for text in found.words)


def test_zero_gradient_depends_on_nothing() -> None:
    for loss in (opd.estimator("k1_loss"), opd.estimator("topk_reward", "jsd", k=2)):
        found = of(loss)
        assert found.ratio_only and "nothing that it could depend on" in found.words[0]


def test_a_loss_that_refuses_a_shape_is_still_described() -> None:
    def loss(r: Rollouts) -> Tensor:
        if r.tokens.shape[1] == 2:
            raise RuntimeError("two tokens are beneath me")
        return r.token_sum(r.log_u.square() / 2)

    found = of(loss)
    assert any("two tokens are beneath me" in text for text in found.words)
    assert found.ratio_only


def test_large_batches_say_what_was_not_looked_at() -> None:
    found = of(opd.estimator("opd_plus", "jsd", baseline="leave_one_out"), batch_size=9)
    assert any("were not looked at" in text for text in found.words)
    assert found.batch


def test_bad_settings() -> None:
    loss = opd.estimator("k2_loss")
    weight = recover_weight(loss, Scenario())
    with pytest.raises(InvalidArgumentError, match="tolerance: must be positive, got 0.0"):
        dependence(loss, weight, Scenario(), tolerance=0.0)
    with pytest.raises(InvalidArgumentError, match="batch_size: must be a whole number of at least 1, got 0"):
        dependence(loss, weight, Scenario(batch_size=0))
