"""Rows in, tensors out: the hot path of training and of serving.

Everything is a gather over numpy arrays; no Python loop runs over rows. Histories are gathered once for each distinct
user and request time of a batch, and padded to the longest among them.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopfm_ray.data.batch import Batch, History
from loopfm_ray.data.prepared import EntityTable
from loopfm_ray.data.runs import runs
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.errors import SchemaError
from loopfm_ray.store.codes import CodeSpec, decode
from loopfm_ray.types import MICROS_PER_S

__all__ = [
    "Batch",
    "Collator",
    "Gathered",
    "History",
    "HistorySource",
    "LatentHistorySource",
    "RawHistorySource",
]

# Any: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Gathered:
    """G histories as numpy arrays, shaped as in `History`."""

    mask: NDArray[np.bool_]
    age_s: NDArray[np.float32]
    latents: NDArray[np.float32] | None = None
    item_ids: NDArray[np.int64] | None = None


class HistorySource(Protocol):
    """Where the histories that rows point to are read."""

    def gather(
        self,
        bucket: NDArray[np.integer],
        start: NDArray[np.integer],
        length: NDArray[np.integer],
        request_ts: NDArray[np.integer],
    ) -> Gathered:
        """Return the newest entries of each of G slices `[start, start + length)`, oldest first."""
        ...


class RawHistorySource:
    """The items that a user met, from the history events of prepared data."""

    def __init__(
        self,
        events: Mapping[int, Table],
        items: EntityTable,
        item_fields: Sequence[str],
        max_len: int,
    ) -> None:
        """Take what to gather from.

        Args:
            events: table of each bucket, with columns item and event_ts.
            items: the item table.
            item_fields: the columns of `item_ids`: `item` and categorical fields of the item table.
            max_len: the newest so many events of a slice are read.
        """
        self._tables = {
            bucket: (_plain(table, "event_ts"), _plain(table, "item"))
            for bucket, table in events.items()
            if table.num_rows
        }
        self._names = tuple(item_fields)
        self._fields = _item_matrix(items, item_fields)
        self.max_len = max_len

    def limited(self, schema: FeatureSchema) -> "RawHistorySource":
        """Return the same source with ids that `schema` does not know as 0.

        Raises:
            SchemaError: `schema` lacks one of the item fields.
        """
        chosen = {field.name: field for field in schema.of(Kind.CATEGORICAL, Side.ITEM)}
        unknown = [name for name in self._names if name not in chosen]
        if unknown:
            raise SchemaError(
                f"a raw history reads item fields {unknown} that the schema does not have, it has"
                f" {sorted(chosen)}; select them too"
            )
        limits = np.asarray([chosen[name].cardinality for name in self._names], dtype=np.int64)
        other = copy.copy(self)
        other._fields = np.where(self._fields < limits, self._fields, 0)
        return other

    def entries(self, bucket: int, rows: NDArray[np.integer]) -> tuple[Ints, Ints]:
        """Return times [M] and item ids [M, F] of `rows` of a bucket's events."""
        times, items = self._tables[bucket]
        met = items[rows]
        return times[rows], self._fields[np.where(met < len(self._fields), met, 0)]

    def gather(
        self,
        bucket: NDArray[np.integer],
        start: NDArray[np.integer],
        length: NDArray[np.integer],
        request_ts: NDArray[np.integer],
    ) -> Gathered:
        """Return ages and item ids of the newest entries of each slice."""
        mask, owner, rows = _positions(start, length, self.max_len)
        event_ts = np.empty(len(rows), dtype=np.int64)
        item = np.zeros(mask.shape, dtype=np.int64)
        met = np.empty(len(rows), dtype=np.int64)
        for members, (times, items) in _each_bucket(self._tables, bucket[owner]):
            event_ts[members] = times[rows[members]]
            met[members] = items[rows[members]]
        met[met >= len(self._fields)] = 0
        item[mask] = met
        # row 0 of the item table is all 0, so padding takes the same gather
        ids = np.take(self._fields, item, axis=0)
        return Gathered(mask, _ages(mask, request_ts[owner] - event_ts), item_ids=ids)


class LatentHistorySource:
    """The latents of a user's events, from the history tables of a joined set."""

    def __init__(self, tables: Mapping[int, Table], spec: CodeSpec, max_len: int) -> None:
        """Take what to gather from.

        Args:
            tables: table of each bucket, with columns event_ts and code.
            spec: how the codes were made.
            max_len: the newest so many events of a slice are read.
        """
        self._tables = {
            bucket: (_plain(table, "event_ts"), _code_bytes(table, spec))
            for bucket, table in tables.items()
            if table.num_rows
        }
        self._spec = spec
        self._max_len = max_len

    def gather(
        self,
        bucket: NDArray[np.integer],
        start: NDArray[np.integer],
        length: NDArray[np.integer],
        request_ts: NDArray[np.integer],
    ) -> Gathered:
        """Return ages and latents of the newest entries of each slice."""
        mask, owner, rows = _positions(start, length, self._max_len)
        event_ts = np.empty(len(rows), dtype=np.int64)
        codes = np.empty((len(rows), self._spec.num_bytes), dtype=np.uint8)
        for members, (times, packed) in _each_bucket(self._tables, bucket[owner]):
            event_ts[members] = times[rows[members]]
            codes[members] = packed[rows[members]]
        latents = np.zeros((*mask.shape, self._spec.dim), dtype=np.float32)
        latents[mask] = decode(codes, self._spec)
        return Gathered(mask, _ages(mask, request_ts[owner] - event_ts), latents=latents)


