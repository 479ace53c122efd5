"""The programs of a vocabulary in parts: two processes of gloo, interpreted, against float64 in one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError
from opdtheory.kernels import sweep

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(not INTERPRETED, reason="two ranks share no GPU, and nothing is interpreted")
CROSS = ("reverse_kl", "forward_kl", "jeffreys")
NAMES = (
    *CROSS,
    *("jsd", "chi2", "neyman_chi2", "hellinger", "total_variation", "le_cam", "skew_jsd(beta=0.1)"),
    *("alpha(alpha=0.3)", "alpha(alpha=1.5)", "skew_forward_kl(lam=0.1)", "skew_reverse_kl(lam=0.1)"),
)
# A part of one program, and one of three.
CUTS, RANKS = (0, 1500, 11_000), 2
MASK = torch.tensor([1.0, 0.5, 0.0, -2.0, 1.0, 1.0])
# The interpreter cuts off what a GPU rounds to bfloat16.
BOUND = {torch.float32: 2e-6, torch.bfloat16: 8e-3}


def situations(dtype: torch.dtype) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    student, noise = (torch.randn(6, CUTS[-1], generator=generator, dtype=torch.float64) for _ in range(2))
    student = 2 * student
    absent, lacking = student.clone(), student + noise
    absent[0, 3] = lacking[1, 5000] = absent[3, 8000] = lacking[3, 8000] = -torch.inf
    absent[4, : CUTS[1]] = -torch.inf
    lacking[5, CUTS[1] :] = -torch.inf
    pairs = {
        "plain": (student, student + noise),
        "near": (student, student + 1e-2 * noise),
        "apart by a constant": (student, student + noise + 40.0),
        # The largest logits are on different ranks.
        "far": (student + 30.0 * (torch.arange(CUTS[-1]) < CUTS[1]), student + noise),
        "without tokens": (absent, lacking),
    }
    return {name: (a.to(dtype), b.to(dtype)) for name, (a, b) in pairs.items()}


def whole(student: Tensor, teacher: Tensor, name: str) -> tuple[Tensor, Tensor]:
    z = student.double().requires_grad_()
    values = opd.fused_divergence(z, teacher.double(), name, mask=MASK, temperature=1.3)
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


def own(student: Tensor, teacher: Tensor, name: str, mask: Tensor = MASK) -> tuple[Tensor, Tensor]:
    """By this rank, of its part."""
    z = student.clone().requires_grad_()
    values = opd.fused_parallel_divergence(z, teacher, name, mask=mask, temperature=1.3)
    return values.detach(), torch.autograd.grad(values.sum(), z)[0]


def errors(found: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], part: slice) -> tuple[float, float]:
    """Of values, relative to one and more, and of a row's gradient in norm, relative to that of the whole row."""
    finite = torch.isfinite(wanted[0])
    assert torch.equal(torch.isfinite(found[0]), finite) and bool(torch.isfinite(found[1]).all())
    value = ((found[0] - wanted[0]).abs() / (1 + wanted[0].abs()))[finite].max()
    distance = (found[1].double() - wanted[1][:, part]).norm(dim=-1)
    return float(value), float((distance / (1e-6 + wanted[1].norm(dim=-1))).max())


def rank(here: int, store: str) -> None:
    """What each process does."""
    torch.set_num_threads(1)
    sweep.has_programs = lambda _: True
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=here, world_size=RANKS)
    part = slice(CUTS[here], CUTS[here + 1])
    calls, reduce = [], dist.all_reduce

    def counted(numbers: Tensor, *args: Any, **options: Any) -> Any:
        calls.append(numbers.numel())
        return reduce(numbers, *args, **options)

    dist.all_reduce = counted
    for dtype, bound in BOUND.items():
        for situation, (student, teacher) in situations(dtype).items():
            # The programs differ only in what they read and write, so that some cases do in bfloat16.
            for name in NAMES if dtype == torch.float32 else (*CROSS, "jsd", "chi2"):
                case = (situation, name, dtype)
                wanted = whole(student, teacher, name)
                ours, theirs = student[:, part].clone(), teacher[:, part]
                ours[2] = torch.nan
                calls.clear()
                found = own(ours, theirs, name)
                rounds = 2 if name in CROSS else 3
                assert len(calls) <= rounds + (situation == "without tokens"), (case, calls)
                assert max(calls) == (24 if name in CROSS else 12), (case, calls)
                assert found[0][2] == 0 and not found[1][2].any(), case
                value, slope = errors(found, wanted, part)
                # Near the teacher, and where the two share no tokens, the gradient is what two numbers leave.
                limit = max(1e-4, bound) if situation in ("near", "far") else bound
                assert value < 2e-6 and slope < limit, (case, value, slope)
                again = own(ours, theirs, name)
                assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True)), case
                shared = [torch.empty_like(found[0]) for _ in range(RANKS)]
                dist.all_gather(shared, found[0])
                assert torch.equal(*shared), case
    twins(part, reduce)
    student, teacher = situations(torch.float32)["far"]
    for name in NAMES:
        assert not own(student[:, part], student[:, part], name)[1].any(), name
    refused(student[:, part], teacher[:, part], here)
    dist.destroy_process_group()


