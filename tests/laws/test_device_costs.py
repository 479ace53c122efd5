"""What a call costs on a GPU beside its programs: memory, operations and waits, with the programs interpreted."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import opdtheory as opd
from benchmarks.peers.memory import Allocations, memory_of_hidden
from opdtheory.kernels import attached, layers, linear, products, sweep, values

pytest.importorskip("triton")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="programs are interpreted by `make device`"),
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
]
CUDA = torch.device("cuda")
PROGRAMS = ("launch.resident_program", "launch.whole_row_program", "rescale._rescale_program")


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """What is allocated with the chunks and products of a GPU; these, and programs, allocate nothing."""
    found = Allocations()

    def written(left: Tensor, right: Tensor, out: Tensor) -> Tensor:
        with found.paused():
            return out.copy_(left.float() @ right.float())

    def added(total: Tensor, left: Tensor, right: Tensor) -> None:
        with found.paused():
            total += left.float() @ right.float()

    monkeypatch.setattr(products, "_wide_product", written)
    monkeypatch.setattr(products, "_add_wide_product", added)
    for module in (products, layers):
        monkeypatch.setattr(module, "accumulates_wide", lambda matrix: matrix.dtype == torch.bfloat16)
    monkeypatch.setattr(linear, "chunk_rows", lambda words, dtype, _: products.chunk_rows(words, dtype, CUDA))
    monkeypatch.setattr(sweep, "has_programs", lambda _: True)
    for name in PROGRAMS:
        monkeypatch.setattr(f"opdtheory.kernels.programs.{name}", Apart(name, found))
    return found


class Apart:
    """A program interpreted on copies, uncounted: the interpreter makes tensors, and holds arguments for a while."""

    def __init__(self, name: str, allocations: Allocations) -> None:
        from opdtheory.kernels.programs import launch, rescale

        module, program = name.split(".")
        self._program: Any = vars({"launch": launch, "rescale": rescale}[module])[program]
        self._allocations = allocations

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            with self._allocations.paused():
                # A view of another tensor must remain one.
                storages = {each.untyped_storage()._cdata: each.untyped_storage() for each in arguments if _held(each)}
                copies = {key: each.clone() for key, each in storages.items()}
                self._program[grid](*(_moved(each, copies) for each in arguments), **options)
                for key, each in storages.items():
                    each.copy_(copies[key])

        return run


def _held(argument: Any) -> bool:
    return isinstance(argument, Tensor)


def _moved(argument: Any, copies: dict[int, torch.UntypedStorage]) -> Any:
    if not _held(argument):
        return argument
    storage = copies[argument.untyped_storage()._cdata]
    place = argument.storage_offset(), argument.shape, argument.stride()
    return torch.empty(0, dtype=argument.dtype).set_(storage, *place)


TOKENS, WIDTH, WORDS = 150, 32, 4000
# Rows of a chunk: whole tiles, or so few that the rounding of the head's gradient needs more than the chunks did.
TILES, FEW = 128, 8


def tensors(dtype: torch.dtype, trained: bool, bias: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (WORDS, WIDTH), (TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,))
    hidden, head, *others, offset = (torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)
    given = {"student_bias": offset.requires_grad_()} if bias else {}
    return [hidden.requires_grad_(), head.requires_grad_(trained), *others], given


class Peaks(NamedTuple):
    """Bytes at most in each pass, and then of the gradients and of whatever else is left, but the values."""

    forward: int
    backward: int
    gradients: int
    left: int


def peaks(
    allocations: Allocations,
    dtype: torch.dtype = torch.bfloat16,
    trained: bool = True,
    bias: bool = False,
    varied: bool = False,
    scale: float = 1.0,
) -> Peaks:
    """Those of a call; `varied` weighs the positions differently in the backward pass."""
    inputs, given = tensors(dtype, trained, bias)
    upstream = torch.linspace(1, 2, TOKENS) if varied else torch.full((TOKENS,), 1 / TOKENS)
    with allocations:
        loss = opd.fused_linear_divergence(*inputs, "reverse_kl", student_scale=scale, **given)
        forward, allocations.most = allocations.most, allocations.held
        loss.backward(upstream)
    leaves = [each for each in (*inputs, *given.values()) if each.requires_grad]
    found = [each.grad.untyped_storage() for each in leaves if each.grad is not None]
    assert len(found) == len(leaves)
    gradients = sum(each.nbytes() for each in found)
    left = allocations.held - gradients - loss.untyped_storage().nbytes()
    return Peaks(forward, allocations.most, gradients, left)


def chunks_of(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "DEVICE_CHUNK_BYTES", rows * 2 * 4 * WORDS)


def as_predicted(found: int, wanted: int) -> bool:
    return wanted <= found <= 1.03 * wanted


@pytest.mark.parametrize("bias", (False, True), ids=("plain", "bias"))
@pytest.mark.parametrize(("trained", "rows"), ((True, TILES), (True, FEW), (False, TILES)), ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_memory_from_hidden_states_is_what_is_predicted(
    dtype: torch.dtype, trained: bool, rows: int, bias: bool, allocations: Allocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(rows, monkeypatch)
    found = peaks(allocations, dtype, trained, bias)
    assert as_predicted(found.forward, memory_of_hidden(TOKENS, WIDTH, WORDS, dtype, trained, bias))
    # The gradients are there, and are handed over without a copy.
    assert found.left == 0 and found.backward <= found.gradients + 32 * TOKENS


def test_halves_of_a_scaled_head_lie_where_the_teachers_logits_were(
    allocations: Allocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gradient in the products is not the one in the logits; the false twin splits it in new memory."""
    chunks_of(TILES, monkeypatch)
    wanted, split = memory_of_hidden(TOKENS, WIDTH, WORDS, torch.bfloat16), products.Halves.split
    assert as_predicted(peaks(allocations, scale=0.5).forward, wanted)
    monkeypatch.setattr(products.Halves, "split", lambda matrix, spare: split(matrix))
    allocations.most = allocations.held
    assert peaks(allocations, scale=0.5).forward > 1.4 * wanted


