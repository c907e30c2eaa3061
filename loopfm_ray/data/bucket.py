"""The second pass over a log: everything one bucket of users needs, from its spilled rows to its files.

Buckets do not depend on one another, so `prepare_bucket` can be mapped over them in other processes.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.data.entities import Standard
from loopfm_ray.data.past import PastRows, past_features
from loopfm_ray.data.runs import runs
from loopfm_ray.history.asof import newest_visible

__all__ = ["BucketFiles", "BucketTask", "prepare_bucket", "write_arrow"]

# Any: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class BucketTask:
    """What `prepare_bucket` needs to know."""

    bucket: int
    spill: Path
    out_dir: Path
    origin_ts: int
    period_us: int
    count_fields: tuple[str, ...]
    recency: bool
    max_len: int
    are_events_positives: bool
    numeric: tuple[tuple[str, Standard], ...]


@dataclass(frozen=True)
class BucketFiles:
    """The files of one bucket, `(path inside the version, rows)`, and its number of events."""

    files: tuple[tuple[str, int], ...]
    num_events: int


def prepare_bucket(task: BucketTask) -> BucketFiles:
    """Add the past features and history pointers to the rows of one bucket and write its files.

    Reads `items.parquet` of the version being written, for the values that events are counted by.
    """
    with pa.memory_map(str(task.spill)) as source:
        rows = pa.ipc.open_stream(source).read_all().combine_chunks()
    columns = {
        name: rows.column(name).to_numpy() for name in ("user", "item", "event_ts", "label_ts")
    }
    is_event = rows.column("is_event").to_numpy()
    events = _event_table(rows, columns, is_event, task.are_events_positives)
    past = _past_columns(task, columns, events)
    events, start, length = _pointers(task, columns, events)
    files = [_write_events(task, events)]

    numeric = dict(task.numeric)
    out: dict[str, Any] = {
        "example_id": rows.column("example_id"),
        "bucket": np.full(rows.num_rows, task.bucket, dtype=np.int16),
    }
    for name in rows.column_names[1:]:
        values = rows.column(name)
        if name in numeric:
            mean, std = numeric[name]
            scaled = (values.to_numpy() - mean) / std
            values = np.nan_to_num(scaled, nan=0.0).astype(np.float32)
        out[name] = values
    out |= past
    out |= {"raw_start": start, "raw_len": length.astype(np.int32)}
    files += _write_periods(task, pa.table(out), columns["event_ts"])
    return BucketFiles(tuple(files), int(is_event.sum()))


def write_arrow(table: Table, path: Path) -> None:
    """Write a table as one uncompressed Arrow IPC batch, so that readers can map it without copying."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = table.combine_chunks()
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)


def _event_table(
    rows: Table, columns: dict[str, Any], is_event: NDArray[np.bool_], are_positives: bool
) -> dict[str, Any]:
    """Return the history events sorted by user, time and example id."""
    chosen = np.flatnonzero(is_event)
    # Rows come in example order, which is time order: a stable sort by user is enough.
    chosen = chosen[np.argsort(columns["user"][chosen], kind="stable")]
    event_ts = columns["event_ts"][chosen]
    return {
        "example_id": rows.column("example_id").to_numpy()[chosen],
        "user": columns["user"][chosen],
        "item": columns["item"][chosen],
        "event_ts": event_ts,
        "available_ts": np.maximum(event_ts, columns["label_ts"][chosen])
        if are_positives
        else event_ts,
    }


def _past_columns(
    task: BucketTask, columns: dict[str, Any], events: dict[str, Any]
) -> dict[str, NDArray[np.float32]]:
    of_item = [name for name in task.count_fields if name not in ("item", "user")]
    items = pq.read_table(task.out_dir / "items.parquet", columns=of_item)
    tables = {name: items.column(name).to_numpy() for name in of_item}

    def values(rows: dict[str, Any]) -> PastRows:
        item = rows["item"]
        met = {
            name: tables[name][item] if name in tables else rows[name] for name in task.count_fields
        }
        return PastRows(rows["user"], rows["event_ts"], met)

    return past_features(
        values(columns), values(events), events["available_ts"], recency=task.recency
    )


def _pointers(
    task: BucketTask, columns: dict[str, Any], events: dict[str, Any]
) -> tuple[dict[str, Any], Ints, Ints]:
    """Return the events, with copies of rows at the end where no slice would do, and the slice of each row."""
    index = newest_visible(
        (columns["user"], columns["event_ts"]),
        (events["user"], events["event_ts"], events["available_ts"]),
        task.max_len,
    )
    if index.rows is not None:
        events = {name: values[index.rows] for name, values in events.items()}
    return events, index.start, index.length


def _write_events(task: BucketTask, events: dict[str, Any]) -> tuple[str, int]:
    name = f"events/bucket={task.bucket:03d}.arrow"
    write_arrow(pa.table(events), task.out_dir / name)
    return name, len(events["event_ts"])


def _write_periods(task: BucketTask, table: Table, event_ts: Ints) -> list[tuple[str, int]]:
    period = (event_ts - task.origin_ts) // task.period_us
    folder = task.out_dir / f"examples/bucket={task.bucket:03d}"
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for value, start, stop in runs(period):  # rows are in time order
        path = folder / f"period={value:04d}.parquet"
        pq.write_table(
            table.slice(start, stop - start), path, compression="zstd", row_group_size=65_536
        )
        files.append((str(path.relative_to(task.out_dir)), stop - start))
    return files
