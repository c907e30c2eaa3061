"""The processes that train one model together: which rows of a batch each has, and how they sum and gather.

Every process draws the whole batch with its negatives, works on its own part and scales its loss to that part's summand of the mean
over the batch. The sum of the gradients is then that of one process with the whole batch, so all hold the same weights, memory and
optimiser after every step, and what any of them writes goes on in all.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed
from torch import Tensor, nn

__all__ = ["ALONE", "Alone", "Part", "Peer", "Process", "part_of", "sum_gradients"]


class Process(Protocol):
    """One of the processes that train a model."""

    @property
    def rank(self) -> int:
        """Its number, from 0."""
        ...

    @property
    def world_size(self) -> int:
        """How many there are."""
        ...

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all processes, which get the same bits; every process has to call it."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows [n, ...] of all processes in order of rank; n may differ, and every process has to call it."""
        ...


@dataclass(frozen=True)
class Alone:
    """The only process."""

    rank: int = 0
    world_size: int = 1

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Leave the tensors as they are."""

    def gather(self, rows: Tensor) -> Tensor:
        """Return the rows."""
        return rows


ALONE = Alone()


@dataclass(frozen=True)
class Peer:
    """One of the processes of torch's default group, which has to be there."""

    rank: int
    world_size: int

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Sum over the group."""
        for tensor in tensors:
            torch.distributed.all_reduce(tensor)

    def gather(self, rows: Tensor) -> Tensor:
        """Gather over the group, each part padded to the length of the longest."""
        num = torch.tensor([len(rows)], device=rows.device)
        nums = [torch.empty_like(num) for _ in range(self.world_size)]
        torch.distributed.all_gather(nums, num)
        counts = [int(one) for one in nums]
        padded = rows.new_zeros(max(counts), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


@dataclass(frozen=True)
class Part:
    """The rows of a batch that one process works on."""

    rows: slice
    copies: int
    """How many processes have these same rows."""

    def weight(self, num_own: int, num_all: int) -> float:
        """Return what a mean over `num_own` items of the part counts in the mean over all, summed over the processes."""
        return num_own / num_all / self.copies


def part_of(num_rows: int, process: Process) -> Part:
    """Return the part of a process: equal stretches of the rows; of fewer rows than processes, each has all."""
    rank, world_size = process.rank, process.world_size
    if num_rows < world_size:
        return Part(slice(0, num_rows), world_size)
    bounds = [num_rows * number // world_size for number in (rank, rank + 1)]
    return Part(slice(*bounds), 1)


def sum_gradients(module: nn.Module, process: Process) -> None:
    """Replace the gradients of a module by their sums over all processes."""
    if process.world_size == 1:
        return
    for parameter in module.parameters():
        if parameter.grad is None:  # here perhaps, and not in another process
            parameter.grad = torch.zeros_like(parameter)
    process.sum([value.grad for value in module.parameters() if value.grad is not None])
