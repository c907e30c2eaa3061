"""Shards of a latents version: where they lie, what is in them, and the table that lists them.

`shards.parquet` of a version has a row per shard: its counts, the sums for the fingerprint, and checksums of what it was
made from, by which the next version tells what it can take over.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from loopfm_ray.errors import StoreError
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.format import Manifest, file_location
from loopfm_ray.store.tables import read_parquet, write_parquet

__all__ = [
    "SHARDS",
    "SORT_KEYS",
    "ShardStats",
    "latents_schema",
    "merge_fingerprint",
    "parse_shard",
    "parse_stats",
    "read_shard_table",
    "shard_path",
    "write_shard_table",
]

SHARDS = "shards.parquet"
SORT_KEYS = ("user", "event_ts", "example_id")
"""The order of rows."""
_COLUMNS = {
    "period": pa.int32(),
    "bucket": pa.int32(),
    "num_rows": pa.int64(),
    "num_events": pa.int64(),
    "num_bytes": pa.int64(),
    "sums": pa.list_(pa.float64()),
    "squares": pa.list_(pa.float64()),
    "input_sha256": pa.string(),
}


def shard_path(period: int, bucket: int) -> str:
    """Return the path of one shard inside a latents version."""
    return f"period={period:04d}/bucket={bucket:03d}.parquet"


def latents_schema(spec: CodeSpec) -> Any:
    """Return the Arrow schema of a shard whose codes follow `spec`."""
    return pa.schema(
        [
            ("example_id", pa.int64()),
            ("user", pa.int32()),
            ("item", pa.int32()),
            ("event_ts", pa.int64()),
            ("label_ts", pa.int64()),
            ("available_ts", pa.int64()),
            ("is_event", pa.bool_()),
            ("fm_prob", pa.float32()),
            ("code", pa.binary(spec.num_bytes)),
        ]
    )


@dataclass(frozen=True)
class ShardStats:
    """What one shard holds; sums, so that shards merge exactly.

    Attributes:
        period: of the shard.
        bucket: of the shard.
        num_rows: rows.
        num_events: rows that are events.
        num_bytes: of the file.
        sums: of each latent dimension.
        squares: sums of the squares.
        input_sha256: of all that it was made from: the rows, and what the snapshot read for them; empty when not told.
        is_reused: whether it was taken over from the version before.
    """

    period: int
    bucket: int
    num_rows: int
    num_events: int
    num_bytes: int
    sums: tuple[float, ...]
    squares: tuple[float, ...]
    input_sha256: str = ""
    is_reused: bool = False


def merge_fingerprint(stats: Sequence[ShardStats], dim: int) -> dict[str, list[float]]:
    """Return mean and standard deviation of each latent dimension over all shards, in shard order."""
    count = sum(item.num_rows for item in stats)
    ordered = sorted(stats, key=lambda item: (item.period, item.bucket))
    mean = np.zeros(dim)
    square = np.zeros(dim)
    for item in ordered:
        mean += item.sums
        square += item.squares
    mean /= max(count, 1)
    std = np.sqrt(np.maximum(square / max(count, 1) - mean**2, 0.0))
    return {"mean": mean.tolist(), "std": std.tolist()}


def parse_shard(path: str) -> tuple[int, int]:
    """Return `(period, bucket)` of the path of a shard."""
    try:
        folder, name = path.removesuffix(".parquet").split("/")
        return int(folder.removeprefix("period=")), int(name.removeprefix("bucket="))
    except ValueError as error:
        raise StoreError(
            f"{path!r} is no shard of a latents version, expected period=0000/bucket=000.parquet;"
            " remove the version and write it again"
        ) from error


def parse_stats(tree: Mapping[str, Any]) -> ShardStats:  # Any: JSON or a row
    """Return the stats of a JSON tree or a row of the table."""
    return ShardStats(**{**tree, "sums": tuple(tree["sums"]), "squares": tuple(tree["squares"])})


def write_shard_table(stats: Sequence[ShardStats], path: Path) -> None:
    """Write the table of shards, by period and bucket."""
    ordered = sorted(stats, key=lambda item: (item.period, item.bucket))
    rows = [asdict(item) for item in ordered]
    arrays = [pa.array([row[name] for row in rows], kind) for name, kind in _COLUMNS.items()]
    write_parquet(pa.Table.from_arrays(arrays, names=list(_COLUMNS)), path)


def read_shard_table(location: Location, manifest: Manifest) -> dict[tuple[int, int], ShardStats]:
    """Return the stats of every shard of the version at `location` by `(period, bucket)`.

    Raises:
        StoreError: the table can not be read.
    """
    table = read_parquet(file_location(location, manifest, SHARDS))
    found = [parse_stats(row) for row in table.to_pylist()]
    return {(item.period, item.bucket): item for item in found}
