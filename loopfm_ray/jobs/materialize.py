"""Embed and score every event later than a snapshot, once: a Ray Data job that writes one shard for each input file.

Versions of several snapshots are made in one job, whose processes start once. Shards are whole or absent and carry a marker, so a killed job goes on where it stopped, and a rerun gives the same bytes.
A shard is taken over from the version before when its rows and all that the snapshot reads for them are the same.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.digest import inputs_sha256
from loopfm_ray.data.examples import ExampleFile, Rows, concat_rows, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import format_ts
from loopfm_ray.errors import ConfigError, JobError, StoreError
from loopfm_ray.jobs.mapping import Progress, on_this_node, silent, unwrap
from loopfm_ray.store.filesystem import Location, absolute, is_remote
from loopfm_ray.store.manifest import Manifest
from loopfm_ray.store.offline import LatentsWriter, Previous
from loopfm_ray.store.shards import Place, kept_from, shard_path
from loopfm_ray.train.embed import Embedder, length_order
from loopfm_ray.train.snapshot import Snapshot, load_snapshot
from loopfm_ray.types import TimeRange

__all__ = [
    "MaterializeTask",
    "Request",
    "Scope",
    "ShardEmbedder",
    "group_shards",
    "materialize",
    "materialize_all",
    "plan_shards",
]

_SHARD_COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")
_MAX_ATTEMPTS = 3


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


@dataclass(frozen=True)
class MaterializeTask:
    """What every worker needs to write shards."""

    prepared: Location
    snapshot: Location
    time_range: TimeRange
    writer: LatentsWriter
    batch_rows: int = 1024
    redo: TimeRange | None = None
    """Only shards of this time are made again, the others must be taken over; None makes again what changed."""
    is_here: bool = False
    """Whether shards wait on the disk of this machine, so that all workers have to run on it."""
    is_fresh: bool = False
    """Whether no shard is taken over."""

    @property
    def attempts(self) -> Path:
        """Where the attempts at each shard are counted; beside the shards, and gone with them."""
        return self.writer.work_dir / "attempts"


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


class ShardEmbedder:
    """One worker: holds the FM and writes the shards it is handed."""

    def __init__(self, task: MaterializeTask) -> None:
        self._task = task
        self._data = PreparedData.open(task.prepared)
        self._embedder = Embedder(load_snapshot(task.snapshot))
        self._fields = Collator(
            self._embedder.snapshot.spec.schema, self._data.items, self._data.users
        )
        self._of_bucket: tuple[int, Collator, RawHistorySource | None] = (-1, self._fields, None)
        files = self._data.examples.files(task.time_range)
        self._files = {(file.period, file.bucket): file for file in files}
        self._previous = None if task.is_fresh else task.writer.previous()

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write the shards of `row` (bucket, periods) that are not there already; return how many there are.

        Those that lie in one file of the version before must come together: if all are the same, the file is taken over.
        """
        bucket, writer = int(row["bucket"]), self._task.writer
        places = [(int(period), bucket) for period in row["periods"]]
        todo = [place for place in places if writer.completed(*place) is None]
        if todo:
            self._count_attempt(*todo[0])
        same = [place for place in todo if self._is_same(self._files[place])]
        if same and self._previous:
            writer.take_over(self._previous, same)
        for place in todo:
            if place not in same:
                self._write(self._files[place])
        return {"bucket": bucket, "num_shards": len(places)}

    def _is_same(self, file: ExampleFile) -> bool:
        """Return whether the shard can be taken over from the version before."""
        span, redo = file.period_range, self._task.redo
        if redo and redo.start_ts < span.stop_ts and span.start_ts < redo.stop_ts:
            return False
        before = self._previous.shards.get((file.period, file.bucket)) if self._previous else None
        if before and before.input_sha256 == self._input_sha256(file, self._read(file)):
            return True
        if redo:
            raise StoreError(
                f"period {file.period} of bucket {file.bucket} (from {format_ts(span.start_ts)}) lies outside the range"
                f" {format_ts(redo.start_ts)} to {format_ts(redo.stop_ts)} and {'changed' if before else 'is new'}: it can not be taken over;"
                " widen the range or leave it out"
            )
        return False

    def _read(self, file: ExampleFile) -> Rows:
        """Return the rows of a shard in the order in which they are embedded."""
        collate, source = self._open(file.bucket)
        columns = list(dict.fromkeys([*collate.columns, *_SHARD_COLUMNS]))
        rows = read_rows([file], self._task.time_range, columns=columns)
        if source is None:
            return rows
        order = length_order(rows, self._embedder.snapshot.spec.max_len)
        return {name: values[order] for name, values in rows.items()}

    def _input_sha256(self, file: ExampleFile, rows: Rows) -> str:
        """Return what tells whether the shard would be the same."""
        return inputs_sha256(rows, _SHARD_COLUMNS, self._fields, self._open(file.bucket)[1])

    def _count_attempt(self, period: int, bucket: int) -> None:
        """Stop a shard that kills its worker again and again: Ray itself would start new ones for ever."""
        path = self._task.attempts / f"{period:04d}-{bucket:03d}"
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as stream:
            stream.write(b".")
        if path.stat().st_size > _MAX_ATTEMPTS:
            raise JobError(
                f"materialize: the worker died {_MAX_ATTEMPTS} times while it embedded period {period} of bucket"
                f" {bucket}, perhaps for lack of memory; look at the log of the worker in Ray's session folder, then run it again"
            )

    def _write(self, file: ExampleFile) -> None:
        rows, size = self._read(file), self._task.batch_rows
        collate, _ = self._open(file.bucket)
        latents, probs = [], []
        tasks = self._embedder.snapshot.spec.schema.tasks
        for begin in range(0, len(rows["example_id"]), size):
            batch = {name: values[begin : begin + size] for name, values in rows.items()}
            embedded = self._embedder(collate(batch))
            latents.append(embedded.latents)
            probs.append(embedded.columns(tasks))
        columns = {name: rows[name] for name in _SHARD_COLUMNS}
        columns |= concat_rows(probs)
        self._task.writer.write(
            file.period,
            file.bucket,
            columns,
            np.concatenate(latents),
            self._input_sha256(file, rows),
        )

    def _open(self, bucket: int) -> tuple[Collator, RawHistorySource | None]:
        """Return what makes batches of a bucket's rows, and the raw histories that the snapshot reads; the last is kept."""
        if self._of_bucket[0] != bucket:
            data, spec = self._data, self._embedder.snapshot.spec
            source, sources = None, {}
            if spec.item_fields:
                events = {bucket: data.events(bucket)}
                source = RawHistorySource(events, data.items, spec.item_fields, spec.max_len)
                sources["raw"] = source = source.limited(spec.schema)
            collate = Collator(spec.schema, data.items, data.users, sources)
            self._of_bucket = (bucket, collate, source)
        return self._of_bucket[1:]


class _Embedders:
    """One worker of a job over several versions: holds the FM of the shards that it was handed last."""

    def __init__(self, tasks: Sequence[MaterializeTask]) -> None:
        self._tasks = tasks
        self._opened: tuple[int, ShardEmbedder] | None = None

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write the shards of `row`, which names its task."""
        number = int(row["task"])
        if self._opened is None or self._opened[0] != number:
            self._opened = (number, ShardEmbedder(self._tasks[number]))
        return self._opened[1](row)


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
    """Return what `ShardEmbedder` is called with: shards of one file of `previous` together, by bucket and period."""
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
    """Call `_Embedders` with every item, in processes of the cluster."""
    num_workers = min(num_workers, len(items))
    # many small blocks, so that no worker waits long for the last of another
    num_blocks = min(len(items), 32 * num_workers)
    shards = ray.data.from_items(list(items), override_num_blocks=num_blocks)
    written = shards.map(
        _Embedders,
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
