"""Examples on disk, by bucket and period, and their reader: in time order or shuffled within windows."""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.errors import SchemaError, StoreError
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.format import file_location
from loopfm_ray.types import TimeRange

__all__ = [
    "ExampleFile",
    "ExampleSet",
    "Rows",
    "concat_rows",
    "count_rows",
    "fetch",
    "iterate_files",
    "iterate_rows",
    "read_rows",
    "rows_of",
]

Rows = dict[str, NDArray[Any]]
"""Columns of examples by name; a sequence field is [n, S] with 0 as padding."""
_NAME = re.compile(r"(?:^|/)bucket=(\d+)/period=(\d+)\.parquet$")
_ORDER = ("event_ts", "example_id")


@dataclass(frozen=True)
class ExampleFile:
    """The examples of one bucket in one period, sorted by time and example id."""

    version: Version
    name: str
    bucket: int
    period: int
    num_rows: int
    period_range: TimeRange
    """What the period spans; all rows lie inside."""

    @property
    def path(self) -> Path:
        """Where the file is on this machine's disk; one on S3 is fetched."""
        return self.version.path(self.name)

    @property
    def source(self) -> Location:
        """Where the file lies, for readers that open S3 themselves."""
        return file_location(self.version.location, self.version.manifest, self.name)


@dataclass(frozen=True)
class ExampleSet:
    """The example files of a version, by period and then by bucket."""

    all_files: tuple[ExampleFile, ...]

    @classmethod
    def open(cls, location: Location, folder: str) -> "ExampleSet":
        """Return the examples in `folder` of the version at `location` (`examples` or `requests`)."""
        return cls.of(open_version(location), folder)

    @classmethod
    def of(cls, version: Version, folder: str) -> "ExampleSet":
        """Return the examples in `folder` of a version.

        Raises:
            StoreError: the manifest does not say how long periods are.
        """
        manifest = version.manifest
        try:
            origin_ts = int(manifest.meta["period_origin_ts"])
            period_us = int(manifest.meta["period_us"])
        except KeyError as error:
            raise StoreError(
                f"{version.location}: the manifest lacks {error} in its meta; write the version again"
            ) from error
        files = []
        for entry in manifest.files:
            match = _NAME.search(entry.path)
            if match is None or not entry.path.startswith(f"{folder}/"):
                continue
            bucket, period = int(match[1]), int(match[2])
            start_ts = origin_ts + period * period_us
            span = TimeRange(start_ts, start_ts + period_us)
            files.append(ExampleFile(version, entry.path, bucket, period, entry.num_rows, span))
        return cls(tuple(sorted(files, key=lambda file: (file.period, file.bucket))))

    def files(
        self, time_range: TimeRange | None = None, buckets: Sequence[int] | None = None
    ) -> list[ExampleFile]:
        """Return the files that can hold rows of `time_range` and `buckets` (None is all), periods first."""
        wanted = None if buckets is None else set(buckets)
        return [
            file
            for file in self.all_files
            if (wanted is None or file.bucket in wanted) and _overlap(file, time_range)
        ]

    def num_rows(
        self, time_range: TimeRange | None = None, buckets: Sequence[int] | None = None
    ) -> int:
        """Return the exact number of rows of `time_range` and `buckets` (None is all)."""
        total = 0
        for file in self.files(time_range, buckets):
            if _covered(file, time_range):
                total += file.num_rows
            else:
                event_ts = pq.read_table(file.path, columns=["event_ts"]).column(0).to_numpy()
                total += int(np.diff(_bounds(event_ts, time_range))[0])
        return total


@dataclass(frozen=True)
class _Window:
    """Files and the part of time that is read from them together."""

    files: tuple[ExampleFile, ...]
    time_range: TimeRange | None


def fetch(files: Sequence[ExampleFile]) -> None:
    """Bring all of `files` to this machine's disk, several at a time; without it each comes when it is read."""
    names: dict[int, tuple[Version, list[str]]] = {}
    for file in files:
        names.setdefault(id(file.version), (file.version, []))[1].append(file.name)
    for version, wanted in names.values():
        version.fetch(wanted)


