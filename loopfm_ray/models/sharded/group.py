"""The processes that share a table: what they pass to one another, alone or over torch.distributed."""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from loopfm_ray.errors import ConfigError

__all__ = ["Group", "SoloGroup", "TorchGroup", "current_group"]


class Group(Protocol):
    """Processes in a fixed order; every call is one that all of them have to make."""

    @property
    def rank(self) -> int:
        """Place of this process."""
        ...

    @property
    def size(self) -> int:
        """How many there are."""
        ...

    def swap(self, rows: Tensor) -> Tensor:
        """Send row r of [size, k] to process r; return [size, k], row r of which came from process r."""
        ...

    def exchange(self, values: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Send the first send[0] rows of [n, ...] to process 0, the next to process 1, and so on.

        Returns:
            [sum(receive), ...] what came, by process; `receive` has to be what they send.
        """
        ...


class SoloGroup:
    """One process, which needs no torch.distributed."""

    rank = 0
    size = 1

    def swap(self, rows: Tensor) -> Tensor:
        """Return `rows`."""
        return rows

    def exchange(self, values: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """Return `values`."""
        del send, receive
        return values


class TorchGroup:
    """A process group of torch.distributed: gloo between CPUs, NCCL between GPUs."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        """Take a process group; None is the default one.

        Raises:
            ConfigError: torch.distributed is not set up.
        """
        if not dist.is_initialized():
            raise ConfigError(
                "sharded tables over several processes need torch.distributed, found it not set up; call"
                " init_process_group first, or use SoloGroup"
            )
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def swap(self, rows: Tensor) -> Tensor:
        """See `Group.swap`."""
        result = torch.empty_like(rows)
        dist.all_to_all_single(result, rows.contiguous(), group=self._group)
        return result

    def exchange(self, values: Tensor, send: Sequence[int], receive: Sequence[int]) -> Tensor:
        """See `Group.exchange`."""
        result = values.new_empty(sum(receive), *values.shape[1:])
        dist.all_to_all_single(
            result, values.contiguous(), list(receive), list(send), group=self._group
        )
        return result


def current_group() -> Group:
    """Return the default process group, or a group of this process alone where torch.distributed is not set up."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        return TorchGroup()
    return SoloGroup()
