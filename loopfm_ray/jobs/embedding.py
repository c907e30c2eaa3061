"""The workers of a materialise job: each holds an FM and writes the shards that it is handed, or takes them over from the version before."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.digest import inputs_sha256
from loopfm_ray.data.examples import ExampleFile, Rows, concat_rows, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import format_ts
from loopfm_ray.errors import JobError, StoreError
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.offline import LatentsWriter
from loopfm_ray.train.embed import Embedder, length_order
from loopfm_ray.train.snapshot import load_snapshot
from loopfm_ray.types import TimeRange

__all__ = ["Embedders", "MaterializeTask", "ShardEmbedder"]

_SHARD_COLUMNS = ("example_id", "user", "item", "event_ts", "label_ts", "is_event")
_MAX_ATTEMPTS = 3


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


class Embedders:
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
