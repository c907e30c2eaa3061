"""The different keys of a batch, and sums over the places of each."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Distinct", "find_distinct"]


@dataclass(frozen=True)
class Distinct:
    """Different keys, rising, and where each stands among all."""

    keys: Tensor
    """[U] int64."""
    place: Tensor
    """[n] int64: `keys[place]` are all keys."""
    order: Tensor
    """[n] int64: places of all keys, those of the first different key first."""
    starts: Tensor
    """[U] int64: where in `order` the places of each begin."""

    def sum(self, values: Tensor) -> Tensor:
        """Return [U, D]: for each different key the sum of its values [n, D], added in the order of their places."""
        if len(self.keys) == len(self.order):
            return values.index_select(0, self.order)
        # reads each value once; index_add_ takes many times as long on a CPU
        return functional.embedding_bag(self.order, values, self.starts, mode="sum")


def find_distinct(keys: Tensor) -> Distinct:
    """Return the different ones of keys [n] int64."""
    ordered, order = torch.sort(keys, stable=True)
    distinct, counts = torch.unique_consecutive(ordered, return_counts=True)
    numbers = torch.arange(len(distinct), device=keys.device)
    place = torch.empty_like(order)
    place[order] = torch.repeat_interleave(numbers, counts)
    return Distinct(distinct, place, order, counts.cumsum(0) - counts)
