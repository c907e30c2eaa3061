"""The join of one bucket of users, block by block: what a worker does.

A bucket of at most `block_rows` rows is one block. A larger one is cut into blocks of whole users; only a user with more
rows than a block is cut further, by time, and joined in slabs. See `blocks` and `slabs`. Memory depends on the size of a
block, not on the log, nor on how its rows are spread over users.
"""

from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from loopfm_ray.data.joined import (
    SCORE_TS,
    TEACHER_CODE,
    TEACHER_SNAPSHOT,
    USER_SOURCE,
    teacher_prob_of,
)
from loopfm_ray.errors import StoreError
from loopfm_ray.history.blocks import Block
from loopfm_ray.history.keyed import KeyedAnswers
from loopfm_ray.history.rows import BucketRows, history_schema
from loopfm_ray.history.settings import JoinStats, JoinTask
from loopfm_ray.history.slices import Histories, SlicePlan, numpy_columns
from loopfm_ray.history.spill import Answers
from loopfm_ray.store.cache import VersionFile
from loopfm_ray.store.manifest import disk_errors
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.rows import prob_column
from loopfm_ray.store.shards import SORT_KEYS
from loopfm_ray.store.tables import code_bytes, code_column, write_parquet_pieces
from loopfm_ray.store.teachers import teacher_number, teachers_of

__all__ = ["join_bucket"]

# Any below: pyarrow ships no types.
Table = Any

_NONE = 2**62


def join_bucket(task: JoinTask) -> JoinStats:
    """Join one bucket and write its files; return what was found.

    Raises:
        StoreError: a request has no row in the latents version, or the disk is full.
    """
    with disk_errors(task.out_dir), ExitStack() as stack:
        task.out_dir.mkdir(parents=True, exist_ok=True)
        join = _BucketJoin(task, stack)
        join.take()
        return join.write()


class _BucketJoin:
    """What is known of one bucket so far: its histories, and what the snapshot says of its requests."""

    def __init__(self, task: JoinTask, stack: ExitStack) -> None:
        """Begin with nothing; `stack` closes the files."""
        self._task = task
        latents = LatentsReader(task.latents)
        self._probs = {"fm_prob": "teacher_prob"}
        self._probs |= {prob_column(one): teacher_prob_of(one) for one in latents.tasks}
        self._rows = BucketRows(task, tuple(self._probs))
        history = history_schema(self._rows.spec, task.settings.side)
        plan = SlicePlan(history, self._rows.requests, SORT_KEYS, task.settings, task.out_dir)
        self._histories = Histories(plan, stack)
        fields = [(name, pa.float32()) for name in self._probs]
        if task.settings.with_own_latent:
            fields.append(("code", pa.binary(self._rows.spec.num_bytes)))
        teacher = Answers(pa.schema(fields), task.out_dir, task.settings.block_rows)
        self._teacher = stack.enter_context(closing(teacher))
        self._keyed = [KeyedAnswers(task, key, stack) for key in task.settings.keys]
        meta = latents.manifest.meta
        self._teachers, self._delay_us = teachers_of(meta), int(meta["delay_us"])
        self._num_late_scores = 0
        self._num_missing = 0
        self._first_missing = (_NONE, 0)
        self._num_written = 0

    def take(self) -> None:
        """Join all blocks."""
        self._histories.take(self._predicted(self._rows.blocks()))

    def write(self) -> JoinStats:
        """Write the files of the bucket and return its stats.

        Raises:
            StoreError: a request has no row in the latents version.
        """
        task, stats = self._task, self._histories.stats
        if self._num_missing:
            raise StoreError(
                f"{self._num_missing} of {stats.num_requests} requests of bucket {task.bucket} have no row in"
                f" {task.latents}, first example_id {self._first_missing[1]}; materialize the whole time range of the"
                " requests (history.keep_s may keep too little)"
            )
        self._histories.write(task.out_dir / "history" / f"bucket={task.bucket:03d}.arrow")
        folder = task.out_dir / "requests" / f"bucket={task.bucket:03d}"
        for period, file in task.examples:
            write_parquet_pieces(self._answered(file), folder / f"period={period:04d}.parquet")
        return replace(stats, num_late_scores=self._num_late_scores)

    def _answered(self, file: Path | VersionFile) -> Iterator[Table]:
        """Yield the requests of one file with their answers; files must be asked for in order."""
        for table in self._rows.examples(file):
            if not table.num_rows:
                continue
            span = (self._num_written, self._num_written + table.num_rows)
            self._num_written = span[1]
            teacher, (start, length) = self._teacher.read(*span), self._histories.read(*span)
            columns = {
                shown: pa.array(teacher[name], pa.float32()) for name, shown in self._probs.items()
            }
            event_ts, label_ts = numpy_columns(table, "event_ts", "label_ts")
            number = teacher_number(self._teachers, event_ts)
            columns[TEACHER_SNAPSHOT] = pa.array(number, pa.int16())
            columns[SCORE_TS] = pa.array(event_ts + self._delay_us, pa.int64())
            self._num_late_scores += int(np.count_nonzero(event_ts + self._delay_us > label_ts))
            if "code" in teacher:
                columns[TEACHER_CODE] = code_column(teacher["code"])
            columns[f"{USER_SOURCE}_start"] = pa.array(start, pa.int64())
            columns[f"{USER_SOURCE}_len"] = pa.array(length, pa.int32())
            for answers in self._keyed:
                columns |= {name: pa.array(v) for name, v in answers.columns(*span).items()}
            for name, values in columns.items():
                table = table.append_column(name, values)
            yield table

    def _predicted(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """Yield the blocks, and take what the snapshot says of each request on the way."""
        for block in blocks:
            self._predict(block)
            yield block

    def _predict(self, block: Block) -> None:
        """Take the stored FM prediction of each request of a block, and its own latent if it is asked for."""
        known = np.flatnonzero(
            numpy_columns(block.rows, "event_ts")[0] >= self._task.time_range.start_ts
        )
        user, event_ts, example_id = (
            column[known] for column in numpy_columns(block.rows, *SORT_KEYS)
        )
        by_id = np.argsort(example_id)
        asked = numpy_columns(block.requests, *SORT_KEYS)
        (position,) = numpy_columns(block.requests, "position")
        place = np.searchsorted(example_id[by_id], asked[2])
        found = place < len(known)
        row = by_id[place[found]]
        # the same example, at the time and of the user that the request names
        found[found] = (
            (example_id[row] == asked[2][found])
            & (event_ts[row] == asked[1][found])
            & (user[row] == asked[0][found])
        )
        missing = np.flatnonzero(~found)
        if len(missing):
            first = missing[np.argmin(position[missing])]
            self._num_missing += len(missing)
            self._first_missing = min(
                self._first_missing, (int(position[first]), int(asked[2][first]))
            )
            return
        row = known[row]
        found_of_row = [column[row] for column in numpy_columns(block.rows, *self._probs)]
        if self._task.settings.with_own_latent:
            found_of_row.append(code_bytes(block.rows.column("code"))[row])
        self._teacher.add(position, *found_of_row)
