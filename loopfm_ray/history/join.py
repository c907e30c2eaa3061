"""The point-in-time join of requests with the latents version: what the vertical models train on.

Each bucket of users is one task that depends on no other, so `join_bucket` can be mapped over them in other processes.
Per bucket it writes `history/bucket=000.arrow`, the events with their codes, and
`requests/bucket=000/period=0000.parquet`, the examples with the teacher prediction and the slice of the history that was
visible at each.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.config import config_hash
from loopfm_ray.data.prepare import Mapper, serial
from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.history.asof import HistoryIndex, newest_visible
from loopfm_ray.history.staleness import StalenessSketch
from loopfm_ray.store.cache import VersionFile, open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, commit, read_manifest, stage
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.tables import read_parquet, write_ipc, write_parquet
from loopfm_ray.types import TimeRange

__all__ = [
    "JoinSettings",
    "JoinStats",
    "JoinTask",
    "join_bucket",
    "joined_meta",
    "merge_stats",
    "plan_join",
    "write_joined",
]

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]

HISTORY_COLUMNS = ("example_id", "user", "item", "event_ts", "available_ts", "code")
_EXAMPLES = re.compile(r"examples/bucket=(\d+)/period=(\d+)\.parquet")


@dataclass(frozen=True)
class JoinSettings:
    """What a history is: its longest length, and how old an event may be; None keeps all."""

    max_len: int
    retention_us: int | None = None


@dataclass(frozen=True)
class JoinTask:
    """What `join_bucket` needs to know; `examples` are `(period, file)` of the bucket, local or of a version."""

    bucket: int
    examples: tuple[tuple[int, Path | VersionFile], ...]
    latents: Location
    out_dir: Path
    time_range: TimeRange
    settings: JoinSettings


@dataclass(frozen=True)
class JoinStats:
    """What the join found; sums, so that buckets merge exactly.

    `coverage` is the share of requests with a history; staleness is the age of its newest event.
    """

    num_requests: int = 0
    num_with_history: int = 0
    sum_length: int = 0
    num_history_rows: int = 0
    num_extra_rows: int = 0
    staleness: StalenessSketch = field(default_factory=StalenessSketch)

    @property
    def coverage(self) -> float:
        """Share of requests that have a history; 0 without requests."""
        return self.num_with_history / max(self.num_requests, 1)

    @property
    def mean_length(self) -> float:
        """Mean history length over all requests; 0 without requests."""
        return self.sum_length / max(self.num_requests, 1)


def merge_stats(stats: Sequence[JoinStats]) -> JoinStats:
    """Return the stats of all buckets together."""
    return JoinStats(
        num_requests=sum(item.num_requests for item in stats),
        num_with_history=sum(item.num_with_history for item in stats),
        sum_length=sum(item.sum_length for item in stats),
        num_history_rows=sum(item.num_history_rows for item in stats),
        num_extra_rows=sum(item.num_extra_rows for item in stats),
        staleness=StalenessSketch.merge([item.staleness for item in stats]),
    )


def plan_join(
    prepared: Location,
    latents: Location,
    out_dir: Path,
    time_range: TimeRange,
    settings: JoinSettings,
) -> list[JoinTask]:
    """Return one task per bucket of the prepared version that has examples in `time_range`.

    Raises:
        LeakError: the range begins before the snapshot may embed.
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
    files: dict[int, list[tuple[int, Path | VersionFile]]] = {}
    for entry in manifest.files:
        match = _EXAMPLES.fullmatch(entry.path)
        if match is None:
            continue
        bucket, period = int(match[1]), int(match[2])
        begin = origin_ts + period * period_us
        if begin < time_range.stop_ts and begin + period_us > time_range.start_ts:
            files.setdefault(bucket, []).append((period, VersionFile(version, entry.path)))
    if not files:
        raise StoreError(
            f"{prepared} has no examples from {time_range.start_ts} to {time_range.stop_ts}; check data.split"
        )
    return [
        JoinTask(bucket, _by_period(files[bucket]), latents, out_dir, time_range, settings)
        for bucket in sorted(files)
    ]


def _by_period(
    files: Sequence[tuple[int, Path | VersionFile]],
) -> tuple[tuple[int, Path | VersionFile], ...]:
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
        stats = merge_stats(list(mapper(join_bucket, tasks)))
        source, origin = read_manifest(latents), read_manifest(prepared)
        return commit(
            staged,
            kind="joined",
            config_hash=config_hash(
                settings.max_len, settings.retention_us, time_range.start_ts, time_range.stop_ts
            ),
            inputs={"prepared": origin.version, "latents": source.version},
            meta=joined_meta(origin, source, time_range, settings, stats),
            num_rows=stats.num_requests,
            replace_other=replace_other,
        )


