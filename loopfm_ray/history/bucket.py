"""The join of one bucket of users, block by block: what a worker does.

A bucket of at most `block_rows` rows is one block. A larger one is cut into blocks of whole users; only a user with more
rows than a block is cut further, by time, and joined in slabs. See `blocks` and `slabs`. Memory depends on the size of a
block, not on the log, nor on how its rows are spread over users.
"""

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.errors import StoreError
from loopfm_ray.history.asof import newest_visible
from loopfm_ray.history.blocks import Block, Cutting, cut_into_blocks
from loopfm_ray.history.order import time_order
from loopfm_ray.history.slabs import LongUser, Seen, join_long_user, take_in_pieces
from loopfm_ray.history.spill import Answers, Spill
from loopfm_ray.history.staleness import StalenessSketch
from loopfm_ray.history.table import HistoryTable
from loopfm_ray.history.times import visible_from
from loopfm_ray.store.cache import VersionFile
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import disk_errors
from loopfm_ray.store.offline import LatentsReader, latents_schema
from loopfm_ray.store.shards import SORT_KEYS
from loopfm_ray.store.tables import iter_parquet, write_parquet_pieces
from loopfm_ray.types import TimeRange

__all__ = ["BLOCK_ROWS", "JoinSettings", "JoinStats", "JoinTask", "join_bucket", "merge_stats"]

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]

BLOCK_ROWS = 2_000_000
"""Rows of a block, if nothing else is asked for."""
HISTORY_COLUMNS = ("example_id", "user", "item", "event_ts", "available_ts", "code")
_REQUESTS = pa.schema(
    [
        ("user", pa.int32()),
        ("event_ts", pa.int64()),
        ("example_id", pa.int64()),
        ("position", pa.int64()),
    ]
)
_PROBS = pa.schema([("prob", pa.float32())])
_NONE = 2**62
_SLICES = pa.schema([("start", pa.int64()), ("length", pa.int32())])


@dataclass(frozen=True)
class JoinSettings:
    """What a history is, and how much is in memory to find it.

    Attributes:
        max_len: the longest history.
        retention_us: how old an event may be at the request; None keeps all.
        block_rows: rows that are joined at once; changes no byte of the answer.
    """

    max_len: int
    retention_us: int | None = None
    block_rows: int = BLOCK_ROWS


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


def join_bucket(task: JoinTask) -> JoinStats:
    """Join one bucket and write its files; return what was found.

    Raises:
        StoreError: a request has no row in the latents version, or the disk is full.
    """
    with disk_errors(task.out_dir), ExitStack() as stack:
        task.out_dir.mkdir(parents=True, exist_ok=True)
        join = _BucketJoin(task, stack)
        for user, blocks in itertools.groupby(join.blocks(), key=lambda block: block.user):
            if user is not None:
                join.add_long_user(blocks)
            else:
                for block in blocks:
                    join.add_users(block)
        return join.write()


