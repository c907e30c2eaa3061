"""Tables on disk: one way to write Parquet and Arrow files, and packed codes as a column.

Equal tables give equal bytes. A file appears whole, by a rename, so a task that is killed can simply run again.
"""

import os
import secrets
from collections.abc import Callable
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
    "map_ipc",
    "read_parquet",
    "write_atomically",
    "write_ipc",
    "write_parquet",
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


def write_parquet(table: Table, path: Path) -> None:
    """Write one Parquet file with zstd, whole or not at all."""
    write_atomically(
        path,
        lambda staged: pq.write_table(
            table, str(staged), compression="zstd", row_group_size=_ROW_GROUP
        ),
    )


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
