"""Heads with a low-rank addition, frozen heads and tied ones, against autograd through plain logits."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import layers, products
from tests.kernels.test_linear import worst
from tests.tolerances import ALGEBRA

WORDS, WIDTH, OTHER_WIDTH = 7, 4, 3
MASK = torch.tensor([[1, 0, 1, 0.5, 1], [1, 1, 0, 0, -1]])
SCALING, OTHER_SCALING = 0.7, -1.3
LEAVES = ("hidden", "head", "A", "B", "bias")


def case(*batch: int, rank: int = 2, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Everything that two adapted heads have; the student's are leaves."""
    draw = functools.partial(torch.randn, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    shapes = {
        **{"hidden": (*batch, WIDTH), "head": (WORDS, WIDTH), "A": (rank, WIDTH), "B": (WORDS, rank), "bias": (WORDS,)},
        **{"other_hidden": (*batch, OTHER_WIDTH), "other_head": (WORDS, OTHER_WIDTH)},
        **{"other_A": (rank + 1, OTHER_WIDTH), "other_B": (WORDS, rank + 1), "other_bias": (WORDS,)},
    }
    made = {name: draw(*shape).to(dtype) for name, shape in shapes.items()}
    return {name: each.requires_grad_(name in LEAVES) for name, each in made.items()}


def fused(c: dict[str, Tensor], name: str = "jsd", **options: Any) -> Tensor:
    return opd.fused_linear_divergence(
        *(c[each] for each in ("hidden", "head", "other_hidden", "other_head")),
        name,
        student_bias=c["bias"],
        teacher_bias=c["other_bias"],
        student_lora=(c["A"], c["B"], SCALING),
        teacher_lora=(c["other_A"], c["other_B"], OTHER_SCALING),
        **options,
    )


def merged(
    c: dict[str, Tensor],
    name: str = "jsd",
    scalings: tuple[float, float] = (SCALING, OTHER_SCALING),
    **options: Any,
) -> Tensor:
    """The same from logits by the merged weights."""
    logits = []
    for whose, prefix, scaling in zip(("student", "teacher"), ("", "other_"), scalings, strict=True):
        hidden, head, down, up, bias = (c[prefix + each] for each in LEAVES)
        z = hidden @ (head + scaling * up @ down).T + bias
        z, cap = z * options.pop(f"{whose}_scale", 1.0), options.pop(f"{whose}_softcap", None)
        logits.append(z if cap is None else cap * torch.tanh(z / cap))
    options.pop("chunk_size", None)
    return opd.fused_divergence(logits[0], logits[1].detach(), name, **options)


def slopes(values: Tensor, c: dict[str, Tensor], upstream: Tensor, **options: Any) -> tuple[Tensor, ...]:
    return torch.autograd.grad(values, [c[each] for each in LEAVES], upstream, **options)


def gap(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> float:
    return max(worst(a, b) for a, b in zip(mine, theirs, strict=True))


@pytest.mark.parametrize("chunk", [None, 1, 4])
@pytest.mark.parametrize("upstream", ["ones", "varied"])
@pytest.mark.parametrize(
    "form",
    [
        {},
        {"student_scale": 0.6, "teacher_scale": 1.7},
        {"student_softcap": 1.5},
        {"student_scale": -0.8, "student_softcap": 2.0, "teacher_softcap": 0.7},
    ],
    ids=str,
)
def test_it_is_the_divergence_of_the_merged_heads(form: dict[str, Any], chunk: int | None, upstream: str) -> None:
    """Each false twin forgets one scaling."""
    c = case(2, 5)
    options = {"mask": MASK, "temperature": 1.3, "chunk_size": chunk, **form}
    factors = {"ones": torch.ones(2, 5), "varied": torch.arange(10.0).view(2, 5)}[upstream].double()
    found, wanted = fused(c, **options), merged(c, **options)
    assert worst(found, wanted) < ALGEBRA
    exact = slopes(wanted, c, factors)
    twice = slopes(found, c, factors, retain_graph=True), slopes(found, c, factors)
    assert max(gap(each, exact) for each in twice) < ALGEBRA
    for scalings in ((1.0, OTHER_SCALING), (SCALING, 1.0)):
        twin = merged(c, scalings=scalings, **options)
        assert worst(twin, found) > 1e-3
        assert all(worst(a, b) > 1e-3 for a, b in zip(slopes(twin, c, factors), exact, strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 6),
    st.integers(1, 5),
    st.integers(0, 9),
    st.sampled_from(["reverse_kl", "forward_kl", "total_variation", "chi2"]),
    st.sets(st.sampled_from(LEAVES), min_size=1),
    st.integers(1, 4),
)
def test_any_rank_and_any_frozen_part(
    rank: int, positions: int, seed: int, name: str, leaves: set[str], chunk: int
) -> None:
    c = case(positions, rank=rank, seed=seed)
    for each in LEAVES:
        c[each].requires_grad_(each in leaves)
    kept = [c[each] for each in LEAVES if each in leaves]
    found, wanted = fused(c, name, chunk_size=chunk), merged(c, name)
    assert float(((found - wanted).abs() / (1 + wanted.abs())).detach().max()) < ALGEBRA
    for mine, theirs in zip(*(torch.autograd.grad(each.sum(), kept) for each in (found, wanted)), strict=True):
        assert worst(mine, theirs) < ALGEBRA * (1 + float(theirs.abs().max()))


def test_an_adapter_of_zeros_is_none_and_only_its_second_factor_learns() -> None:
    """As adapters start: with B = 0 the loss is that of the head, and A has no gradient."""
    c = case(6)
    with torch.no_grad():
        c["B"].zero_()
    lora = (c["A"], c["B"], SCALING)
    tensors = [c[each] for each in ("hidden", "head", "other_hidden", "other_head")]
    values = opd.fused_linear_divergence(*tensors, "jsd", student_lora=lora)
    assert worst(values, opd.fused_linear_divergence(*tensors, "jsd")) < ALGEBRA
    by_down, by_up = torch.autograd.grad(values.sum(), lora[:2])
    assert not by_down.any() and by_up.abs().max() > 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter", ["same", "float32"])
def test_narrow_dtypes_are_rounded_once(dtype: torch.dtype, adapter: str) -> None:
    """Against float64 from the same rounded tensors; the twin rounds A h, as a model in the narrow dtype does."""
    narrow = case(40, dtype=dtype)
    if adapter == "float32":
        narrow |= {each: narrow[each].detach().float().requires_grad_(each in LEAVES) for each in ("A", "B")}
        narrow |= {each: narrow[each].float() for each in ("other_A", "other_B")}
    exact = {name: each.detach().double().requires_grad_(name in LEAVES) for name, each in narrow.items()}
    found, wanted = fused(narrow, chunk_size=7), merged(exact)
    error = worst(found, wanted)
    assert found.dtype == torch.float32 and error < 2e-6
    ones = torch.ones(40)
    for mine, theirs, name in zip(slopes(found, narrow, ones), slopes(wanted, exact, ones), LEAVES, strict=True):
        assert mine.dtype == narrow[name].dtype
        unit = torch.finfo(mine.dtype).eps / 2 * theirs.abs() + 1e-5 * theirs.abs().max() + torch.finfo(dtype).tiny
        assert bool(((mine.double() - theirs).abs() <= unit).all())
    with torch.no_grad():
        inner = (exact["hidden"] @ exact["A"].T).to(dtype).double()
        z = exact["hidden"] @ exact["head"].T + SCALING * inner @ exact["B"].T + exact["bias"]
        down = exact["other_hidden"] @ exact["other_A"].T
        other = exact["other_hidden"] @ exact["other_head"].T + OTHER_SCALING * down @ exact["other_B"].T
        assert worst(opd.fused_divergence(z, other + exact["other_bias"], "jsd"), wanted) > 10 * error


def test_autocast_casts_the_factors_as_it_does_the_head() -> None:
    """A backward pass outside autocast, which repeats the work, is that of the forward pass."""
    narrow = case(9, dtype=torch.bfloat16)
    wide = {name: each.detach().float().requires_grad_(name in LEAVES) for name, each in narrow.items()}
    upstream = torch.arange(9.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = fused(wide)
    assert torch.equal(inside, fused(narrow))
    mine, theirs = slopes(inside, wide, upstream), slopes(fused(narrow), narrow, upstream)
    assert all(a.dtype == torch.float32 and torch.equal(a.to(b.dtype), b) for a, b in zip(mine, theirs, strict=True))
    # With numbers that bfloat16 has not, the factors are rounded first.
    fine = {name: (each.detach() * 1.001).requires_grad_(name in LEAVES) for name, each in wide.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = fused(fine)
    assert worst(rounded, fused(fine)) > 1e-4
    cast = {name: each if "bias" in name else each.bfloat16() for name, each in fine.items()}
    assert torch.equal(rounded, fused(cast))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_frozen_head_costs_no_product_of_its_size(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """Neither a sum nor a product for the head is made; the twin, whose head is trained, makes both."""
    made: list[torch.Size] = []
    add, zeros = products.add_product, torch.zeros

    def counted(total: Tensor, left: Tensor, states: Tensor) -> None:
        made.append(total.shape)
        add(total, left, states)

    def allocated(*size: Any, **options: Any) -> Tensor:
        found = zeros(*size, **options)
        made.append(found.shape)
        return found

    monkeypatch.setattr(layers, "add_product", counted)
    monkeypatch.setattr(torch, "zeros", allocated)
    c = case(6, dtype=dtype)
    whole = torch.Size([WORDS, WIDTH])
    for frozen in (True, False):
        made.clear()
        c["head"].requires_grad_(not frozen)
        values = fused(c, chunk_size=2)
        torch.autograd.grad(values, [each for each in c.values() if each.requires_grad], torch.arange(6.0))
        # Once to allocate it and thrice to add to it, in the forward pass and in the repeated work.
        assert made.count(whole) == (0 if frozen else 8)


def test_tied_weights_get_both_their_gradients() -> None:
    """The student's head embeds its tokens, and is the teacher's head too, where it is detached."""
    c = case(6)
    tokens = torch.tensor([0, 3, 3, 6, 1, 2])
    head, down, up = c["head"], c["A"], c["B"]
    mix = torch.linspace(-1, 1, WIDTH * WIDTH, dtype=torch.float64).view(WIDTH, WIDTH)
    other = torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def hidden() -> Tensor:
        return torch.tanh(head[tokens] @ mix)

    found = opd.fused_linear_divergence(
        hidden(), head, other, head, "jsd", student_lora=(down, up, 0.5), teacher_lora=(down, up, 2.0)
    )
    theirs = (other @ (head + 2.0 * up @ down).T).detach()
    wanted = opd.fused_divergence(hidden() @ (head + 0.5 * up @ down).T, theirs, "jsd")
    leaves = (head, down, up)
    mine, exact = (torch.autograd.grad(each.sum(), leaves) for each in (found, wanted))
    assert gap(mine, exact) < ALGEBRA
    # The twins: the embedding alone, the head alone, and a teacher that learns.
    alone = opd.fused_divergence(hidden().detach() @ (head + 0.5 * up @ down).T, theirs, "jsd")
    below = opd.fused_divergence(hidden() @ (head + 0.5 * up @ down).detach().T, theirs, "jsd")
    for twin in (alone, below):
        assert worst(torch.autograd.grad(twin.sum(), head)[0], exact[0]) > 1e-3


def test_chunks_of_the_default_size_keep_to_the_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tensors of logits take what is allowed, whatever their dtype, and one position always fits."""
    seen: list[int] = []
    chunk = layers.Layer.chunk

    def counted(self: layers.Layer, part: Tensor) -> Tensor:
        seen.append(len(part))
        return chunk(self, part)

    monkeypatch.setattr(layers.Layer, "chunk", counted)
    monkeypatch.setattr(products, "CHUNK_BYTES", 2 * WORDS * 8 * 3)
    for dtype, rows in ((torch.float64, 3), (torch.bfloat16, 6)):
        seen.clear()
        fused(case(12, dtype=dtype))
        assert max(seen) == rows
    monkeypatch.setattr(products, "CHUNK_BYTES", 1)
    assert products.chunk_rows(WORDS, torch.float32, torch.device("cpu")) == 1
    monkeypatch.undo()
    assert products.chunk_rows(151_936, torch.float32, torch.device("cpu")) == 220
    # Whole tiles of rows, where a GPU has memory for one.
    assert products.chunk_rows(151_936, torch.float32, torch.device("cuda")) == 512
    assert products.chunk_rows(10**6, torch.float32, torch.device("cuda")) == 83


def test_a_kept_graph_accumulates() -> None:
    """Also where what lies in .grad is overwritten."""
    c = case(5)
    values = fused(c).sum()
    for _ in range(3):
        values.backward(retain_graph=True)
        for each in LEAVES:
            c[each].grad.add_(0.0)
    exact = slopes(merged(c), c, torch.ones(5, dtype=torch.float64))
    assert gap(tuple(c[each].grad / 3 for each in LEAVES), exact) < ALGEBRA


def test_a_wider_teacher_keeps_its_digits() -> None:
    """The twin has the teacher in the student's dtype."""
    c = case(9, dtype=torch.bfloat16)
    fine = case(9, dtype=torch.float32)
    c |= {name: each.detach() for name, each in fine.items() if name.startswith("other")}
    exact = {name: each.detach().double() for name, each in c.items()}
    assert worst(fused(c), merged(exact)) < 2e-6
    coarse = {name: each.detach().bfloat16() for name, each in c.items()}
    assert worst(fused(coarse), merged(exact)) > 1e-4


@pytest.mark.bad_input
@pytest.mark.parametrize("whose", ["student", "teacher"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda a, b, s: [a, b, s], r"be a tuple \(A, B, scaling\), got list"),
        (lambda a, b, s: (a, b), r"be a tuple \(A, B, scaling\), got tuple"),
        (lambda a, b, s: (a, b, float("nan")), "have a finite number as scaling, got nan"),
        (lambda a, b, s: (a, b, True), "have a finite number as scaling, got True"),
        (lambda a, b, s: (a, b.tolist(), s), "have a floating-point matrix as B, got list"),
        (lambda a, b, s: (a.long(), b, s), "have a floating-point matrix as A, got torch.int64"),
        (lambda a, b, s: (a[0], b, s), "have a floating-point matrix as A, got torch.float64"),
        (lambda a, b, s: (b, a, s), r"have A of shape \(r, .\) and B of shape \(7, r\)"),
        (lambda a, b, s: (a[:1], b, s), r"have A of shape \(r, .\) and B of shape \(7, r\)"),
        (lambda a, b, s: (a[:0], b[:, :0], s), r"have A of shape \(r, .\) and B of shape \(7, r\)"),
        (lambda a, b, s: (a, b.float(), s), "have A and B of dtype torch.float64, got torch.float64 and torch.float32"),
        (lambda a, b, s: (a.to("meta"), b, s), "be on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(whose: str, change: Any, words: str) -> None:
    c = case(6)
    factors = {"student": (c["A"], c["B"]), "teacher": (c["other_A"], c["other_B"])}[whose]
    tensors = [c[each] for each in ("hidden", "head", "other_hidden", "other_head")]
    given: dict[str, Any] = {f"{whose}_lora": change(*(each.detach() for each in factors), 0.5)}
    with pytest.raises(InvalidArgumentError, match=f"^{whose}_lora: must {words}"):
        opd.fused_linear_divergence(*tensors, "jsd", **given)
