"""The fused loss of k tokens and a sampled one, against the estimator and against the whole divergence."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.rollouts import Rollouts
from tests.tolerances import ALGEBRA

NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "total_variation", "skew_forward_kl(lam=0.1)")


def case(*shape: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """The student's and the teacher's logits, and what a teacher server sends of the latter."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    log_q = torch.log_softmax(teacher, -1)
    logprobs, ids = log_q.topk(k, dim=-1)
    tokens = torch.randint(shape[-1], shape[:-1], generator=generator)
    own = log_q.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    payload = {"teacher_ids": ids, "teacher_logprobs": logprobs, "tokens": tokens, "token_logprobs": own}
    return student.requires_grad_(), teacher, payload


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a.detach() - b.detach()).abs() / (1 + b.detach().abs())).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("k", "constant"), [(1, 0.0), (3, 0.7), (8, -0.4), (2, "rest"), (8, "rest")])
@pytest.mark.parametrize("chunk", (None, 1, 5))
def test_it_is_the_estimators_loss(name: str, k: int, constant: float | str, chunk: int | None) -> None:
    student, teacher, payload = case(3, 4, 8, k=k)
    mask = (torch.arange(12).view(3, 4) % 5 > 0).double()
    baseline = {"baseline": "rest"} if constant == "rest" else {"baseline": "constant", "baseline_value": constant}
    loss = opd.estimator("topk_tail_sampled", name, k=k, **baseline)
    rollouts = Rollouts.from_logits(payload["tokens"], student, teacher, mask)
    wanted = mask * loss.token_loss(rollouts)
    found = opd.fused_sampled_tail(student, divergence=name, mask=mask, constant=constant, chunk_size=chunk, **payload)
    assert worst(found, wanted) < 10 * ALGEBRA
    upstream = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    slopes = [torch.autograd.grad(each, student, upstream, retain_graph=True)[0] for each in (found, wanted)]
    assert worst(*slopes) < 10 * ALGEBRA


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("constant", (0.0, 1.3, "rest"))
def test_its_mean_over_the_sampled_token_is_the_whole_gradient(name: str, constant: float | str) -> None:
    """Every token of one row, weighted by the student's probability; the twin weights by the teacher's."""
    student, teacher, _ = case(1, 7, k=1, seed=3)
    log_q = teacher.log_softmax(-1)
    logprobs, ids = log_q.topk(2, -1)
    rows = student.expand(7, 7)
    every = torch.arange(7)
    values = opd.fused_sampled_tail(
        rows, ids.expand(7, 2), logprobs.expand(7, 2), every, log_q[0], name, constant=constant
    )
    whole = torch.autograd.grad(opd.fused_divergence(student, teacher, name).sum(), student)[0]
    for weights, exact in ((student, True), (teacher, False)):
        chances = weights.detach().softmax(-1)[0]
        (mean,) = torch.autograd.grad(values, student, chances, retain_graph=True)
        assert (worst(mean, whole) < 1e-10) is exact


def test_a_temperature_is_that_of_the_student() -> None:
    student, _, payload = case(5, 6, k=2)
    found = opd.fused_sampled_tail(student, divergence="jsd", temperature=1.7, **payload)
    wanted = opd.fused_sampled_tail(student / 1.7, divergence="jsd", **payload)
    assert worst(found, wanted) < ALGEBRA
    slopes = [torch.autograd.grad(each.sum(), student, retain_graph=True)[0] for each in (found, wanted)]
    assert worst(*slopes) < ALGEBRA


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    student, _, payload = case(6, 400, k=20)
    rounded = student.detach().to(dtype)
    narrow, wide = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
    found, wanted = (opd.fused_sampled_tail(z, divergence="jsd", **payload) for z in (narrow, wide))
    assert found.dtype == torch.float32 and worst(found, wanted) < 1e-5
    slopes = [torch.autograd.grad(each.sum(), z)[0] for each, z in ((found, narrow), (wanted, wide))]
    assert slopes[0].dtype == dtype
    assert worst(slopes[0].double(), slopes[1]) < max(torch.finfo(dtype).eps, 1e-6)


def test_padding_and_impossible_tokens_leave_the_set_alone() -> None:
    student, _, payload = case(3, 6, k=2)
    outside = next(a for a in range(6) if a not in payload["teacher_ids"][1].tolist())
    impossible = student.detach().clone()
    impossible[1, outside] = -math.inf
    tokens = torch.tensor([-100, outside, int(payload["teacher_ids"][2, 0])])
    logprobs = torch.tensor([math.nan, -1.0, -5.0], dtype=torch.float64)
    rows = impossible.requires_grad_()
    payload |= {"tokens": tokens, "token_logprobs": logprobs}
    found = opd.fused_sampled_tail(rows, divergence="chi2", **payload)
    none = opd.fused_sampled_tail(rows, divergence="chi2", **{**payload, "tokens": torch.full((3,), -100)})
    assert worst(found, none) == 0.0
    (slope,) = torch.autograd.grad(found.sum(), rows)
    assert bool(torch.isfinite(slope).all())


def test_second_derivatives_are_refused() -> None:
    student, _, payload = case(3, 6, k=2)
    loss = opd.fused_sampled_tail(student, divergence="jsd", **payload).sum()
    slope = torch.autograd.grad(loss, student, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="fused_sampled_tail has first derivatives only"):
        slope.square().sum().backward()


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"student_logits": torch.full((2, 5), math.nan)}, "student_logits"),
        ({"teacher_ids": torch.tensor([[0, 1], [2, 2]])}, "teacher_ids"),
        ({"tokens": torch.zeros(2)}, "tokens"),
        ({"tokens": torch.zeros(3, dtype=torch.int64)}, "tokens"),
        ({"tokens": torch.tensor([0, 5])}, "tokens"),
        ({"tokens": torch.tensor([0, -1])}, "tokens"),
        ({"token_logprobs": torch.zeros(2, dtype=torch.int64)}, "token_logprobs"),
        ({"token_logprobs": torch.tensor([0.0, math.nan])}, "token_logprobs"),
        ({"constant": math.inf}, "constant"),
        ({"constant": "optimal"}, "constant"),
        ({"temperature": 0.0}, "temperature"),
        ({"mask": torch.tensor([1.0, math.nan])}, "mask"),
    ],
)
def test_bad_arguments_are_named(changed: dict[str, Any], name: str) -> None:
    good = {
        "student_logits": torch.zeros(2, 5),
        "teacher_ids": torch.tensor([[0, 1], [2, 3]]),
        "teacher_logprobs": torch.full((2, 2), -1.0),
        "tokens": torch.tensor([4, 1]),
        "token_logprobs": torch.full((2,), -2.0),
    }
    with pytest.raises(InvalidArgumentError) as caught:
        opd.fused_sampled_tail(**{**good, **changed}, divergence="jsd")
    assert caught.value.argument == name
