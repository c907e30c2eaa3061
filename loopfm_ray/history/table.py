"""The history table of one bucket while it grows: rows in order, then copies for histories that are no slice."""

from pathlib import Path
from typing import Any

import pyarrow as pa

from loopfm_ray.store.columns import ColumnFiles
from loopfm_ray.store.tables import write_ipc

__all__ = ["HistoryTable"]

# Any below: pyarrow ships no types.
Table = Any


class HistoryTable:
    """Holds up to a block of rows in memory and more in files; close it at the end."""

    def __init__(self, schema: Any, folder: Path, block_rows: int) -> None:
        """Begin with no rows.

        Args:
            schema: of the rows; fixed width columns without nulls.
            folder: whose disk is to take them.
            block_rows: more rows than this go to disk.
        """
        self.schema = schema
        self._block_rows = block_rows
        self._folder = folder
        self._rows: list[Table] = []
        self._copies: list[Table] = []
        self._files: tuple[ColumnFiles, ColumnFiles] | None = None
        self.num_rows = 0
        self.num_copies = 0

    def close(self) -> None:
        """Give the disk space back."""
        for files in self._files or ():
            files.close()

    def append(self, table: Table) -> None:
        """Put rows after the rows so far."""
        self._rows.append(table)
        self.num_rows += table.num_rows
        self._spill()

    def append_copies(self, table: Table) -> None:
        """Put rows after the copies so far, which come after all rows."""
        self._copies.append(table)
        self.num_copies += table.num_rows
        self._spill()

    def read(self, start: int, stop: int) -> Table:
        """Return rows `start` to `stop`, of what `append` took."""
        return self._to_files()[0].read(start, stop)

    def write(self, path: Path) -> None:
        """Write all rows as one batch, whatever their number."""
        if self._files is None:
            whole = pa.concat_tables([self.schema.empty_table(), *self._rows, *self._copies])
            write_ipc(whole, path)
            return
        rows, copies = self._to_files()
        rows.extend(copies)
        rows.write_ipc(path)

    def _spill(self) -> None:
        if self._files is not None or self.num_rows + self.num_copies > self._block_rows:
            self._to_files()

    def _to_files(self) -> tuple[ColumnFiles, ColumnFiles]:
        if self._files is None:
            self._files = (
                ColumnFiles(self.schema, self._folder),
                ColumnFiles(self.schema, self._folder),
            )
        for held, files in zip((self._rows, self._copies), self._files, strict=True):
            for table in held:
                files.append(table)
            held.clear()
        return self._files
