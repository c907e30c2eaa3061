"""From one request to one batch, through the collator and the code tables that training used.

What is missing has a stated default: an unknown user, item or categorical value is id 0, a number left out is the mean,
a sequence left out is empty, a missing history is the model's learnt vector for none. All of it is reported. A field that
counts the user's past has none: the store does not hold what it counts, and no constant means "never", so the caller has
to give it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from loopfm_ray.data.collate import Batch, Collator, History, LatentHistorySource
from loopfm_ray.data.derive import derive_context
from loopfm_ray.data.schema import Field, Kind, Side
from loopfm_ray.serving.bundle import Bundle, HistoryPin
from loopfm_ray.serving.contract import ContextValue, RequestError, ScoreQuery
from loopfm_ray.store.online import UserHistory, is_cut, visible_slice
from loopfm_ray.types import MICROS_PER_S, UNKNOWN_ID

__all__ = ["FeatureBuilder", "HistoryRead", "RequestFeatures", "read_history"]

Column = NDArray[Any]
"""[B] or [B, S] values of one field."""
_ZERO = np.zeros(1, dtype=np.int64)


@dataclass(frozen=True)
class HistoryRead:
    """What a request sees of a history.

    `age_s` is the age of the newest item; `reason` says why the history is less than the model could have had.
    """

    history: History
    length: int
    age_s: float | None
    reason: str | None


@dataclass(frozen=True)
class RequestFeatures:
    """The batch of one request, a row for each item in order, and what had to be replaced by a default."""

    batch: Batch
    num_unknown_items: int
    is_unknown_user: bool
    unknown_fields: tuple[str, ...]
    default_fields: tuple[str, ...]


def read_history(
    found: UserHistory | None, pin: HistoryPin, request_ts: int, num_rows: int
) -> HistoryRead:
    """Return the history that all `num_rows` rows of a request at `request_ts` share.

    `reason` is `not_in_store`, `nothing_visible`, `cut_in_store` (fewer events than the model reads are left of one
    that was cut when it was published, and older ones could have counted) or None.
    """
    rows = _ZERO[:0] if found is None else _visible(found, pin, request_ts)
    event_ts, codes = _ZERO[:0], np.zeros((0, pin.code_spec.num_bytes), dtype=np.uint8)
    if found is not None:
        event_ts, codes = found.event_ts[rows], found.codes[rows]
    packed = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(pin.code_spec.num_bytes), len(rows), [None, pa.py_buffer(codes.tobytes())]
    )
    table = pa.table({"event_ts": event_ts, "code": packed})
    source = LatentHistorySource({0: table}, pin.code_spec, pin.max_len)
    gathered = source.gather(_ZERO, _ZERO, np.asarray([len(rows)]), np.asarray([request_ts]))
    assert gathered.latents is not None
    history = History(
        row=torch.zeros(num_rows, dtype=torch.int64),
        mask=torch.from_numpy(gathered.mask),
        age_s=torch.from_numpy(gathered.age_s),
        latents=torch.from_numpy(gathered.latents),
    )
    age_s = (request_ts - int(event_ts[-1])) / MICROS_PER_S if len(rows) else None
    return HistoryRead(history, len(rows), age_s, _reason(found, len(rows), pin, request_ts))


def _visible(found: UserHistory, pin: HistoryPin, request_ts: int) -> NDArray[np.int64]:
    return visible_slice(found, request_ts, pin.max_len, pin.retention_us)


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

    def build(self, query: ScoreQuery) -> RequestFeatures:
        """Return the batch of `query` without histories.

        Raises:
            RequestError: a context field is unknown, derived, or has a value of the wrong type or length.
        """
        self._check_names(query)
        num_rows = len(query.items)
        user = self._encode("user", [query.user])
        items = self._encode("item", query.items)
        rows: dict[str, Column] = {
            "user": np.repeat(user, num_rows),
            "item": items,
            "bucket": np.zeros(num_rows, dtype=np.int16),
            "event_ts": np.full(num_rows, query.request_ts, dtype=np.int64),
        }
        rows |= {task: np.zeros(num_rows, dtype=np.float32) for task in self._tasks}
        given: dict[str, ContextValue] = {
            **query.context,
            **derive_context(query.request_ts, self._derive),
        }
        unknown = []
        for name, field in self._fields.items():
            rows[name], is_known = self._column(field, given.get(name), num_rows)
            if not is_known:
                unknown.append(name)
        return RequestFeatures(
            batch=self._collator(rows),
            num_unknown_items=int(np.count_nonzero(items == UNKNOWN_ID)),
            is_unknown_user=self._reads("user") and int(user[0]) == UNKNOWN_ID,
            unknown_fields=tuple(unknown),
            default_fields=tuple(name for name in self.request_fields if name not in given),
        )

    def with_history(self, features: RequestFeatures, read: HistoryRead) -> Batch:
        """Return the batch with its history."""
        return replace(features.batch, histories={"latent": read.history})

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
                f"context fields {unknown} are unknown; the model reads {list(self.request_fields)}, see GET /v1/model"
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
    ) -> tuple[Column, bool]:
        """Return the column of a field, and whether its value is known (a default counts as known)."""
        if field.kind == Kind.NUMERIC:
            return _number_column(field, value, num_rows), True
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


def _number_column(field: Field, value: ContextValue | None, num_rows: int) -> Column:
    if value is None:
        return np.zeros(num_rows, dtype=np.float32)  # standardised: the mean
    values = value if isinstance(value, list) else [value]
    if any(isinstance(one, str | bool) for one in values):
        raise RequestError(f"context field {field.name!r} takes a number, or one for each item")
    if len(values) not in (1, num_rows) or (isinstance(value, list) and len(values) != num_rows):
        raise RequestError(
            f"context field {field.name!r} has {len(values)} numbers for {num_rows} items; give one for all, or one"
            " for each item"
        )
    with np.errstate(over="ignore"):
        scaled = (np.asarray(values, dtype=np.float64) - field.mean) / field.std
        column = scaled.astype(np.float32)
    if not np.isfinite(column).all():
        raise RequestError(f"context field {field.name!r} is too large a number for this model")
    return np.broadcast_to(column, num_rows).copy()
