"""N processes that together take the same step as one: shares of the global batch, sums over processes."""

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
    """The processes of a run; if there is only one, no method communicates.

    Attributes:
        rank: index of this process, from 0.
        size: number of processes.
        device: device of this process.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's part of `count` items. Parts are consecutive, as equal as possible, and make up the whole."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def total(self, values: Tensor) -> Tensor:
        """The elementwise sum over the processes, with the same bits in each."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def sum_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by its sum over the processes; losses are already divided by global counts."""
        if self.size == 1:
            return
        wanted = [parameter for parameter in parameters if parameter.requires_grad]
        # A parameter that this process's share does not reach still takes part in the sum.
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

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order, in the first process; an empty list in the others."""
        if self.size == 1:
            return [value]
        found: list[Any] | None = [None] * self.size if self.is_first else None
        dist.gather_object(value, found, dst=0)
        return found or []

    def wait(self) -> None:
        """Wait for all processes."""
        if self.size > 1:
            # A sum rather than a barrier: the barrier of NCCL guesses the device.
            self.total(torch.zeros(1, device=self.device))


@contextmanager
def processes(device: str = "auto") -> Iterator[Processes]:
    """The processes that `torchrun` started, or this one alone; a process group made here is destroyed at the end.

    Communication uses NCCL between GPUs and gloo between CPUs.

    Raises:
        InvalidArgumentError: the device is unknown or not available.
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
        raise InvalidArgumentError("device", f"must be auto, cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise InvalidArgumentError("device", f"must be auto or cpu where torch sees no GPU, got {name!r}")
        device = torch.device("cuda", local_rank if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