def joined_meta(
    prepared: Manifest,
    latents: Manifest,
    time_range: TimeRange,
    settings: JoinSettings,
    stats: JoinStats,
) -> dict[str, Any]:  # Any: JSON
    """Return the meta of the manifest of a joined version."""
    inherited = (
        "snapshot_id",
        "trained_until_ts",
        "code_spec",
        "delay_us",
        "waits_for_label",
        "watermark_ts",
    )
    return {
        **{name: latents.meta[name] for name in inherited},
        **{name: prepared.meta[name] for name in ("num_buckets", "period_us", "period_origin_ts")},
        "latents_version": latents.version,
        "max_len": settings.max_len,
        "retention_us": settings.retention_us,
        "start_ts": time_range.start_ts,
        "stop_ts": time_range.stop_ts,
        "coverage": stats.coverage,
        "mean_length": stats.mean_length,
        "num_history_rows": stats.num_history_rows,
        "num_extra_rows": stats.num_extra_rows,
        "staleness_s": stats.staleness.quantiles(),
    }


def join_bucket(task: JoinTask) -> JoinStats:
    """Join one bucket and write its files; return what was found.

    Raises:
        StoreError: a request has no row in the latents version.
    """
    rows = LatentsReader(task.latents).read_bucket(task.bucket)
    known_id = rows.column("example_id").to_numpy()
    known_prob = rows.column("fm_prob").to_numpy()
    by_id = np.argsort(known_id)
    requests = {period: _requests(file, task.time_range) for period, file in task.examples}
    probs = {
        period: _teacher(table, known_id[by_id], known_prob[by_id], task)
        for period, table in requests.items()
    }

    events = rows.filter(rows.column("is_event")).select(list(HISTORY_COLUMNS))
    # what happened after the last request is visible to none
    event_ts = events.column("event_ts").to_numpy()
    events = events.filter(pa.array(event_ts < task.time_range.stop_ts))
    columns = {
        name: events.column(name).to_numpy() for name in ("user", "event_ts", "available_ts")
    }
    asked = [
        (table.column("user").to_numpy(), table.column("event_ts").to_numpy())
        for table in requests.values()
    ]
    request_ts = np.concatenate([ts for _, ts in asked])
    index = newest_visible(
        (np.concatenate([user for user, _ in asked]), request_ts),
        (columns["user"], columns["event_ts"], columns["available_ts"]),
        task.settings.max_len,
        task.settings.retention_us,
    )
    history = events if index.rows is None else events.take(pa.array(index.rows))
    write_ipc(history, task.out_dir / "history" / f"bucket={task.bucket:03d}.arrow")
    _write_requests(task, requests, probs, index)
    newest_ts = history.column("event_ts").to_numpy()
    return _stats(request_ts, newest_ts, index, events.num_rows)


def _requests(file: Path | VersionFile, time_range: TimeRange) -> Table:
    """Return the examples of one file whose time lies in the range."""
    table = read_parquet(file.path if isinstance(file, VersionFile) else file)
    event_ts = table.column("event_ts").to_numpy()
    chosen = (event_ts >= time_range.start_ts) & (event_ts < time_range.stop_ts)
    return table if chosen.all() else table.filter(pa.array(chosen))


def _teacher(
    requests: Table, known_id: Ints, known_prob: NDArray[np.float32], task: JoinTask
) -> NDArray[np.float32]:
    """Return [R] the stored FM prediction of each request."""
    wanted = requests.column("example_id").to_numpy()
    place = np.searchsorted(known_id, wanted)
    found = place < len(known_id)
    found[found] = known_id[place[found]] == wanted[found]
    num_missing = int(len(wanted) - np.count_nonzero(found))
    if num_missing:
        raise StoreError(
            f"{num_missing} of {len(wanted)} requests of bucket {task.bucket} have no row in {task.latents}, first"
            f" example_id {int(wanted[np.argmin(found)])}; materialize the whole time range of the requests"
        )
    prob: NDArray[np.float32] = known_prob[place]
    return prob


def _write_requests(
    task: JoinTask,
    requests: dict[int, Table],
    probs: dict[int, NDArray[np.float32]],
    index: HistoryIndex,
) -> None:
    folder = task.out_dir / "requests" / f"bucket={task.bucket:03d}"
    begin = 0
    for period, table in requests.items():
        part = slice(begin, begin + table.num_rows)
        begin += table.num_rows
        if not table.num_rows:
            continue
        table = table.append_column("teacher_prob", pa.array(probs[period], pa.float32()))
        table = table.append_column("latent_start", pa.array(index.start[part], pa.int64()))
        length = index.length[part].astype(np.int32)
        table = table.append_column("latent_len", pa.array(length, pa.int32()))
        write_parquet(table, folder / f"period={period:04d}.parquet")


def _stats(request_ts: Ints, history_ts: Ints, index: HistoryIndex, num_events: int) -> JoinStats:
    """Return the stats of one bucket; `history_ts` are the event times of the written history."""
    has = index.length > 0
    newest = index.start[has] + index.length[has] - 1
    return JoinStats(
        num_requests=len(request_ts),
        num_with_history=int(np.count_nonzero(has)),
        sum_length=int(index.length.sum()),
        num_history_rows=num_events,
        num_extra_rows=len(history_ts) - num_events,
        staleness=StalenessSketch.of(request_ts[has] - history_ts[newest]),
    )
