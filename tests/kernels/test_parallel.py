"""The divergence over a vocabulary in parts: processes of gloo against one process."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import opdtheory as opd
from opdtheory.errors import InvalidArgumentError

NAMES = (
    "reverse_kl forward_kl jsd chi2 neyman_chi2 hellinger total_variation le_cam jeffreys skew_jsd(beta=0.1) "
    "alpha(alpha=0.3) alpha(alpha=1.5) skew_forward_kl(lam=0.1) skew_reverse_kl(lam=0.1)"
).split()
VOCABULARY = 13
# Parts of different sizes, of two ranks and of four.
CUTS = {2: (0, 5, 13), 4: (0, 3, 7, 8, 13)}
BOUND = {torch.float64: 1e-12, torch.float32: 2e-6}


def case(dtype: torch.dtype, absent: bool) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (
        torch.randn(2, 4, VOCABULARY, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2)
    )
    if absent:
        # One distribution lacks a token, both do, and all tokens of the first rank are absent.
        teacher[0, 0, 2] = student[0, 1, 12] = -torch.inf
        student[1, 0, 6] = teacher[1, 0, 6] = -torch.inf
        student[1, 2, :3] = -torch.inf
    return student, teacher, torch.tensor([[1.0, 1.0, 0.0, 0.5], [1.0, 1.0, 1.0, 1.0]])


UPSTREAM = torch.arange(1.0, 9.0).view(2, 4)


def rank() -> None:
    """What each process does: print the worst differences from one process, by name, as a line of numbers."""
    dist.init_process_group("gloo")
    here, ranks = dist.get_rank(), dist.get_world_size()
    part = slice(CUTS[ranks][here], CUTS[ranks][here + 1])
    calls, reduce = [], dist.all_reduce

    def counted(numbers: Tensor, *args: object, **options: object) -> object:
        calls.append(numbers.numel())
        return reduce(numbers, *args, **options)

    dist.all_reduce = counted
    for dtype in BOUND:
        for absent in (False, True):
            student, teacher, mask = case(dtype, absent)
            for name in NAMES:
                whole, own = student.clone().requires_grad_(), student[..., part].clone().requires_grad_()
                wanted = opd.fused_divergence(whole, teacher, name, mask=mask, temperature=1.2)
                wanted.backward(UPSTREAM.to(dtype))
                calls.clear()
                found = opd.fused_parallel_divergence(own, teacher[..., part], name, mask=mask, temperature=1.2)
                found.backward(UPSTREAM.to(dtype))
                assert max(calls) == 16 and len(calls) <= 3 + absent, calls
                finite = torch.isfinite(wanted)
                assert torch.equal(torch.isfinite(found), finite), name
                size = 1 + wanted.detach()[finite].abs().max() if absent else 1.0
                errors = (found - wanted).detach()[finite].abs().max(), (own.grad - whole.grad[..., part]).abs().max()
                assert max(errors) < 10 * size * BOUND[dtype], (name, dtype, errors)
                # The twin: this rank alone, normalised by itself.
                if not absent:
                    alone = opd.fused_divergence(own.detach(), teacher[..., part], name, mask=mask, temperature=1.2)
                    assert (alone - wanted).abs().max() > 1e-3, name
    bad = student[..., part].clone()
    bad[0, 0, 0] = torch.nan if here == ranks - 1 else 0.0
    try:
        opd.fused_parallel_divergence(bad, teacher[..., part], "jsd")
    except InvalidArgumentError as refused:
        assert refused.argument == "student_logits"
    else:
        raise AssertionError("NaN on the last rank was not refused on every rank")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", (2, 4))
@pytest.mark.slow
def test_processes_agree_with_one(ranks: int) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    root = str(Path(__file__).parents[2])
    base = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1"}
    base |= {"MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}
    started = [
        subprocess.Popen([sys.executable, __file__], env={**base, "RANK": str(each)}, stderr=subprocess.PIPE, text=True)
        for each in range(ranks)
    ]
    for process in started:
        _, errors = process.communicate(timeout=200)
        assert process.returncode == 0, errors


def test_without_a_process_group_it_says_so() -> None:
    with pytest.raises(InvalidArgumentError, match="group: must be a process group, got none"):
        opd.fused_parallel_divergence(torch.zeros(2, 3), torch.zeros(2, 3), "jsd")


if __name__ == "__main__":
    rank()
