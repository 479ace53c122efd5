"""The divergence on a top-k payload with a tail bucket, against the coarse-graining of the estimators."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators.vocabulary import TopK, perspective
from tests.conftest import CHECKED
from tests.tolerances import ALGEBRA

# What checks annotations at run time cannot be traced.
compiles = pytest.mark.skipif(CHECKED, reason="OPDTHEORY_TYPECHECK: the compiler cannot trace the checks")
NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "hellinger", "skew_forward_kl(lam=0.1)")


def case(*shape: int, k: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The student's logits, the teacher's log-probabilities, and the payload of them."""
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    log_q = torch.log_softmax(teacher, -1)
    return student.requires_grad_(), log_q, *reversed(log_q.topk(k, dim=-1))


def coarse(student: Tensor, log_q: Tensor, k: int, name: str, tau: float = 1.0) -> Tensor:
    pair = TopK(k, "tail").coarse(torch.log_softmax(student / tau, -1), log_q)
    return perspective(opd.divergence(name), *pair).sum(-1)


def worst(a: Tensor, b: Tensor) -> float:
    return float(((a.detach() - b.detach()).abs() / (1 + b.detach().abs())).max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("k", (1, 3, 7, 8))
@pytest.mark.parametrize("chunk", (None, 1, 5))
def test_it_is_the_coarse_divergence(name: str, k: int, chunk: int | None) -> None:
    student, log_q, ids, logprobs = case(3, 4, 8, k=k)
    mask = torch.linspace(-1, 1, 12, dtype=torch.float64).view(3, 4).round(decimals=1)
    upstream = torch.linspace(1, 2, 12, dtype=torch.float64).view(3, 4)
    found = opd.fused_top_k_divergence(student, ids, logprobs, name, mask=mask, temperature=1.3, chunk_size=chunk)
    wanted = mask * coarse(student, log_q, k, name, 1.3)
    assert worst(found, wanted) < ALGEBRA
    slopes = [torch.autograd.grad(each, student, upstream)[0] for each in (found, wanted)]
    assert worst(*slopes) < 10 * ALGEBRA


def test_the_truncated_sum_is_another() -> None:
    """The false twin leaves the bucket out; neither its value nor its gradient is this one's (T9)."""
    student, log_q, ids, logprobs = case(3, 8, k=3)
    found = opd.fused_top_k_divergence(student, ids, logprobs, "forward_kl")
    log_p = torch.log_softmax(student, -1)
    truncated = (logprobs.exp() * (logprobs - log_p.gather(-1, ids))).sum(-1)
    assert worst(found, truncated) > 1e-2
    slopes = [torch.autograd.grad(each.sum(), student, retain_graph=True)[0] for each in (found, truncated)]
    assert worst(*slopes) > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_it_is_at_most_the_whole_divergence_and_that_for_all_tokens(name: str) -> None:
    student, log_q, ids, logprobs = case(20, 9, k=9)
    whole = opd.fused_divergence(student, log_q, name)
    assert worst(opd.fused_top_k_divergence(student, ids, logprobs, name), whole) < ALGEBRA
    parts = [opd.fused_top_k_divergence(student, ids[:, :k], logprobs[:, :k], name) for k in (2, 5)]
    assert bool((parts[0] <= parts[1] + ALGEBRA).all()) and bool((parts[1] <= whole + ALGEBRA).all())


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_narrow_dtypes(dtype: torch.dtype) -> None:
    student, log_q, ids, logprobs = case(6, 400, k=20)
    rounded = student.detach().to(dtype)
    narrow, wide = rounded.clone().requires_grad_(), rounded.double().requires_grad_()
    found = opd.fused_top_k_divergence(narrow, ids, logprobs.to(dtype), "jsd")
    wanted = opd.fused_top_k_divergence(wide, ids, logprobs.to(dtype).double(), "jsd")
    assert found.dtype == torch.float32 and worst(found, wanted) < 1e-6
    slopes = [torch.autograd.grad(each.sum(), z)[0] for each, z in ((found, narrow), (wanted, wide))]
    assert slopes[0].dtype == dtype
    assert worst(slopes[0].double(), slopes[1]) < torch.finfo(dtype).eps


def test_a_bucket_far_below_keeps_its_logarithm() -> None:
    """In float32 the bucket underflows beside the chosen token; its logarithm is taken from a maximum of its own."""
    student = torch.tensor([[200.0, 1.0, 2.0, 0.0]], requires_grad=True)
    ids, logprobs = torch.tensor([[0]]), torch.tensor([[0.5]]).log()
    found = opd.fused_top_k_divergence(student, ids, logprobs, "forward_kl")
    tail = math.log(math.exp(1) + math.exp(2) + 1) - 200
    assert found.item() == pytest.approx(-math.log(2) - 0.5 * tail, rel=1e-6)
    slope = torch.autograd.grad(found.sum(), student)[0]
    # The bucket's half of the teacher, shared as the student shares it.
    assert slope.tolist()[0] == pytest.approx([0.5, *(-0.5 * torch.softmax(student[0, 1:], -1)).tolist()], rel=1e-5)


def test_second_derivatives_are_refused() -> None:
    student, _, ids, logprobs = case(3, 6, k=2)
    loss = opd.fused_top_k_divergence(student, ids, logprobs, "jsd").sum()
    slope = torch.autograd.grad(loss, student, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="fused_top_k_divergence has first derivatives only"):
        slope.square().sum().backward()


def test_slices() -> None:
    student, log_q, ids, logprobs = case(3, 5, 6, k=2)
    shifted = opd.fused_top_k_divergence(student[:, :-1], ids[:, 1:], logprobs[:, 1:], "jsd")
    assert worst(shifted, coarse(student[:, :-1], log_q[:, 1:], 2, "jsd")) < ALGEBRA


@compiles
def test_compiled_graphs_break_there() -> None:
    student, log_q, ids, logprobs = case(3, 6, k=2)
    torch._dynamo.reset()
    compiled = torch.compile(lambda z: opd.fused_top_k_divergence(z, ids, logprobs, "jsd"), backend="aot_eager")
    assert worst(compiled(student.detach()), coarse(student, log_q, 2, "jsd")) < ALGEBRA


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"student_logits": torch.zeros(2, 5, dtype=torch.int64)}, "student_logits"),
        ({"student_logits": torch.full((2, 5), math.nan)}, "student_logits"),
        ({"teacher_ids": torch.zeros(2, 2)}, "teacher_ids"),
        ({"teacher_ids": torch.zeros(3, 2, dtype=torch.int64)}, "teacher_ids"),
        ({"teacher_ids": torch.tensor([[0, 5], [1, 2]])}, "teacher_ids"),
        ({"teacher_ids": torch.tensor([[0, 1], [2, 2]])}, "teacher_ids"),
        ({"teacher_logprobs": torch.zeros(2, 3)}, "teacher_logprobs"),
        ({"teacher_logprobs": torch.full((2, 2), -0.1)}, "teacher_logprobs"),
        ({"teacher_logprobs": torch.full((2, 2), math.nan)}, "teacher_logprobs"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"mask": torch.tensor([1.0, math.inf])}, "mask"),
        ({"temperature": -1.0}, "temperature"),
        ({"chunk_size": True}, "chunk_size"),
        ({"divergence": "nothing"}, "divergence"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], name: str) -> None:
    given = {
        "student_logits": torch.zeros(2, 5),
        "teacher_ids": torch.tensor([[0, 1], [2, 3]]),
        "teacher_logprobs": torch.full((2, 2), -1.0),
        "divergence": "jsd",
    }
    with pytest.raises(InvalidArgumentError) as refused:
        opd.fused_top_k_divergence(**{**given, **arguments})
    assert refused.value.argument == name