def iterate_rows(
    files: Sequence[ExampleFile],
    time_range: TimeRange | None = None,
    *,
    columns: Sequence[str] | None = None,
    window_rows: int = 262_144,
    shuffle_seed: int | None = None,
    batch_rows: int = 1024,
) -> Iterator[Rows]:
    """Yield batches of rows, window after window in time.

    Memory holds one window of about `window_rows` rows (more only where that many rows have one time). All batches but
    the last have `batch_rows` rows. The same arguments give the same batches.

    Args:
        files: from `ExampleSet.files`.
        time_range: rows outside are left out; None keeps all.
        columns: the columns to read; None is all.
        window_rows: rows that are read, and shuffled, together.
        shuffle_seed: None keeps time order, ties by example id; else rows are shuffled inside their window.
        batch_rows: rows of a batch.

    Raises:
        SchemaError: a file lacks a column.
    """
    left: Rows = {}
    for number, window in enumerate(_plan(files, time_range, window_rows)):
        rows = _read_window(window, columns)
        size = count_rows(rows)
        if shuffle_seed is None:
            order = np.lexsort((rows["example_id"], rows["event_ts"]))
        else:
            order = np.random.default_rng([shuffle_seed, number]).permutation(size)
        if columns is not None:
            rows = {name: rows[name] for name in columns}
        held = count_rows(left)
        start = 0
        if held:
            start = min(batch_rows - held, size)
            left = concat_rows([left, _take(rows, order[:start])])
            if count_rows(left) < batch_rows:
                continue
            yield left
            left = {}
        for begin in range(start, size, batch_rows):
            batch = _take(rows, order[begin : begin + batch_rows])
            if begin + batch_rows > size:
                left = batch
            else:
                yield batch
    if count_rows(left):
        yield left


def iterate_files(
    files: Sequence[ExampleFile], *, columns: Sequence[str], block_rows: int
) -> Iterator[Rows]:
    """Yield all rows of `files`, file after file, in blocks of `block_rows` rows (the last may have fewer).

    Memory holds one block and one file. These are the blocks that Ray Data gives for the same files in order.

    Raises:
        SchemaError: a file lacks a column.
    """
    held: list[Any] = []  # Any: pyarrow tables
    num_held = 0
    for file in files:
        table = _read_table(file, None, columns)
        held.append(table)
        num_held += table.num_rows
        if num_held < block_rows:
            continue
        joined = pa.concat_tables(held)
        whole = num_held - num_held % block_rows
        for begin in range(0, whole, block_rows):
            yield rows_of(joined.slice(begin, block_rows))
        held, num_held = [joined.slice(whole)], num_held - whole
    if num_held:
        yield rows_of(pa.concat_tables(held))


def read_rows(
    files: Sequence[ExampleFile],
    time_range: TimeRange | None = None,
    *,
    columns: Sequence[str] | None = None,
) -> Rows:
    """Return all rows of `files` within `time_range` at once, in time order, ties by example id."""
    if not files:
        return {}
    rows = _read_window(_Window(tuple(files), time_range), columns)
    order = np.lexsort((rows["example_id"], rows["event_ts"]))
    return _take({name: rows[name] for name in columns or rows}, order)


def rows_of(table: Any) -> Rows:  # Any: a pyarrow table
    """Return the columns of an Arrow table of examples as numpy arrays.

    Lists are padded with 0; fixed-size binary becomes uint8 [N, bytes].
    """
    return {name: _to_numpy(table.column(name)) for name in table.column_names}


def _overlap(file: ExampleFile, time_range: TimeRange | None) -> bool:
    span = file.period_range
    return time_range is None or (
        span.start_ts < time_range.stop_ts and time_range.start_ts < span.stop_ts
    )


def _covered(file: ExampleFile, time_range: TimeRange | None) -> bool:
    span = file.period_range
    return time_range is None or (
        time_range.start_ts <= span.start_ts and span.stop_ts <= time_range.stop_ts
    )


def _bounds(event_ts: NDArray[np.int64], time_range: TimeRange | None) -> NDArray[np.int64]:
    """Return the first row inside the range and the first one after it; `event_ts` is sorted."""
    if time_range is None:
        return np.asarray([0, len(event_ts)])
    return np.searchsorted(event_ts, [time_range.start_ts, time_range.stop_ts], side="left")


def _plan(
    files: Sequence[ExampleFile], time_range: TimeRange | None, window_rows: int
) -> Iterator[_Window]:
    """Cut the files into windows of about `window_rows` rows, each a stretch of time."""
    periods: dict[int, list[ExampleFile]] = {}
    for file in files:
        if _overlap(file, time_range):
            periods.setdefault(file.period, []).append(file)
    held: list[ExampleFile] = []
    for period in sorted(periods):
        num_rows = sum(file.num_rows for file in periods[period])
        if held and sum(file.num_rows for file in held) + num_rows > window_rows:
            yield _Window(tuple(held), time_range)
            held = []
        if num_rows <= window_rows:
            held += periods[period]
        else:
            yield from _split_period(periods[period], time_range, window_rows)
    if held:
        yield _Window(tuple(held), time_range)


