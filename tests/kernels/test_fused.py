"""The whole-vocabulary loss as users call it: values, derivatives, transforms, dtypes, masks, memory and errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.estimators.vocabulary import perspective
from tests.conftest import CHECKED
from tests.sparse import some
from tests.tolerances import ALGEBRA

INF = math.inf
# Forward mode in torch loads a part of torch.jit.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")
# What checks annotations at run time cannot be traced.
compiles = pytest.mark.skipif(CHECKED, reason="OPDTHEORY_TYPECHECK: the compiler cannot trace the checks")
NAMES = ("reverse_kl", "forward_kl", "jsd", "chi2", "alpha(alpha=0.3)", "skew_jsd(beta=0.1)")


def pair(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
    return student.to(dtype).requires_grad_(), teacher.to(dtype)


def gradient(loss: Tensor, student: Tensor, upstream: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(loss, student, torch.ones_like(loss) if upstream is None else upstream)[0]


def plainly(student: Tensor, teacher: Tensor, name: str, tau: float = 1.0) -> Tensor:
    """The same by autograd, in float64."""
    log_p, log_q = (torch.log_softmax(z.double() / tau, -1) for z in (student, teacher))
    return perspective(opd.divergence(name), log_p, log_q).sum(-1)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_token_local_objective(name: str) -> None:
    student = opd.TabularPolicy.random(vocab_size=5, horizon=1, scale=2.0, seed=0)
    teacher = opd.TabularPolicy.random(vocab_size=5, horizon=1, scale=2.0, seed=1)
    logits = student.logits[0].detach().clone().requires_grad_()
    loss = opd.fused_divergence(logits, teacher.logits[0], name).sum()
    assert worst(loss, opd.exact_value(student, teacher, name)) < ALGEBRA
    exact = opd.exact_gradient(student, teacher, name)[0]
    found = gradient(loss, logits)
    assert worst(found, exact) < ALGEBRA
    # The twins: the other sign, and the distribution of another temperature.
    assert worst(-found, exact) > 1e-2
    other = opd.fused_divergence(logits, teacher.logits[0], name, temperature=1.1).sum()
    assert worst(gradient(other, logits), exact) > 1e-3


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", (None, 1, 3, 100))
def test_against_autograd(name: str, chunk: int | None) -> None:
    student, teacher = pair(3, 4, 7)
    upstream = torch.linspace(-1, 2, 12, dtype=torch.float64).view(3, 4)
    found = opd.fused_divergence(student, teacher, name, temperature=1.3, chunk_size=chunk)
    plain = plainly(student, teacher, name, 1.3)
    assert found.shape == (3, 4) and worst(found, plain) < ALGEBRA
    for factor in (torch.ones(3, 4, dtype=torch.float64), upstream):
        wanted = gradient(plainly(student, teacher, name, 1.3), student, factor)
        found = opd.fused_divergence(student, teacher, name, temperature=1.3, chunk_size=chunk)
        assert worst(gradient(found, student, factor), wanted) < ALGEBRA


@forward_mode
@pytest.mark.parametrize("name", some(NAMES))
def test_first_and_second_derivatives_by_differences(name: str) -> None:
    student, teacher = pair(2, 2, 4)
    mask = torch.tensor([[1.0, 0.0], [0.5, 1.0]])

    def loss(z: Tensor) -> Tensor:
        return opd.fused_divergence(z, teacher, name, mask=mask, temperature=1.3)

    assert torch.autograd.gradcheck(loss, (student,), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(loss, (student,), check_fwd_over_rev=True)


def test_third_derivatives_are_refused() -> None:
    student, teacher = pair(4)
    first = torch.autograd.grad(opd.fused_divergence(student, teacher, "jsd"), student, create_graph=True)[0]
    second = torch.autograd.grad(first[0], student, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="end at the second"):
        second[0].backward()


@forward_mode
@pytest.mark.parametrize("name", NAMES)
def test_transforms_of_torch_func(name: str) -> None:
    student, teacher = pair(3, 5)
    rows, fixed = student.detach(), teacher[0]

    def loss(z: Tensor, t: Tensor) -> Tensor:
        return opd.fused_divergence(z, t, name)

    mapped = torch.func.vmap(torch.func.grad(loss))(rows, teacher)
    assert worst(mapped, gradient(loss(student, teacher), student)) < ALGEBRA
    assert worst(torch.func.vmap(loss, in_dims=(1, None))(rows.T, fixed), loss(rows, fixed.expand(3, 5))) < ALGEBRA
    hessian = torch.func.hessian(loss)(rows[0], fixed)
    plain = torch.autograd.functional.hessian(lambda z: plainly(z, fixed, name), rows[0])
    assert worst(hessian, plain) < ALGEBRA
    assert worst(torch.func.jacrev(torch.func.jacrev(loss))(rows[0], fixed), plain) < ALGEBRA
    assert worst(0.9 * hessian, plain) > 1e-4


@forward_mode
def test_absent_tokens_have_second_derivatives_too() -> None:
    student = torch.tensor([0.3, -0.2, -INF, 1.0], dtype=torch.float64)
    teacher = torch.tensor([0.1, -INF, 0.4, 0.0], dtype=torch.float64)
    for name in ("jsd", "hellinger", "le_cam", "skew_jsd(beta=0.1)"):
        found = torch.func.hessian(lambda z, name=name: opd.fused_divergence(z, teacher, name))(student)
        kept = torch.tensor([0, 1, 3])

        def plain(z: Tensor, name: str = name) -> Tensor:
            return plainly(torch.cat([z[:2], student[2:3], z[2:]]), teacher, name)

        exact = torch.autograd.functional.hessian(plain, student[kept])
        assert worst(found[kept][:, kept], exact) < ALGEBRA
        assert worst(found[2], torch.zeros(4)) == 0


@compiles
@pytest.mark.parametrize("backend", ("aot_eager",))
@pytest.mark.parametrize("name", ("jsd", "alpha(alpha=0.3)"))
def test_compiles_to_one_graph(backend: str, name: str) -> None:
    student, teacher = pair(3, 50, dtype=torch.float32)
    for which in (name, opd.divergence(name)):

        def loss(z: Tensor, t: Tensor, which: Any = which) -> Tensor:
            return 3 * opd.fused_divergence(2 * z, t, which, mask=torch.ones(3)).sum()

        torch._dynamo.reset()
        compiled = torch.compile(loss, backend=backend, fullgraph=True)
        assert worst(compiled(student, teacher), loss(student, teacher)) == 0
        found, wanted = (gradient(f(student, teacher), student) for f in (compiled, loss))
        assert worst(found, wanted) < 1e-7
        with torch.inference_mode():
            assert worst(compiled(student, teacher), loss(student, teacher)) == 0


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_own_divergences_compile_with_a_break() -> None:
    student, teacher = pair(3, 6)
    own = opd.Divergence.from_expr((opd.u - 1) ** 2 / (opd.u + 2))

    def loss(z: Tensor) -> Tensor:
        return 2 * opd.fused_divergence(z, teacher, own).sum()

    torch._dynamo.reset()
    found = gradient(torch.compile(loss, backend="aot_eager")(student), student)
    plain = 2 * perspective(own, torch.log_softmax(student, -1), torch.log_softmax(teacher, -1)).sum()
    assert worst(found, gradient(plain, student)) < ALGEBRA


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("name", NAMES)
def test_narrow_dtypes_lose_what_rounding_the_result_loses(dtype: torch.dtype, name: str) -> None:
    student, teacher = pair(4, 300, dtype=dtype)
    found, exact = opd.fused_divergence(student, teacher, name), plainly(student, teacher, name)
    assert found.dtype == torch.float32
    assert float(((found - exact).abs() / (1 + exact)).detach().max()) < 2e-6
    slope, wanted = gradient(found, student), gradient(exact, student)
    assert slope.dtype == dtype
    # `wanted` has been rounded too, and what float16 cannot hold is zero.
    rounding = torch.finfo(dtype).eps * wanted.double().abs() + 6e-8
    assert bool(((slope.double() - wanted.double()).abs() <= rounding + 1e-6 * wanted.abs().max()).all())


def test_mixed_dtypes_and_autocast() -> None:
    student, teacher = pair(4, 30, dtype=torch.bfloat16)
    mixed = opd.fused_divergence(student, teacher.float(), "jsd")
    assert torch.equal(mixed, opd.fused_divergence(student, teacher, "jsd"))
    assert opd.fused_divergence(student, teacher.double(), "jsd").dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = opd.fused_divergence(student.float(), teacher.float(), "jsd")
    assert torch.equal(inside, opd.fused_divergence(student.float(), teacher.float(), "jsd"))
    assert worst(mixed, plainly(student, teacher, "jsd")) < 1e-6


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.float32, torch.bfloat16))
def test_masked_positions_are_not_looked_at(dtype: torch.dtype) -> None:
    student, teacher = pair(3, 4, 6, dtype=torch.float32)
    mask = torch.tensor([[1, 0, 1, 1], [0, 0, 0, 0], [1, 1, 1, 0]]).to(dtype)
    spoilt = torch.where(mask.bool().unsqueeze(-1), student, math.nan).detach().requires_grad_()
    for chunk in (None, 1, 2):
        found = opd.fused_divergence(spoilt, teacher, "jsd", mask=mask, chunk_size=chunk)
        wanted = opd.fused_divergence(student, teacher, "jsd") * mask
        assert worst(found, wanted) < 1e-6
        slope = gradient(found, spoilt)
        assert worst(slope, gradient(wanted, student)) < 1e-6
        assert bool((slope[~mask.bool()] == 0).all()) and bool((found[~mask.bool()] == 0).all())


def test_the_mask_is_a_weight() -> None:
    student, teacher = pair(5, 6)
    mask = torch.tensor([0.5, 2.0, 0.0, -1.0, 1 / 3], dtype=torch.float64)
    found = opd.fused_divergence(student, teacher, "forward_kl", mask=mask)
    wanted = mask * plainly(student, teacher, "forward_kl")
    assert worst(found, wanted) < ALGEBRA
    assert worst(gradient(found, student), gradient(wanted, student)) < ALGEBRA


def test_any_leading_shape_and_strides() -> None:
    student, teacher = pair(3, 5, 4, 6)
    whole = opd.fused_divergence(student, teacher, "jsd")
    shifted = opd.fused_divergence(student[:, :-1], teacher[:, 1:], "jsd", mask=torch.ones(3, 4, 4))
    assert worst(shifted, plainly(student[:, :-1], teacher[:, 1:], "jsd")) < ALGEBRA
    turned = opd.fused_divergence(student.permute(1, 3, 0, 2), teacher.permute(1, 3, 0, 2), "jsd")
    assert worst(turned, plainly(student.permute(1, 3, 0, 2), teacher.permute(1, 3, 0, 2), "jsd")) < ALGEBRA
    assert worst(gradient(shifted, student)[:, -1], torch.zeros(3, 4, 6)) == 0
    assert opd.fused_divergence(student[0, 0, 0], teacher[0, 0, 0], "jsd").shape == ()
    assert worst(opd.fused_divergence(student[0, 0, 0], teacher[0, 0, 0], "jsd"), whole[0, 0, 0]) < ALGEBRA
    empty = opd.fused_divergence(student[:0], teacher[:0], "jsd")
    assert empty.shape == (0, 5, 4) and gradient(empty, student).abs().sum() == 0


def test_inputs_are_left_alone() -> None:
    for dtype in (torch.float32, torch.float64):
        for tau in (1.0, 0.7):
            for name in NAMES:
                student, teacher = pair(3, 8, dtype=dtype)
                before = student.detach().clone(), teacher.clone()
                opd.fused_divergence(student, teacher, name, temperature=tau).sum().backward()
                assert torch.equal(student.detach(), before[0]) and torch.equal(teacher, before[1])
                assert teacher.grad is None


def test_a_kept_graph_can_be_used_again() -> None:
    student, teacher = pair(3, 6, dtype=torch.float32)
    loss = opd.fused_divergence(student, teacher, "jsd")
    first = torch.autograd.grad(loss.sum(), student, retain_graph=True)[0]
    twice = torch.autograd.grad(2 * loss.sum(), student, retain_graph=True)[0]
    again = torch.autograd.grad(loss.sum(), student)[0]
    assert worst(twice, 2 * first) < 1e-7 and torch.equal(again, first)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = pair(3, 6)
    teacher.requires_grad_()
    opd.fused_divergence(student, teacher, "jsd").sum().backward()
    assert teacher.grad is None


def test_nothing_is_kept_where_no_gradient_is_asked_for() -> None:
    student, teacher = pair(3, 6)
    with torch.no_grad():
        assert not opd.fused_divergence(student, teacher, "jsd").requires_grad
    with torch.inference_mode():
        assert opd.fused_divergence(student, teacher, "jsd").shape == (3,)


class _Sizes(TorchDispatchMode):
    """The sizes of the storages that operations make."""

    def __init__(self) -> None:
        super().__init__()
        self.made: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(each, Tensor):
                storage = each.untyped_storage()
                self.made[storage.data_ptr()] = storage.nbytes()
        return result


@pytest.mark.parametrize("name", NAMES)
def test_only_the_gradient_is_as_large_as_the_logits(name: str) -> None:
    student, teacher = pair(64, 5000, dtype=torch.float32)
    whole = student.untyped_storage().nbytes()
    with _Sizes() as sizes:
        opd.fused_divergence(student, teacher, name, chunk_size=1).sum().backward()
    known = {student.untyped_storage().data_ptr(), teacher.untyped_storage().data_ptr()}
    large = [size for place, size in sizes.made.items() if size > whole / 10 and place not in known]
    assert large == [whole]
    with _Sizes() as sizes:
        plainly(student, teacher, name)
    assert sum(size > whole / 10 for size in sizes.made.values()) > 3


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"student_logits": [[0.0]]}, "student_logits"),
        ({"student_logits": torch.zeros(2, 3, dtype=torch.int64)}, "student_logits"),
        ({"student_logits": torch.zeros(())}, "student_logits"),
        ({"student_logits": torch.zeros(2, 0)}, "student_logits"),
        ({"student_logits": torch.tensor([[0.0, math.nan, 0.0], [0.0, 0.0, 0.0]])}, "student_logits"),
        ({"student_logits": torch.full((2, 3), -INF)}, "student_logits"),
        ({"teacher_logits": torch.zeros(2, 4)}, "teacher_logits"),
        ({"teacher_logits": None}, "teacher_logits"),
        ({"teacher_logits": torch.tensor([[0.0, INF, 0.0], [0.0, 0.0, 0.0]])}, "teacher_logits"),
        ({"divergence": "kl"}, "divergence"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"mask": [1, 1]}, "mask"),
        ({"mask": torch.ones(2, dtype=torch.complex64)}, "mask"),
        ({"mask": torch.tensor([1.0, math.nan])}, "mask"),
        ({"mask": torch.ones(2, requires_grad=True)}, "mask"),
        ({"temperature": 0.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunk_size": 1.5}, "chunk_size"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], name: str) -> None:
    given = {"student_logits": torch.zeros(2, 3), "teacher_logits": torch.ones(2, 3), "divergence": "jsd"}
    with pytest.raises(InvalidArgumentError) as refused:
        opd.fused_divergence(**{**given, **arguments})
    assert refused.value.argument == name
    for dtype in (torch.float64, torch.bfloat16):
        student = arguments.get("student_logits")
        if isinstance(student, Tensor) and student.is_floating_point() and student.ndim == 2 and student.numel():
            with pytest.raises(InvalidArgumentError, match="student_logits"):
                opd.fused_divergence(student.to(dtype), torch.ones(2, 3, dtype=dtype), "forward_kl")
