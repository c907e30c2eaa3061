"""The histories of some owners while they are joined block by block: one table, and the slice of it for each request.

An owner is whom events belong to: a user, or the value of another key. A block has all rows of its owners, or is a part of
the rows of one; see `blocks` and `slabs`.
"""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.history.asof import newest_visible
from loopfm_ray.history.blocks import Block
from loopfm_ray.history.order import time_order
from loopfm_ray.history.settings import JoinSettings, JoinStats, merge_stats
from loopfm_ray.history.slabs import LongUser, Seen, join_long_user, take_in_pieces
from loopfm_ray.history.spill import Answers, Spill
from loopfm_ray.history.staleness import StalenessSketch
from loopfm_ray.history.table import HistoryTable
from loopfm_ray.history.times import visible_from

__all__ = ["HISTORY_COLUMNS", "Histories", "SlicePlan", "filter_rows", "numpy_columns"]

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]

HISTORY_COLUMNS = ("example_id", "user", "item", "event_ts", "available_ts", "code")
_NONE = 2**62
_SLICES = pa.schema([("start", pa.int64()), ("length", pa.int32())])


@dataclass(frozen=True)
class SlicePlan:
    """What is joined, and where.

    Attributes:
        history: Arrow schema of the table that is written.
        requests: of the requests: the sort keys and `position`.
        keys: the sort keys of rows and requests: the owner, event_ts, example_id.
        settings: what a history is.
        folder: for what does not fit into a block.
    """

    history: Any
    requests: Any
    keys: tuple[str, ...]
    settings: JoinSettings
    folder: Path


class Histories:
    """The table of histories so far, and the slices of the requests so far."""

    def __init__(self, plan: SlicePlan, stack: ExitStack) -> None:
        """Begin with nothing; `stack` closes the files."""
        self._plan = plan
        self._limits = (plan.settings.max_len, plan.settings.retention_us)
        self._place = (plan.folder, plan.settings.block_rows)
        self._history = stack.enter_context(closing(HistoryTable(plan.history, *self._place)))
        self._slices = stack.enter_context(closing(Answers(_SLICES, *self._place)))
        self._stats = JoinStats(staleness=StalenessSketch.of(np.zeros(0, dtype=np.int64)))

    @property
    def stats(self) -> JoinStats:
        """What was found."""
        return replace(self._stats, num_history_rows=self._history.num_rows)

    def take(self, blocks: Iterator[Block]) -> None:
        """Join all blocks; those of one owner follow each other in time order."""
        for owner, group in itertools.groupby(blocks, key=lambda block: block.user):
            if owner is not None:
                self._add_long_owner(group)
            else:
                for block in group:
                    self._add_owners(block)

    def read(self, start: int, stop: int) -> tuple[Ints, Ints]:
        """Return start and length of the requests at positions `start` to `stop`, once all blocks were taken."""
        slices = self._slices.read(start, stop)
        begin = slices["start"]
        # copies come after all rows, whose number is known only now
        begin = np.where(begin < 0, self._history.num_rows + ~begin, begin)
        return begin, slices["length"]

    def write(self, path: Path) -> None:
        """Write the table."""
        self._history.write(path)

    def _add_owners(self, block: Block) -> None:
        """Join a block that has all rows of its owners."""
        owner_name = self._plan.keys[0]
        rows = self._events(block.rows)
        owner, event_ts, available_ts = numpy_columns(rows, owner_name, "event_ts", "available_ts")
        events = rows.select(self._plan.history.names)
        asked, request_ts, position = numpy_columns(
            block.requests, owner_name, "event_ts", "position"
        )
        index = newest_visible((asked, request_ts), (owner, event_ts, available_ts), *self._limits)
        num, start, has = len(owner), index.start, index.length > 0
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

    def _add_long_owner(self, blocks: Iterator[Block]) -> None:
        """Join the blocks, in time order, of one owner."""
        start, num_copies = self._history.num_rows, self._history.num_copies
        with closing(Spill(self._plan.requests, *self._place)) as asked:
            is_in_order = self._collect(blocks, asked)
            owner = LongUser(self._history, start, self._history.num_rows, is_in_order)
            for seen in join_long_user(owner, asked.tables(0), *self._place, self._limits):
                self._add(seen, num_copies)

    def _collect(self, blocks: Iterator[Block], asked: Spill) -> bool:
        """Put the events of one owner into the history and its requests, in time order, into `asked`.

        Returns whether the events become readable in the order in which they happened.
        """
        newest_ts, is_in_order = -_NONE, True
        for block in blocks:
            events = self._events(block.rows).select(self._plan.history.names)
            self._history.append(events)
            ready_ts = visible_from(*numpy_columns(events, "event_ts", "available_ts"))
            is_in_order &= bool(np.all(np.diff(ready_ts, prepend=newest_ts) >= 0))
            newest_ts = int(ready_ts.max(initial=newest_ts))
            order = np.argsort(block.requests.column("event_ts").to_numpy(), kind="stable")
            in_order = block.requests.take(pa.array(order))
            asked.deal(in_order, np.zeros(len(order), dtype=np.int64))
        return is_in_order

    def _events(self, rows: Table) -> Table:
        """Return the events among `rows` in the order of a history."""
        events = np.flatnonzero(*numpy_columns(rows, "is_event"))
        order = time_order(*(column[events] for column in numpy_columns(rows, *self._plan.keys)))
        names = list(dict.fromkeys([self._plan.keys[0], *self._plan.history.names]))
        return rows.select(names).take(pa.array(events[order])).combine_chunks()

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


def filter_rows(table: Table, chosen: NDArray[np.bool_]) -> Table:
    """Return the chosen rows; the table itself where they are all."""
    return table if chosen.all() else table.filter(pa.array(chosen))


def numpy_columns(table: Table, *names: str) -> tuple[NDArray[Any], ...]:
    """Return columns without nulls as arrays."""
    return tuple(table.column(name).to_numpy() for name in names)
