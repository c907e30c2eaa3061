"""Where the histories that rows point to are read: slices of Arrow tables, gathered into padded arrays."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.joined import EVENT_TYPE, LABEL, SIDE_COLUMNS
from loopfm_ray.data.prepared import EntityTable
from loopfm_ray.data.runs import runs
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.errors import SchemaError
from loopfm_ray.store.codes import CodeSpec, decode
from loopfm_ray.store.tables import code_bytes
from loopfm_ray.types import MICROS_PER_S

__all__ = [
    "Gathered",
    "HistorySource",
    "LatentHistorySource",
    "RawHistorySource",
    "known_label",
    "lay_out_latents",
]

# Any: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]
Columns = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Gathered:
    """G histories as numpy arrays, shaped as in `History`."""

    mask: NDArray[np.bool_]
    age_s: NDArray[np.float32]
    latents: NDArray[np.float32] | None = None
    item_ids: NDArray[np.int64] | None = None
    label: NDArray[np.int64] | None = None
    event_type: NDArray[np.int64] | None = None


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
        side: Sequence[str] = (),
    ) -> None:
        """Take what to gather from.

        Args:
            events: table of each bucket, with columns item and event_ts, and those of `side`.
            items: the item table.
            item_fields: the columns of `item_ids`: `item` and categorical fields of the item table.
            max_len: the newest so many events of a slice are read.
            side: `LABEL`, `EVENT_TYPE` or both, to be given with each event.

        Raises:
            SchemaError: a table lacks a column of the side information.
        """
        self._side = tuple(side)
        self._tables = {
            bucket: _plain_columns(table, ("event_ts", "item"), self._side)
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
        """Return times [M] and item ids [M, F] of `rows` of a bucket's events, without their side information."""
        columns = self._tables[bucket]
        met = columns["item"][rows]
        return columns["event_ts"][rows], self._fields[np.where(met < len(self._fields), met, 0)]

    def gather(
        self,
        bucket: NDArray[np.integer],
        start: NDArray[np.integer],
        length: NDArray[np.integer],
        request_ts: NDArray[np.integer],
    ) -> Gathered:
        """Return ages, item ids and side information of the newest entries of each slice."""
        mask, owner, rows = _positions(start, length, self.max_len)
        asked: Ints = request_ts[owner].astype(np.int64)
        cells = _cells(self._tables, bucket[owner], rows, ("event_ts", "item", *_names(self._side)))
        met = cells["item"].astype(np.int64)
        met[met >= len(self._fields)] = 0
        item = np.zeros(mask.shape, dtype=np.int64)
        item[mask] = met
        # row 0 of the item table is all 0, so padding takes the same gather
        ids = np.take(self._fields, item, axis=0)
        age_s = _ages(mask, asked - cells["event_ts"])
        return Gathered(mask, age_s, item_ids=ids, **_side(self._side, mask, cells, asked))