def test_positions_weighed_differently_repeat_the_work_beside_the_first_gradients(
    allocations: Allocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    chunks_of(TILES, monkeypatch)
    found = peaks(allocations, varied=True)
    first = 2 * (TOKENS + WORDS) * WIDTH
    assert as_predicted(found.backward, memory_of_hidden(TOKENS, WIDTH, WORDS, torch.bfloat16) + first)
    assert found.left == 0 and found.backward > 1.05 * found.forward


@pytest.mark.parametrize("twin", ("logits", "head"))
def test_what_is_held_too_long_is_found_out(
    twin: str, allocations: Allocations, monkeypatch: pytest.MonkeyPatch
) -> None:
    """False twins: logits that are alive while gradients are rounded, and a product of its own for the head."""
    chunks_of(TILES, monkeypatch)
    kept: list[Tensor] = []
    chunk = linear._Run._chunk

    def keeping(run: Any, part: Tensor, evaluator: Any, z: Tensor, other: Tensor) -> Any:
        kept[:] = z, other
        return chunk(run, part, evaluator, z, other)

    def apart(total: Tensor, gradient: products.Halves, states: Tensor) -> None:
        made = torch.zeros_like(total)
        products._add_wide_product(made, gradient.rows.T, states.repeat_interleave(2, 0))
        total += made

    if twin == "logits":
        monkeypatch.setattr(linear._Run, "_chunk", keeping)
    else:
        monkeypatch.setattr(layers, "add_product", apart)
    assert peaks(allocations).forward > 1.05 * memory_of_hidden(TOKENS, WIDTH, WORDS, torch.bfloat16)


def test_the_prediction_for_a_large_batch() -> None:
    """Counted by hand: two chunks of 512 rows, the head's gradient in float32, that of the hidden states."""
    shape = 4_096, 1_024, 151_936
    logits, head, hidden = 2 * 512 * 151_936 * 4, 151_936 * 1_024, 4_096 * 1_024
    assert memory_of_hidden(*shape, torch.bfloat16) == logits + 4 * head + 2 * hidden
    assert memory_of_hidden(*shape, torch.bfloat16, trained=False) == logits + 2 * hidden
    assert memory_of_hidden(64, *shape[1:], torch.bfloat16) == (4 + 2) * head + 2 * 64 * 1_024


class Operations(TorchDispatchMode):
    """What a GPU is asked to do: operations but views and bare memory, and how often the host waits for a number."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)
        if name == "_local_scalar_dense":
            self.waits += 1
        elif not views and not name.startswith("empty"):
            self.asked.append(name)
        return func(*args, **(kwargs or {}))


class Launches:
    """A program that does nothing but count."""

    def __init__(self) -> None:
        self.count = 0

    def __getitem__(self, grid: Any) -> Any:
        def run(*_: Any, **__: Any) -> None:
            self.count += 1

        return run


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    found = Launches()
    monkeypatch.setattr(sweep, "has_programs", lambda _: True)
    for name in PROGRAMS:
        monkeypatch.setattr(f"opdtheory.kernels.programs.{name}", found)
    # What is looked up once for a divergence is of no interest.
    opd.fused_divergence(torch.zeros(1, 2), torch.zeros(1, 2), "jsd")
    found.count = 0
    return found


def asked(launches: Launches, mask: Tensor | None, dtype: torch.dtype, kept: bool = False) -> dict[str, Any]:
    """For each pass the operations, the waits and the programs."""
    student, teacher = torch.zeros(2, 3, 50, dtype=dtype, requires_grad=True), torch.zeros(2, 3, 50, dtype=dtype)
    found = {}
    with Operations() as forward:
        loss = opd.fused_divergence(student, teacher, "jsd", mask=mask)
    found["forward"] = forward.asked, forward.waits, launches.count
    loss, launches.count = loss.sum(), 0
    with Operations() as backward:
        loss.backward(retain_graph=kept)
    found["backward"] = backward.asked, backward.waits, launches.count
    return found


MASKS = {"none": None, "weights": torch.ones(2, 3), "booleans": torch.ones(2, 3, dtype=torch.bool)}


@pytest.mark.parametrize("kept", (False, True), ids=("freed", "kept"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_a_call_asks_for_little_and_waits_once(mask: str, dtype: torch.dtype, kept: bool, launches: Launches) -> None:
    """A memset, a program and a wait, then a program; a boolean mask is cast, and `ones_like` is torch's own."""
    found = asked(launches, MASKS[mask], dtype, kept)
    assert found["forward"] == (["_to_copy"] * (mask == "booleans") + ["zeros"], 1, 1)
    assert found["backward"] == (["ones_like"], 0, 1)


@pytest.mark.parametrize("twin", ("forward", "backward"))
def test_superfluous_work_is_found_out(twin: str, launches: Launches, monkeypatch: pytest.MonkeyPatch) -> None:
    """False twins: weights are checked before the program, and what comes from upstream is laid out anew."""
    by_programs, scaled = sweep._by_programs, attached.scaled

    def checked(evaluator: Any, wides: list[Tensor], narrows: list[Tensor], rows: int) -> None:
        sweep.check_weights(narrows[1])
        by_programs(evaluator, wides, narrows, rows)

    def copied(gradient: Tensor, upstream: Tensor, in_place: bool) -> Tensor:
        return scaled(gradient, upstream.contiguous(), in_place)

    monkeypatch.setattr(sweep, "_by_programs", checked if twin == "forward" else by_programs)
    monkeypatch.setattr(values, "scaled", copied if twin == "backward" else scaled)
    operations, waits, programs = asked(launches, MASKS["weights"], torch.float32)[twin]
    assert len(operations) > 1 and waits == (2 if twin == "forward" else 0) and programs == 1
