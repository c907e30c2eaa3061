"""From requests to one batch, through the collator and the code tables that training used.

What is missing has a stated default: an unknown user, item or categorical value is id 0, a number left out is the mean,
a sequence left out is empty, a missing history is the model's learnt vector for none. All of it is reported. A field that
counts the user's past has none: the store does not hold what it counts, and no constant means "never", so the caller has
to give it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.data.collate import Batch, Collator, History
from loopfm_ray.data.derive import derive_context
from loopfm_ray.data.history_sources import lay_out_latents
from loopfm_ray.data.schema import Field, Kind, Side
from loopfm_ray.serving.bundle import Bundle
from loopfm_ray.serving.contract import ContextValue, RequestError, ScoreQuery
from loopfm_ray.serving.spec import HistoryPin
from loopfm_ray.store.online import UserHistory, is_cut, visible_slice
from loopfm_ray.types import MICROS_PER_S, UNKNOWN_ID

__all__ = ["FeatureBuilder", "HistoryRead", "RequestFeatures", "read_histories"]

Column = NDArray[Any]
"""[B] or [B, S] values of one field."""
_ZERO = np.zeros(1, dtype=np.int64)
_NUMBERS = frozenset((int, float))
"""The types of a number; a truth value is none."""


@dataclass(frozen=True)
class HistoryRead:
    """What one request sees of a history.

    `age_s` is the age of the newest item; `reason` says why the history is less than the model could have had.
    """

    length: int
    age_s: float | None
    reason: str | None


@dataclass(frozen=True)
class RequestFeatures:
    """What of one request had to be replaced by a default."""

    num_unknown_items: int
    is_unknown_user: bool
    unknown_fields: tuple[str, ...]
    default_fields: tuple[str, ...]


def read_histories(
    found: Sequence[UserHistory | None],
    pin: HistoryPin,
    request_ts: Sequence[int],
    num_rows: Sequence[int],
) -> tuple[History, list[HistoryRead]]:
    """Return the histories of N requests as their rows share them, and what each request sees.

    `reason` is `not_in_store`, `nothing_visible`, `cut_in_store` (fewer events than the model reads are left of one
    that was cut when it was published, and older ones could have counted) or None.

    Args:
        found: [N] what the store gave.
        pin: how the VM reads it.
        request_ts: [N].
        num_rows: [N] items of each request.
    """
    seen = [
        _ZERO[:0] if one is None else visible_slice(one, ts, pin.max_len, pin.retention_us)
        for one, ts in zip(found, request_ts, strict=True)
    ]
    lengths = np.asarray([len(rows) for rows in seen], dtype=np.int64)
    parts = [
        (one.event_ts[rows], one.codes[rows])
        for one, rows in zip(found, seen, strict=True)
        if one is not None
    ]
    event_ts = np.concatenate([_ZERO[:0], *(times for times, _ in parts)])
    no_codes = np.zeros((0, pin.code_spec.num_bytes), np.uint8)
    codes = np.concatenate([no_codes, *(part for _, part in parts)])
    asked = np.repeat(np.asarray(request_ts, dtype=np.int64), lengths)
    gathered = lay_out_latents(lengths, asked - event_ts, codes, pin.code_spec)
    starts = np.cumsum(lengths) - lengths
    assert gathered.latents is not None
    history = History(
        row=torch.from_numpy(np.repeat(np.arange(len(lengths)), num_rows)),
        mask=torch.from_numpy(gathered.mask),
        age_s=torch.from_numpy(gathered.age_s),
        latents=torch.from_numpy(gathered.latents),
    )
    newest = [
        int(event_ts[start + n - 1]) if n else None
        for start, n in zip(starts, lengths, strict=True)
    ]
    reads = [
        HistoryRead(
            int(n),
            None if last is None else (ts - last) / MICROS_PER_S,
            _reason(one, int(n), pin, ts),
        )
        for one, n, last, ts in zip(found, lengths, newest, request_ts, strict=True)
    ]
    return history, reads


def _reason(found: UserHistory | None, length: int, pin: HistoryPin, request_ts: int) -> str | None:
    if found is None:
        return "not_in_store"
    if is_cut(found, length, request_ts, pin.max_len, pin.retention_us):
        return "cut_in_store"
    return None if length else "nothing_visible"


class FeatureBuilder:
    """Builds batches for one bundle. It has no state, so threads may share it."""

    def __init__(self, bundle: Bundle) -> None:
        schema = bundle.spec.schema
        self._bundle = bundle
        self._collator = Collator(schema, bundle.items, bundle.users)
        self._tasks = schema.tasks
        self._derive = bundle.spec.derive
        own = (Side.CONTEXT, Side.PAST)
        self._fields = {field.name: field for field in schema.fields if field.side in own}
        self.request_fields = tuple(name for name in self._fields if name not in self._derive)
        """The fields that a caller may give."""

    def build(self, queries: Sequence[ScoreQuery]) -> tuple[Batch, list[RequestFeatures]]:
        """Return the rows of all queries, one after another, without histories, and what each query lacked.

        Raises:
            RequestError: a context field is unknown, derived, or has a value of the wrong type or length; its `index`
                says of which query.
        """
        sizes = [len(query.items) for query in queries]
        users = self._encode("user", [query.user for query in queries])
        items = self._encode("item", [item for query in queries for item in query.items])
        columns: dict[str, list[Any]] = {name: [] for name in self._fields}
        lacks: list[tuple[list[str], tuple[str, ...]]] = []
        for index, query in enumerate(queries):
            try:
                lacks.append(self._add_context(query, columns))
            except RequestError as error:
                raise RequestError(error.message, index) from None
        total = len(items)
        rows: dict[str, Column] = {
            "user": np.repeat(users, sizes),
            "item": items,
            "bucket": np.zeros(total, dtype=np.int16),
            "event_ts": np.repeat(
                np.asarray([query.request_ts for query in queries], dtype=np.int64), sizes
            ),
        }
        rows |= {task: np.zeros(total, dtype=np.float32) for task in self._tasks}
        for name, parts in columns.items():
            field = self._fields[name]
            is_number = field.kind == Kind.NUMERIC
            rows[name] = _scaled(field, parts, sizes) if is_number else _stack(parts)
        unknown_items = np.add.reduceat(items == UNKNOWN_ID, np.cumsum([0, *sizes[:-1]]))
        features = [
            RequestFeatures(
                num_unknown_items=int(count),
                is_unknown_user=self._reads("user") and int(user) == UNKNOWN_ID,
                unknown_fields=tuple(unknown),
                default_fields=default,
            )
            for count, user, (unknown, default) in zip(unknown_items, users, lacks, strict=True)
        ]
        return self._collator(rows), features

    def _add_context(
        self, query: ScoreQuery, columns: Mapping[str, list[Any]]
    ) -> tuple[list[str], tuple[str, ...]]:
        """Add what one query has for each field; return its fields of unknown value, and those left out.

        A column is added, or the numbers of a numeric field as they were given.
        """
        self._check_names(query)
        given: dict[str, ContextValue] = {
            **query.context,
            **derive_context(query.request_ts, self._derive),
        }
        unknown = []
        for name, field in self._fields.items():
            column, is_known = self._column(field, given.get(name), len(query.items))
            columns[name].append(column)
            if not is_known:
                unknown.append(name)
        return unknown, tuple(name for name in self.request_fields if name not in given)

    def _reads(self, name: str) -> bool:
        return name in self._bundle.vocabularies

    def _encode(self, name: str, keys: Sequence[str]) -> NDArray[np.int32]:
        """Return [n] ids; zeros for an entity that the VM reads nothing of."""
        vocabulary = self._bundle.vocabularies.get(name)
        if vocabulary is None:
            return np.zeros(len(keys), dtype=np.int32)
        return vocabulary.encode(keys)

    def _check_names(self, query: ScoreQuery) -> None:
        unknown = sorted(set(query.context).difference(self._fields))
        if unknown:
            raise RequestError(
                f"context fields {unknown} are unknown; the model reads {list(self.request_fields)}, GET /v1/models/NAME lists them"
            )
        derived = sorted(set(query.context).intersection(self._derive))
        if derived:
            raise RequestError(
                f"context fields {derived} are computed from request_ts; leave them out"
            )
        absent = [
            name
            for name, field in self._fields.items()
            if field.side == Side.PAST and name not in query.context
        ]
        if absent:
            raise RequestError(
                f"context fields {absent} count the user's past and have no default; give one number for each item"
            )

    def _column(
        self, field: Field, value: ContextValue | None, num_rows: int
    ) -> tuple[Column | list[float], bool]:
        """Return the column of a field, and whether its value is known (a default counts as known)."""
        if field.kind == Kind.NUMERIC:
            return _numbers(field, value, num_rows), True
        if field.kind == Kind.SEQUENCE:
            return self._sequence_column(field, value, num_rows)
        if value is None:
            return np.zeros(num_rows, dtype=np.int32), True
        if isinstance(value, bool | float | list):
            raise RequestError(f"context field {field.name!r} takes one string or integer")
        found = int(self._encode(field.name, [str(value)])[0])
        return np.full(num_rows, found, dtype=np.int32), found != UNKNOWN_ID

    def _sequence_column(
        self, field: Field, value: ContextValue | None, num_rows: int
    ) -> tuple[Column, bool]:
        if value is None or value == []:
            return np.zeros((num_rows, 1), dtype=np.int32), True
        if not isinstance(value, list) or not all(isinstance(key, str) for key in value):
            raise RequestError(f"context field {field.name!r} takes a list of strings")
        keys = [str(key) for key in value][-self._bundle.spec.sequence_len :]
        ids = self._encode(field.name, keys)
        return np.tile(ids, (num_rows, 1)), bool((ids != UNKNOWN_ID).all())


def _stack(parts: Sequence[Column]) -> Column:
    """Return the columns of several requests one below another, sequences padded to the longest."""
    if len(parts) == 1:
        return parts[0]
    if parts[0].ndim == 1:
        return np.concatenate(parts)
    width = max(part.shape[1] for part in parts)
    return np.concatenate([np.pad(part, ((0, 0), (0, width - part.shape[1]))) for part in parts])


def _numbers(field: Field, value: ContextValue | None, num_rows: int) -> list[float]:
    """Return the number of each row as it was given; what is left out is the mean."""
    if value is None:
        return [field.mean] * num_rows
    values: list[Any] = value if isinstance(value, list) else [value] * num_rows
    if not _NUMBERS.issuperset(map(type, values)):
        raise RequestError(f"context field {field.name!r} takes a number, or one for each item")
    if len(values) != num_rows:
        raise RequestError(
            f"context field {field.name!r} has {len(values)} numbers for {num_rows} items; give one for all, or one"
            " for each item"
        )
    return values


def _scaled(field: Field, parts: Sequence[list[float]], sizes: Sequence[int]) -> Column:
    """Return [B] float32: the numbers of all queries as the model reads them."""
    values = np.asarray(list(itertools.chain.from_iterable(parts)), dtype=np.float64)
    with np.errstate(over="ignore"):
        column = ((values - field.mean) / field.std).astype(np.float32)
    is_bad = ~np.isfinite(column)
    if is_bad.any():
        index = int(np.searchsorted(np.cumsum(sizes), np.flatnonzero(is_bad)[0], side="right"))
        raise RequestError(
            f"context field {field.name!r} is too large a number for this model", index
        )
    return column
