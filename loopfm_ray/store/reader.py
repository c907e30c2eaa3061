"""Read a latents version, local or on S3."""

from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa

from loopfm_ray.errors import StoreError
from loopfm_ray.history.order import time_order
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.format import file_location, read_manifest
from loopfm_ray.store.shards import SHARDS, SORT_KEYS, latents_schema, parse_shard, shard_path
from loopfm_ray.store.tables import iter_parquet, read_parquet

__all__ = ["LatentsReader"]

# Any: pyarrow ships no types.
Table = Any


class LatentsReader:
    """Reads one latents version, local or on S3."""

    def __init__(self, location: Location) -> None:
        """Open the version at `location`.

        Raises:
            StoreError: there is none, or it is of another kind.
        """
        self.location = location
        self.manifest = read_manifest(location)
        if self.manifest.kind != "latents":
            raise StoreError(
                f"{location} holds a version of kind {self.manifest.kind!r}, expected 'latents';"
                " give the directory that materialize wrote"
            )
        self.spec = CodeSpec.from_tree(self.manifest.meta["code_spec"])
        self._shards = sorted(
            parse_shard(entry.path) for entry in self.manifest.files if entry.path != SHARDS
        )

    @property
    def buckets(self) -> list[int]:
        """The buckets that have shards."""
        return sorted({bucket for _, bucket in self._shards})

    @property
    def periods(self) -> list[int]:
        """The periods that have shards."""
        return sorted({period for period, _ in self._shards})

    def num_rows(self, bucket: int) -> int:
        """Return how many rows one bucket has, from the manifest alone."""
        return sum(
            entry.num_rows
            for entry in self.manifest.files
            if entry.path != SHARDS and parse_shard(entry.path)[1] == bucket
        )

    def iter_bucket(self, bucket: int, columns: Sequence[str], batch_rows: int) -> Iterator[Table]:
        """Yield the rows of one bucket shard by shard, in tables of at most `batch_rows`.

        Rows come in the order of periods and, within one, of the file; columns in the order of the schema.
        """
        wanted = [name for name in latents_schema(self.spec).names if name in columns]
        sizes = {entry.path: entry.num_rows for entry in self.manifest.files}
        for period, owner in self._shards:
            if owner != bucket:
                continue
            path = shard_path(period, bucket)
            place = file_location(self.location, self.manifest, path)
            if sizes[path] <= batch_rows:
                yield read_parquet(place, wanted)
            else:
                yield from iter_parquet(place, wanted, batch_rows)

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
        schema = latents_schema(self.spec)
        wanted = list(columns) if columns is not None else schema.names
        needed = [name for name in schema.names if name in {*wanted, *SORT_KEYS, "is_event"}]
        parts = [
            read_parquet(
                file_location(self.location, self.manifest, shard_path(period, bucket)), needed
            )
            for period, owner in self._shards
            if owner == bucket and (periods is None or period in periods)
        ]
        empty = pa.schema([schema.field(name) for name in needed]).empty_table()
        table = pa.concat_tables(parts) if parts else empty
        if events_only:
            table = table.filter(table.column("is_event"))
        order = time_order(*(table.column(name).to_numpy() for name in SORT_KEYS))
        return table.select(wanted).take(pa.array(order)).combine_chunks()
