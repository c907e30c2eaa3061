"""Rewrite a latents version in fewer files, or without what is too old; the foundation model has no part in it.

Daily periods times buckets make many small files. Neighbouring periods of a bucket are put into one file until it has
about `target_rows`. The newest period stays alone: events still come to it, so its file would be made again and again. The
rows stay the same, so the content id does, and nothing that was made from the version is out of date.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa

from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.history.order import time_order
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, draft, file_location, finish, stage
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import Rule, read_rows, write_rows
from loopfm_ray.store.shards import (
    CONTENT_META,
    SHARDS,
    SORT_KEYS,
    ShardFile,
    ShardStats,
    in_shards,
    kept_from,
    latents_meta,
    write_shard_table,
)
from loopfm_ray.store.work import bring

__all__ = ["TARGET_ROWS", "compact", "expire", "plan_files"]

TARGET_ROWS = 1 << 20
"""Rows of a file, about; also what bounds the memory, as a file is put together in memory."""

_MAYBE_META = ("teachers", "tasks")
"""What the meta of some versions tells besides."""
_MADE_META = (
    "latents_format",
    "space",
    *CONTENT_META,
    "kept_from_ts",
    "period_us",
    "period_origin_ts",
)

_log = logging.getLogger(__name__)

# Any below: pyarrow ships no types.
Table = Any


@dataclass(frozen=True)
class _Group:
    """Shards of one bucket that go into one file."""

    shards: tuple[ShardStats, ...]

    @property
    def path(self) -> str:
        return ShardFile.over(item.place for item in self.shards).path

    @property
    def sources(self) -> list[str]:
        return sorted({item.path for item in self.shards})


def compact(
    location: Location, *, target_rows: int = TARGET_ROWS, retention_us: int | None = None
) -> Manifest:
    """Put the small files of the latents version at `location` together, in one commit, and return what lies there.

    Nothing is written if there is nothing to put together. A reader that has a file open keeps it; on a local disk one
    that opens files later must open the version again.

    Args:
        location: a directory or an `s3://` address.
        target_rows: rows of a file, about; a file is made in memory.
        retention_us: periods wholly older than this before the watermark are dropped as well; None keeps all.

    Raises:
        ConfigError: `target_rows` or `retention_us` is not positive.
        StoreError: there is no such version, the disk is full, or on S3 another writer committed meanwhile.
    """
    if target_rows < 1:
        raise ConfigError(f"target_rows must be at least 1, found {target_rows}")
    return _rewrite(location, target_rows, retention_us)


def expire(location: Location, retention_us: int) -> Manifest:
    """Drop the periods that are wholly older than `retention_us` before the watermark, in one commit.

    Files without such periods stay as they are. What was dropped is gone from a local disk when this returns. On S3
    the folder of the version before stays for readers that have yet to switch, and goes with the next commit.

    Raises:
        ConfigError: `retention_us` is not positive.
        StoreError: as `compact`, or the version does not say how long its periods are.
    """
    return _rewrite(location, None, retention_us)


def plan_files(
    shards: Iterable[ShardStats], target_rows: int | None
) -> list[tuple[ShardStats, ...]]:
    """Return which shards of one version share a file, from which files they lie in now.

    Files of a bucket are taken in the order of their periods and put together while they have `target_rows` at most. No
    file is split, the newest period of the version stays alone, and a plan of planned files is the same again. Without
    `target_rows` every file stays what it is.
    """
    files: dict[tuple[int, str], list[ShardStats]] = {}
    for item in sorted(shards, key=lambda item: (item.bucket, item.period)):
        files.setdefault((item.bucket, item.path), []).append(item)
    newest = max((item.period for items in files.values() for item in items), default=0)
    groups: list[list[ShardStats]] = []
    for items in files.values():
        last = groups[-1] if groups else []
        is_closed = all(item.period < newest for item in items)
        is_next = bool(last) and last[0].bucket == items[0].bucket
        fits = target_rows is not None and _num_rows(last) + _num_rows(items) <= target_rows
        if is_next and is_closed and fits:
            last.extend(items)
        else:
            groups.append(list(items))
    return [tuple(group) for group in groups]


def _rewrite(location: Location, target_rows: int | None, retention_us: int | None) -> Manifest:
    with stage(location) as staged:
        # read after staging: on S3 that is when the claim on what lies there is made
        reader = LatentsReader(location)
        shards = reader.shards
        kept = _unexpired(reader, retention_us)
        groups = [_Group(items) for items in plan_files(kept, target_rows)]
        is_same = len(kept) == len(shards) and len(groups) == len(reader.files)
        if is_same:
            return reader.manifest
        written = [item for group in groups for item in _write(reader, group, staged)]
        write_shard_table(written, staged / SHARDS)
        manifest = _draft(reader, written, retention_us)
        manifest = finish(staged, Path(str(location)), manifest, replace_other=True)
    _log.info("latents %s: %s", manifest.version, manifest.record)
    return manifest


def _unexpired(reader: LatentsReader, retention_us: int | None) -> list[ShardStats]:
    """Return the shards whose period is not wholly older than the retention."""
    if retention_us is None:
        return list(reader.shards.values())
    if retention_us <= 0:
        raise ConfigError(f"the retention must be positive, found {retention_us} microseconds")
    meta = reader.manifest.meta
    length, origin_ts = meta["period_us"], meta["period_origin_ts"]
    if length is None:
        raise StoreError(
            f"{reader.location} does not say how long its periods are, so none can expire; run materialize again"
        )
    first_ts = kept_from(meta["watermark_ts"], retention_us, length, origin_ts)
    return [item for item in reader.shards.values() if origin_ts + item.period * length >= first_ts]


def _write(reader: LatentsReader, group: _Group, staged: Path) -> list[ShardStats]:
    """Write the file of a group, or take it over if it is one already; return its stats with the new path."""
    sources = group.sources
    path = staged / group.path
    num_there = sum(item.path in sources for item in reader.shards.values())
    if len(sources) == 1 and num_there == len(group.shards):
        bring(file_location(reader.location, reader.manifest, sources[0]), path)
    else:
        _check_apart(reader.location, group.shards)
        meta = reader.manifest.meta
        write_rows(_merged(reader, group), path, Rule(meta["delay_us"], meta["waits_for_label"]))
    return [replace(item, path=group.path) for item in group.shards]


def _merged(reader: LatentsReader, group: _Group) -> Table:
    """Return the rows of a group, sorted."""
    parts = []
    for source in group.sources:
        place = file_location(reader.location, reader.manifest, source)
        rows = read_rows(place, reader.spec, tasks=reader.tasks)
        mine = [item for item in group.shards if item.path == source]
        chosen = in_shards(rows.column("event_ts").to_numpy(), mine)
        parts.append(rows if chosen.all() else rows.filter(pa.array(chosen)))
    table = pa.concat_tables(parts)
    expected = _num_rows(group.shards)
    if table.num_rows != expected:
        raise StoreError(
            f"{group.sources} of {reader.location} have {table.num_rows} rows of the periods wanted, expected"
            f" {expected}; remove the version and run materialize again"
        )
    order = time_order(*(table.column(name).to_numpy() for name in SORT_KEYS))
    return table.take(pa.array(order))


def _check_apart(location: Location, shards: Sequence[ShardStats]) -> None:
    """Make sure that times tell the shards of a file apart."""
    before: ShardStats | None = None
    for item in sorted(
        (item for item in shards if item.num_rows), key=lambda item: (item.min_ts, item.max_ts)
    ):
        if before is not None and item.min_ts <= before.max_ts:
            raise StoreError(
                f"periods {before.period} and {item.period} of bucket {item.bucket} of {location} overlap in time,"
                " so they can not share a file; remove the version and run materialize again"
            )
        before = item


def _draft(
    reader: LatentsReader, shards: Sequence[ShardStats], retention_us: int | None
) -> Manifest:
    """Return the manifest of the same version in other files, or with fewer shards."""
    before = reader.manifest
    made = {name: before.meta[name] for name in _MADE_META}
    made |= {name: before.meta[name] for name in _MAYBE_META if name in before.meta}
    if retention_us is not None:
        period = (made["period_us"], made["period_origin_ts"])
        first_ts = kept_from(made["watermark_ts"], retention_us, *period)
        made["kept_from_ts"] = max(made["kept_from_ts"], first_ts)
    manifest = draft(
        kind="latents",
        config_hash=before.config_hash,
        inputs=before.inputs,
        meta=latents_meta(made, shards),
        num_rows=_num_rows(shards),
        record={
            "previous": before.version,
            "num_expired": len(reader.shards) - len(shards),
            "num_files_before": len(reader.files),
            "num_files": len({item.path for item in shards}),
        },
    )
    # the code that embedded the rows: another must not take them over
    return replace(manifest, code_version=before.code_version)


def _num_rows(shards: Iterable[ShardStats]) -> int:
    return sum(item.num_rows for item in shards)