def _split_period(
    files: Sequence[ExampleFile], time_range: TimeRange | None, window_rows: int
) -> Iterator[_Window]:
    """Cut one period that is too large for a window at times that give about equal parts."""
    fetch(files)
    times = [pq.read_table(file.path, columns=["event_ts"]).column(0).to_numpy() for file in files]
    inside = [event_ts[slice(*_bounds(event_ts, time_range))] for event_ts in times]
    event_ts = np.sort(np.concatenate(inside))
    if not len(event_ts):
        return
    num_parts = -(-len(event_ts) // window_rows)
    cuts = np.unique(event_ts[(np.arange(num_parts) * len(event_ts)) // num_parts])
    edges = [*cuts.tolist(), int(event_ts[-1]) + 1]
    for start_ts, stop_ts in itertools.pairwise(edges):
        yield _Window(tuple(files), TimeRange(start_ts, stop_ts))


def _read_window(window: _Window, columns: Sequence[str] | None) -> Rows:
    names = None if columns is None else list(dict.fromkeys([*columns, *_ORDER]))
    fetch(window.files)
    parts = [_read_file(file, window.time_range, names) for file in window.files]
    return concat_rows(parts)


def _read_file(
    file: ExampleFile, time_range: TimeRange | None, names: Sequence[str] | None
) -> Rows:
    return rows_of(_read_table(file, time_range, names))


def _read_table(
    file: ExampleFile, time_range: TimeRange | None, names: Sequence[str] | None
) -> Any:  # Any: a pyarrow table
    try:
        with pq.ParquetFile(file.path) as source:
            missing = [name for name in names or () if name not in source.schema_arrow.names]
            if missing:
                raise SchemaError(
                    f"{file.path} has no columns {missing}; it has {source.schema_arrow.names}"
                )
            groups = range(source.num_row_groups)
            span = None if _covered(file, time_range) else time_range
            if span is not None:
                groups = _overlapping_groups(source.metadata, span)
            # One thread a file: many readers share few cores.
            table = source.read_row_groups(list(groups), columns=names, use_threads=False)
    except OSError as error:
        raise StoreError(
            f"{file.path} can not be read: {error}; write the version again"
        ) from error
    if span is not None:
        start, stop = _bounds(table.column("event_ts").to_numpy(), span)
        table = table.slice(start, stop - start)
    return table


def _overlapping_groups(metadata: Any, span: TimeRange) -> range:  # Any: pyarrow's file metadata
    """Return the row groups that can hold rows of `span`; they are in time order."""
    column = metadata.schema.names.index("event_ts")
    stats = [
        metadata.row_group(n).column(column).statistics for n in range(metadata.num_row_groups)
    ]
    inside = [
        n for n, stat in enumerate(stats) if stat.max >= span.start_ts and stat.min < span.stop_ts
    ]
    return range(inside[0], inside[-1] + 1) if inside else range(0)


def _to_numpy(column: Any) -> NDArray[Any]:  # Any: a pyarrow chunked array
    if pa.types.is_fixed_size_binary(column.type):
        return _bytes(column)
    if not pa.types.is_list(column.type):
        values: NDArray[Any] = column.to_numpy()
        return values
    lists = column.combine_chunks()
    if isinstance(lists, pa.ChunkedArray):
        lists = pa.concat_arrays(lists.chunks)
    lengths = pc.list_value_length(lists).to_numpy()
    flat = lists.flatten().to_numpy()
    width = int(lengths.max()) if len(lengths) else 0
    out = np.zeros((len(lengths), width), dtype=flat.dtype)
    out[np.arange(width) < lengths[:, None]] = flat
    return out


def _bytes(column: Any) -> NDArray[np.uint8]:
    """Return [N, bytes] of a fixed-size binary column."""
    size = column.type.byte_width
    parts = [
        np.frombuffer(part.buffers()[1], dtype=np.uint8)[part.offset * size :][: len(part) * size]
        for part in column.chunks
    ]
    flat = np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint8)
    return flat.reshape(len(column), size)


def count_rows(rows: Mapping[str, NDArray[Any]]) -> int:
    """Return the length of the columns of `rows`; 0 without columns."""
    return len(next(iter(rows.values()))) if rows else 0


def _take(rows: Rows, index: NDArray[np.intp]) -> Rows:
    return {name: values[index] for name, values in rows.items()}


def concat_rows(parts: Sequence[Rows]) -> Rows:
    """Return the rows of all parts, in order; sequences are padded with 0 to the widest."""
    if len(parts) == 1:
        return parts[0]
    return {name: _stack([part[name] for part in parts]) for name in (parts[0] if parts else ())}


def _stack(arrays: Sequence[NDArray[Any]]) -> NDArray[Any]:
    if arrays[0].ndim == 1:
        return np.concatenate(arrays)
    width = max(array.shape[1] for array in arrays)
    return np.concatenate(
        [np.pad(array, ((0, 0), (0, width - array.shape[1]))) for array in arrays]
    )
