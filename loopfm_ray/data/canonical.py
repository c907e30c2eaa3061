"""Map one block of a log to the package's own columns and types, and refuse what can not be right.

Every error says which file, column and row (counted from 0), what was found, what was expected and what to do.
"""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loopfm_ray.data.config import ColumnsConfig, TaskColumn
from loopfm_ray.errors import DataError, SchemaError
from loopfm_ray.types import MICROS_PER_S

__all__ = ["BlockPlace", "canonical_block", "float_column", "key_column"]

# Any: pyarrow ships no types.
Array = Any
_UNIT_US = {"s": 1_000_000, "ms": 1_000, "us": 1}


@dataclass(frozen=True)
class BlockPlace:
    """Where a block comes from: the file and the number of its first row."""

    file: str
    first_row: int

    def at(self, column: str, row: int) -> str:
        """Return the words that name one cell in a message."""
        return f"{self.file}, column {column!r}, row {self.first_row + row}"


def canonical_block(
    block: pa.Table, columns: ColumnsConfig, place: BlockPlace, label_delay_us: int
) -> pa.Table:
    """Return the block with columns event_ts, user, item, label, the tasks, label_ts and the fields by their names.

    Keys become text (null where unknown), times int64 microseconds UTC, labels float32, numbers float64.

    Raises:
        SchemaError: a column has the wrong type.
        DataError: a value is missing, not finite, not a time or not 0 or 1.
    """
    event_ts = _time_column(block, columns.event_ts, columns.timestamp_unit, place)
    out: dict[str, Array] = {
        "event_ts": event_ts,
        "user": _required(key_column(block, columns.user, place), columns.user, place),
        "item": _required(key_column(block, columns.item, place), columns.item, place),
        "label": pa.array(np.ones(block.num_rows, dtype=np.float32))
        if columns.label is None
        else _label_column(block, columns.label, place),
    }
    for name, task in columns.tasks.items():
        if isinstance(task, str):
            out[name] = _label_column(block, task, place)
        else:
            out[name] = _above(block, task, place)
    out["label_ts"] = (
        pc.add(event_ts, pa.scalar(label_delay_us, pa.int64()))
        if columns.label_ts is None
        else _label_times(block, columns, event_ts, place)
    )
    for name, column in columns.categorical.items():
        out[name] = key_column(block, column, place)
    for name, column in columns.numeric.items():
        out[name] = float_column(block, column, place)
    for name, column in columns.sequence.items():
        out[name] = _sequence_column(block, column, place)
    return pa.table(out)


def key_column(block: pa.Table, column: str, place: BlockPlace) -> Array:
    """Return a column as text keys; empty text is null.

    Raises:
        SchemaError: the column holds neither text nor integers.
    """
    values = _column(block, column)
    kind = values.type
    if pa.types.is_dictionary(kind):
        values, kind = values.cast(kind.value_type), kind.value_type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    is_plain = pa.types.is_integer(kind) or pa.types.is_boolean(kind) or pa.types.is_null(kind)
    if not (is_text or is_plain):
        raise SchemaError(
            f"{place.file}: column {column!r} has type {kind}, expected text or integers for a key;"
            " cast it before, or list it under numeric"
        )
    text = values.cast(pa.string())
    if not is_text:
        return text
    return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def float_column(block: pa.Table, column: str, place: BlockPlace) -> Array:
    """Return a column as float64; null stays null.

    Raises:
        SchemaError: the column does not hold numbers.
        DataError: a value is NaN or infinite.
    """
    values = _column(block, column)
    kind = values.type
    is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
    if not (is_number or pa.types.is_decimal(kind) or pa.types.is_boolean(kind)):
        raise SchemaError(
            f"{place.file}: column {column!r} has type {kind}, expected numbers;"
            " cast it before, or list it under categorical"
        )
    numbers = values.cast(pa.float64())
    bad = pc.fill_null(pc.invert(pc.is_finite(numbers)), False)
    row = _first_true(bad)
    if row is not None:
        raise DataError(
            f"{place.at(column, row)}: found {numbers[row].as_py()}, expected a finite number;"
            " fill or drop such rows, or write null where the value is missing"
        )
    return numbers


def _column(block: pa.Table, column: str) -> Array:
    values = block.column(column)
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
        if isinstance(values, pa.ChunkedArray):
            values = pa.concat_arrays(values.chunks)
    return values


def _required(keys: Array, column: str, place: BlockPlace) -> Array:
    row = _first_true(keys.is_null())
    if row is not None:
        raise DataError(
            f"{place.at(column, row)}: the key is missing, expected text or an integer;"
            " drop rows without a user or item"
        )
    return keys


