"""The divergence from hidden states and heads, against the same from logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import layers, products
from tests.conftest import CHECKED
from tests.tolerances import ALGEBRA

# What checks annotations at run time cannot be traced.
compiles = pytest.mark.skipif(CHECKED, reason="OPDTHEORY_TYPECHECK: the compiler cannot trace the checks")
NAMES = ("reverse_kl", "forward_kl", "jsd", "total_variation")


def case(*batch: int, dtype: torch.dtype = torch.float64, vocabulary: int = 7) -> list[Tensor]:
    """Student's hidden states and head, teacher's hidden states and head."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((*batch, 4), (vocabulary, 4), (*batch, 3), (vocabulary, 3))
    tensors = [torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:]]


def by_logits(hidden: Tensor, head: Tensor, other: Tensor, other_head: Tensor, name: str, **options: Any) -> Tensor:
    return opd.fused_divergence(hidden @ head.T, other @ other_head.T, name, **options)


def worst(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("chunk", (None, 1, 4))
@pytest.mark.parametrize("upstream", ("ones", "mean", "varied"))
def test_it_is_the_divergence_of_the_logits(name: str, chunk: int | None, upstream: str) -> None:
    tensors = case(2, 5)
    mask = torch.tensor([[1, 0, 1, 0.5, 1], [1, 1, 0, 0, -1]])
    factors = {"ones": torch.ones(2, 5), "mean": torch.full((2, 5), 0.1), "varied": torch.arange(10.0).view(2, 5)}
    options = {"mask": mask, "temperature": 1.3}
    found = opd.fused_linear_divergence(*tensors, name, chunk_size=chunk, **options)
    wanted = by_logits(*tensors, name, **options)
    assert found.shape == (2, 5) and worst(found, wanted) < ALGEBRA
    slopes = [torch.autograd.grad(each, tensors[:2], factors[upstream].double()) for each in (found, wanted)]
    for mine, theirs in zip(*slopes, strict=True):
        assert worst(mine, theirs) < ALGEBRA
        assert worst(1.01 * mine, theirs) > 1e-5


def test_a_factor_that_varies_is_not_taken_for_one() -> None:
    """The false twin scales the gradients of the first position's factor."""
    tensors = case(6)
    loss = opd.fused_linear_divergence(*tensors, "jsd")
    varied = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    right = torch.autograd.grad(loss, tensors[1], varied, retain_graph=True)[0]
    wrong = 2 * torch.autograd.grad(loss, tensors[1], torch.ones_like(varied))[0]
    assert worst(right, wrong) > 1e-3


def test_differences_and_refused_second_derivatives() -> None:
    hidden, head, other, other_head = case(3)

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return opd.fused_linear_divergence(x, w, other, other_head, "jsd")

    assert torch.autograd.gradcheck(loss, (hidden, head))
    slope = torch.autograd.grad(loss(hidden, head).sum(), hidden, create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="fused_linear_divergence has first derivatives only"):
        slope.square().sum().backward()


def test_a_kept_graph_can_be_used_again() -> None:
    tensors = case(6)
    loss = opd.fused_linear_divergence(*tensors, "jsd").sum()
    twice = torch.autograd.grad(2 * loss, tensors[:2], retain_graph=True)
    once = torch.autograd.grad(loss, tensors[:2])
    assert all(worst(a, 2 * b) < ALGEBRA for a, b in zip(twice, once, strict=True))


def test_only_what_is_asked_for() -> None:
    hidden, head, other, other_head = case(6)
    frozen = opd.fused_linear_divergence(hidden, head.detach(), other, other_head, "jsd").sum()
    wanted = by_logits(hidden, head, other, other_head, "jsd").sum()
    slopes = [torch.autograd.grad(each, hidden)[0] for each in (frozen, wanted)]
    assert worst(*slopes) < ALGEBRA
    with torch.no_grad():
        assert not opd.fused_linear_divergence(hidden, head, other, other_head, "jsd").requires_grad
    nothing = opd.fused_linear_divergence(hidden, head, other, other_head, "jsd", mask=torch.zeros(6))
    assert nothing.abs().sum() == 0 and torch.autograd.grad(nothing.sum(), head)[0].abs().sum() == 0


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_narrow_dtypes_and_autocast(dtype: torch.dtype) -> None:
    tensors = case(40, dtype=dtype, vocabulary=50)
    found = opd.fused_linear_divergence(*tensors, "jsd")
    exact = by_logits(*(each.double() for each in tensors), "jsd")
    eps = torch.finfo(dtype).eps
    assert found.dtype == torch.float32 and worst(found, exact) < 4 * eps + 1e-6
    mine = torch.autograd.grad(found.sum(), tensors[:2])
    theirs = torch.autograd.grad(exact.sum(), tensors[:2])
    assert all(a.dtype == dtype and worst(a.double(), b.double()) < 20 * eps for a, b in zip(mine, theirs, strict=True))
    if dtype == torch.bfloat16:
        wide = [each.detach().float().requires_grad_() for each in tensors]
        with torch.autocast("cpu", dtype=dtype):
            inside = opd.fused_linear_divergence(*wide, "jsd")
        assert torch.equal(inside, found)
        slopes = torch.autograd.grad(inside.sum(), wide[:2])
        assert all(a.dtype == torch.float32 and worst(a, b) < 20 * eps for a, b in zip(slopes, theirs, strict=True))


WIDTHS = (torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", WIDTHS)
@pytest.mark.parametrize("near", (1.0, 0.03))
@pytest.mark.parametrize("name", (*NAMES, "chi2", "skew_reverse_kl(lam=0.3)"))
def test_narrow_states_are_rounded_once(name: str, near: float, dtype: torch.dtype) -> None:
    """Against float64 on the same rounded inputs: what is left is the last rounding, to the dtype of the input."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(24, 64, generator=generator)
    head = torch.randn(600, 64, generator=generator) / 8
    other = hidden + near * torch.randn(24, 64, generator=generator)
    exact = [each.to(dtype).double().requires_grad_(k < 2) for k, each in enumerate((hidden, head, other))]
    wanted = torch.autograd.grad(by_logits(*exact, exact[1].detach(), name).sum(), exact[:2])
    narrow = [each.detach().to(dtype).requires_grad_(k < 2) for k, each in enumerate(exact)]
    loss = opd.fused_linear_divergence(*narrow, narrow[1].detach(), name, chunk_size=7).sum()
    for found, right in zip(torch.autograd.grad(loss, narrow[:2]), wanted, strict=True):
        # Half a unit in the last place, and of float16 its smallest number.
        last = torch.finfo(dtype).eps / 2 * right.abs() + torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
        assert float(((found.double() - right).abs() - 1.001 * last).max()) <= 1e-4 * float(right.abs().max())
        error = float((found.double() - right).norm() / right.norm())
        assert error <= torch.finfo(dtype).eps / 2
        # The false twin rounds the logits before the loss.
        if found.shape == hidden.shape and dtype == torch.bfloat16 and near < 1:
            rounded = [each.detach().clone().requires_grad_(k < 2) for k, each in enumerate(narrow)]
            twin = opd.fused_divergence(rounded[0] @ rounded[1].T, rounded[2] @ rounded[1].detach().T, name)
            coarse = torch.autograd.grad(twin.sum(), rounded[0])[0].double()
            assert float((coarse - right).norm() / right.norm()) > 4 * error


@pytest.mark.parametrize("kept", (True, False))
def test_a_loss_scale_keeps_small_gradients_of_float16(kept: bool) -> None:
    """The false twin rounds before the scale comes: a tenth of what it finds is zero."""
    tensors = case(9, dtype=torch.float16, vocabulary=50)
    exact = [each.detach().double().requires_grad_(each.requires_grad) for each in tensors]
    mask = torch.full((9,), 1e-6)
    wanted = torch.autograd.grad(2**16 * by_logits(*exact, "jsd", mask=mask).sum(), exact[:2])
    loss = 2**16 * opd.fused_linear_divergence(*tensors, "jsd", mask=mask).sum()
    found = torch.autograd.grad(loss, tensors[:2], retain_graph=kept)
    if kept:
        assert all(map(torch.equal, found, torch.autograd.grad(loss, tensors[:2])))
    for mine, theirs in zip(found, wanted, strict=True):
        assert mine.dtype == torch.float16
        assert float((mine.double() - theirs).norm()) < 1e-3 * float(theirs.norm())
        twin = (theirs / 2**16).half().double() * 2**16
        assert float((twin - theirs).norm()) > 1e-2 * float(theirs.norm())


def test_a_wide_head_goes_through_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = case(9, dtype=torch.bfloat16, vocabulary=50)
    whole = torch.autograd.grad(opd.fused_linear_divergence(*tensors, "jsd").sum(), tensors[:2])
    monkeypatch.setattr(products, "_UPCAST", 4 * 7)
    parts = torch.autograd.grad(opd.fused_linear_divergence(*tensors, "jsd").sum(), tensors[:2])
    assert all(worst(a.float(), b.float()) <= 2**-8 * float(b.abs().max()) for a, b in zip(parts, whole, strict=True))


class OnGPU:
    """torch with the products of a GPU, which sums those of bfloat16 in float32; done here in float64."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def mm(left: Tensor, right: Tensor, *, out_dtype: torch.dtype | None = None, out: Tensor | None = None) -> Tensor:
        if out_dtype is None:
            return torch.mm(left, right, out=out)
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == torch.float32 and out is not None
        return out.copy_(left.double() @ right.double())

    @staticmethod
    def addmm(total: Tensor, left: Tensor, right: Tensor, *, out_dtype: torch.dtype, out: Tensor) -> Tensor:
        assert left.dtype == right.dtype == torch.bfloat16 and out_dtype == total.dtype == torch.float32
        return out.copy_(total + (left.double() @ right.double()).float())


def of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products as on a GPU."""
    monkeypatch.setattr(products, "torch", OnGPU())
    for module in (products, layers):
        monkeypatch.setattr(module, "accumulates_wide", lambda matrix: matrix.dtype == torch.bfloat16)


def test_products_of_a_gpu_keep_sixteen_bits_of_the_gradient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bfloat16 factors stand for the float32 one."""
    left, right, states = torch.randn(30, 50), torch.randn(50, 8).bfloat16(), torch.randn(30, 8).bfloat16()
    of_a_gpu(monkeypatch)
    total = torch.ones(50, 8)
    products.add_product(total, left, states)
    for found, exact in (
        (products.product(left, right), left.double() @ right.double()),
        (total, 1 + left.double().T @ states.double()),
    ):
        assert found.dtype == torch.float32
        assert float((found - exact).norm() / exact.norm()) < 1e-5
    halves = products.Halves.split(left)
    assert float((halves.column_sums() - left.sum(0)).abs().max()) < 1e-3
    alone = left.bfloat16().double() @ right.double()
    assert float((alone - left.double() @ right.double()).norm() / alone.norm()) > 1e-3
    tensors = case(9, dtype=torch.bfloat16, vocabulary=50)
    exact_tensors = [each.detach().double().requires_grad_(each.requires_grad) for each in tensors]
    mine = torch.autograd.grad(opd.fused_linear_divergence(*tensors, "jsd").sum(), tensors[:2])
    theirs = torch.autograd.grad(by_logits(*exact_tensors, "jsd").sum(), exact_tensors[:2])
    assert all(worst(a.double(), b) <= 2**-8 * float(b.abs().max()) for a, b in zip(mine, theirs, strict=True))


def test_halves_share_the_memory_of_a_matrix() -> None:
    matrix = torch.randn(5, 8)
    halves = products.Halves.of(matrix)
    assert halves.rows.shape == (10, 8) and halves.rows.data_ptr() == matrix.data_ptr()
    wanted, spare = torch.randn(5, 8), torch.empty(5, 8)
    for split in (products.Halves.split(wanted), products.Halves.split(wanted, spare)):
        high, low = split.rows[::2], split.rows[1::2]
        assert torch.equal(high, wanted.bfloat16()) and torch.equal(low, (wanted - high.float()).bfloat16())
    assert split.rows.data_ptr() == spare.data_ptr()


# A hook may write into the gradient that it is handed, and the graph may be used again.


def losses_in_place() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 7, generator=generator)
    top, ids = torch.randn(5, 7, generator=generator).log_softmax(-1).topk(3)
    hidden, head, other, other_head = (each.detach().float() for each in case(5))
    return {
        "hidden": (hidden, lambda x: opd.fused_linear_divergence(x, head, other, other_head, "jsd")),
        "head": (head, lambda x: opd.fused_linear_divergence(hidden, x, other, other_head, "jsd")),
        "narrow": (
            hidden.bfloat16(),
            lambda x: opd.fused_linear_divergence(x, *(each.bfloat16() for each in (head, other, other_head)), "jsd"),
        ),
        "logits": (logits, lambda x: opd.fused_divergence(x, logits.flip(0), "jsd")),
        "own": (logits, lambda x: opd.fused_divergence(x, logits.flip(0), "alpha(alpha=0.01)")),
        "top_k": (logits, lambda x: opd.fused_top_k_divergence(x, ids, top, "forward_kl")),
    }


@pytest.mark.parametrize("factor", (1.0, 3.0, "varied"))
@pytest.mark.parametrize("kind", losses_in_place())
def test_a_hook_in_place_and_a_kept_graph_leave_the_gradient_alone(kind: str, factor: float | str) -> None:
    start, loss = losses_in_place()[kind]
    upstream = torch.arange(1.0, 6.0) if factor == "varied" else torch.full((5,), float(factor))
    plain = start.clone().requires_grad_()
    wanted = torch.autograd.grad(loss(plain), plain, upstream)[0]
    hooked = start.clone().requires_grad_()
    hooked.register_hook(lambda g: g.mul_(0.5))
    values = loss(hooked)
    for times, kept in ((1, True), (2, True), (3, False)):
        values.backward(upstream, retain_graph=kept)
        tolerance = 0 if start.dtype == torch.float32 else 2**-7 * float(wanted.abs().max())
        assert worst(hooked.grad, 0.5 * times * wanted) <= max(tolerance, 1e-6 * times)
        # What lies in .grad may be overwritten too.
        if kept:
            hooked.grad.add_(0.0)


def test_zeroing_the_gradient_between_passes_leaves_the_graph_alone() -> None:
    tensors = case(5)
    loss = opd.fused_linear_divergence(*tensors, "jsd").sum()
    loss.backward(retain_graph=True)
    first = [each.grad.clone() for each in tensors[:2]]
    for each in tensors[:2]:
        each.grad.zero_()
    loss.backward()
    assert all(torch.equal(each.grad, old) for each, old in zip(tensors[:2], first, strict=True))


@compiles
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_compiled_graphs_break_there() -> None:
    hidden, *others = case(6)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: 2 * opd.fused_linear_divergence(2 * x, *others, "jsd").sum(), backend="aot_eager"
    )
    found = torch.autograd.grad(compiled(hidden), hidden)[0]
    wanted = torch.autograd.grad(2 * by_logits(2 * hidden, *others, "jsd").sum(), hidden)[0]
    assert worst(found, wanted) < ALGEBRA