class Collator:
    """Turns rows of examples into a `Batch` for one schema."""

    def __init__(
        self,
        schema: FeatureSchema,
        items: EntityTable,
        users: EntityTable,
        sources: Mapping[str, HistorySource] | None = None,
    ) -> None:
        """Take the schema of the model, the entity tables and the history sources by name.

        The source `raw` follows the columns raw_start and raw_len, `latent` follows latent_start and latent_len.
        """
        self._schema = schema
        self._sources = {
            name: source.limited(schema) if isinstance(source, RawHistorySource) else source
            for name, source in (sources or {}).items()
        }
        self._ids = {
            Side.USER: _side_ids(schema, users, Side.USER),
            Side.ITEM: _side_ids(schema, items, Side.ITEM),
        }
        self._numbers = {
            Side.USER: _side_numbers(schema, users, Side.USER),
            Side.ITEM: _side_numbers(schema, items, Side.ITEM),
        }
        self._item_limits = np.asarray(
            [field.cardinality for field in schema.of(Kind.CATEGORICAL, Side.ITEM)], dtype=np.int64
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of the rows that a call reads, `teacher_prob` apart."""
        own = [
            field.name for field in self._schema.fields if field.side in (Side.CONTEXT, Side.PAST)
        ]
        pointers = [f"{name}_{part}" for name in self._sources for part in ("start", "len")]
        base = ["user", "item", "bucket", "event_ts", *self._schema.tasks]
        return tuple(dict.fromkeys([*base, *own, *pointers]))

    def __call__(self, rows: Mapping[str, NDArray[Any]]) -> Batch:
        """Return the batch of B rows; ids that the schema does not know become 0.

        Raises:
            SchemaError: a column is missing.
        """
        try:
            teacher = rows.get("teacher_prob")
            return Batch(
                ids=torch.from_numpy(self._id_matrix(rows)),
                numeric=torch.from_numpy(self._numeric_matrix(rows)),
                sequences={
                    field.name: self._sequence(rows, field) for field in self._schema.sequences
                },
                histories=self._histories(rows),
                label=torch.from_numpy(
                    np.stack([rows[task] for task in self._schema.tasks], axis=1).astype(
                        np.float32, copy=False
                    )
                ),
                teacher_prob=None
                if teacher is None
                else torch.from_numpy(np.asarray(teacher, np.float32)),
            )
        except KeyError as error:
            raise SchemaError(
                f"rows have no column {error}, found {sorted(rows)}; read the columns in Collator.columns"
            ) from error

    def _id_matrix(self, rows: Mapping[str, NDArray[Any]]) -> Ints:
        out = np.empty((len(rows["item"]), len(self._schema.categorical)), dtype=np.int64)
        for side, (columns, table) in self._ids.items():
            if columns:
                entity = rows[side.value]
                out[:, columns] = table[np.where(entity < len(table), entity, 0)]
        for column, field in enumerate(self._schema.categorical):
            if field.side == Side.CONTEXT:
                out[:, column] = _known(rows[field.name], field)
        return out

    def _numeric_matrix(self, rows: Mapping[str, NDArray[Any]]) -> NDArray[np.float32]:
        out = np.empty((len(rows["item"]), len(self._schema.numeric)), dtype=np.float32)
        for side, (columns, table) in self._numbers.items():
            if columns:
                entity = rows[side.value]
                out[:, columns] = table[np.where(entity < len(table), entity, 0)]
        for column, field in enumerate(self._schema.numeric):
            if field.side in (Side.CONTEXT, Side.PAST):
                out[:, column] = rows[field.name]
        return out

    def _sequence(self, rows: Mapping[str, NDArray[Any]], field: Field) -> Tensor:
        values = rows[field.name]
        used = np.flatnonzero((values != 0).any(axis=0))
        width = int(used[-1]) + 1 if len(used) else 1
        if values.shape[1] < width:
            values = np.zeros((len(values), width), dtype=np.int64)
        return torch.from_numpy(_known(values[:, :width], field).astype(np.int64))

    def _histories(self, rows: Mapping[str, NDArray[Any]]) -> dict[str, History]:
        out: dict[str, History] = {}
        for name, source in self._sources.items():
            length = np.asarray(rows[f"{name}_len"], dtype=np.int64)
            # All empty histories are one.
            start = np.where(length > 0, rows[f"{name}_start"], -1)
            bucket = np.where(length > 0, rows["bucket"], -1)
            request_ts = rows["event_ts"]
            first, row = _distinct(start, bucket, request_ts)
            found = source.gather(bucket[first], start[first], length[first], request_ts[first])
            item_ids = found.item_ids
            if item_ids is not None and not isinstance(source, RawHistorySource):
                item_ids = np.where(item_ids < self._item_limits, item_ids, 0)
            out[name] = History(
                row=torch.from_numpy(row),
                mask=torch.from_numpy(found.mask),
                age_s=torch.from_numpy(found.age_s),
                latents=None if found.latents is None else torch.from_numpy(found.latents),
                item_ids=None if item_ids is None else torch.from_numpy(item_ids),
            )
        return out


def _distinct(
    start: Ints, bucket: NDArray[np.integer], request_ts: Ints
) -> tuple[NDArray[np.intp], Ints]:
    """Return the first row of each distinct history and [B] which history each row has.

    A slice that is not empty belongs to one user, and with the request time it says how long it is.
    """
    order = np.lexsort((request_ts, start, bucket))
    ranked = start[order]
    starts = np.ones(len(order), dtype=bool)
    differs = np.zeros(max(len(order) - 1, 0), dtype=bool)
    for values in (bucket[order], request_ts[order]):
        differs |= values[1:] != values[:-1]
    starts[1:] = (ranked[1:] != ranked[:-1]) | (differs & (ranked[1:] >= 0))
    row = np.empty(len(order), dtype=np.int64)
    row[order] = np.cumsum(starts) - 1
    return order[starts], row


def _positions(
    start: NDArray[np.integer], length: NDArray[np.integer], max_len: int
) -> tuple[NDArray[np.bool_], NDArray[np.intp], Ints]:
    """Return the mask [G, L], and for its N true cells in order: which history, and which row of its bucket."""
    size = np.minimum(length, max_len).astype(np.int64)
    width = max(1, int(size.max())) if len(size) else 1
    mask = np.arange(width) < size[:, None]
    owner = np.repeat(np.arange(len(size)), size)
    begin = np.cumsum(size) - size
    rows = np.arange(len(owner)) + (start + (length - size) - begin)[owner]
    return mask, owner, rows


def _each_bucket(
    tables: Mapping[int, tuple[NDArray[Any], NDArray[Any]]], bucket: NDArray[np.integer]
) -> Iterator[tuple[slice | NDArray[np.intp], tuple[NDArray[Any], NDArray[Any]]]]:
    """Yield, for each bucket met, which cells it has and its columns."""
    if np.all(bucket[1:] >= bucket[:-1]):  # as the collator asks: cells of a bucket are neighbours
        for value, start, stop in runs(bucket):
            yield slice(start, stop), tables[value]
        return
    order = np.argsort(bucket, kind="stable")
    for value, start, stop in runs(bucket[order]):
        yield order[start:stop], tables[value]


def _ages(mask: NDArray[np.bool_], age_us: Ints) -> NDArray[np.float32]:
    out = np.zeros(mask.shape, dtype=np.float32)
    out[mask] = age_us / MICROS_PER_S
    return out


def _plain(table: Table, column: str) -> NDArray[Any]:
    values: NDArray[Any] = table.column(column).to_numpy()
    return values


def _code_bytes(table: Table, spec: CodeSpec) -> NDArray[np.uint8]:
    """View a fixed-size binary column as uint8 [N, bytes] without copying."""
    column = table.column("code").combine_chunks()
    buffer = column.buffers()[1]
    whole = np.frombuffer(buffer, dtype=np.uint8)
    size = spec.num_bytes
    begin = column.offset * size
    return whole[begin : begin + len(column) * size].reshape(len(column), size)


def _item_matrix(items: EntityTable, item_fields: Sequence[str]) -> Ints:
    own = np.arange(len(items), dtype=np.int32)
    columns = [own if name == Side.ITEM.value else items.ids[name] for name in item_fields]
    return np.stack(columns, axis=1).astype(np.int64)


def _side_ids(
    schema: FeatureSchema, table: EntityTable, side: Side
) -> tuple[list[int], NDArray[np.int32]]:
    """Return the columns of `Batch.ids` that come from a side, and [N + 1, n] their known ids by entity."""
    chosen = [(n, field) for n, field in enumerate(schema.categorical) if field.side == side]
    if not chosen:
        return [], np.zeros((1, 0), dtype=np.int32)
    own = np.arange(len(table), dtype=np.int32)
    columns = [
        _known(own if field.name == side.value else table.ids[field.name], field)
        for _, field in chosen
    ]
    return [n for n, _ in chosen], np.stack(columns, axis=1)


def _side_numbers(
    schema: FeatureSchema, table: EntityTable, side: Side
) -> tuple[list[int], NDArray[np.float32]]:
    chosen = [(n, field) for n, field in enumerate(schema.numeric) if field.side == side]
    if not chosen:
        return [], np.zeros((1, 0), dtype=np.float32)
    columns = [table.numeric[field.name] for _, field in chosen]
    return [n for n, _ in chosen], np.stack(columns, axis=1)


def _known(ids: NDArray[Any], field: Field) -> NDArray[Any]:
    return np.where(ids < field.cardinality, ids, 0)