class LatentHistorySource:
    """The latents of an entity's events, from the history tables of a joined set."""

    def __init__(
        self,
        tables: Mapping[int, Table],
        spec: CodeSpec,
        max_len: int,
        side: Sequence[str] = (),
    ) -> None:
        """Take what to gather from.

        Args:
            tables: table of each bucket, with columns event_ts and code, and those of `side`.
            spec: how the codes were made.
            max_len: the newest so many events of a slice are read.
            side: `LABEL`, `EVENT_TYPE` or both, to be given with each event.

        Raises:
            SchemaError: a table lacks a column of the side information.
        """
        self._side = tuple(side)
        self._tables = {
            bucket: {
                **_plain_columns(table, ("event_ts",), self._side),
                "code": code_bytes(table.column("code")),
            }
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
        """Return ages, latents and side information of the newest entries of each slice."""
        mask, owner, rows = _positions(start, length, self._max_len)
        asked: Ints = request_ts[owner].astype(np.int64)
        cells = _cells(self._tables, bucket[owner], rows, ("event_ts", "code", *_names(self._side)))
        age_s, latents = _latents(mask, asked - cells["event_ts"], cells["code"], self._spec)
        return Gathered(mask, age_s, latents=latents, **_side(self._side, mask, cells, asked))


def lay_out_latents(
    length: Ints, age_us: Ints, codes: NDArray[np.uint8], spec: CodeSpec
) -> Gathered:
    """Return G histories side by side, as `LatentHistorySource.gather` gives them.

    Args:
        length: [G] events of each.
        age_us: [N] age of each event at its request, history after history, oldest first.
        codes: [N, bytes] their codes.
        spec: how the codes were made.
    """
    width = max(1, int(length.max())) if len(length) else 1
    mask = np.arange(width) < length[:, None]
    age_s, latents = _latents(mask, age_us, codes, spec)
    return Gathered(mask, age_s, latents=latents)


def _latents(
    mask: NDArray[np.bool_], age_us: Ints, codes: NDArray[np.uint8], spec: CodeSpec
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return ages [G, L] in seconds and latents [G, L, D] of the true cells of `mask`, which come in order; 0 elsewhere."""
    if mask.all():
        latents = decode(codes, spec).reshape(*mask.shape, spec.dim)
    else:
        latents = np.zeros((*mask.shape, spec.dim), dtype=np.float32)
        if len(codes):
            latents[mask] = decode(codes, spec)
    return _ages(mask, age_us), latents


def known_label(label: NDArray[Any], label_ts: Ints, request_ts: Ints) -> Ints:
    """Return [N] what a request knows of each event's label: 0 nothing yet, 1 negative, 2 positive.

    A label is known from `label_ts` on: a request of that very instant has it.
    """
    known: Ints = np.where(label_ts <= request_ts, np.where(label > 0, 2, 1), 0).astype(np.int64)
    return known


def _names(side: Sequence[str]) -> tuple[str, ...]:
    return tuple(name for one in side for name in SIDE_COLUMNS[one])


def _side(side: Sequence[str], mask: NDArray[np.bool_], cells: Columns, asked: Ints) -> Columns:
    """Return the side information of the true cells of `mask` as [G, L] arrays, by name."""
    values: Columns = {}
    if LABEL in side:
        values[LABEL] = known_label(cells["label"], cells["label_ts"], asked)
    if EVENT_TYPE in side:
        values[EVENT_TYPE] = cells["event_type"]
    out = {name: np.zeros(mask.shape, dtype=np.int64) for name in values}
    for name, found in values.items():
        out[name][mask] = found
    return out


def _plain_columns(table: Table, names: Sequence[str], side: Sequence[str]) -> Columns:
    wanted = (*names, *_names(side))
    missing = [name for name in wanted if name not in table.column_names]
    if missing:
        raise SchemaError(
            f"a history table has no columns {missing}, it has {table.column_names}; leave the side information"
            " out, or join a version that holds it"
        )
    return {name: table.column(name).to_numpy() for name in wanted}


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


def _cells(
    tables: Mapping[int, Columns], bucket: NDArray[np.integer], rows: Ints, names: Sequence[str]
) -> Columns:
    """Return the columns `names` of N cells, each a row of the table of its bucket."""
    if not len(rows):
        return {name: np.zeros(0, dtype=np.int64) for name in names}
    out: Columns = {}
    for members, columns in _each_bucket(tables, bucket):
        for name in names:
            values = columns[name]
            if name not in out:
                out[name] = np.empty((len(rows), *values.shape[1:]), dtype=values.dtype)
            out[name][members] = values[rows[members]]
    return out


def _each_bucket(
    tables: Mapping[int, Columns], bucket: NDArray[np.integer]
) -> Iterator[tuple[slice | NDArray[np.intp], Columns]]:
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


def _item_matrix(items: EntityTable, item_fields: Sequence[str]) -> Ints:
    own = np.arange(len(items), dtype=np.int32)
    columns = [own if name == Side.ITEM.value else items.ids[name] for name in item_fields]
    return np.stack(columns, axis=1).astype(np.int64)
