"""The point-in-time join of requests with the latents version: what the vertical models train on.

Each bucket of users is one task that depends on no other, so `join_bucket` can be mapped over them in other processes.
Per bucket it writes `history/bucket=000.arrow`, the events with their codes, and
`requests/bucket=000/period=0000.parquet`, the examples with the teacher prediction and the slice of the history that was
visible at each. Where histories of other keys are asked for, buckets of users first deal their rows to places of these
keys (`keyed`), each again a task of its own.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from loopfm_ray.config import config_hash
from loopfm_ray.data.joined import source_of
from loopfm_ray.data.prepare import Mapper, serial
from loopfm_ray.errors import ConfigError, LeakError, StoreError
from loopfm_ray.history.bucket import join_bucket
from loopfm_ray.history.keyed import DealTask, PlaceTask, deal_bucket, join_place
from loopfm_ray.history.keys import KeyReader
from loopfm_ray.history.settings import (
    JoinSettings,
    JoinStats,
    JoinTask,
    KeyedPlaces,
    StoredSide,
    merge_stats,
)
from loopfm_ray.store.cache import Version, VersionFile, open_version
from loopfm_ray.store.filesystem import Location, remove_tree
from loopfm_ray.store.manifest import Manifest, commit, read_manifest, stage
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.space import Space
from loopfm_ray.store.teachers import teachers_of
from loopfm_ray.types import TimeRange

__all__ = [
    "JoinSettings",
    "JoinStats",
    "JoinTask",
    "StoredSide",
    "join_bucket",
    "joined_hash",
    "joined_meta",
    "merge_stats",
    "plan_join",
    "write_joined",
]

_DEALT = "_dealt"
"""Folder of a version being written, in which rows wait for their place."""
_EXAMPLES = re.compile(r"examples/bucket=(\d+)/period=(\d+)\.parquet")


def plan_join(
    prepared: Location,
    latents: Location,
    out_dir: Path,
    time_range: TimeRange,
    settings: JoinSettings,
) -> list[JoinTask]:
    """Return one task per bucket of the prepared version that has requests or events that requests may see.

    Those without requests, `examples` being empty, matter to histories of other keys than the user alone.

    Raises:
        LeakError: the range begins before the snapshot may embed.
        ConfigError: the examples lack what is to be kept of events.
        StoreError: there are no examples in the range, or the latents stop before its end.
    """
    version = open_version(prepared)
    manifest = version.manifest
    meta = read_manifest(latents).meta
    if time_range.start_ts <= meta["trained_until_ts"]:
        raise LeakError(
            f"requests from {time_range.start_ts} on include some that snapshot {meta['snapshot_id']} was trained on"
            f" (until {meta['trained_until_ts']}); start the requests later or use an earlier snapshot"
        )
    origin_ts, period_us = manifest.meta["period_origin_ts"], manifest.meta["period_us"]
    files: dict[int, list[tuple[int, VersionFile]]] = {}
    earlier: dict[int, list[tuple[int, VersionFile]]] = {}
    for entry in manifest.files:
        match = _EXAMPLES.fullmatch(entry.path)
        if match is None:
            continue
        bucket, period = int(match[1]), int(match[2])
        begin = origin_ts + period * period_us
        stop = begin + period_us
        if begin >= time_range.stop_ts:
            continue
        # before the requests only what was kept counts; a request without its latent is told of, not left out
        if stop <= min(meta["kept_from_ts"], time_range.start_ts):
            continue
        found = files if stop > time_range.start_ts else earlier
        found.setdefault(bucket, []).append((period, VersionFile(version, entry.path)))
    if not files:
        raise StoreError(
            f"{prepared} has no examples from {time_range.start_ts} to {time_range.stop_ts}; check data.split"
        )
    _check_side(version, settings.side)
    for key in settings.keys:
        KeyReader(prepared, key)
    return [
        JoinTask(
            bucket,
            _by_period(files.get(bucket, [])),
            latents,
            out_dir,
            time_range,
            settings,
            _by_period(earlier.get(bucket, [])),
        )
        for bucket in sorted({*files, *earlier})
    ]


def _check_side(prepared: Version, side: StoredSide) -> None:
    """Check that the examples have what is to be kept of events."""
    if not side.origins:
        return
    first = next(e.path for e in prepared.manifest.files if _EXAMPLES.fullmatch(e.path))
    known = pq.read_schema(prepared.path(first)).names
    for name, origin in side.origins.items():
        if origin not in known:
            raise ConfigError(
                f"history.side.{name} is {origin!r}, which is no column of the examples of {prepared.location}, they have"
                f" {known}; name one of them"
            )


def _by_period(files: list[tuple[int, VersionFile]]) -> tuple[tuple[int, VersionFile], ...]:
    return tuple(sorted(files, key=lambda item: item[0]))


def write_joined(
    prepared: Location,
    latents: Location,
    final_dir: Location,
    time_range: TimeRange,
    settings: JoinSettings,
    *,
    mapper: Mapper = serial,
    replace_other: bool = False,
) -> Manifest:
    """Join all buckets and commit the "joined" version at `final_dir`.

    Raises:
        StoreError: a request has no teacher prediction, or `final_dir` holds something else.
    """
    with stage(final_dir) as staged:
        tasks = plan_join(prepared, latents, staged, time_range, settings)
        source, origin = read_manifest(latents), read_manifest(prepared)
        places = KeyedPlaces(staged / _DEALT, int(origin.meta["num_buckets"]))
        keyed = _join_keys(tasks, prepared, places, mapper) if settings.keys else {}
        asked = [replace(task, keyed=places) for task in tasks if task.examples]
        stats = merge_stats(list(mapper(join_bucket, asked)))
        remove_tree(places.folder)
        return commit(
            staged,
            kind="joined",
            config_hash=joined_hash(settings, time_range),
            inputs={"prepared": origin.version, "latents": source.content},
            meta={**joined_meta(origin, source, time_range, settings, stats), "histories": keyed},
            num_rows=stats.num_requests,
            replace_other=replace_other,
        )


def _join_keys(
    tasks: Sequence[JoinTask], prepared: Location, places: KeyedPlaces, mapper: Mapper
) -> dict[str, dict[str, Any]]:  # Any: JSON
    """Join the histories of all keys, but for the buckets of users that ask; return what each is, by source."""
    first, num_places = tasks[0], places.num_places
    settings = first.settings
    deals = [DealTask(task, prepared, num_places, places.folder) for task in tasks]
    list(mapper(deal_bucket, deals))
    spec = LatentsReader(first.latents).spec
    buckets = tuple(task.bucket for task in tasks)
    found = {}
    for key in settings.keys:
        own = [
            PlaceTask(key, place, buckets, spec, settings, places.folder, first.out_dir)
            for place in range(num_places)
        ]
        stats = merge_stats(list(mapper(join_place, own)))
        found[source_of(key)] = {
            "key": list(key),
            "max_len": settings.max_len,
            **_stats_meta(stats),
        }
    return found


def joined_hash(settings: JoinSettings, time_range: TimeRange) -> str:
    """Return the config hash of a joined version."""
    return config_hash(settings.content, time_range.start_ts, time_range.stop_ts)


def joined_meta(
    prepared: Manifest,
    latents: Manifest,
    time_range: TimeRange,
    settings: JoinSettings,
    stats: JoinStats,
) -> dict[str, Any]:  # Any: JSON
    """Return the meta of the manifest of a joined version."""
    return {
        **Space.of_meta(latents.meta).to_meta(),
        **{name: latents.meta[name] for name in ("trained_until_ts", "watermark_ts")},
        **{name: prepared.meta[name] for name in ("num_buckets", "period_us", "period_origin_ts")},
        "latents_version": latents.content,
        "max_len": settings.max_len,
        "retention_us": settings.retention_us,
        "with_own_latent": settings.with_own_latent,
        "side": settings.side.origins,
        "start_ts": time_range.start_ts,
        "stop_ts": time_range.stop_ts,
        "teachers": [asdict(one) for one in teachers_of(latents.meta)],
        "num_late_scores": stats.num_late_scores,
        **({"tasks": latents.meta["tasks"]} if "tasks" in latents.meta else {}),
        **_stats_meta(stats),
    }


def _stats_meta(stats: JoinStats) -> dict[str, Any]:  # Any: JSON
    return {
        "coverage": stats.coverage,
        "mean_length": stats.mean_length,
        "num_history_rows": stats.num_history_rows,
        "num_extra_rows": stats.num_extra_rows,
        "staleness_s": stats.staleness.quantiles(),
    }
