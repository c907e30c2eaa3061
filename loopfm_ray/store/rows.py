"""The rows of a latents file: what readers get, and how little of it lies on disk.

Readers get absolute times. A file holds `event_ts` in the largest unit (second, millisecond, microsecond) that fits all
its times; `label_after`, the label's distance from the event, in the same unit; and `available_after`, the distance of
`available_ts` from what delay and label give, which is 0 wherever the writer kept its own rule. Delta encoding makes a
constant distance free, and neighbours of a sorted file cheap. The unit and the rule stand in the file itself. Differences
wrap around in 64 bits, so any two times come back exactly.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.errors import StoreError
from loopfm_ray.history.times import available_from
from loopfm_ray.store.codes import CodeSpec, encode
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.tables import (
    code_bytes,
    code_column,
    iter_parquet,
    read_parquet,
    read_parquet_metadata,
    write_atomically,
)

__all__ = [
    "LATENTS_FORMAT",
    "Rule",
    "iterate_rows",
    "latents_schema",
    "make_rows",
    "prob_column",
    "read_rows",
    "rows_columns",
    "rows_sha256",
    "write_rows",
]

LATENTS_FORMAT = 2
"""Of the files of a latents version; readers refuse any other."""

_ROW_GROUP = 1 << 18
_UNITS_US = (1_000_000, 1_000)
_KEY = "loopfm.latents"
_DELTA = (
    "example_id",
    "user",
    "item",
    "event_ts",
    "label_after",
    "available_after",
)
_PROB, _FLOATS = "fm_prob", "BYTE_STREAM_SPLIT"
_ENCODING = {
    **dict.fromkeys(_DELTA, "DELTA_BINARY_PACKED"),
    "is_event": "RLE",
    "fm_prob": _FLOATS,
    "code": "PLAIN",
}
"""How each column lies in the file; benchmarks/latents_size.py measures it."""
_NEEDS = {
    "event_ts": ("event_ts",),
    "label_ts": ("event_ts", "label_after"),
    "available_ts": ("event_ts", "label_after", "available_after"),
}
"""Columns of the file that a column of the reader is made of, where it is not the same one."""

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Rule:
    """What `available_ts` is expected to be; a file holds only the difference from it."""

    delay_us: int = 0
    waits_for_label: bool = False

    def available(self, event_ts: Ints, label_ts: Ints) -> Ints:
        """Return [N] the expected `available_ts`."""
        return available_from(event_ts, label_ts if self.waits_for_label else None, self.delay_us)


def prob_column(task: str) -> str:
    """Return the column of the FM's probability of a further task; that of the first is `fm_prob`."""
    return f"{_PROB}_{task}"


def latents_schema(spec: CodeSpec, tasks: Sequence[str] = ()) -> Any:
    """Return the Arrow schema of the rows that readers get, for codes that follow `spec`, with predictions of further `tasks`."""
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("user", pa.int32()),
            ("item", pa.int32()),
            ("event_ts", pa.int64()),
            ("label_ts", pa.int64()),
            ("available_ts", pa.int64()),
            ("is_event", pa.bool_()),
            (_PROB, pa.float32()),
            *((prob_column(task), pa.float32()) for task in tasks),
            ("code", pa.binary(spec.num_bytes)),
        ]
    )


