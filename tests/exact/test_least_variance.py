"""The least variances in closed form, against estimators and losses by enumeration."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from opdtheory import Rollouts, divergence, estimator
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import Estimate, TabularPolicy, exact_gradient, gradient_moments, least_variance, random_pair
from tests.tolerances import ALGEBRA

NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2")


def pair_of(size: int, seed: int) -> tuple[TabularPolicy, TabularPolicy]:
    return random_pair(size, 1, distance=1.0, seed=seed)


def rows_of(pair: tuple[TabularPolicy, TabularPolicy]) -> tuple[Tensor, Tensor]:
    student, teacher = (policy.logits[0] for policy in pair)
    return student, teacher


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k", "support"), [(1, "teacher"), (2, "student"), (4, "teacher")])
def test_constants_and_variances_are_those_of_the_estimators(name: str, k: int, support: str) -> None:
    pair = pair_of(5, seed=3)
    found = least_variance(*rows_of(pair), name, k, support)
    split = {"k": k, "support": support}
    for estimate, loss, options in (
        (found.centred, "opd_plus", {}),
        (found.sampled, "opd_plus", {}),
        (found.split_level, "topk_tail_sampled", split),
        (found.split, "topk_tail_sampled", split),
    ):
        constant = float(estimate.constant)
        run = estimator(loss, name, baseline="constant", baseline_value=constant, **options)
        assert float(estimate.variance) == pytest.approx(gradient_moments(run, *pair).variance, rel=1e-9, abs=1e-14)
    best = gradient_moments(estimator("opd_plus", name, baseline="optimal"), *pair).variance
    assert float(found.sampled.variance) == pytest.approx(best, rel=1e-10)
    centred = gradient_moments(estimator("opd_plus_centred", name), *pair).variance
    assert float(found.centred.variance) == pytest.approx(centred, rel=1e-10)
    (exact,) = exact_gradient(*pair, name)
    assert float(found.squared_gradient) == pytest.approx(float(exact.square().sum()), rel=1e-12)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("group", [2, 3])
def test_leave_one_out_is_that_of_every_group(name: str, group: int) -> None:
    pair = pair_of(3, seed=2)
    loss = estimator("opd_plus", name, baseline="leave_one_out")
    variance = gradient_moments(loss, *pair, batch_size=group).variance
    found = least_variance(*rows_of(pair), name, group=group)
    assert float(found.leave_one_out.variance) == pytest.approx(group * variance, rel=1e-10)
    assert found.leave_one_out.variance > found.sampled.variance


def by_event(name: str, chosen: Tensor, constant: float, vector: Tensor) -> object:
    """The loss whose gradient is a vector on the set and its complement beside the tail's sampled term."""
    weight_of = divergence(name).weight

    def loss(r: Rollouts) -> Tensor:
        log_p, log_q = r.student_logits.log_softmax(-1), r.teacher_logits.log_softmax(-1)
        p = log_p.detach().exp()
        weight = weight_of(log_q - log_p).detach() - constant
        inside = torch.zeros(p.shape[-1], dtype=p.dtype).scatter(0, chosen, 1.0)
        mass = (p * inside).sum(-1)
        own = inside[r.tokens]
        known = (inside * (p * weight * log_p)).sum(-1)
        moved = (inside * (vector * log_p)).sum(-1)
        tail = (weight.gather(-1, r.tokens.unsqueeze(-1)).squeeze(-1)) * r.student_logprobs
        on_set = known + (1 - mass) * moved
        on_tail = known - mass * moved + tail
        return r.token_sum(-(own * on_set + (1 - own) * on_tail))

    return loss


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", [1, 2, 4])
def test_by_event_and_the_floor_are_those_of_losses(name: str, k: int) -> None:
    pair = pair_of(5, seed=5)
    student, teacher = rows_of(pair)
    found = least_variance(student, teacher, name, k)
    p, weight = student.softmax(-1)[0], divergence(name).weight(teacher.log_softmax(-1) - student.log_softmax(-1))[0]
    chosen = teacher[0].topk(k).indices
    inside = torch.zeros_like(p).scatter(0, chosen, 1.0)
    exact = exact_gradient(*pair, name)

    def variance(constant: float, vector: Tensor) -> float:
        moments = gradient_moments(by_event(name, chosen, constant, vector), *pair)
        assert torch.allclose(moments.mean[0], exact[0], atol=ALGEBRA)
        return moments.variance

    def conditional(constant: float) -> Tensor:
        return p * inside * (weight - constant) / (p * inside).sum()

    c = float(found.event.constant)
    assert variance(c, conditional(c)) == pytest.approx(float(found.event.variance), rel=1e-9, abs=1e-14)
    assert all(variance(c + d, conditional(c + d)) > float(found.event.variance) for d in (-0.1, 0.1))
    # The floor: least squares over the constant and the coefficients on the set, from the gradients themselves.
    scores = torch.eye(5, dtype=p.dtype) - p
    mass = (p * inside).sum()
    rows, target = [], []
    for a in range(5):
        drawn = float(1 - inside[a])
        on_set = (p * inside * weight) @ scores
        value = on_set + drawn * weight[a] * scores[a] - (p * weight) @ scores
        by_constant = (p * inside) @ scores + drawn * scores[a]
        by_vector = [((1 - mass) * (1 - drawn) - mass * drawn) * scores[b] for b in chosen.tolist()]
        rows.append(p[a].sqrt() * torch.stack([-by_constant, *by_vector], -1))
        target.append(p[a].sqrt() * value)
    design, aim = torch.cat(rows), torch.cat(target)
    solution = torch.linalg.lstsq(design, -aim.unsqueeze(-1), driver="gelsd").solution
    least = float((aim.unsqueeze(-1) + design @ solution).square().sum())
    assert float(found.floor.variance) == pytest.approx(least, rel=1e-9, abs=1e-14)
    vector = torch.zeros_like(p).scatter(0, chosen, solution[1:, 0])
    assert variance(float(solution[0]), vector) == pytest.approx(least, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("name", NAMES)
def test_what_bounds_what(name: str) -> None:
    def no_more(least: Estimate, most: Estimate) -> bool:
        # Equal ones may differ by rounding, which grows with them: some variances are above 1e4.
        return bool((least.variance <= most.variance * (1 + ALGEBRA) + ALGEBRA).all())

    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 300, 6, generator=generator, dtype=torch.float64)
    by_k = [least_variance(student, teacher, name, k) for k in range(7)]
    for found in by_k:
        assert all(no_more(found.floor, other) for other in (found.split, found.event, found.sampled))
        assert no_more(found.event, found.sampled) and no_more(found.split, found.split_level)
    assert all(no_more(more.event, fewer.event) for fewer, more in itertools.pairwise(by_k))
    for known in (5, 6):  # a single token that is left to chance is known too
        for estimate in (by_k[known].split_level, by_k[known].split, by_k[known].floor):
            assert float(estimate.variance.max()) < 1e-10
    assert float(by_k[6].event.variance.max()) < 1e-10


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_the_split_can_be_worse_than_the_sampled_token_alone(name: str) -> None:
    p, q = torch.tensor([[[1, 8, 3]], [[2.4, 2.4, 7.2]]]).double() / 12
    found = least_variance(p.log(), q.log(), name, 1)
    assert float(found.split.variance) > 1.5 * float(found.sampled.variance)
    assert float(found.event.variance) == pytest.approx(float(found.sampled.variance), rel=1e-10)


def test_a_level_tail_is_as_good_as_known() -> None:
    p, u = (torch.tensor([row], dtype=torch.float64) for row in ([0.3, 0.3, 0.3, 0.1], [5 / 3, 1.0, 0.5, 0.5]))
    found = least_variance(p.log(), (p * u).log(), "jsd", 2)
    assert float(found.split_level.variance) < 1e-15
    assert isinstance(found.split_level, Estimate) and float(found.sampled.variance) > 1e-3
    same = least_variance(p.log(), p.log(), "jsd", 2)
    assert float(same.centred.variance) == float(same.split_level.variance) == 0.0


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("options", "named"), [({"k": 4}, "k"), ({"support": "both"}, "support"), ({"group": 1}, "group")]
)
def test_bad_arguments_are_named(options: dict, named: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        least_variance(torch.zeros(2, 3), torch.zeros(2, 3), "jsd", **options)
    assert caught.value.argument == named
