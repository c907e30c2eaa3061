"""The point-in-time join of a log as it comes: unsorted, in chunks, in memory.

The log is dealt into ranges of users that fit the processor's cache; each range is sorted and searched on its own, so the
ranges can share threads and no temporary is as long as the log. One user's events stay in one range, whatever their number.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.history.asof import HistoryIndex, RequestColumns, newest_visible
from loopfm_ray.history.order import time_order

__all__ = ["LogChunk", "SortedLog", "join_log"]

Ints = NDArray[np.int64]
AnyInts = NDArray[np.integer]
Column = NDArray[Any]  # Any: a carried column may hold anything of fixed size
Item = TypeVar("Item")
Result = TypeVar("Result")

_RANGE_ROWS = 1 << 19
_MAX_RANGES = 256  # numbers of ranges are bytes, which NumPy sorts by counting


@dataclass(frozen=True)
class LogChunk:
    """Some rows of a log, in any order; `carried` are further columns that shall come back sorted."""

    user: AnyInts
    event_ts: AnyInts
    available_ts: AnyInts
    example_id: AnyInts
    carried: tuple[Column, ...] = ()


@dataclass(frozen=True)
class SortedLog:
    """The carried columns by user, event_ts and example_id, and the history of each request as slices of them."""

    carried: tuple[Column, ...]
    index: HistoryIndex


@dataclass(frozen=True)
class _Ranges:
    """Ranges of users: user `low + (i << shift)` begins range `i`."""

    low: int
    shift: int
    num: int

    def deal(self, user: AnyInts) -> list[NDArray[np.intp]]:
        """Return the rows of each range, in order."""
        number = ((user.astype(np.int64) - self.low) >> self.shift).astype(np.uint8)
        rows = np.argsort(number, kind="stable")
        return np.split(rows, np.cumsum(np.bincount(number, minlength=self.num))[:-1])


def join_log(
    requests: RequestColumns,
    log: Sequence[LogChunk],
    max_len: int,
    retention_us: int | None = None,
    num_threads: int = 1,
) -> SortedLog:
    """Sort a log and find the newest `max_len` events that each request could see, as `newest_visible` does.

    Args:
        requests: `(user, request_ts)`, [R] each.
        log: one chunk at least; all carry the same columns.
        max_len: the longest history.
        retention_us: events older than this at the request are left out; None keeps all.
        num_threads: to work with; they change no answer.
    """
    user, request_ts = (np.asarray(column) for column in requests)
    ranges = _ranges(log)
    # users without events fall into the ranges at the ends
    asked = ranges.deal(np.clip(user, ranges.low, ranges.low + (ranges.num << ranges.shift) - 1))

    def one(task: tuple[list[tuple[LogChunk, NDArray[np.intp]]], NDArray[np.intp]]) -> SortedLog:
        pieces, wanted = task
        return _join_range((user[wanted], request_ts[wanted]), pieces, max_len, retention_us)

    with ThreadPoolExecutor(num_threads) as pool:
        run = map if num_threads == 1 else pool.map
        dealt = list(_apply(run, lambda chunk: ranges.deal(chunk.user), log))
        pieces = [
            [(chunk, rows[number]) for chunk, rows in zip(log, dealt, strict=True)]
            for number in range(ranges.num)
        ]
        found = list(_apply(run, one, list(zip(pieces, asked, strict=True))))
    num_events = sum(len(chunk.user) for chunk in log)
    carried = tuple(
        np.concatenate(columns) for columns in zip(*(f.carried for f in found), strict=True)
    )
    return SortedLog(
        carried, _merge([f.index for f in found], asked, [_rows(p) for p in pieces], num_events)
    )


def _apply(
    run: Callable[..., Iterable[Any]], task: Callable[[Item], Result], items: Sequence[Item]
) -> Iterable[Result]:
    """Give `map` and a pool's `map` one type."""
    return run(task, items)


def _rows(pieces: list[tuple[LogChunk, NDArray[np.intp]]]) -> int:
    return sum(len(rows) for _, rows in pieces)


def _ranges(log: Sequence[LogChunk]) -> _Ranges:
    """Return ranges of users, about as many as the log has `_RANGE_ROWS`."""
    filled = [chunk.user for chunk in log if len(chunk.user)]
    if not filled:
        return _Ranges(0, 0, 1)
    low = min(int(user.min()) for user in filled)
    width = max(int(user.max()) for user in filled) - low + 1
    wanted = min(_MAX_RANGES, 1 + sum(map(len, filled)) // _RANGE_ROWS)
    shift = 0
    while -(-width >> shift) > wanted:
        shift += 1
    return _Ranges(low, shift, (width - 1 >> shift) + 1)


def _join_range(
    requests: RequestColumns,
    pieces: list[tuple[LogChunk, NDArray[np.intp]]],
    max_len: int,
    retention_us: int | None,
) -> SortedLog:
    """Join one range of users."""

    def gather(columns: Iterable[Column]) -> Column:
        return np.concatenate(
            [column[rows] for column, (_, rows) in zip(columns, pieces, strict=True)]
        )

    chunks = [chunk for chunk, _ in pieces]
    user = gather(chunk.user for chunk in chunks)
    event_ts = gather(chunk.event_ts for chunk in chunks)
    order = time_order(user, event_ts, gather(chunk.example_id for chunk in chunks))
    available_ts = gather(chunk.available_ts for chunk in chunks)[order]
    index = newest_visible(
        requests, (user[order], event_ts[order], available_ts), max_len, retention_us
    )
    columns = zip(*(chunk.carried for chunk in chunks), strict=True)
    carried = [gather(column)[order] for column in columns]
    return SortedLog(tuple(carried), index)


def _merge(
    found: list[HistoryIndex], asked: list[NDArray[np.intp]], sizes: list[int], num_events: int
) -> HistoryIndex:
    """Return the index of all ranges, whose rows follow each other, extra rows after all events."""
    num_requests = sum(map(len, asked))
    start = np.zeros(num_requests, dtype=np.int64)
    length = np.zeros(num_requests, dtype=np.int64)
    extra: list[Ints] = []
    first, num_extra = 0, num_events
    for index, wanted, size in zip(found, asked, sizes, strict=True):
        moved = np.where(index.start < size, first, num_extra - size)
        start[wanted] = np.where(index.length > 0, index.start + moved, 0)
        length[wanted] = index.length
        if index.rows is not None:
            extra.append(index.rows[size:] + first)
            num_extra += len(extra[-1])
        first += size
    if not extra:
        return HistoryIndex(start, length, None)
    return HistoryIndex(start, length, np.concatenate([np.arange(num_events), *extra]))
