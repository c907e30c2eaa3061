"""The join of one user whose rows are more than a block: slab after slab of what becomes readable.

What a request sees depends only on which events were readable by then. So events are taken in the order in which they
become readable (`visible_from`, then row), a block at a time, and of what was readable before, the newest `max_len` are
carried along: the newest of a union are among the newest of its parts. Events that are not yet readable are not held,
however late they come.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.history.asof import newest_visible
from loopfm_ray.history.blocks import Cutting, cut_into_blocks
from loopfm_ray.history.table import HistoryTable
from loopfm_ray.history.times import visible_from

__all__ = ["LongUser", "Seen", "join_long_user"]

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]

_MOST_COPIES = 1 << 24
"""Entries of the histories of one answer, should all be copies."""
_PIECE_ROWS = 1 << 19


@dataclass(frozen=True)
class LongUser:
    """Rows `start` to `stop` of `history`; `is_in_order` if they become readable in the order of rows."""

    history: HistoryTable
    start: int
    stop: int
    is_in_order: bool


@dataclass(frozen=True)
class Seen:
    """What R requests see.

    Attributes:
        position: int64 [R] of the requests.
        start: int64 [R] row of the history where the slice starts; `~i` stands for the `i`-th copy of this user. 0 where
            `length` is 0.
        length: int64 [R] of the slice.
        age_us: int64, of the newest event at each request that has one.
        num_copies: rows of `copies`.
        copies: history rows for what is no slice; to be read before the next answer is asked for.
    """

    position: Ints
    start: Ints
    length: Ints
    age_us: Ints
    num_copies: int
    copies: Iterator[Table]


def join_long_user(
    user: LongUser,
    requests: Iterator[Table],
    folder: Path,
    block_rows: int,
    limits: tuple[int, int | None],
) -> Iterator[Seen]:
    """Yield the histories of all requests of one user.

    Args:
        user: whose requests they are.
        requests: columns event_ts, which never falls, and position.
        folder: for what does not fit into a block.
        block_rows: events of a slab.
        limits: `(max_len, retention_us)` as `newest_visible` takes them.
    """
    asked = _Asked(requests, min(block_rows, max(1, _MOST_COPIES // limits[0])))
    num_copies = 0
    slabs = _slabs(user, folder, block_rows)
    table = next(slabs)
    while True:
        following = next(slabs, None)
        until_ts = None if following is None else int(_ready(following).min())
        known = _Known(table)
        last_state = -1
        for chunk in asked.until(until_ts):
            seen, last_state = known.answer(chunk, limits, last_state, num_copies)
            num_copies += seen.num_copies
            yield seen
        if following is None:
            return
        carry = known.table.slice(max(0, known.table.num_rows - limits[0]))
        table = pa.concat_tables([carry, following])


class _Asked:
    """Requests in time order, handed out up to some time."""

    def __init__(self, requests: Iterator[Table], num_rows: int) -> None:
        self._requests = requests
        self._num_rows = num_rows
        self._rest: Table = None

    def until(self, until_ts: int | None) -> Iterator[Table]:
        """Yield what is left of the requests earlier than `until_ts`, None for all, some at a time."""
        while True:
            if self._rest is None or not self._rest.num_rows:
                self._rest = next(self._requests, None)
                if self._rest is None:
                    return
            num = self._rest.num_rows
            if until_ts is not None:
                num = int(np.searchsorted(self._rest.column("event_ts").to_numpy(), until_ts))
            if not num:
                return
            chunk = self._rest.slice(0, min(num, self._num_rows))
            self._rest = self._rest.slice(chunk.num_rows)
            yield chunk


class _Known:
    """Events that requests of one slab can see: those carried into it and its own."""

    def __init__(self, table: Table) -> None:
        order = np.argsort(table.column("row").to_numpy())
        self.table = table.take(pa.array(order)).combine_chunks()
        self._row = self.table.column("row").to_numpy()
        self._event_ts = self.table.column("event_ts").to_numpy()
        self._available_ts = self.table.column("available_ts").to_numpy()
        self._ready_ts = np.sort(_ready(self.table))

    def answer(
        self, requests: Table, limits: tuple[int, int | None], last_state: int, num_copies: int
    ) -> tuple[Seen, int]:
        """Return what requests see, and how many events are readable at the last of them.

        Args:
            requests: in time order.
            limits: `(max_len, retention_us)`.
            last_state: what the call before returned, -1 for the first: the copies of this state are there already.
            num_copies: so far.
        """
        max_len, retention_us = limits
        asked_ts = requests.column("event_ts").to_numpy()
        state = np.searchsorted(self._ready_ts, asked_ts, side="right")
        is_new = np.append(True, np.diff(state) != 0)
        asked = (np.zeros(np.count_nonzero(is_new), dtype=np.int64), asked_ts[is_new])
        # one window serves all requests that meet the same state
        window = newest_visible(
            asked,
            (np.zeros_like(self._row), self._event_ts, self._available_ts),
            max_len,
            row=self._row,
        )
        num = len(self._row)
        rows = np.arange(num) if window.rows is None else window.rows
        num_known = 0
        if state[0] == last_state and window.start[0] >= num:
            num_known = int(window.length[0])
        which = np.cumsum(is_new) - 1
        start, length = window.start[which], window.length[which]
        if retention_us is not None:
            oldest = np.searchsorted(self._event_ts, asked_ts - retention_us, side="left")
            num_old = _count_below(rows, start, length, oldest)
            start, length = start + num_old, length - num_old
        has = length > 0
        newest = rows[(start + length - 1)[has]]
        age_us = asked_ts[has] - self._event_ts[newest]
        seen = Seen(
            position=requests.column("position").to_numpy(),
            start=np.where(has, self._place(start, num_copies - num_known), 0),
            length=length,
            age_us=age_us,
            num_copies=len(rows) - num - num_known,
            copies=take_in_pieces(self.table, rows[num + num_known :]),
        )
        return seen, int(state[-1])

    def _place(self, start: Ints, num_copies: int) -> Ints:
        """Return where in the history slices of the events at hand start, or of the copies after them."""
        num = len(self._row)
        if not num:
            return start
        of_row = self._row[np.minimum(start, num - 1)]
        return np.where(start < num, of_row, ~(num_copies + start - num))


def take_in_pieces(table: Table, rows: Ints) -> Iterator[Table]:
    """Yield the given rows of a table, some at a time."""
    for start in range(0, len(rows), _PIECE_ROWS):
        yield table.take(pa.array(rows[start : start + _PIECE_ROWS]))


def _count_below(rows: Ints, start: Ints, length: Ints, bound: Ints) -> Ints:
    """Return how many of `rows[start : start + length]`, which rise, are less than `bound`; [R] each."""
    low = np.zeros_like(length)
    high = length.copy()
    while np.any(low < high):
        middle = (low + high) >> 1
        open_ = low < high
        below = np.zeros(len(low), dtype=bool)
        below[open_] = rows[(start + middle)[open_]] < bound[open_]
        low = np.where(open_ & below, middle + 1, low)
        high = np.where(open_ & ~below, middle, high)
    return low


def _ready(table: Table) -> Ints:
    return visible_from(
        table.column("event_ts").to_numpy(), table.column("available_ts").to_numpy()
    )


def _slabs(user: LongUser, folder: Path, block_rows: int) -> Iterator[Table]:
    """Yield the events in the order in which they become readable, with their rows; one empty table if there are none."""
    schema = user.history.schema.append(pa.field("row", pa.int64()))
    if user.is_in_order:
        starts = range(user.start, max(user.stop, user.start + 1), block_rows)
        for start in starts:
            yield _rows_of(user, start, min(start + block_rows, user.stop))
        return
    schema = schema.append(pa.field("ready_ts", pa.int64()))
    cutting = Cutting(
        ("ready_ts", "row"),
        schema,
        schema.empty_table().select(["ready_ts", "row"]).schema,
        folder,
        block_rows,
    )

    def rows(columns: Sequence[str]) -> Iterator[Table]:
        for start in range(user.start, user.stop, block_rows):
            table = _rows_of(user, start, min(start + block_rows, user.stop))
            table = table.append_column("ready_ts", pa.array(_ready(table)))
            yield table.select(list(columns))

    for block in cut_into_blocks(rows, lambda _: iter(()), user.stop - user.start, cutting):
        yield block.rows.drop_columns(["ready_ts"])


def _rows_of(user: LongUser, start: int, stop: int) -> Table:
    table = user.history.read(start, stop)
    return table.append_column("row", pa.array(np.arange(start, stop)))
