"""Shards of a latents version: what is in them, in which file each lies, and what names their rows.

A shard is the rows of one period and bucket. A file holds one shard, or, once compacted, several of one bucket.
`shards.parquet` of a version has a row per shard: its file, its counts, the sums for the fingerprint, a checksum of what
it was made from, by which the next version tells what it can take over, and one of its rows, which together name the
content of the version.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.config import config_hash
from loopfm_ray.errors import StoreError
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.format import Manifest, file_location
from loopfm_ray.store.rows import LATENTS_FORMAT
from loopfm_ray.store.tables import read_parquet, write_parquet

__all__ = [
    "CONTENT_META",
    "SHARDS",
    "SORT_KEYS",
    "Place",
    "ShardFile",
    "ShardStats",
    "check_latents",
    "content_id",
    "describe_rows",
    "in_shards",
    "is_listed",
    "kept_from",
    "latents_meta",
    "merge_fingerprint",
    "parse_stats",
    "read_shard_table",
    "shard_path",
    "write_shard_table",
]

SHARDS = "shards.parquet"
SORT_KEYS = ("user", "event_ts", "example_id")
"""The order of rows in every file."""
CONTENT_META = (
    "snapshot_id",
    "trained_until_ts",
    "code_spec",
    "delay_us",
    "waits_for_label",
    "watermark_ts",
)
"""What of the meta belongs to the content beside the rows."""
_COLUMNS = {
    "period": pa.int32(),
    "bucket": pa.int32(),
    "path": pa.string(),
    "num_rows": pa.int64(),
    "num_events": pa.int64(),
    "min_ts": pa.int64(),
    "max_ts": pa.int64(),
    "sums": pa.list_(pa.float64()),
    "squares": pa.list_(pa.float64()),
    "input_sha256": pa.string(),
    "rows_sha256": pa.string(),
}

# Any below: pyarrow ships no types.
Table = Any
Place = tuple[int, int]
"""`(period, bucket)` of a shard."""


@dataclass(frozen=True, order=True)
class ShardFile:
    """A file of a latents version: shards of one bucket from period `first` to `last`, perhaps not all of them."""

    first: int
    last: int
    bucket: int

    @classmethod
    def over(cls, places: Iterable[Place]) -> "ShardFile":
        """Return the file of these shards of one bucket."""
        periods, buckets = zip(*places, strict=True)
        return cls(min(periods), max(periods), buckets[0])

    @classmethod
    def parse(cls, path: str) -> "ShardFile":
        """Return the file at a path inside a latents version.

        Raises:
            StoreError: no shard lies at such a path.
        """
        try:
            folder, name = path.removesuffix(".parquet").split("/")
            first, _, last = folder.removeprefix("period=").partition("-")
            return cls(int(first), int(last or first), int(name.removeprefix("bucket=")))
        except ValueError as error:
            raise StoreError(
                f"{path!r} is no shard of a latents version, expected period=0000/bucket=000.parquet or"
                " period=0000-0001/bucket=000.parquet; remove the version and write it again"
            ) from error

    @property
    def path(self) -> str:
        """The path inside the version."""
        span = f"{self.first:04d}"
        if self.last != self.first:
            span += f"-{self.last:04d}"
        return f"period={span}/bucket={self.bucket:03d}.parquet"


def shard_path(period: int, bucket: int) -> str:
    """Return the path of the file that holds one shard alone."""
    return ShardFile(period, period, bucket).path


@dataclass(frozen=True)
class ShardStats:
    """What one shard holds; sums, so that shards merge exactly.

    Attributes:
        period: of the shard.
        bucket: of the shard.
        path: of its file inside the version.
        num_rows: rows.
        num_events: rows that are events.
        min_ts: `event_ts` of the first; the shards of a bucket do not overlap in time.
        max_ts: `event_ts` of the last; before `min_ts` when there is none.
        sums: of each latent dimension.
        squares: sums of the squares.
        input_sha256: of all that it was made from: the rows, and what the snapshot read for them; empty when not told.
        rows_sha256: of its rows in order (`rows.rows_sha256`), whatever file they lie in.
        is_reused: whether it was taken over from the version before.
    """

    period: int
    bucket: int
    path: str
    num_rows: int
    num_events: int
    min_ts: int
    max_ts: int
    sums: tuple[float, ...]
    squares: tuple[float, ...]
    input_sha256: str = ""
    rows_sha256: str = ""
    is_reused: bool = False

    @property
    def place(self) -> Place:
        """`(period, bucket)`."""
        return self.period, self.bucket


def describe_rows(
    columns: Mapping[str, NDArray[Any]], latents: NDArray[np.float32]
) -> dict[str, Any]:
    """Return counts, times and sums of the rows of one shard, as `ShardStats` takes them."""
    wide, times = latents.astype(np.float64), columns["event_ts"]
    return {
        "num_rows": len(times),
        "num_events": int(np.count_nonzero(columns["is_event"])),
        "min_ts": int(times.min()) if len(times) else 0,
        "max_ts": int(times.max()) if len(times) else -1,
        "sums": tuple(wide.sum(axis=0).tolist()),
        "squares": tuple(np.square(wide).sum(axis=0).tolist()),
    }


def in_shards(event_ts: NDArray[np.int64], shards: Iterable[ShardStats]) -> NDArray[np.bool_]:
    """Return [N] which rows of a file belong to one of `shards`, all of its bucket."""
    chosen = np.zeros(len(event_ts), dtype=bool)
    for item in shards:
        chosen |= (event_ts >= item.min_ts) & (event_ts <= item.max_ts)
    return chosen


def merge_fingerprint(stats: Sequence[ShardStats], dim: int) -> dict[str, list[float]]:
    """Return mean and standard deviation of each latent dimension over all shards, in shard order."""
    count = sum(item.num_rows for item in stats)
    mean = np.zeros(dim)
    square = np.zeros(dim)
    for item in sorted(stats, key=lambda item: item.place):
        mean += item.sums
        square += item.squares
    mean /= max(count, 1)
    std = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 0.0))
    return {"mean": mean.tolist(), "std": std.tolist()}


def content_id(stats: Iterable[ShardStats], meta: Mapping[str, Any]) -> str:  # Any: JSON
    """Return 16 hex digits that name what readers of a latents version get, however it is laid out in files.

    Args:
        stats: of all shards; those without rows do not count.
        meta: of the version.
    """
    rows = sorted([*item.place, item.num_rows, item.rows_sha256] for item in stats if item.num_rows)
    return config_hash({name: meta[name] for name in CONTENT_META}, rows)


def latents_meta(made: Mapping[str, Any], stats: Sequence[ShardStats]) -> dict[str, Any]:
    """Return the meta of a latents version: how it was `made`, and what follows from its shards."""
    return {
        **made,
        "num_events": sum(item.num_events for item in stats),
        "fingerprint": merge_fingerprint(stats, CodeSpec.from_tree(made["code_spec"]).dim),
        "content": content_id(stats, made),
    }


def kept_from(watermark_ts: int, retention_us: int, period_us: int, origin_ts: int) -> int:
    """Return when the oldest period begins that is not wholly older than `retention_us` before the watermark."""
    return origin_ts + (watermark_ts - retention_us - origin_ts) // period_us * period_us


def is_listed(manifest: Manifest) -> bool:
    """Return whether a version has a table of its shards."""
    return any(entry.path == SHARDS for entry in manifest.files)


def parse_stats(tree: Mapping[str, Any]) -> ShardStats:  # Any: JSON or a row
    """Return the stats of a JSON tree or a row of the table."""
    return ShardStats(**{**tree, "sums": tuple(tree["sums"]), "squares": tuple(tree["squares"])})


def write_shard_table(stats: Iterable[ShardStats], path: Path) -> None:
    """Write the table of shards, by period and bucket."""
    rows = [asdict(item) for item in sorted(stats, key=lambda item: item.place)]
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in _COLUMNS.items()]
    write_parquet(pa.Table.from_arrays(arrays, names=list(_COLUMNS)), path)


def read_shard_table(location: Location, manifest: Manifest) -> dict[Place, ShardStats]:
    """Return the stats of every shard of the version at `location` by `(period, bucket)`.

    Raises:
        StoreError: the table can not be read.
    """
    table = read_parquet(file_location(location, manifest, SHARDS))
    found = [parse_stats(row) for row in table.to_pylist()]
    return {item.place: item for item in found}


def check_latents(location: Location, manifest: Manifest) -> None:
    """Make sure that a version holds latents that this code can read.

    Raises:
        StoreError: it is of another kind, or its files of another format.
    """
    if manifest.kind != "latents":
        raise StoreError(
            f"{location} holds a version of kind {manifest.kind!r}, expected 'latents';"
            " give the directory that materialize wrote"
        )
    found = manifest.meta.get("latents_format", 1)
    if found != LATENTS_FORMAT:
        raise StoreError(
            f"{location} has latents format {found}, this code reads {LATENTS_FORMAT}; run materialize again"
        )