def twins(part: slice, reduce: Any) -> None:
    """Each leaves one thing out, on every rank, so that all still make the same calls."""
    from opdtheory.kernels.programs.launch_parts import Part

    student, teacher = situations(torch.float32)["plain"]
    ours, theirs = student[:, part], teacher[:, part]
    for name, last in (("jsd", 3), ("reverse_kl", 2)):
        wanted, calls = whole(student, teacher, name), []

        def own_sums(numbers: Tensor, *args: Any, calls: list[int] = calls, last: int = last, **options: Any) -> Any:
            calls.append(numbers.numel())
            # What this rank adds to the mean, for the mean of all.
            kept = numbers.clone()
            reduce(numbers, *args, **options)
            if len(calls) == last:
                numbers[-1 if last == 3 else 2] = kept[-1 if last == 3 else 2]

        dist.all_reduce = own_sums
        assert errors(own(ours, theirs, name), wanted, part)[1] > 1e-3, name
    dist.all_reduce = reduce
    right = Part._whole
    student, teacher = situations(torch.float32)["apart by a constant"]
    wanted = whole(student, teacher, "reverse_kl")
    Part._whole = lambda self, peaks: 0.0 * right(self, peaks)
    sums = Part.sums

    def unmoved(self: Part, peaks: Tensor) -> Tensor:
        Part._whole = lambda self, peaks: self._columns(6, 7)[:, 0, 0]
        found = sums(self, peaks)
        Part._whole = lambda self, peaks: 0.0 * right(self, peaks)
        return found

    Part.sums = unmoved
    assert max(errors(own(student[:, part], teacher[:, part], "reverse_kl"), wanted, part)) > 1e-3
    Part.sums, Part._whole = sums, right


def refused(ours: Tensor, theirs: Tensor, here: int) -> None:
    for value, both in ((torch.nan, False), (torch.inf, False), (-torch.inf, True)):
        for name in ("jsd", "reverse_kl"):
            bad = ours.clone()
            if both:
                bad[0] = value
            elif here == 1:
                bad[0, 7] = value
            for student, teacher, argument in ((bad, theirs, "student_logits"), (ours, bad, "teacher_logits")):
                try:
                    own(student, teacher, name)
                except InvalidArgumentError as error:
                    assert error.argument == argument and "1 of 6 rows" in str(error), error
                else:
                    raise AssertionError(f"{value} was not refused on every rank")
    mask = MASK.clone()
    mask[1] = torch.nan
    try:
        own(ours, theirs, "jsd", mask)
    except InvalidArgumentError as error:
        assert error.argument == "mask", error
    else:
        raise AssertionError("a weight of NaN was not refused")


def test_processes_agree_with_one() -> None:
    pytest.importorskip("triton")
    base = {**os.environ, "OMP_NUM_THREADS": "1"}
    base["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[3]), base.get("PYTHONPATH", "")])
    with tempfile.TemporaryDirectory() as folder:
        started = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__, str(each), f"{folder}/store"],
                env=base,
                stderr=subprocess.PIPE,
                text=True,
            )
            for each in range(RANKS)
        ]
        try:
            ended = [process.communicate(timeout=500)[1] for process in started]
        finally:
            for process in started:
                process.kill()
        assert all(process.returncode == 0 for process in started), "\n".join(each[-1500:] for each in ended)


if __name__ == "__main__":
    rank(int(sys.argv[1]), sys.argv[2])