def _label_column(block: pa.Table, column: str, place: BlockPlace) -> Array:
    values = _column(block, column)
    kind = values.type
    if not (pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind)):
        raise SchemaError(
            f"{place.file}: label column {column!r} has type {kind}, expected 0 and 1 as integers,"
            " floats or booleans; convert it before"
        )
    labels = values.cast(pa.float32(), safe=False)
    good = pc.or_(pc.equal(labels, pa.scalar(0.0, pa.float32())), pc.equal(labels, 1.0))
    row = _first_true(pc.invert(pc.fill_null(good, False)))
    if row is not None:
        raise DataError(
            f"{place.at(column, row)}: found {values[row].as_py()}, expected 0 or 1;"
            " correct the label or drop the row"
        )
    return labels


def _above(block: pa.Table, task: TaskColumn, place: BlockPlace) -> Array:
    """Return 1 where a column of numbers is above the bound of a task, else 0."""
    values = float_column(block, task.column, place)
    row = _first_true(values.is_null())
    if row is not None:
        raise DataError(
            f"{place.at(task.column, row)}: the number is missing, expected one to compare with {task.above};"
            " fill it in or drop the row"
        )
    return pc.greater(values, task.above).cast(pa.float32())


def _label_times(
    block: pa.Table, columns: ColumnsConfig, event_ts: Array, place: BlockPlace
) -> Array:
    assert columns.label_ts is not None
    label_ts = _time_column(block, columns.label_ts, columns.timestamp_unit, place)
    row = _first_true(pc.less(label_ts, event_ts))
    if row is not None:
        raise DataError(
            f"{place.at(columns.label_ts, row)}: the label was known before the event, found"
            f" {label_ts[row].as_py()} us against {event_ts[row].as_py()} us; expected label_ts >= event_ts"
        )
    return label_ts


def _sequence_column(block: pa.Table, column: str, place: BlockPlace) -> Array:
    values = _column(block, column)
    kind = values.type
    is_list = pa.types.is_list(kind) or pa.types.is_large_list(kind)
    if not is_list or not (
        pa.types.is_integer(kind.value_type) or pa.types.is_string(kind.value_type)
    ):
        raise SchemaError(
            f"{place.file}: sequence column {column!r} has type {kind}, expected lists of text or"
            " integers; convert it before"
        )
    return values.cast(pa.list_(pa.string()))


def _time_column(block: pa.Table, column: str, unit: str, place: BlockPlace) -> Array:
    """Return times as int64 microseconds UTC."""
    values = _column(block, column)
    kind = values.type
    row = _first_true(values.is_null())
    if row is not None:
        raise DataError(
            f"{place.at(column, row)}: the time is missing, expected a timestamp; drop rows without a time"
        )
    if pa.types.is_date(kind):
        return values.cast(pa.timestamp("us")).cast(pa.int64())
    if pa.types.is_timestamp(kind):
        return values.cast(pa.timestamp("us", tz=kind.tz), safe=False).cast(pa.int64())
    if pa.types.is_integer(kind):
        counts = values.cast(pa.int64())
        return (
            pc.floor(pc.divide(counts, 1000)).cast(pa.int64())
            if unit == "ns"
            else pc.multiply(counts, _UNIT_US[unit])
        )
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return _parse_times(values, column, place)
    raise SchemaError(
        f"{place.file}: time column {column!r} has type {kind}, expected an Arrow timestamp, ISO text or"
        " integers (data.columns.timestamp_unit); convert it before"
    )


def _parse_times(values: Array, column: str, place: BlockPlace) -> Array:
    for tz in (None, "UTC"):  # all without a zone, or all with one: the fast ways
        try:
            return values.cast(pa.timestamp("us", tz=tz)).cast(pa.int64())
        except pa.ArrowInvalid:
            continue
    epoch = datetime(1970, 1, 1, tzinfo=UTC)
    times = np.empty(len(values), dtype=np.int64)
    for row, text in enumerate(values.to_pylist()):
        try:
            moment = datetime.fromisoformat(text)
        except ValueError as error:
            raise DataError(
                f"{place.at(column, row)}: found {text!r}, expected an ISO time like 2017-06-26T04:00:00Z;"
                " correct the text or give an Arrow timestamp"
            ) from error
        delta = (moment if moment.tzinfo else moment.replace(tzinfo=UTC)) - epoch
        times[row] = (delta.days * 86_400 + delta.seconds) * MICROS_PER_S + delta.microseconds
    return pa.array(times)


def _first_true(mask: Array) -> int | None:
    row: int = pc.index(mask, True).as_py()
    return row if row >= 0 else None
