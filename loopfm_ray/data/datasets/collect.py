"""Gather user and item tables from the rows of published files that repeat them on every row."""

from collections.abc import Sequence

import polars as pl

from loopfm_ray.data.datasets.published import Layout, PublishedFile, read_layout
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.errors import DataError

__all__ = ["TableOf", "collect"]

_MERGE_ROWS = 1_000_000


class TableOf:
    """One row for each key of a column, with what the files say beside it."""

    def __init__(self, key: str, categorical: Sequence[str], numeric: Sequence[str] = ()) -> None:
        self.key = key
        self.categorical = tuple(categorical)
        self.numeric = tuple(numeric)
        self._parts: list[pl.DataFrame] = []
        self._num_rows = 0
        self._limit = _MERGE_ROWS

    @property
    def columns(self) -> list[str]:
        """The columns that the table takes from the files."""
        return [self.key, *self.categorical, *self.numeric]

    def add(self, block: pl.DataFrame) -> None:
        """Add the keys of a block of rows."""
        part = block.select(self.columns).unique(maintain_order=True)
        self._parts.append(part)
        self._num_rows += part.height
        if self._num_rows > self._limit:
            self._merge()
            self._limit = max(_MERGE_ROWS, 2 * self._num_rows)

    def source(self, advice: str) -> EntitySource:
        """Return the finished table.

        Raises:
            DataError: a key comes with two different values; `advice` says what to do.
        """
        frame = self._merge()
        repeated = frame.filter(pl.col(self.key).is_duplicated())
        if repeated.height:
            key = repeated[self.key][0]
            first, second, *_ = repeated.filter(pl.col(self.key) == key).iter_rows(named=True)
            differ = {
                name: (first[name], second[name]) for name in first if first[name] != second[name]
            }
            raise DataError(
                f"{self.key} {key!r} comes with different values in different rows: {differ}; expected the same in"
                f" all; {advice}"
            )
        return EntitySource.from_table(frame.to_arrow(), self.key, self.categorical, self.numeric)

    def _merge(self) -> pl.DataFrame:
        frame = pl.concat(self._parts).unique(maintain_order=True)
        self._parts, self._num_rows = [frame], frame.height
        return frame


def collect(file: PublishedFile, layout: Layout, tables: Sequence[TableOf]) -> int:
    """Add the rows of a file to the tables; return how many rows it has."""
    columns = list(dict.fromkeys(name for table in tables for name in table.columns))
    num_rows = 0
    for _, block in read_layout(file, layout, columns):
        frame = pl.DataFrame(block)
        num_rows += frame.height
        for table in tables:
            table.add(frame)
    return num_rows
