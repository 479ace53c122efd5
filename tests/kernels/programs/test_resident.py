"""Programs that hold a row together, interpreted: each member in a process of its own, so that they must wait."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import opdtheory as opd

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="programs are interpreted by `make device`"),
    pytest.mark.filterwarnings("ignore:.* encountered in :RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning"),
]
KINDS = ("jsd", "reverse_kl", "forward_kl", "jeffreys", "chi2")


class Processes:
    """Launches every program of a grid as a process, with tensors in memory that all of them share."""

    def __init__(self, program: Any, started: Callable[[int], None] = lambda _: None) -> None:
        self._program, self._started = program, started

    def __getitem__(self, grid: tuple[int]) -> Callable[..., None]:
        def launch(*arguments: Any, **options: Any) -> None:
            # A view of another tensor must remain one.
            storages = {x.untyped_storage().data_ptr(): x.untyped_storage() for x in arguments if isinstance(x, Tensor)}
            copies = {at: torch.UntypedStorage._new_shared(len(each)).copy_(each) for at, each in storages.items()}

            def moved(x: Any) -> Any:
                if not isinstance(x, Tensor):
                    return x
                there = torch.empty(0, dtype=x.dtype).set_(
                    copies[x.untyped_storage().data_ptr()], x.storage_offset(), x.shape, x.stride()
                )
                return there

            shared = [moved(x) for x in arguments]
            context = multiprocessing.get_context("fork")

            def member(number: int) -> None:
                torch.set_num_threads(1)
                self._started(number)
                self._program[(1,)](*shared, **options)

            processes = [context.Process(target=member, args=(number,)) for number in range(grid[0])]
            for process in processes:
                process.start()
            for process in processes:
                process.join(60)
            alive = [process for process in processes if process.is_alive()]
            for process in alive:
                process.kill()
            assert not alive and all(process.exitcode == 0 for process in processes)
            for at, each in storages.items():
                each.copy_(copies[at])

        return launch


@pytest.fixture
def grouped(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    from opdtheory.kernels import sweep
    from opdtheory.kernels.programs import launch

    monkeypatch.setattr(sweep, "has_programs", lambda _: True)
    program = launch.resident_program

    def group(members: int, held: int, groups: int, started: Callable[[int], None] = lambda _: None) -> None:
        monkeypatch.setattr(launch, "group_of", lambda *_: launch.Group(members, held, groups))
        monkeypatch.setattr(launch, "resident_program", Processes(program, started))

    return group


@pytest.mark.parametrize(
    ("rows", "words", "wanted"),
    (
        (4096, 151_936, (19, 8192, 13)),
        (8, 151_936, (19, 8192, 8)),
        (4096, 32_000, (4, 8192, 66)),
        (4096, 8192, (1, 8192, 264)),
        (4096, 700, (1, 1024, 2112)),
        (4096, 270_336, (33, 8192, 8)),
        (4096, 270_337, None),
    ),
)
def test_groups_of_a_gpu(
    rows: int, words: int, wanted: tuple[int, ...] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 132 processors, each with registers for two blocks: a row takes at most an eighth of them."""
    from opdtheory.kernels.programs.launch import group_of

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=132))
    group = group_of(rows, words, torch.device("cuda"))
    assert (None if group is None else tuple(group)) == wanted
    if group is not None:
        assert group.members * group.held >= words and group.members <= group.groups * group.members <= 16 * 132
    monkeypatch.setattr(torch.version, "hip", "6.0")
    assert group_of(rows, words, torch.device("cuda")) is None


def found(student: Tensor, teacher: Tensor, name: str, mask: Tensor) -> tuple[Tensor, Tensor]:
    z = student.detach().clone().requires_grad_()
    values = opd.fused_divergence(z, teacher, name, mask=mask, temperature=1.3)
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


def logits(rows: int, words: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(rows, words, generator=generator) for _ in range(2))
    return (3 * student).to(dtype), (3 * student + noise).to(dtype)


