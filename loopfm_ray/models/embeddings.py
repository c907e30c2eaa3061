"""Embeddings of categorical and sequence fields: one table per field by its face, one fused table underneath."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from loopfm_ray.errors import ConfigError
from loopfm_ray.types import UNKNOWN_ID

__all__ = [
    "INIT_STD",
    "EmbeddingTables",
    "FieldEmbeddings",
    "TableFactory",
    "TableLayout",
    "look_up",
]

INIT_STD = 0.05
"""Of the noise that rows begin with."""


def look_up(table: Tensor, ids: Tensor) -> Tensor:
    """Return [..., D] the rows ids [...] of a table [N, D].

    The gradient is that of `functional.embedding`, which on a CPU takes three times as long.
    """
    return table.index_select(0, ids.flatten()).view(*ids.shape, table.shape[1])


class EmbeddingTables(Protocol):
    """One table per field: what models ask of it, wherever the rows lie."""

    dim: int

    @property
    def names(self) -> tuple[str, ...]:
        """The fields."""
        ...

    def offsets(self, names: Sequence[str]) -> Tensor:
        """Return [len(names)] int64: what `__call__` tells the fields of its columns by."""
        ...

    def __call__(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return [..., F * dim]: the embeddings of ids [..., F], side by side."""
        ...


TableFactory = Callable[[Mapping[str, int], int], EmbeddingTables]
"""Cardinality of each field, and width -> their tables."""


class TableLayout:
    """Where the table of each field lies in the one below."""

    def __init__(self, cardinalities: Mapping[str, int]) -> None:
        self.names = tuple(cardinalities)
        self.sizes = tuple(max(1, cardinalities[name]) for name in self.names)
        self.starts = tuple(sum(self.sizes[:index]) for index in range(len(self.sizes)))
        self.num_rows = sum(self.sizes)
        self._place_of = {name: index for index, name in enumerate(self.names)}

    def rows(self, name: str) -> slice:
        """Return the rows of one field."""
        place = self._place_of[name]
        return slice(self.starts[place], self.starts[place] + self.sizes[place])

    def places(self, names: Sequence[str]) -> list[int]:
        """Return the number of each field.

        Raises:
            ConfigError: a name has no table.
        """
        missing = sorted(set(names).difference(self.names))
        if missing:
            raise ConfigError(f"fields {missing} have no embedding; the model has {self.names}")
        return [self._place_of[name] for name in names]

    def offsets(self, names: Sequence[str]) -> Tensor:
        """Return [len(names)] int64: where the tables of these fields begin.

        Raises:
            ConfigError: a name has no table.
        """
        return torch.tensor([self.starts[place] for place in self.places(names)], dtype=torch.int64)

    def has_room_for(self, other: "TableLayout") -> bool:
        """Return whether `other` has the same fields, each with as many ids or fewer."""
        return other.names == self.names and all(
            theirs <= own for theirs, own in zip(other.sizes, self.sizes, strict=True)
        )


class FieldEmbeddings(nn.Module):
    """One embedding table per field, stored as one matrix so that a batch is one look-up.

    Rows start as normal noise; the row of the unknown id of every field starts at 0, so that a value never seen
    in training says nothing, and is learnt where training meets it.
    """

    def __init__(self, cardinalities: Mapping[str, int], dim: int) -> None:
        super().__init__()
        self.layout, self.dim = TableLayout(cardinalities), dim
        weight = torch.randn(self.layout.num_rows, dim) * INIT_STD
        weight[self.offsets(self.names) + UNKNOWN_ID] = 0.0
        self.weight = nn.Parameter(weight)

    @property
    def names(self) -> tuple[str, ...]:
        """The fields."""
        return self.layout.names

    def table(self, name: str) -> Tensor:
        """Return the table [cardinality, dim] of one field."""
        return self.weight[self.layout.rows(name)]

    def adopt(self, other: "FieldEmbeddings") -> bool:
        """Take over the rows of tables of the same fields with as many ids or fewer; return whether these are such."""
        if other.dim != self.dim or not self.layout.has_room_for(other.layout):
            return False
        with torch.no_grad():
            for name in self.names:
                rows = other.table(name)
                self.table(name)[: len(rows)].copy_(rows)
        return True

    def offsets(self, names: Sequence[str]) -> Tensor:
        """Return [len(names)] int64: where the tables of these fields begin; see `forward`.

        Raises:
            ConfigError: a name has no table.
        """
        return self.layout.offsets(names)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return [..., F * dim]: the embeddings of ids [..., F], side by side.

        Args:
            ids: [..., F] int64, each below its field's cardinality.
            offsets: [F] int64 from `offsets`, in the order of the columns.
        """
        return look_up(self.weight, ids + offsets).flatten(-2)
