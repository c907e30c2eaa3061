"""Read a latents version, local or on S3."""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from loopfm_ray.history.order import time_order
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.shards import SHARDS, SORT_KEYS, latents_schema, parse_shard, shard_path
from loopfm_ray.store.tables import read_parquet

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
        self._version = open_version(location, "latents")
        self.manifest = self._version.manifest
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
        names = [
            shard_path(period, owner)
            for period, owner in self._shards
            if owner == bucket and (periods is None or period in periods)
        ]
        folder = self._version.fetch(names)
        parts = [read_parquet(folder / name, needed) for name in names]
        empty = pa.schema([schema.field(name) for name in needed]).empty_table()
        table = pa.concat_tables(parts) if parts else empty
        if events_only:
            table = table.filter(table.column("is_event"))
        order = time_order(*(table.column(name).to_numpy() for name in SORT_KEYS))
        return table.select(wanted).take(pa.array(order)).combine_chunks()
