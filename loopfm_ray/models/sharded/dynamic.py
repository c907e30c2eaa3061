"""Embeddings of raw ids, no vocabulary: ids get rows while the model trains, and lose them when they are no longer used."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from loopfm_ray.models.embeddings import TableLayout
from loopfm_ray.models.sharded.distinct import find_distinct
from loopfm_ray.models.sharded.embeddings import RowNoise
from loopfm_ray.models.sharded.exchange import (
    LEARNS,
    READS,
    Asked,
    Request,
    answer,
    ask,
    send_back,
)
from loopfm_ray.models.sharded.group import Group, SoloGroup
from loopfm_ray.models.sharded.id_map import IdConfig, IdEntries, IdMap
from loopfm_ray.models.sharded.noise import initial_rows, mix
from loopfm_ray.models.sharded.optim import RowOptimizer
from loopfm_ray.models.sharded.shard import Shard, pull

__all__ = ["DynamicEmbeddings"]


class DynamicEmbeddings(nn.Module):
    """Rows for the ids of several fields in one sharded table, admitted and evicted by an `IdMap` on each rank.

    Field and raw id are mixed into one key of 64 bits. The mixture is one to one within a field; ids of two fields share a row with
    a chance of 2 ** -64 a pair. Ranks own ranges of these keys. An id without a row reads the default row of its field, a dense parameter that
    every rank has and that data parallelism keeps equal.

    The calls that every rank has to make are those of `ShardedEmbeddings`.
    """

    def __init__(
        self,
        fields: Sequence[str],
        dim: int,
        optimizer: RowOptimizer,
        ids: IdConfig,
        group: Group | None = None,
        noise: RowNoise | None = None,
    ) -> None:
        super().__init__()
        self.layout = TableLayout(dict.fromkeys(fields, 1))
        self.dim, self.group = dim, group or SoloGroup()
        self.noise = noise or RowNoise()
        capacity = -(-ids.capacity // self.group.size)
        self.ids = IdMap(ids, capacity)
        self.shard = Shard(capacity, dim, optimizer)
        self.num_steps = 0
        self.default = nn.Parameter(torch.zeros(len(fields), dim))
        self.register_buffer("salts", mix(torch.arange(1, len(fields) + 1)), persistent=False)

    salts: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        """The fields."""
        return self.layout.names

    def offsets(self, names: Sequence[str]) -> Tensor:
        """Return [len(names)] int64: the numbers of these fields; see `forward`.

        Raises:
            ConfigError: a name is no field.
        """
        return torch.tensor(self.layout.places(names), dtype=torch.int64)

    def forward(self, ids: Tensor, offsets: Tensor) -> Tensor:
        """Return [..., F * dim]: the embeddings of ids [..., F], side by side.

        Where gradients are on it is part of a training step: ids are counted and may get rows, which change at the next `step`.

        Args:
            ids: [..., F] int64, any numbers.
            offsets: [F] int64 from `offsets`, in the order of the columns.
        """
        distinct = find_distinct(mix(ids ^ self.salts[offsets]).flatten())
        learns = torch.is_grad_enabled()
        counts = torch.bincount(self.owner(distinct.keys), minlength=self.group.size).tolist()
        request = Request(distinct.keys, counts, LEARNS if learns else READS)
        asked = ask(self.group, request, _describe)
        rows = self._meet(asked.keys) if learns else self._find(asked.keys)
        has_row = self._send_has_row(rows, request, asked)[distinct.place]
        found = pull(self.group, self.shard, distinct, request, asked, rows)
        shape = (*ids.shape, self.dim)
        found = torch.where(
            has_row.view(*ids.shape, 1), found.view(shape), self.default[offsets].expand(shape)
        )
        return found.flatten(-2)

    def owner(self, keys: Tensor) -> Tensor:
        """Return the rank of each key: the ranges of the ranks follow one another, so that sorted keys are in order of owners."""
        return (((keys >> 32) + (1 << 31)) * self.group.size) >> 32

    def step(self, factor: float = 1.0) -> None:
        """Update the rows that were looked up since the last step, at a share of the learning rate; every rank has to call it."""
        self.shard.step(self.group, factor)
        self.num_steps += 1

    def drain(self) -> None:
        """Answer the others' look-ups until no rank asks any more; every rank has to call it."""

        def reply(request: Request, asked: Asked) -> None:
            rows = self._find(asked.keys)
            self._send_has_row(rows, request, asked)
            send_back(self.group, self.shard.read(rows), request, asked)

        answer(self.group, reply, _describe, self.shard.table.device)

    def restore(self, members: IdEntries, waiting: IdEntries) -> Tensor:
        """Take over the ids of a checkpoint; return [n] the rows of `members`, -1 for those that there is no room for."""
        self.ids = IdMap(self.ids.config, self.ids.capacity)
        return torch.from_numpy(self.ids.restore(members, waiting))

    def _send_has_row(self, rows: Tensor, request: Request, asked: Asked) -> Tensor:
        return send_back(self.group, (rows >= 0).to(torch.uint8), request, asked).bool()

    def _find(self, keys: Tensor) -> Tensor:
        return torch.from_numpy(self.ids.find(keys.cpu().numpy())).to(keys.device)

    def _meet(self, keys: Tensor) -> Tensor:
        distinct = find_distinct(keys)
        different = distinct.keys.cpu().numpy()
        admission = self.ids.meet(different, self.num_steps + 1)
        fresh = admission.rows[admission.is_new]
        values = initial_rows(
            different[admission.is_new], self.dim, self.noise.std, self.noise.seed
        )
        self.shard.reset(torch.from_numpy(fresh), values)
        return torch.from_numpy(admission.rows).to(keys.device)[distinct.place]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "DynamicEmbeddings":
        self.shard.apply(fn)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch leaves it untyped
        return self


def _describe(rank: int, field: int, value: int) -> str:
    return f"rank {rank} looked up id {value} of field number {field}"
