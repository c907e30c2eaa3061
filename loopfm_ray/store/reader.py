"""Read a latents version, local or on S3."""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa

from loopfm_ray.history.order import time_order
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.rows import iterate_rows, latents_schema, read_rows
from loopfm_ray.store.shards import (
    SHARDS,
    SORT_KEYS,
    Place,
    ShardFile,
    ShardStats,
    check_latents,
    in_shards,
    read_shard_table,
)

__all__ = ["LatentsReader"]

# Any: pyarrow ships no types.
Table = Any


class LatentsReader:
    """Reads one latents version, local or on S3, compacted or not."""

    def __init__(self, location: Location) -> None:
        """Open the version at `location`.

        Raises:
            StoreError: there is none, or it is of another kind or format.
        """
        self.location = location
        self._version = open_version(location)
        self.manifest = self._version.manifest
        check_latents(location, self.manifest)
        self.spec = CodeSpec.from_tree(self.manifest.meta["code_spec"])
        self.tasks = tuple(self.manifest.meta.get("tasks", ()))
        """The further tasks that rows have predictions of, beside the first."""
        self.files = sorted(
            ShardFile.parse(entry.path) for entry in self.manifest.files if entry.path != SHARDS
        )

    @cached_property
    def shards(self) -> dict[Place, ShardStats]:
        """What every shard holds, by `(period, bucket)`."""
        return read_shard_table(self.location, self.manifest)

    @property
    def buckets(self) -> list[int]:
        """The buckets that have shards."""
        return sorted({file.bucket for file in self.files})

    @property
    def periods(self) -> list[int]:
        """The periods that have shards."""
        if all(file.first == file.last for file in self.files):
            return sorted({file.first for file in self.files})
        return sorted({period for period, _ in self.shards})

    def num_rows(self, bucket: int) -> int:
        """Return how many rows one bucket has, from the manifest alone."""
        return sum(
            entry.num_rows
            for entry in self.manifest.files
            if entry.path != SHARDS and ShardFile.parse(entry.path).bucket == bucket
        )

    def iter_bucket(self, bucket: int, columns: Sequence[str], batch_rows: int) -> Iterator[Table]:
        """Yield the rows of one bucket file by file, in tables of at most `batch_rows`.

        Files come in the order of their periods, rows in the order of the file, columns in that of the schema.
        """
        sizes = {entry.path: entry.num_rows for entry in self.manifest.files}
        for file in self.files:
            if file.bucket != bucket:
                continue
            place = self._version.path(file.path)
            if sizes[file.path] <= batch_rows:
                yield read_rows(place, self.spec, columns, self.tasks)
            else:
                yield from iterate_rows(place, self.spec, columns, batch_rows, self.tasks)

    def read_bucket(
        self,
        bucket: int,
        *,
        columns: Sequence[str] | None = None,
        periods: Sequence[int] | None = None,
        events_only: bool = False,
    ) -> Table:
        """Return the rows of one bucket, sorted by user, event_ts and example_id.

        Args:
            bucket: to read.
            columns: to return; None gives all.
            periods: to read; None reads all.
            events_only: whether to leave out rows that are no events.
        """
        schema = latents_schema(self.spec, self.tasks)
        wanted = list(columns) if columns is not None else schema.names
        extra = {*SORT_KEYS, "is_event"} if events_only else {*SORT_KEYS}
        needed = [name for name in schema.names if name in {*wanted, *extra}]
        files = [file for file in self.files if file.bucket == bucket and _overlaps(file, periods)]
        self._version.fetch(file.path for file in files)
        parts = [self._read(file, needed, periods) for file in files]
        empty = pa.schema([schema.field(name) for name in needed]).empty_table()
        table = pa.concat_tables(parts) if parts else empty
        if events_only:
            table = table.filter(table.column("is_event"))
        if len(parts) > 1:  # one file is sorted
            order = time_order(*(table.column(name).to_numpy() for name in SORT_KEYS))
            table = table.take(pa.array(order))
        return table.select(wanted).combine_chunks()

    def _read(self, file: ShardFile, columns: list[str], periods: Sequence[int] | None) -> Table:
        """Return the rows of one file that lie in `periods`."""
        table = read_rows(self._version.path(file.path), self.spec, columns, self.tasks)
        if periods is None or file.first == file.last:
            return table
        chosen = [
            item
            for item in self.shards.values()
            if item.path == file.path and item.period in periods
        ]
        return table.filter(pa.array(in_shards(table.column("event_ts").to_numpy(), chosen)))


def _overlaps(file: ShardFile, periods: Sequence[int] | None) -> bool:
    return periods is None or any(file.first <= period <= file.last for period in periods)
