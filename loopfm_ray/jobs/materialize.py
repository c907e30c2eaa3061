"""Embed and score every event later than a snapshot, once: a Ray Data job that writes one shard for each input file.

Shards are whole or absent and carry a marker, so a killed job goes on where it stopped, and a rerun gives the same bytes.
"""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray.data

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.examples import ExampleFile, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, JobError
from loopfm_ray.jobs.mapping import Progress, silent, unwrap
from loopfm_ray.store.manifest import Manifest
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.train.embed import Embedder
from loopfm_ray.train.snapshot import Snapshot, load_snapshot
from loopfm_ray.types import TimeRange

__all__ = ["MaterializeTask", "ShardEmbedder", "materialize", "plan_shards"]

_SHARD_COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")
_MAX_ATTEMPTS = 3


@dataclass(frozen=True)
class MaterializeTask:
    """What every worker needs to write shards."""

    prepared: Path
    snapshot: Path
    time_range: TimeRange
    writer: LatentsWriter
    batch_rows: int = 4096

    @property
    def attempts(self) -> Path:
        """Where the attempts at each shard are counted; beside the shards, and gone with them."""
        return self.writer.work_dir / "attempts"


def plan_shards(data: PreparedData, snapshot: Snapshot) -> tuple[TimeRange, list[ExampleFile]]:
    """Return the time to embed, everything after the snapshot, and its example files.

    Raises:
        ConfigError: the snapshot is newer than all events.
    """
    _, max_ts = data.log_range
    if snapshot.spec.trained_until_ts >= max_ts:
        raise ConfigError(
            f"snapshot {snapshot.snapshot_id} was trained until {snapshot.spec.trained_until_ts}, the last event is at"
            f" {max_ts}: there is nothing later to embed; add newer events or set data.split.fm_stop earlier"
        )
    time_range = TimeRange(snapshot.spec.trained_until_ts + 1, max_ts + 1)
    files = data.examples.files(time_range)
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
        self._collators: dict[int, Collator] = {}
        files = self._data.examples.files(task.time_range)
        self._files = {(file.period, file.bucket): file for file in files}

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Write the shard of `row` (period, bucket) unless it is there already; return its row counts."""
        period, bucket = int(row["period"]), int(row["bucket"])
        stats = self._task.writer.completed(period, bucket)
        if stats is None:
            self._count_attempt(period, bucket)
            stats = self._write(self._files[period, bucket])
        return {"period": period, "bucket": bucket, "num_rows": stats.num_rows}

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

    def _write(self, file: ExampleFile) -> Any:
        rows = read_rows([file], self._task.time_range)
        collate = self._collator(file.bucket)
        latents, probs = [], []
        for begin in range(0, len(rows["example_id"]), self._task.batch_rows):
            part = {
                name: values[begin : begin + self._task.batch_rows] for name, values in rows.items()
            }
            embedded = self._embedder(collate(part))
            latents.append(embedded.latents)
            probs.append(embedded.fm_prob)
        columns = {name: rows[name] for name in _SHARD_COLUMNS}
        columns["fm_prob"] = np.concatenate(probs)
        return self._task.writer.write(file.period, file.bucket, columns, np.concatenate(latents))

    def _collator(self, bucket: int) -> Collator:
        if bucket not in self._collators:
            data, snapshot = self._data, self._embedder.snapshot
            sources = {}
            if snapshot.spec.item_fields:
                sources["raw"] = RawHistorySource(
                    {bucket: data.events(bucket)},
                    data.items,
                    snapshot.spec.item_fields,
                    snapshot.spec.max_len,
                )
            self._collators = {
                bucket: Collator(snapshot.spec.schema, data.items, data.users, sources)
            }
        return self._collators[bucket]


def materialize(
    prepared: Path,
    snapshot_dir: Path,
    out_dir: Path,
    *,
    delay_us: int,
    num_workers: int,
    progress: Progress = silent,
) -> Manifest:
    """Write the latents version of one snapshot at `out_dir`, or return it if it is there.

    Raises:
        ConfigError: there is nothing later than the snapshot.
        JobError: a worker failed.
    """
    data = PreparedData.open(prepared)
    snapshot = load_snapshot(snapshot_dir)
    time_range, files = plan_shards(data, snapshot)
    writer = LatentsWriter(
        final_dir=out_dir,
        snapshot_id=snapshot.snapshot_id,
        trained_until_ts=snapshot.spec.trained_until_ts,
        spec=snapshot.spec.code_spec,
        delay_us=delay_us,
        waits_for_label=data.manifest.meta["history_events"] == "positives",
        inputs={"prepared": data.manifest.version, "snapshot": snapshot.version},
    )
    task = MaterializeTask(prepared.absolute(), snapshot_dir.absolute(), time_range, writer)
    shards = [(file.period, file.bucket) for file in files]
    finished = writer.begin(shards)
    if finished is not None:
        return finished
    shutil.rmtree(task.attempts, ignore_errors=True)
    todo = [place for place in shards if writer.completed(*place) is None]
    _run(task, todo, num_workers, progress)
    return writer.finish(shards, watermark_ts=data.log_range[1], replace_other=True)


def _run(
    task: MaterializeTask, todo: Sequence[tuple[int, int]], num_workers: int, progress: Progress
) -> None:
    if not todo:
        return
    num_workers = min(num_workers, len(todo))
    # buckets together, so that a worker maps each bucket's events once
    items = [
        {"period": period, "bucket": bucket}
        for period, bucket in sorted(todo, key=lambda p: (p[1], p[0]))
    ]
    shards = ray.data.from_items(items, override_num_blocks=min(len(items), 8 * num_workers))
    written = shards.map(
        ShardEmbedder,
        fn_constructor_args=(task,),
        compute=ray.data.ActorPoolStrategy(size=num_workers),
        num_cpus=1,
    )
    try:
        for done, _ in enumerate(written.iter_rows(), 1):
            progress("materialize", done, len(todo))
    except Exception as error:  # the edge to Ray: every failure becomes one of ours
        raise unwrap(error, "materialize") from error