def late(number: int) -> None:
    if number == 1:
        time.sleep(1.0)


def never(number: int) -> None:
    if number == 1:
        os._exit(0)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", KINDS)
def test_a_group_finds_what_one_program_finds(name: str, dtype: torch.dtype, grouped: Callable[..., None]) -> None:
    student, teacher = logits(7, 2900, dtype)
    mask = torch.tensor([1.0, 0.0, 2.0, 0.0, 0.0, 1.0, 1.0])
    wide = found(student.double(), teacher.double(), name, mask)
    grouped(3, 1024, 2)
    results = [found(student, teacher, name, mask) for _ in range(2)]
    # The interpreter cuts off what a GPU rounds to bfloat16.
    bound = 1e-6 if dtype == torch.float32 else 8e-3
    for (values, slopes), (exact, wanted) in zip(results, [wide, wide], strict=True):
        assert float((values.double() - exact).abs().max()) < 1e-6 * (1 + float(exact.abs().max()))
        assert float((slopes.double() - wanted).norm()) < bound * float(wanted.norm())
    # To the last bit: sums are in the same order, whoever comes first.
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_a_late_member_is_waited_for(grouped: Callable[..., None]) -> None:
    """Also where it is of the first group and the second one is done long before."""
    student, teacher = logits(6, 2900, torch.float32)
    wanted = found(student, teacher, "jsd", torch.ones(6))
    grouped(3, 1024, 2, late)
    values, slopes = found(student, teacher, "jsd", torch.ones(6))
    assert float((values - wanted[0]).abs().max()) < 1e-6
    assert float((slopes - wanted[1]).abs().max()) < 1e-6


def test_a_member_that_does_not_wait_is_found_out(
    grouped: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The false twin takes what is on the board when it comes."""
    from opdtheory.kernels.programs import resident

    monkeypatch.setattr(resident, "_received", at_once)
    student, teacher = logits(6, 2900, torch.float32)
    wanted = found(student, teacher, "jsd", torch.ones(6))
    grouped(3, 1024, 2, late)
    values, _ = found(student, teacher, "jsd", torch.ones(6))
    assert not float((values - wanted[0]).abs().max()) < 1e-3


@triton.jit
def at_once(words, number, members, state, patience, SLOTS: tl.constexpr):
    at = tl.arange(0, SLOTS)
    there = tl.load(words + at, mask=at < members, other=0)
    values = (there & 0xFFFFFFFF).to(tl.int32).to(tl.float32, bitcast=True)
    return tl.sum(values.to(tl.float64), 0), 0.0, patience


def test_a_member_that_never_comes_is_an_error(grouped: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """The others give up, and nobody hangs; the patience of half a minute is cut short."""
    from opdtheory.kernels.programs import resident

    monkeypatch.setattr(resident, "_PATIENCE", tl.constexpr(50))
    student, teacher = logits(6, 2900, torch.float32)
    for name in ("jsd", "reverse_kl"):
        grouped(3, 1024, 2, never)
        with pytest.raises(RuntimeError, match="have not met"):
            found(student, teacher, name, torch.ones(6))


def test_rows_that_are_left(grouped: Callable[..., None]) -> None:
    """Infinite and unusable rows of one member's block are left by the whole group."""
    student, teacher = logits(5, 2900, torch.float32)
    teacher[1, 2500] = -torch.inf
    student[2, 1500] = -torch.inf
    student[3, 7] = teacher[3, 7] = -torch.inf
    mask = torch.ones(5)
    for name in ("reverse_kl", "forward_kl", "jsd", "jeffreys"):
        wide = found(student.double(), teacher.double(), name, mask)
        grouped(3, 1024, 2)
        values, slopes = found(student, teacher, name, mask)
        assert torch.equal(values.isinf(), wide[0].isinf())
        finite = wide[0].isfinite()
        assert float((values - wide[0])[finite].abs().max()) < 1e-5
        assert float((slopes - wide[1]).abs().max()) < 1e-5
