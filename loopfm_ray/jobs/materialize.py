"""Embed and score every event later than a snapshot, once: a Ray Data job that writes one shard for each input file.

Versions of several snapshots are made in one job, whose processes start once. Shards are whole or absent and carry a marker, so a killed job goes on where it stopped, and a rerun gives the same bytes.
A shard is taken over from the version before when its rows and all that the snapshot reads for them are the same.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data

from loopfm_ray.data.examples import ExampleFile, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import format_ts
from loopfm_ray.errors import ConfigError
from loopfm_ray.jobs.embedding import Embedders, MaterializeTask
from loopfm_ray.jobs.mapping import Progress, on_this_node, silent, unwrap
from loopfm_ray.store.filesystem import Location, absolute, is_remote
from loopfm_ray.store.manifest import Manifest
from loopfm_ray.store.offline import LatentsWriter, Previous
from loopfm_ray.store.shards import Place, kept_from, shard_path
from loopfm_ray.train.snapshot import Snapshot, load_snapshot
from loopfm_ray.types import TimeRange

__all__ = [
    "Request",
    "Scope",
    "group_shards",
    "materialize",
    "materialize_all",
    "plan_shards",
]


@dataclass(frozen=True)
class Scope:
    """What of a version is made again, what is left out, and where it waits.

    Attributes:
        redo: only periods that overlap it are made again, all others must be the same as before; None makes again what
            changed.
        keep_us: periods wholly older than this before the last event are left out; None keeps all.
        is_fresh: whether everything is made again, also what did not change.
        scratch: where shards wait for the upload when the version is to lie on S3.
        is_scratch_shared: whether workers on all machines have `scratch`; else all run on this one.
        only: the events that are embedded; None is all that are later than the snapshot.
    """

    redo: TimeRange | None = None
    keep_us: int | None = None
    is_fresh: bool = False
    scratch: Path | None = None
    is_scratch_shared: bool = False
    only: TimeRange | None = None

    @property
    def attempt(self) -> str:
        """A name for work that is asked for though its result may be there already; empty for the work that is due."""
        if self.is_fresh:
            return "fresh"
        return f"{self.redo.start_ts}-{self.redo.stop_ts}" if self.redo else ""


@dataclass(frozen=True)
class Request:
    """A latents version that is asked for."""

    snapshot_dir: Location
    out_dir: Location
    scope: Scope = Scope()


def plan_shards(
    data: PreparedData,
    snapshot: Snapshot,
    keep_us: int | None = None,
    only: TimeRange | None = None,
) -> tuple[TimeRange, list[ExampleFile]]:
    """Return the time to embed, everything after the snapshot, and its example files.

    `only` narrows it. Periods wholly older than `keep_us` before the last event are left out; None keeps all.

    Raises:
        ConfigError: the snapshot is newer than all events.
    """
    _, max_ts = data.log_range
    if snapshot.spec.trained_until_ts >= max_ts:
        raise ConfigError(
            f"snapshot {snapshot.snapshot_id} was trained until {snapshot.spec.trained_until_ts}, the last event is at"
            f" {max_ts}: there is nothing later to embed; add newer events or set data.split.fm_stop earlier"
        )
    start_ts, stop_ts = snapshot.spec.trained_until_ts + 1, max_ts + 1
    if only is not None:
        start_ts, stop_ts = max(start_ts, only.start_ts), min(stop_ts, only.stop_ts)
    time_range = TimeRange(start_ts, stop_ts)
    files = data.examples.files(time_range)
    if keep_us is not None:
        files = [file for file in files if file.period_range.stop_ts > max_ts - keep_us]
    return time_range, [file for file in files if _has_rows(file, time_range)]


def _has_rows(file: ExampleFile, time_range: TimeRange) -> bool:
    """Return whether a file holds rows of the range; only those at its edges have to be looked into."""
    span = file.period_range
    if time_range.start_ts <= span.start_ts and span.stop_ts <= time_range.stop_ts:
        return True
    return len(read_rows([file], time_range, columns=["event_ts"])["event_ts"]) > 0


@dataclass(frozen=True)
class _Plan:
    """What a request comes to: its version if that is there, else the shards that it lacks."""

    task: MaterializeTask
    shards: list[Place]
    finished: Manifest | None
    watermark_ts: int
    kept_from_ts: int

    def items(self, number: int) -> list[dict[str, Any]]:
        """Return what the workers are to be called with, as task `number`."""
        writer = self.task.writer
        if self.finished is not None:
            return []
        todo = [place for place in self.shards if writer.completed(*place) is None]
        return [{**item, "task": number} for item in group_shards(todo, writer.previous())]

    def finish(self) -> Manifest:
        """Return the version, of which all shards are there."""
        if self.finished is not None:
            return self.finished
        return self.task.writer.finish(
            self.shards,
            watermark_ts=self.watermark_ts,
            kept_from_ts=self.kept_from_ts,
            replace_other=True,
        )


def materialize(
    prepared: Location,
    snapshot_dir: Location,
    out_dir: Location,
    *,
    delay_us: int,
    num_workers: int,
    progress: Progress = silent,
    scope: Scope = Scope(),
) -> Manifest:
    """Write the latents version of one snapshot at `out_dir`, or return it if it is there.

    Args:
        prepared: the prepared version, a directory or an `s3://` address as the next two.
        snapshot_dir: the snapshot.
        out_dir: the version to write.
        delay_us: from an event to its readers.
        num_workers: processes.
        progress: told of each shard.
        scope: what is made again and what is left out.

    Raises:
        StoreError: `scope.redo` is given and a shard outside of it can not be taken over.
        ConfigError: there is nothing later than the snapshot, or nothing of it in `scope.redo`.
        JobError: a worker failed.
    """
    [manifest] = materialize_all(
        prepared,
        [Request(snapshot_dir, out_dir, scope)],
        delay_us=delay_us,
        num_workers=num_workers,
        progress=progress,
    )
    return manifest


def materialize_all(
    prepared: Location,
    requests: Sequence[Request],
    *,
    delay_us: int,
    num_workers: int,
    progress: Progress = silent,
) -> list[Manifest]:
    """Write the latents versions that are asked for and not there, in one job, and return the manifests of all.

    Shards of a version that lies there, made by the same code with the same snapshot, are taken over where nothing they
    were made from changed. The manifest's `record` says how many (`num_reused`, `num_redone`), and how many events came
    later than the watermark of the version before (`num_late_events`).

    Args:
        prepared: the prepared version of all of them, a directory or an `s3://` address.
        requests: versions at different places.
        delay_us: from an event to its readers.
        num_workers: processes.
        progress: told of each shard.

    Raises:
        StoreError: with `scope.redo` a shard outside of it can not be taken over.
        ConfigError: there is nothing later than a snapshot, or nothing of it in `scope.redo`.
        JobError: a worker failed.
    """
    data = PreparedData.open(prepared)
    plans = [_plan(data, absolute(prepared), request, delay_us) for request in requests]
    items = [item for number, plan in enumerate(plans) for item in plan.items(number)]
    if items:
        _run([plan.task for plan in plans], items, num_workers, progress)
    return [plan.finish() for plan in plans]


def _plan(data: PreparedData, prepared: Location, request: Request, delay_us: int) -> _Plan:
    """Begin a version, and return what there is to do for it."""
    scope, snapshot = request.scope, load_snapshot(request.snapshot_dir)
    embedded, files = plan_shards(data, snapshot, scope.keep_us, scope.only)
    if scope.redo:
        _check_redo(scope.redo, files)
    writer = LatentsWriter(
        final_dir=absolute(request.out_dir),
        snapshot_id=snapshot.snapshot_id,
        trained_until_ts=snapshot.spec.trained_until_ts,
        spec=snapshot.spec.code_spec,
        delay_us=delay_us,
        waits_for_label=data.manifest.meta["history_events"] == "positives",
        inputs={"prepared": data.manifest.version, "snapshot": snapshot.version},
        scratch=scope.scratch,
        attempt=scope.attempt,
        period_us=data.manifest.meta["period_us"],
        period_origin_ts=data.manifest.meta["period_origin_ts"],
        tasks=snapshot.spec.schema.tasks[1:],
    )
    task = MaterializeTask(
        prepared,
        absolute(request.snapshot_dir),
        embedded,
        writer,
        redo=scope.redo,
        is_here=is_remote(request.out_dir) and not scope.is_scratch_shared,
        is_fresh=scope.is_fresh,
    )
    watermark_ts, kept_from_ts = data.log_range[1], embedded.start_ts
    if scope.keep_us is not None:
        period = (data.manifest.meta["period_us"], data.manifest.meta["period_origin_ts"])
        kept_from_ts = max(kept_from_ts, kept_from(watermark_ts, scope.keep_us, *period))
    shards = [(file.period, file.bucket) for file in files]
    finished = writer.begin(shards)
    if finished is None:
        shutil.rmtree(task.attempts, ignore_errors=True)
    return _Plan(task, shards, finished, watermark_ts, kept_from_ts)


def _check_redo(redo: TimeRange, files: Sequence[ExampleFile]) -> None:
    """Make sure that there is something to make again."""
    spans = [file.period_range for file in files]
    if any(redo.start_ts < span.stop_ts and span.start_ts < redo.stop_ts for span in spans):
        return
    first, last = min(span.start_ts for span in spans), max(span.stop_ts for span in spans)
    raise ConfigError(
        f"the range {format_ts(redo.start_ts)} to {format_ts(redo.stop_ts)} holds no period that is embedded; those run"
        f" from {format_ts(first)} to {format_ts(last)}"
    )


def group_shards(todo: Sequence[Place], previous: Previous | None) -> list[dict[str, Any]]:
    """Return what `embedding.ShardEmbedder` is called with: shards of one file of `previous` together, by bucket and period."""
    groups: dict[tuple[int, str], list[int]] = {}
    # buckets together, so that a worker maps each bucket's events once
    for period, bucket in sorted(todo, key=lambda place: (place[1], place[0])):
        path = previous.file_of(period, bucket) if previous else shard_path(period, bucket)
        groups.setdefault((bucket, path), []).append(period)
    return [{"bucket": bucket, "periods": periods} for (bucket, _), periods in groups.items()]


def _run(
    tasks: Sequence[MaterializeTask],
    items: Sequence[dict[str, Any]],
    num_workers: int,
    progress: Progress,
) -> None:
    """Call `Embedders` with every item, in processes of the cluster."""
    num_workers = min(num_workers, len(items))
    # many small blocks, so that no worker waits long for the last of another
    num_blocks = min(len(items), 32 * num_workers)
    shards = ray.data.from_items(list(items), override_num_blocks=num_blocks)
    written = shards.map(
        Embedders,
        fn_constructor_args=(tuple(tasks),),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
        **(on_this_node() if any(task.is_here for task in tasks) else {}),
    )
    try:
        for done, _ in enumerate(written.iter_rows(), 1):
            progress("materialize", done, len(items))
    except Exception as error:  # the edge to Ray: every failure becomes one of ours
        raise unwrap(error, "materialize") from error
