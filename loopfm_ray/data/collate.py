"""Rows in, tensors out: the hot path of training and of serving.

Everything is a gather over numpy arrays; no Python loop runs over rows. Histories are gathered once for each distinct
user and request time of a batch, and padded to the longest among them.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from loopfm_ray.data.batch import Batch, History
from loopfm_ray.data.history_sources import (
    Gathered,
    HistorySource,
    LatentHistorySource,
    RawHistorySource,
)
from loopfm_ray.data.joined import TEACHER_CODE, USER_SOURCE, teacher_prob_of
from loopfm_ray.data.prepared import EntityTable
from loopfm_ray.data.schema import FeatureSchema, Field, Kind, Side
from loopfm_ray.errors import SchemaError
from loopfm_ray.store.codes import CodeSpec, decode

__all__ = [
    "Batch",
    "Collator",
    "Gathered",
    "History",
    "HistorySource",
    "LatentHistorySource",
    "RawHistorySource",
]

Ints = NDArray[np.int64]

_IN_USER_BUCKET = ("raw", USER_SOURCE)
"""Sources whose histories lie in the bucket of the row's user."""


class Collator:
    """Turns rows of examples into a `Batch` for one schema."""

    def __init__(
        self,
        schema: FeatureSchema,
        items: EntityTable,
        users: EntityTable,
        sources: Mapping[str, HistorySource] | None = None,
        teacher_spec: CodeSpec | None = None,
    ) -> None:
        """Take what rows are looked up in.

        Args:
            schema: the fields of the model.
            items: the item table.
            users: the user table.
            sources: by name. The source `latent` follows the columns latent_start and latent_len, and so on; one that is
                keyed by something else than the user has its bucket in a column too, such as latent_by_item_bucket.
            teacher_spec: how the column teacher_code was made; None leaves `Batch.teacher_latent` out.
        """
        self._schema, self._teacher_spec = schema, teacher_spec
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
        """The columns of the rows that a call reads, the teacher's predictions apart."""
        own = [
            field.name for field in self._schema.fields if field.side in (Side.CONTEXT, Side.PAST)
        ]
        pointers = [f"{name}_{part}" for name in self._sources for part in ("start", "len")]
        pointers += [_bucket_column(name) for name in self._sources]
        pointers += [TEACHER_CODE] if self._teacher_spec is not None else []
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
                teacher_latent=self._teacher_latent(rows),
                teacher_more=self._teacher_more(rows),
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

    def _teacher_more(self, rows: Mapping[str, NDArray[Any]]) -> Tensor | None:
        """Return what the teacher says of the tasks beside the first, if the rows tell it of all of them."""
        names = [teacher_prob_of(task) for task in self._schema.tasks[1:]]
        if not names or any(name not in rows for name in names):
            return None
        return torch.from_numpy(np.stack([np.asarray(rows[n], np.float32) for n in names], axis=1))

    def _teacher_latent(self, rows: Mapping[str, NDArray[Any]]) -> Tensor | None:
        if self._teacher_spec is None:
            return None
        return torch.from_numpy(decode(rows[TEACHER_CODE], self._teacher_spec))

    def _histories(self, rows: Mapping[str, NDArray[Any]]) -> dict[str, History]:
        out: dict[str, History] = {}
        for name, source in self._sources.items():
            length = np.asarray(rows[f"{name}_len"], dtype=np.int64)
            # All empty histories are one.
            start = np.where(length > 0, rows[f"{name}_start"], -1)
            bucket = np.where(length > 0, rows[_bucket_column(name)], -1)
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
                latents=_tensor(found.latents),
                item_ids=_tensor(item_ids),
                label=_tensor(found.label),
                event_type=_tensor(found.event_type),
            )
        return out


def _bucket_column(source: str) -> str:
    return "bucket" if source in _IN_USER_BUCKET else f"{source}_bucket"


def _tensor(values: NDArray[Any] | None) -> Tensor | None:
    return None if values is None else torch.from_numpy(values)


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
