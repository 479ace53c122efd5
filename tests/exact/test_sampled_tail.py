"""The closed-form variance of a split between summed and sampled tokens, against estimators and by enumeration."""

from __future__ import annotations

import pytest
import torch

from opdtheory import estimator
from opdtheory.errors import InvalidArgumentError
from opdtheory.exact import TabularPolicy, exact_gradient, gradient_moments, random_pair
from opdtheory.exact.sampled_tail import tail_moments
from tests.tolerances import ALGEBRA


def rows(size: int, seed: int, distance: float = 1.0) -> tuple[TabularPolicy, TabularPolicy]:
    return random_pair(size, 1, distance=distance, seed=seed)


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "jsd", "chi2", "hellinger"])
@pytest.mark.parametrize(("k", "support"), [(0, "teacher"), (1, "teacher"), (3, "student"), (5, "teacher")])
def test_variances_are_those_of_the_estimators(name: str, k: int, support: str) -> None:
    pair = rows(6, seed=3)
    student, teacher = (policy.logits[0] for policy in pair)
    for constant in (0.0, 0.8):
        options = {} if constant == 0.0 else {"baseline": "constant", "baseline_value": constant}
        split = {"k": k, "support": support} if k else {}
        loss = estimator("topk_tail_sampled" if k else "opd_plus", name, **split, **options)
        found = tail_moments(student, teacher, name, k, support, constant)
        assert float(found.variance) == pytest.approx(gradient_moments(loss, *pair).variance, rel=1e-10)
    best = estimator("topk_tail_sampled" if k else "opd_plus", name, **split, baseline="optimal")
    least = gradient_moments(best, *pair).variance
    if k:
        assert float(found.least) == pytest.approx(least, rel=1e-10)
        rest = estimator("topk_tail_sampled", name, **split, baseline="rest")
        assert float(found.rest) == pytest.approx(gradient_moments(rest, *pair).variance, rel=1e-10)
    else:  # the estimator's constant leaves out the mean's own term, which is all that it could lose
        assert float(found.least) <= least * (1 + ALGEBRA)
    (exact,) = exact_gradient(*pair, name)
    assert float(found.squared_gradient) == pytest.approx(float(exact.square().sum()), rel=1e-12)


def test_rows_are_apart_and_a_parabola_has_its_lowest_point_there() -> None:
    generator = torch.Generator().manual_seed(1)
    student, teacher = torch.randn(2, 7, 9, generator=generator, dtype=torch.float64)
    found = tail_moments(student, teacher, "forward_kl", 3)
    alone = [tail_moments(a, b, "forward_kl", 3) for a, b in zip(student.split(1), teacher.split(1), strict=True)]
    for name in ("variance", "constant", "least", "rest", "squared_gradient"):
        assert torch.allclose(getattr(found, name), torch.cat([getattr(x, name) for x in alone]), atol=ALGEBRA)
    for row, (a, b) in enumerate(zip(student.split(1), teacher.split(1), strict=True)):
        best = float(found.constant[row])
        low, middle, high = (
            float(tail_moments(a, b, "forward_kl", 3, constant=best + shift).variance) for shift in (-1.0, 0.0, 1.0)
        )
        assert low == pytest.approx(high, rel=1e-10) and middle < low
        assert middle == pytest.approx(float(found.least[row]), rel=1e-10)
    assert found.least_relative < found.relative


def test_everything_summed_leaves_nothing_to_chance() -> None:
    student, teacher = (torch.randn(4, 5, generator=torch.Generator().manual_seed(s)) for s in (1, 2))
    found = tail_moments(student, teacher, "chi2", 5)
    assert float(found.variance.max()) == float(found.least.max()) == 0.0
    # One token left to chance is as good as known once its weight is the constant.
    assert float(tail_moments(student, teacher, "chi2", 4).least.max()) < 1e-10


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ((torch.zeros(2, 3), torch.zeros(2, 4), "jsd"), "teacher"),
        ((torch.zeros(3), torch.zeros(3), "jsd"), "teacher"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), "jsd", 4), "k"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), "jsd", 1, "both"), "support"),
        ((torch.zeros(2, 3), torch.tensor([[0.0, 0.0, -torch.inf]] * 2), "jsd"), "teacher"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple, named: str) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        tail_moments(*arguments)
    assert caught.value.argument == named
