"""Embedding tables by field whose rows are spread over a group; the face is that of `FieldEmbeddings`.

Row r of the tables, one below another, belongs to rank `r % size`: ids are given in order of first appearance, so neighbours are
about equally often used, and the busiest ids fall on all ranks in turn. All fields share one look-up.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from loopfm_ray.models.embeddings import INIT_STD, FieldEmbeddings, TableLayout
from loopfm_ray.models.sharded.distinct import Distinct, find_distinct
from loopfm_ray.models.sharded.exchange import (
    BAD_ID,
    LEARNS,
    READS,
    Asked,
    Request,
    answer,
    ask,
    send_back,
)
from loopfm_ray.models.sharded.group import Group, SoloGroup
from loopfm_ray.models.sharded.noise import fill_rows
from loopfm_ray.models.sharded.optim import RowOptimizer
from loopfm_ray.models.sharded.shard import Shard, pull
from loopfm_ray.types import UNKNOWN_ID

__all__ = ["RowNoise", "ShardedEmbeddings"]


@dataclass(frozen=True)
class RowNoise:
    """What rows begin with: normal noise of their number and a seed, the same however many ranks there are."""

    seed: int = 0
    std: float = INIT_STD


class ShardedEmbeddings(nn.Module):
    """One table per field, of which each rank of a group holds every size-th row.

    It has no parameters: `step` updates the rows that were looked up since the step before, and nothing else. Every rank has to
    make the same calls; one that runs out of batches before the others calls `drain` when it is not training, and looks up
    an empty batch when it is.
    """

    def __init__(
        self,
        cardinalities: Mapping[str, int],
        dim: int,
        optimizer: RowOptimizer,
        group: Group | None = None,
        noise: RowNoise | None = None,
    ) -> None:
        super().__init__()
        self.layout, self.dim, self.group = TableLayout(cardinalities), dim, group or SoloGroup()
        size, rank = self.group.size, self.group.rank
        num_rows = len(range(rank, self.layout.num_rows, size))
        self.shard = Shard(num_rows, dim, optimizer)
        self.num_steps = 0
        self._stride = max(1, -(-self.layout.num_rows // size))
        noise = noise or RowNoise()
        fill_rows(self.shard.table, rank, size, noise.std, noise.seed)
        unknown = self.offsets(self.names) + UNKNOWN_ID
        own = unknown[unknown % size == rank]
        self.shard.reset(own // size, torch.zeros(len(own), dim))
        self.register_buffer("starts", _int64(self.layout.starts), persistent=False)
        self.register_buffer("sizes", _int64(self.layout.sizes), persistent=False)

    starts: Tensor
    sizes: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The fields."""
        return self.layout.names

    def offsets(self, names: Sequence[str]) -> Tensor:
        """Return [len(names)] int64: where the tables of these fields begin; see `forward`.

        Raises:
            ConfigError: a name has no table.
        """
        return self.layout.offsets(names)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return [..., F * dim]: the embeddings of ids [..., F], side by side.

        Where gradients are on it is part of a training step, and its rows change at the next `step`.

        Args:
            ids: [..., F] int64, each below its field's cardinality.
            offsets: [F] int64 from `offsets`, in the order of the columns.

        Raises:
            DataError: on all ranks, an id of one of them is out of range.
        """
        places = torch.searchsorted(self.starts, offsets)
        is_bad = (ids < 0) | (ids >= self.sizes[places])
        if bool(is_bad.any()):
            where = is_bad.nonzero()[0]
            detail = (int(places[where[-1]]), int(ids[tuple(where)]))
            nothing = Request(ids.new_zeros(0), [0] * self.group.size, BAD_ID, detail)
            ask(self.group, nothing, self._describe)
        found = self._look_up((ids + offsets).flatten())
        return found.view(*ids.shape[:-1], ids.shape[-1] * self.dim)

    def table(self, name: str) -> Tensor:
        """Return the table [cardinality, dim] of one field, on every rank, all of which have to call it."""
        rows = self.layout.rows(name)
        with torch.no_grad():
            return self._look_up(
                torch.arange(rows.start, rows.stop, device=self.shard.table.device)
            )

    def adopt(self, other: FieldEmbeddings) -> bool:
        """Take over the rows of tables of the same fields with as many ids or fewer; return whether these are such."""
        if other.dim != self.dim or not self.layout.has_room_for(other.layout):
            return False
        size, rank = self.group.size, self.group.rank
        self.shard.forget()
        for name in self.names:
            rows, start = other.table(name).detach(), self.layout.rows(name).start
            first = (rank - start) % size
            own = torch.arange(start + first, start + len(rows), size)
            self.shard.reset(own // size, rows[first::size])
        return True

    def step(self, factor: float = 1.0) -> None:
        """Update the rows that were looked up since the last step, at a share of the learning rate; every rank has to call it."""
        self.shard.step(self.group, factor)
        self.num_steps += 1

    def drain(self) -> None:
        """Answer the others' look-ups until no rank asks any more; every rank has to call it."""

        def reply(request: Request, asked: Asked) -> None:
            send_back(self.group, self.shard.read(asked.keys), request, asked)

        answer(self.group, reply, self._describe, self.shard.table.device)

    def _look_up(self, keys: Tensor) -> Tensor:
        distinct = self._by_owner(keys)
        owner = distinct.keys // self._stride
        request = Request(
            keys=distinct.keys - owner * self._stride,
            counts=torch.bincount(owner, minlength=self.group.size).tolist(),
            status=LEARNS if torch.is_grad_enabled() else READS,
        )
        asked = ask(self.group, request, self._describe)
        return pull(self.group, self.shard, distinct, request, asked, asked.keys)

    def _by_owner(self, keys: Tensor) -> Distinct:
        """Return the different ones of row numbers, as `owner * stride + row of its shard`, so that they are in order of owners."""
        size = self.group.size
        return find_distinct(keys if size == 1 else (keys % size) * self._stride + keys // size)

    def _describe(self, rank: int, field: int, value: int) -> str:
        return (
            f"rank {rank} looked up id {value} of field {self.names[field]!r}, which has ids 0 to"
            f" {self.layout.sizes[field] - 1}; collate with the vocabulary that the model was built for"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ShardedEmbeddings":
        self.shard.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self


def _int64(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