class _BucketJoin:
    """What is known of one bucket so far: its history, and the answers to its requests."""

    def __init__(self, task: JoinTask, stack: ExitStack) -> None:
        """Begin with nothing; `stack` closes the files."""
        self._task = task
        self._reader = LatentsReader(task.latents)
        self._limits = (task.settings.max_len, task.settings.retention_us)
        self._place = (task.out_dir, task.settings.block_rows)
        schema = latents_schema(self._reader.spec)
        self._rows, kept = (
            pa.schema([schema.field(name) for name in names])
            for names in ((*HISTORY_COLUMNS, "is_event", "fm_prob"), HISTORY_COLUMNS)
        )
        self._history = stack.enter_context(closing(HistoryTable(kept, *self._place)))
        self._probs = stack.enter_context(closing(Answers(_PROBS, *self._place)))
        self._slices = stack.enter_context(closing(Answers(_SLICES, *self._place)))
        self._num_missing = 0
        self._first_missing = (_NONE, 0)
        self._num_written = 0
        self._stats = JoinStats(staleness=StalenessSketch.of(np.zeros(0, dtype=np.int64)))

    def blocks(self) -> Iterator[Block]:
        """Yield the rows and requests of the bucket, by user."""
        cutting = Cutting(SORT_KEYS, self._rows, _REQUESTS, *self._place)
        num_rows = self._reader.num_rows(self._task.bucket)
        return cut_into_blocks(self._read_rows, self._read_requests, num_rows, cutting)

    def add_users(self, block: Block) -> None:
        """Join a block that has all rows of its users."""
        self._predict(block)
        events = self._events(block.rows)
        user, event_ts, available_ts = _numpy(events, "user", "event_ts", "available_ts")
        asked, request_ts, position = _numpy(block.requests, "user", "event_ts", "position")
        index = newest_visible((asked, request_ts), (user, event_ts, available_ts), *self._limits)
        num, start, has = len(user), index.start, index.length > 0
        newest = (start + index.length - 1)[has]
        copied = np.zeros(0, dtype=np.int64)
        if index.rows is not None:
            newest, copied = index.rows[newest], index.rows[num:]
        first = self._history.num_rows
        place = np.where(start < num, first + start, ~(start - num))
        self._history.append(events)
        self._add(
            Seen(
                position=position,
                start=np.where(has, place, 0),
                length=index.length,
                age_us=request_ts[has] - event_ts[newest],
                num_copies=len(copied),
                copies=take_in_pieces(events, copied),
            ),
            self._history.num_copies,
        )

    def add_long_user(self, blocks: Iterator[Block]) -> None:
        """Join the blocks, in time order, of one user."""
        start, num_copies = self._history.num_rows, self._history.num_copies
        newest_ts, is_in_order = -_NONE, True
        with closing(Spill(_REQUESTS, *self._place)) as asked:
            for block in blocks:
                self._predict(block)
                events = self._events(block.rows)
                self._history.append(events)
                ready_ts = visible_from(*_numpy(events, "event_ts", "available_ts"))
                is_in_order &= bool(np.all(np.diff(ready_ts, prepend=newest_ts) >= 0))
                newest_ts = max(newest_ts, int(ready_ts.max(initial=newest_ts)))
                order = np.argsort(block.requests.column("event_ts").to_numpy(), kind="stable")
                in_order = block.requests.take(pa.array(order))
                asked.deal(in_order, np.zeros(len(order), dtype=np.int64))
            user = LongUser(self._history, start, self._history.num_rows, is_in_order)
            for seen in join_long_user(user, asked.tables(0), *self._place, self._limits):
                self._add(seen, num_copies)

    def write(self) -> JoinStats:
        """Write the files of the bucket and return its stats.

        Raises:
            StoreError: a request has no row in the latents version.
        """
        task, stats = self._task, self._stats
        if self._num_missing:
            raise StoreError(
                f"{self._num_missing} of {stats.num_requests} requests of bucket {task.bucket} have no row in"
                f" {task.latents}, first example_id {self._first_missing[1]}; materialize the whole time range of the"
                " requests (history.keep_s may keep too little)"
            )
        self._history.write(task.out_dir / "history" / f"bucket={task.bucket:03d}.arrow")
        folder = task.out_dir / "requests" / f"bucket={task.bucket:03d}"
        for period, file in task.examples:
            write_parquet_pieces(self._answered(file), folder / f"period={period:04d}.parquet")
        return replace(stats, num_history_rows=self._history.num_rows)

    def _read_rows(self, columns: Sequence[str]) -> Iterator[Table]:
        """Yield the rows that matter: events that a request may see, and rows that are requests."""
        wanted = {*columns, "event_ts", "is_event"}
        time_range = self._task.time_range
        for table in self._reader.iter_bucket(self._task.bucket, [*wanted], self._place[1]):
            event_ts, is_event = _numpy(table, "event_ts", "is_event")
            # what happened after the last request is visible to none
            chosen = (event_ts < time_range.stop_ts) & (
                is_event | (event_ts >= time_range.start_ts)
            )
            yield _filter(table.select(list(columns)), chosen)

    def _read_requests(self, columns: Sequence[str]) -> Iterator[Table]:
        """Yield the keys of all requests, by period, and their positions in that order."""
        position = 0
        keys = [name for name in _REQUESTS.names if name != "position"]
        for _, file in self._task.examples:
            for table in self._read_examples(file, keys):
                numbers = pa.array(np.arange(position, position + table.num_rows))
                position += table.num_rows
                numbered = table.select(keys).append_column("position", numbers)
                yield numbered.cast(_REQUESTS).select(list(columns))

    def _read_examples(
        self, file: Path | VersionFile, columns: Sequence[str] | None
    ) -> Iterator[Table]:
        """Yield the examples of one file whose time lies in the range."""
        time_range = self._task.time_range
        path = file.path if isinstance(file, VersionFile) else file
        for table in iter_parquet(path, columns, self._place[1]):
            (event_ts,) = _numpy(table, "event_ts")
            chosen = (event_ts >= time_range.start_ts) & (event_ts < time_range.stop_ts)
            yield _filter(table, chosen)

    def _answered(self, file: Path | VersionFile) -> Iterator[Table]:
        """Yield the requests of one file with their answers; files must be asked for in order."""
        for table in self._read_examples(file, None):
            if not table.num_rows:
                continue
            stop = self._num_written + table.num_rows
            slices = self._slices.read(self._num_written, stop)
            prob = self._probs.read(self._num_written, stop)["prob"]
            self._num_written = stop
            # copies come after all rows, whose number is known only now
            start = slices["start"]
            start = np.where(start < 0, self._history.num_rows + ~start, start)
            table = table.append_column("teacher_prob", pa.array(prob, pa.float32()))
            table = table.append_column("latent_start", pa.array(start, pa.int64()))
            yield table.append_column("latent_len", pa.array(slices["length"], pa.int32()))

    def _events(self, rows: Table) -> Table:
        """Return the events among `rows`, as the history has them."""
        events = np.flatnonzero(*_numpy(rows, "is_event"))
        order = time_order(*(column[events] for column in _numpy(rows, *SORT_KEYS)))
        return rows.select(list(HISTORY_COLUMNS)).take(pa.array(events[order])).combine_chunks()

    def _predict(self, block: Block) -> None:
        """Take the stored FM prediction of each request of a block."""
        known = np.flatnonzero(_numpy(block.rows, "event_ts")[0] >= self._task.time_range.start_ts)
        user, event_ts, example_id = (column[known] for column in _numpy(block.rows, *SORT_KEYS))
        by_id = np.argsort(example_id)
        asked = _numpy(block.requests, *SORT_KEYS)
        (position,) = _numpy(block.requests, "position")
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
        prob = _numpy(block.rows, "fm_prob")[0][known[row]]
        self._probs.add(position, prob)

    def _add(self, seen: Seen, num_copies: int) -> None:
        """Take what some requests see; their copies are counted from `num_copies` on."""
        for table in seen.copies:
            self._history.append_copies(table)
        start = np.where(seen.start < 0, seen.start - num_copies, seen.start)
        self._slices.add(seen.position, start, seen.length)
        found = JoinStats(
            num_requests=len(seen.position),
            num_with_history=len(seen.age_us),
            sum_length=int(seen.length.sum()),
            num_extra_rows=seen.num_copies,
            staleness=StalenessSketch.of(seen.age_us),
        )
        self._stats = merge_stats([self._stats, found])


def _filter(table: Table, chosen: NDArray[np.bool_]) -> Table:
    return table if chosen.all() else table.filter(pa.array(chosen))


def _numpy(table: Table, *names: str) -> tuple[NDArray[Any], ...]:
    return tuple(table.column(name).to_numpy() for name in names)
