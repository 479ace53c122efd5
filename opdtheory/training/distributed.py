"""N processes that take the same step as one: shares of the global batch, and sums over the processes."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from opdtheory.errors import InvalidArgumentError

__all__ = ["Processes", "processes"]


@dataclass(frozen=True)
class Processes:
    """The processes of a run; with one, every method returns at once.

    Attributes:
        rank: this process, from 0.
        size: how many there are.
        device: what this one computes on.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of `count` items: consecutive, as even as can be; the parts make up the whole."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over the processes, the same bits in each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes: losses are divided by global counts beforehand."""
        if self.size == 1:
            return
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        # A parameter that this process's share did not touch still takes part in the sum.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in wanted]
        flat = self.total(torch.cat([gradient.reshape(-1) for gradient in gradients]))
        for parameter, part in zip(wanted, flat.split([p.numel() for p in wanted]), strict=True):
            parameter.grad = part.view_as(parameter)

    def from_first(self, value: Any) -> Any:
        """The first process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def wait(self) -> None:
        """Return once every process has come here."""
        if self.size > 1:
            # A sum rather than a barrier: NCCL's guesses the device.
            self.total(torch.zeros(1, device=self.device))


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone; a group that this made is closed at the end.

    Gradients and counts travel by NCCL between GPUs and by gloo between CPUs.

    Raises:
        InvalidArgumentError: the device is unknown or is not there.
    """
    size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    place = _device(device, int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_available() and dist.is_initialized():
        yield Processes(dist.get_rank(), dist.get_world_size(), place)
        return
    if size == 1:
        yield Processes(0, 1, place)
        return
    dist.init_process_group("nccl" if place.type == "cuda" else "gloo", rank=rank, world_size=size)
    try:
        yield Processes(rank, size, place)
    finally:
        dist.destroy_process_group()


def _device(name: str, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InvalidArgumentError("device", f"got {name!r}; auto, cpu, cuda or cuda:N is needed") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidArgumentError("device", f"is {name!r}, but torch sees no GPU")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
