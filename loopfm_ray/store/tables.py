"""Tables on disk: one way to write Parquet and Arrow files, and packed codes as a column.

Equal tables give equal bytes. A file appears whole, by a rename, so a task that is killed can simply run again.
"""

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.errors import ShapeError, StoreError
from loopfm_ray.store.filesystem import Location, filesystem
from loopfm_ray.store.manifest import disk_errors, sync

__all__ = [
    "code_bytes",
    "code_column",
    "iter_parquet",
    "map_ipc",
    "read_parquet",
    "read_parquet_metadata",
    "write_atomically",
    "write_ipc",
    "write_parquet",
    "write_parquet_pieces",
    "write_text",
]

_ROW_GROUP = 1 << 18

# Any below: pyarrow ships no types.
Table = Any


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Call `write` with a hidden path beside `path`, then rename it to `path`.

    Raises:
        StoreError: the disk is full.
    """
    staged = path.parent / f".{path.name}.tmp-{secrets.token_hex(8)}"
    with disk_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(staged)
            sync(staged)
            os.replace(staged, path)  # noqa: PTH105  Path.replace is the same call; this one names what it does
        finally:
            staged.unlink(missing_ok=True)


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write a text file, whole or not at all; `mode` is its permissions, less those that the process masks."""

    def write(staged: Path) -> None:
        handle = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(text)

    write_atomically(path, write)


def write_parquet(table: Table, path: Path) -> None:
    """Write one Parquet file with zstd, whole or not at all."""
    write_atomically(
        path,
        lambda staged: pq.write_table(
            table, str(staged), compression="zstd", row_group_size=_ROW_GROUP
        ),
    )


def write_parquet_pieces(pieces: Iterable[Table], path: Path) -> None:
    """Write the rows of all pieces as `write_parquet` writes one table, byte for byte, holding one row group.

    Without rows no file is written.
    """
    groups = _regroup(pieces, _ROW_GROUP)
    first = next(groups, None)
    if first is None:
        return

    def write(staged: Path) -> None:
        with pq.ParquetWriter(str(staged), first.schema, compression="zstd") as writer:
            writer.write_table(first)
            for group in groups:
                writer.write_table(group)

    write_atomically(path, write)


def _regroup(pieces: Iterable[Table], num_rows: int) -> Iterator[Table]:
    """Yield the rows of `pieces` as tables of `num_rows`, the last with the rest, each of one chunk."""
    held: list[Table] = []
    num_held = 0
    for piece in pieces:
        table = piece
        while num_held + table.num_rows >= num_rows:
            held.append(table.slice(0, num_rows - num_held))
            table = table.slice(num_rows - num_held)
            yield pa.concat_tables(held).combine_chunks()
            held, num_held = [], 0
        if table.num_rows:
            held.append(table)
            num_held += table.num_rows
    if held:
        yield pa.concat_tables(held).combine_chunks()


def write_ipc(table: Table, path: Path) -> None:
    """Write one uncompressed Arrow file of a single batch, so that `map_ipc` gives whole columns without a copy."""

    def write(staged: Path) -> None:
        whole = table.combine_chunks()
        batches = whole.to_batches() or [
            pa.RecordBatch.from_pylist([], schema=table.schema),
        ]
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
            for batch in batches:
                writer.write_batch(batch)

    write_atomically(path, write)


def map_ipc(path: Path) -> Table:
    """Return the table of one local Arrow file, memory mapped.

    Raises:
        StoreError: the file is missing or no Arrow file.
    """
    try:
        return pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"{path} can not be read: {error}; write its version again") from error


def read_parquet(location: Location, columns: list[str] | None = None) -> Table:
    """Return the table of one Parquet file, local or on S3.

    Raises:
        StoreError: the file is missing, damaged or lacks a column.
    """
    system, path = filesystem(location)
    try:
        # a single file: without this, `period=0000` in the path becomes a column
        return pq.read_table(path, columns=columns, filesystem=system, partitioning=None)
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StoreError(f"{location} can not be read: {error}; write its version again") from error


def read_parquet_metadata(location: Location) -> dict[bytes, bytes]:
    """Return the key-value metadata of one Parquet file, local or on S3.

    Raises:
        StoreError: the file is missing or damaged.
    """
    system, path = filesystem(location)
    try:
        with system.open_input_file(path) as source:
            return dict(pq.read_metadata(source).metadata or {})
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"{location} can not be read: {error}; write its version again") from error


def iter_parquet(
    location: Location, columns: Sequence[str] | None, batch_rows: int
) -> Iterator[Table]:
    """Yield the rows of one Parquet file, local or on S3, in tables of at most `batch_rows`.

    Memory holds one row group of the columns at most.

    Raises:
        StoreError: the file is missing, damaged or lacks a column.
    """
    system, path = filesystem(location)
    try:
        with system.open_input_file(path) as source:
            file = pq.ParquetFile(source)
            lacking = sorted({*(columns or ())}.difference(file.schema_arrow.names))
            if lacking:
                raise KeyError(f"no columns {lacking}")
            wanted = None if columns is None else list(columns)
            for batch in file.iter_batches(min(batch_rows, _ROW_GROUP), columns=wanted):
                yield pa.Table.from_batches([batch])
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StoreError(f"{location} can not be read: {error}; write its version again") from error


def code_column(packed: NDArray[np.uint8]) -> Any:
    """Return uint8 [N, bytes] as an Arrow array of fixed size binary."""
    if packed.ndim != 2 or packed.dtype != np.uint8:
        raise ShapeError(
            f"packed codes must be uint8 [N, bytes], found {packed.dtype} {list(packed.shape)}"
        )
    data = pa.py_buffer(np.ascontiguousarray(packed))
    kind = pa.binary(packed.shape[1])
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(packed), [None, data])


def code_bytes(column: Any) -> NDArray[np.uint8]:
    """Return uint8 [N, bytes] of a fixed size binary column; a view where the column is one chunk."""
    width = column.type.byte_width
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    parts = []
    for chunk in chunks:
        flat = np.frombuffer(chunk.buffers()[1] or b"", dtype=np.uint8)
        begin = chunk.offset * width
        parts.append(flat[begin : begin + len(chunk) * width].reshape(len(chunk), width))
    if len(parts) == 1:
        return parts[0]
    return np.concatenate(parts) if parts else np.empty((0, width), dtype=np.uint8)
