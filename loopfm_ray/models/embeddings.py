"""Embeddings of categorical and sequence fields: one table per field by its face, one fused table underneath."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from loopfm_ray.errors import ConfigError
from loopfm_ray.types import UNKNOWN_ID

__all__ = ["FieldEmbeddings", "look_up"]

_INIT_STD = 0.05


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Return [..., D] the rows ids [...] of a table [N, D].

    The gradient is that of `functional.embedding`, which on a CPU takes three times as long.
    """
    return table.index_select(0, ids.flatten()).view(*ids.shape, table.shape[1])


class FieldEmbeddings(nn.Module):
    """One embedding table per field, stored as one matrix so that a batch is one look-up.

    Rows start as normal noise; the row of the unknown id of every field starts at 0, so that a value never seen
    in training says nothing, and is learnt where training meets it.
    """

    def __init__(self, cardinalities: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.names = tuple(cardinalities)
        self.dim = dim
        sizes = [max(1, cardinalities[name]) for name in self.names]
        offsets = [sum(sizes[:index]) for index in range(len(sizes))]
        self._offset_of = dict(zip(self.names, offsets, strict=True))
        self._size_of = dict(zip(self.names, sizes, strict=True))
        weight = torch.randn(sum(sizes), dim) * _INIT_STD
        weight[torch.tensor(offsets, dtype=torch.int64) + UNKNOWN_ID] = 0.0
        self.weight = nn.Parameter(weight)

    def table(self, name: str) -> Tensor:
        """Return the table [cardinality, dim] of one field."""
        start = self._offset_of[name]
        return self.weight[start : start + self._size_of[name]]

    def adopt(self, other: "FieldEmbeddings") -> bool:
        """Take over the rows of tables of the same fields with as many ids or fewer; return whether these are such."""
        fits = other.names == self.names and other.dim == self.dim
        if not fits or any(other._size_of[name] > self._size_of[name] for name in self.names):
            return False
        with torch.no_grad():
            for name in self.names:
                self.table(name)[: other._size_of[name]].copy_(other.table(name))
        return True

    def offsets(self, names: Sequence[str]) -> Tensor:
        """Return [len(names)] int64: where the tables of these fields begin; see `forward`.

        Raises:
            ConfigError: a name has no table.
        """
        missing = sorted(set(names).difference(self.names))
        if missing:
            raise ConfigError(f"fields {missing} have no embedding; the model has {self.names}")
        return torch.tensor([self._offset_of[name] for name in names], dtype=torch.int64)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return [..., F * dim]: the embeddings of ids [..., F], side by side.

        Args:
            ids: [..., F] int64, each below its field's cardinality.
            offsets: [F] int64 from `offsets`, in the order of the columns.
        """
        return look_up(self.weight, ids + offsets).flatten(-2)
