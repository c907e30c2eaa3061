"""The rows and requests of one bucket of users, cut into blocks: what every join reads."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from loopfm_ray.errors import StoreError
from loopfm_ray.history.blocks import Block, Cutting, cut_into_blocks
from loopfm_ray.history.settings import JoinTask, StoredSide
from loopfm_ray.history.slices import HISTORY_COLUMNS, filter_rows, numpy_columns
from loopfm_ray.store.cache import VersionFile
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.offline import LatentsReader, latents_schema
from loopfm_ray.store.shards import SORT_KEYS
from loopfm_ray.store.tables import iter_parquet

__all__ = ["REQUESTS", "BucketRows", "history_schema"]

# Any below: pyarrow ships no types.
Table = Any

REQUESTS = pa.schema(
    [
        ("user", pa.int32()),
        ("event_ts", pa.int64()),
        ("example_id", pa.int64()),
        ("position", pa.int64()),
    ]
)
_SIDE_TYPES = {"label": pa.float32(), "event_type": pa.int32()}
_NO_REQUEST = -1


def history_schema(spec: CodeSpec, side: StoredSide) -> Any:
    """Return the Arrow schema of a table of histories."""
    known = latents_schema(spec)
    added = [
        pa.field(name, _SIDE_TYPES.get(name) or known.field(name).type) for name in side.columns
    ]
    return pa.schema([*(known.field(name) for name in HISTORY_COLUMNS), *added])


class BucketRows:
    """Reads one bucket of the latents and the examples."""

    def __init__(self, task: JoinTask, more: Sequence[str] = (), asked: Sequence[Any] = ()) -> None:
        """Open what `task` names.

        Args:
            task: which bucket, and what of it.
            more: columns of the latents that are needed beside those of a history.
            asked: Arrow fields of the examples that are needed of the requests beside the sort keys.
        """
        self._task, self._side = task, task.settings.side
        self._block_rows = task.settings.block_rows
        self._reader = LatentsReader(task.latents)
        self.spec, self.tasks = self._reader.spec, self._reader.tasks
        self.requests = pa.schema([*REQUESTS, *asked])
        known = latents_schema(self.spec, self.tasks)
        names = [*HISTORY_COLUMNS, "is_event", *more]
        names += [n for n in self._side.columns if n not in _SIDE_TYPES]
        self._rows = pa.schema([known.field(name) for name in names])
        side = [pa.field(name, _SIDE_TYPES[name]) for name in self._side.origins]
        self._dealt = pa.schema([*self.requests, *side])

    def blocks(self) -> Iterator[Block]:
        """Yield the rows and requests of the bucket, by user; what the side asks for stands beside the rows."""
        place = (self._task.out_dir, self._block_rows)
        cutting = Cutting(SORT_KEYS, self._rows, self._dealt, *place)
        num_rows = self._reader.num_rows(self._task.bucket)
        for block in cut_into_blocks(self._read_rows, self._read_requests, num_rows, cutting):
            yield self._with_side(block) if self._side.origins else block

    def examples(
        self, file: Path | VersionFile, columns: Sequence[str] | None = None
    ) -> Iterator[Table]:
        """Yield the examples of one file whose time lies in the range of the requests; None reads all columns."""
        time_range = self._task.time_range
        for table in self._read_file(file, columns):
            (event_ts,) = numpy_columns(table, "event_ts")
            chosen = (event_ts >= time_range.start_ts) & (event_ts < time_range.stop_ts)
            yield filter_rows(table, chosen)

    def _read_file(
        self, file: Path | VersionFile, columns: Sequence[str] | None
    ) -> Iterator[Table]:
        path = file.path if isinstance(file, VersionFile) else file
        return iter_parquet(path, columns, self._block_rows)

    def _read_rows(self, columns: Sequence[str]) -> Iterator[Table]:
        """Yield the rows that matter: events that a request may see, and rows that are requests."""
        wanted = {*columns, "event_ts", "is_event"}
        time_range = self._task.time_range
        for table in self._reader.iter_bucket(self._task.bucket, [*wanted], self._block_rows):
            event_ts, is_event = numpy_columns(table, "event_ts", "is_event")
            # what happened after the last request is visible to none
            chosen = (event_ts < time_range.stop_ts) & (
                is_event | (event_ts >= time_range.start_ts)
            )
            yield filter_rows(table.select(list(columns)), chosen)

    def _read_requests(self, columns: Sequence[str]) -> Iterator[Table]:
        """Yield the keys of all requests, by period, and their positions in that order.

        Where side information is asked for, examples before the requests come too, at no position.
        """
        position, time_range, origins = 0, self._task.time_range, self._side.origins
        names = [name for name in self._dealt.names if name != "position"]
        read = list(dict.fromkeys(origins.get(name, name) for name in names))
        earlier = self._task.earlier if origins else ()
        for _, file in (*earlier, *self._task.examples):
            for found in self._read_file(file, read):
                (event_ts,) = numpy_columns(found, "event_ts")
                asked = event_ts >= time_range.start_ts
                kept = event_ts < time_range.stop_ts
                kept &= asked | bool(origins)
                table, asked = filter_rows(found, kept), asked[kept]
                number = position + np.cumsum(asked) - 1
                position += int(asked.sum())
                values = {name: table.column(origins.get(name, name)) for name in names}
                values["position"] = pa.array(np.where(asked, number, _NO_REQUEST))
                yield (
                    pa.table(values)
                    .select(self._dealt.names)
                    .cast(self._dealt)
                    .select(list(columns))
                )

    def _with_side(self, block: Block) -> Block:
        """Return a block whose rows have what their examples say, and whose requests are requests.

        Raises:
            StoreError: a row has no example.
        """
        (row_ids,) = numpy_columns(block.rows, "example_id")
        known_ids, position = numpy_columns(block.requests, "example_id", "position")
        order = np.argsort(known_ids)
        place = np.searchsorted(known_ids[order], row_ids)
        found = place < len(order)
        found[found] = known_ids[order][place[found]] == row_ids[found]
        if not found.all():
            raise StoreError(
                f"{np.count_nonzero(~found)} of {len(found)} rows of latents in bucket {self._task.bucket} have no example in"
                f" the prepared version, first example_id {row_ids[~found][0]}, so their labels are not known; materialize again"
            )
        rows, taken = block.rows, pa.array(order[place])
        for name in self._side.origins:
            rows = rows.append_column(name, block.requests.column(name).take(taken))
        requests = filter_rows(block.requests, position >= 0).select(self.requests.names)
        return replace(block, rows=rows, requests=requests)