def make_rows(
    rows: Mapping[str, NDArray[Any]],
    latents: NDArray[np.float32],
    spec: CodeSpec,
    rule: Rule,
    tasks: Sequence[str] = (),
) -> Table:
    """Return rows and their latents as a table of `latents_schema`.

    Args:
        rows: [N] every column but `available_ts` and `code`, in the order of files.
        latents: [N, d].
        spec: of the codes.
        rule: gives `available_ts`.
        tasks: the further ones that have predictions.
    """
    schema = latents_schema(spec, tasks)
    columns = dict(rows)
    label_ts = np.asarray(columns["label_ts"], dtype=np.int64)
    columns["available_ts"] = rule.available(columns["event_ts"], label_ts)
    arrays = [
        code_column(encode(latents, spec))
        if field.name == "code"
        else pa.array(columns[field.name]).cast(field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def write_rows(table: Table, path: Path, rule: Rule) -> None:
    """Write rows of `latents_schema`, sorted by user, event_ts and example_id, as one file, whole or not at all.

    Raises:
        StoreError: the disk is full.
    """
    packed, head = _pack(table, rule)

    def write(staged: Path) -> None:
        with pq.ParquetWriter(
            str(staged),
            packed.schema,
            compression="zstd",
            use_dictionary=False,
            column_encoding={**_ENCODING, **dict.fromkeys(_more(packed.column_names), _FLOATS)},
            write_statistics=["user"],
            store_schema=False,
        ) as out:
            out.write_table(packed, row_group_size=_ROW_GROUP)
            out.add_key_value_metadata({_KEY: head})

    write_atomically(path, write)


def read_rows(
    location: Location,
    spec: CodeSpec,
    columns: Sequence[str] | None = None,
    tasks: Sequence[str] = (),
) -> Table:
    """Return the rows of one file, local or on S3, in the order of the file.

    Args:
        location: of the file.
        spec: of the codes.
        columns: to return, in the order of `latents_schema`; None gives all.
        tasks: the further ones that have predictions.

    Raises:
        StoreError: the file is missing, damaged, or of another format.
    """
    wanted = _wanted(spec, columns, tasks)
    table = read_parquet(location, _stored(wanted))
    return _unpack(table, _header(table.schema.metadata, location), spec, wanted)


def iterate_rows(
    location: Location,
    spec: CodeSpec,
    columns: Sequence[str] | None,
    batch_rows: int,
    tasks: Sequence[str] = (),
) -> Iterator[Table]:
    """Yield what `read_rows` returns in tables of at most `batch_rows`; memory holds one row group at most.

    Raises:
        StoreError: as `read_rows`.
    """
    wanted = _wanted(spec, columns, tasks)
    head = _header(read_parquet_metadata(location), location)
    for table in iter_parquet(location, _stored(wanted), batch_rows):
        yield _unpack(table, head, spec, wanted)


def rows_sha256(columns: Mapping[str, NDArray[Any]]) -> str:
    """Return a digest of rows in order, whichever files they lie in.

    Args:
        columns: all of `latents_schema`, [N] each; `code` as uint8 [N, bytes].
    """
    digest = hashlib.sha256()
    for name, values in columns.items():
        digest.update(f"{name}{values.shape}{values.dtype.str}".encode())
        digest.update(np.ascontiguousarray(values).view(np.uint8).data)
    return digest.hexdigest()


def _pack(table: Table, rule: Rule) -> tuple[Table, str]:
    """Return the table as it lies in the file, and what the file says of it."""
    event_ts, label_ts, available_ts = (
        table.column(name).to_numpy() for name in ("event_ts", "label_ts", "available_ts")
    )
    label_after = label_ts - event_ts
    unit = next((u for u in _UNITS_US if not ((event_ts % u).any() or (label_after % u).any())), 1)
    made = {
        "event_ts": event_ts // unit,
        "label_after": label_after // unit,
        "available_after": available_ts - rule.available(event_ts, label_ts),
    }
    names = [*_ENCODING, *_more(table.column_names)]
    arrays = [pa.array(made[name]) if name in made else table.column(name) for name in names]
    head = {
        "format": LATENTS_FORMAT,
        "unit_us": unit,
        "delay_us": rule.delay_us,
        "waits_for_label": rule.waits_for_label,
    }
    return pa.Table.from_arrays(arrays, names=names), json.dumps(head, sort_keys=True)


def _more(names: Sequence[str]) -> list[str]:
    """Return the columns of predictions of further tasks."""
    return [name for name in names if name.startswith(f"{_PROB}_")]


def _wanted(spec: CodeSpec, columns: Sequence[str] | None, tasks: Sequence[str]) -> list[str]:
    """Return the columns to give, in the order of `latents_schema`."""
    names = latents_schema(spec, tasks).names
    return [name for name in names if columns is None or name in columns]


def _stored(wanted: Sequence[str]) -> list[str]:
    """Return the columns of a file that `wanted` are made from."""
    stored = {part for name in wanted for part in _NEEDS.get(name, (name,))}
    return [name for name in (*_ENCODING, *_more(wanted)) if name in stored]


def _unpack(table: Table, head: tuple[int, Rule], spec: CodeSpec, wanted: Sequence[str]) -> Table:
    """Return the rows of a table as it lies in a file."""
    schema = latents_schema(spec, [name.removeprefix(f"{_PROB}_") for name in _more(wanted)])
    ready = {name: table.column(name) for name in wanted if name not in _NEEDS}
    ready |= _times(table, *head, wanted)
    arrays = [ready[name] for name in wanted]
    return pa.Table.from_arrays(arrays, schema=pa.schema([schema.field(name) for name in wanted]))


def _header(metadata: Mapping[bytes, bytes] | None, location: Location) -> tuple[int, Rule]:
    try:
        head = json.loads((metadata or {})[_KEY.encode()])
        found = head["format"]
        if found == LATENTS_FORMAT:
            return head["unit_us"], Rule(head["delay_us"], head["waits_for_label"])
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(
            f"{location} does not say how its rows are written; run materialize again"
        ) from error
    raise StoreError(
        f"{location} has latents format {found}, this code reads {LATENTS_FORMAT}; run materialize again"
    )


def _times(table: Table, unit: int, rule: Rule, wanted: Sequence[str]) -> dict[str, Any]:
    """Return the columns of absolute times among `wanted`."""
    names = [name for name in wanted if name in _NEEDS]
    if not names:
        return {}
    event_ts = table.column("event_ts").to_numpy() * unit
    made = {"event_ts": event_ts}
    if "label_after" in table.column_names:
        label_ts = event_ts + table.column("label_after").to_numpy() * unit
        made["label_ts"] = label_ts
    if "available_ts" in names:
        expected = rule.available(event_ts, label_ts)
        made["available_ts"] = expected + table.column("available_after").to_numpy()
    return {name: pa.array(made[name]) for name in names}


def rows_columns(table: Table) -> dict[str, NDArray[Any]]:
    """Return the columns of rows as arrays, as `rows_sha256` takes them."""
    return {
        name: code_bytes(table.column(name)) if name == "code" else table.column(name).to_numpy()
        for name in table.column_names
    }
