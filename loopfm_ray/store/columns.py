"""A table that grows on disk, a raw file per column, and becomes one Arrow batch without ever being in memory.

`map_ipc` gives whole columns without a copy only where the file has a single batch, and Arrow writes a batch from
memory. Here Arrow is given addresses of mapped files that nobody touches, and the bytes behind them are copied from file
to file.
"""

import mmap
import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any

import pyarrow as pa

from loopfm_ray.store.tables import write_atomically, write_ipc

__all__ = ["ColumnFiles"]

# Any below: pyarrow ships no types.
Table = Any

_COPY_BYTES = 1 << 22


class ColumnFiles:
    """Rows of fixed width columns without nulls, appended to nameless files; close it at the end."""

    def __init__(self, schema: Any, folder: Path) -> None:
        """Begin with no rows.

        Args:
            schema: of the rows.
            folder: whose disk the files are to take; they have no name there, so a killed process leaves none.
        """
        self._schema = schema
        self._num_rows = 0
        self._stack = ExitStack()
        self._files: list[IO[bytes]] = [
            self._stack.enter_context(tempfile.TemporaryFile(dir=folder))  # noqa: SIM115  the stack closes it
            for _ in schema
        ]

    @property
    def num_rows(self) -> int:
        """Rows so far."""
        return self._num_rows

    def close(self) -> None:
        """Give the disk space back."""
        self._stack.close()

    def append(self, table: Table) -> None:
        """Put rows at the end."""
        for field, file in zip(self._schema, self._files, strict=True):
            width = _width(field)
            for chunk in table.column(field.name).chunks:
                if len(chunk):
                    data = memoryview(chunk.buffers()[1])
                    file.write(data[chunk.offset * width : (chunk.offset + len(chunk)) * width])
        self._num_rows += table.num_rows

    def extend(self, other: "ColumnFiles") -> None:
        """Put all rows of another at the end."""
        for file, source in zip(self._files, other._files, strict=True):
            _copy(source, file)
        self._num_rows += other.num_rows

    def read(self, start: int, stop: int) -> Table:
        """Return rows `start` to `stop`."""
        arrays = []
        for field, file in zip(self._schema, self._files, strict=True):
            width = _width(field)
            file.seek(start * width)
            data = file.read((stop - start) * width)
            file.seek(0, os.SEEK_END)
            arrays.append(
                pa.Array.from_buffers(field.type, stop - start, [None, pa.py_buffer(data)])
            )
        return pa.Table.from_arrays(arrays, schema=self._schema)

    def write_ipc(self, path: Path) -> None:
        """Write all rows as `write_ipc` writes one table, byte for byte.

        Raises:
            StoreError: the disk is full.
        """
        if not self._num_rows:
            write_ipc(self._schema.empty_table(), path)
            return
        arrays: list[Any] = []  # Any: pyarrow ships no types
        files: dict[int, IO[bytes]] = {}
        for field, file in zip(self._schema, self._files, strict=True):
            file.flush()
            mapped = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            files[mapped.address] = file
            arrays.append(pa.Array.from_buffers(field.type, self._num_rows, [None, mapped]))
        batch = pa.RecordBatch.from_arrays(arrays, schema=self._schema)

        def write(staged: Path) -> None:
            with staged.open("wb") as out:
                sink = pa.PythonFile(_Sink(out, files), mode="w")
                with pa.ipc.new_file(sink, self._schema) as writer:
                    writer.write_batch(batch)

        write_atomically(path, write)


class _Sink:
    """A file for Arrow that takes what lies in a mapped column from that column's file."""

    closed = False

    def __init__(self, out: IO[bytes], files: dict[int, IO[bytes]]) -> None:
        self._out = out
        self._files = files

    def write(self, data: Any) -> None:  # Any: bytes or an Arrow buffer
        source = self._files.get(data.address) if isinstance(data, pa.Buffer) else None
        if source is None:
            self._out.write(data)
        else:
            _copy(source, self._out)

    def flush(self) -> None:
        self._out.flush()


def _copy(source: IO[bytes], sink: IO[bytes]) -> None:
    source.seek(0)
    shutil.copyfileobj(source, sink, _COPY_BYTES)
    source.seek(0, os.SEEK_END)


def _width(field: Any) -> int:
    return int(field.type.bit_width) // 8