@pytest.mark.bad_input
@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"student_hidden": torch.zeros(2, 4, dtype=torch.int64)}, "student_hidden"),
        ({"student_head": torch.zeros(5, 3)}, "student_head"),
        ({"student_head": torch.zeros(5, 4, 1)}, "student_head"),
        ({"student_head": torch.zeros(5, 4, dtype=torch.float64)}, "student_head"),
        ({"teacher_hidden": torch.zeros(3, 3)}, "teacher_hidden"),
        ({"teacher_head": torch.zeros(6, 3)}, "teacher_head"),
        ({"mask": torch.ones(3)}, "mask"),
        ({"temperature": 0}, "temperature"),
        ({"chunk_size": -1}, "chunk_size"),
        ({"divergence": "nothing"}, "divergence"),
    ],
)
def test_what_does_not_fit_is_refused(arguments: dict[str, Any], name: str) -> None:
    given = {
        "student_hidden": torch.zeros(2, 4),
        "student_head": torch.zeros(5, 4),
        "teacher_hidden": torch.zeros(2, 3),
        "teacher_head": torch.zeros(5, 3),
        "divergence": "jsd",
    }
    with pytest.raises(InvalidArgumentError) as refused:
        opd.fused_linear_divergence(**{**given, **arguments})
    assert refused.value.argument == name


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("upstream", ["ones", "varied"])
@pytest.mark.parametrize(
    "form",
    [
        {"bias": True},
        {"student_scale": 0.6, "teacher_scale": 1.7},
        {"student_softcap": 1.5},
        {"bias": True, "student_scale": -0.8, "student_softcap": 2.0, "teacher_softcap": 0.7},
    ],
    ids=str,
)
def test_other_heads_are_the_divergence_of_their_logits(form: dict[str, Any], chunk: int | None, upstream: str) -> None:
    """Bias, scale and cap; the false twin leaves the cap's slope out."""
    tensors = case(2, 5)
    form = dict(form)
    biases = [torch.randn(7, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (1, 2)]
    leaves = tensors[:2]
    if form.pop("bias", False):
        leaves = [*leaves, biases[0].requires_grad_()]
        given = {"student_bias": biases[0], "teacher_bias": biases[1]}
    else:
        given, biases = {}, [torch.zeros(7, dtype=torch.float64)] * 2
    options = {"mask": torch.tensor([[1, 0, 1, 0.5, 1], [1, 1, 0, 0, -1]]), "temperature": 1.3}
    entropy = torch.full((2, 5), torch.nan, dtype=torch.float64)
    found = opd.fused_linear_divergence(*tensors, "jsd", chunk_size=chunk, entropy=entropy, **options, **form, **given)
    hidden, head, other, other_head = tensors
    products = [hidden @ head.T + biases[0], other @ other_head.T + biases[1]]
    logits = []
    for whose, z in zip(("student", "teacher"), products, strict=True):
        z, cap = z * form.get(f"{whose}_scale", 1.0), form.get(f"{whose}_softcap")
        logits.append(z if cap is None else cap * torch.tanh(z / cap))
    wanted = opd.fused_divergence(*logits, "jsd", **options)
    assert worst(found, wanted) < ALGEBRA
    logs = (logits[0] / 1.3).log_softmax(-1)
    assert worst(entropy, -(logs.exp() * logs).sum(-1) * (options["mask"] != 0)) < ALGEBRA
    factors = {"ones": torch.ones(2, 5), "varied": torch.arange(10.0).view(2, 5)}[upstream].double()
    slopes = [torch.autograd.grad(each, leaves, factors, retain_graph=True) for each in (found, wanted)]
    assert all(worst(mine, theirs) < ALGEBRA for mine, theirs in zip(*slopes, strict=True))
    if "student_softcap" in form:
        straight = logits[0].detach() + products[0] - products[0].detach()
        uncapped = opd.fused_divergence(straight, logits[1], "jsd", **options)
        twin = torch.autograd.grad(uncapped, leaves, factors)
        assert worst(twin[1], slopes[0][1]) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_heads_in_narrow_dtypes(dtype: torch.dtype) -> None:
    """Logits are float32: against float64 from the same rounded states."""
    tensors = case(6, dtype=dtype)
    bias = torch.linspace(-1, 1, 7).to(dtype).requires_grad_()
    options = {"student_scale": 0.5, "student_softcap": 1.5}
    entropy = torch.zeros(6)
    found = opd.fused_linear_divergence(*tensors, "jsd", student_bias=bias, entropy=entropy, **options)
    wide = [each.detach().double().requires_grad_() for each in (*tensors, bias)]
    exact_entropy = torch.zeros(6, dtype=torch.float64)
    wanted = opd.fused_linear_divergence(*wide[:4], "jsd", student_bias=wide[4], entropy=exact_entropy, **options)
    assert found.dtype == torch.float32 and worst(found, wanted) < 1e-6 and worst(entropy, exact_entropy) < 1e-6
    slopes = torch.autograd.grad(found.sum(), (*tensors[:2], bias))
    exact = torch.autograd.grad(wanted.sum(), (*wide[:2], wide[4]))
    for mine, theirs in zip(slopes, exact, strict=True):
        assert mine.dtype == dtype and worst(mine, theirs) < 2 * torch.finfo(dtype).eps * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"student_bias": torch.zeros(6)}, "student_bias"),
        ({"teacher_bias": torch.zeros(7, dtype=torch.int64)}, "teacher_bias"),
        ({"student_scale": float("inf")}, "student_scale"),
        ({"teacher_softcap": 0.0}, "teacher_softcap"),
        ({"entropy": torch.zeros(5)}, "entropy"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
@pytest.mark.bad_input
def test_forms_of_heads_that_do_not_fit_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(InvalidArgumentError, match=f"^{name}: must"):
        opd.fused_linear_divergence(*case(6), "jsd", **options)
