"""Cut rows of any number into blocks that fit in memory, each with the requests that belong to it.

Rows are dealt to ranges of the first sort key (users) of about a block each. A range that is still larger is dealt again:
into narrower ranges, and where it is a single user, into ranges of the next key (time). So blocks come in the order of the
keys, whatever the skew, and nothing but one block, one buffer of a block and a histogram of fixed size is in memory.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.history.spill import Spill

__all__ = ["Block", "Cutting", "Source", "cut_into_blocks"]

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]
Source = Callable[[Sequence[str]], Iterator[Table]]
"""Gives the named columns of some rows in tables of at most a block, anew at every call."""

_MAX_BINS = 1 << 20


@dataclass(frozen=True)
class Block:
    """Rows of one range of the keys, in any order, and the requests in it.

    `user` is the first key if the block is a part of its rows; None if it has all rows of all its users.
    """

    rows: Table
    requests: Table
    user: int | None = None


@dataclass(frozen=True)
class Cutting:
    """How to cut: the sort keys, the schemas of rows and requests, which both have the keys, and the size of a block."""

    keys: tuple[str, ...]
    rows: Any
    requests: Any
    folder: Path
    block_rows: int


def cut_into_blocks(
    rows: Source,
    requests: Source,
    num_rows: int,
    cutting: Cutting,
    *,
    depth: int = 0,
    user: int | None = None,
) -> Iterator[Block]:
    """Yield blocks of at most `block_rows` rows, in the order of the keys.

    Requests come with the rows that their keys lie among. A block is larger only if all its rows have the same keys.

    Args:
        rows: what is cut.
        requests: what is dealt along.
        num_rows: at most so many rows there are.
        cutting: how.
        depth: the key to cut by.
        user: the one that all rows are of, if its rows are more than a block.
    """
    key = cutting.keys[depth]
    histogram = _Histogram()
    if num_rows > cutting.block_rows:
        for table in rows([key]):
            histogram.add(_numbers(table, key))
        num_rows = histogram.total
    is_last = histogram.is_one_value and depth + 1 == len(cutting.keys)
    if num_rows <= cutting.block_rows or is_last:
        yield Block(_all(rows, cutting.rows), _all(requests, cutting.requests), user)
        return
    if histogram.is_one_value:
        owner = histogram.low if depth == 0 else user
        yield from cut_into_blocks(rows, requests, num_rows, cutting, depth=depth + 1, user=owner)
        return
    edges = histogram.edges(cutting.block_rows)
    with (
        closing(_deal(rows, cutting.rows, key, edges, cutting)) as dealt,
        closing(_deal(requests, cutting.requests, key, edges, cutting)) as asked,
    ):
        for place in range(len(edges)):
            if not dealt.num_rows(place) and not asked.num_rows(place):
                continue
            yield from cut_into_blocks(
                _source(dealt, place),
                _source(asked, place),
                dealt.num_rows(place),
                cutting,
                depth=depth,
                user=user,
            )


def _deal(source: Source, schema: Any, key: str, edges: Ints, cutting: Cutting) -> Spill:
    """Return the rows of `source` by the range that their key is in; range `i` begins at `edges[i]`."""
    spill = Spill(schema, cutting.folder, cutting.block_rows)
    try:
        for table in source(schema.names):
            place = np.searchsorted(edges, _numbers(table, key), side="right") - 1
            # requests of users without rows may lie before the first
            spill.deal(table, np.maximum(place, 0))
    except BaseException:
        spill.close()
        raise
    return spill


def _source(spill: Spill, place: int) -> Source:
    def tables(columns: Sequence[str]) -> Iterator[Table]:
        for table in spill.tables(place):
            yield table.select(list(columns))

    return tables


def _all(source: Source, schema: Any) -> Table:
    tables = list(source(schema.names))
    return pa.concat_tables(tables).combine_chunks() if tables else schema.empty_table()


def _numbers(table: Table, key: str) -> Ints:
    return np.asarray(table.column(key).to_numpy(), dtype=np.int64)


class _Histogram:
    """Counts of numbers in bins of equal width, a power of two that grows with the range of the numbers."""

    def __init__(self) -> None:
        self._shift = 0
        self._first = 0
        self._counts = np.zeros(0, dtype=np.int64)
        self.low = 0
        self.high = -1

    @property
    def total(self) -> int:
        return int(self._counts.sum())

    @property
    def is_one_value(self) -> bool:
        return self.low >= self.high

    def add(self, values: Ints) -> None:
        if not len(values):
            return
        low, high = int(values.min()), int(values.max())
        if len(self._counts):
            low, high = min(low, self.low), max(high, self.high)
        if (low, high) != (self.low, self.high):
            self._widen(low, high)
        bins = (values >> self._shift) - self._first
        self._counts += np.bincount(bins, minlength=len(self._counts))

    def _widen(self, low: int, high: int) -> None:
        shift = self._shift
        while (high >> shift) - (low >> shift) >= _MAX_BINS:
            shift += 1
        first = low >> shift
        counts = np.zeros((high >> shift) - first + 1, dtype=np.int64)
        old = self._first + np.arange(len(self._counts))
        np.add.at(counts, (old >> (shift - self._shift)) - first, self._counts)
        self._shift, self._first, self._counts = shift, first, counts
        self.low, self.high = low, high

    def edges(self, block_rows: int) -> Ints:
        """Return the first number of each range of neighbouring bins with at most `block_rows`, or of one bin."""
        total = np.cumsum(self._counts)
        edges, start = [], 0
        while start < len(total):
            edges.append(self._first + start << self._shift)
            limit = (total[start - 1] if start else 0) + block_rows
            start = max(start + 1, int(np.searchsorted(total, limit, "right")))
        return np.array(edges, dtype=np.int64)
