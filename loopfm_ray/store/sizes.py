"""What the columns of a latents version take: encoded, and on disk after compression."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.errors import StoreError
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location, filesystem
from loopfm_ray.store.format import file_location, read_manifest
from loopfm_ray.store.shards import SHARDS, check_latents

__all__ = ["ColumnSize", "LatentsSizes", "measure_sizes", "online_event_bytes"]


@dataclass(frozen=True)
class ColumnSize:
    """Bytes of one column over all files, with its page headers.

    Attributes:
        encoded_bytes: after Parquet's encoding, before compression.
        disk_bytes: after compression.
    """

    encoded_bytes: int = 0
    disk_bytes: int = 0


@dataclass(frozen=True)
class LatentsSizes:
    """What a latents version takes.

    Attributes:
        num_rows: rows.
        num_files: files with rows.
        columns: by the name in the files.
        disk_bytes: of these files, with their footers.
    """

    num_rows: int
    num_files: int
    columns: dict[str, ColumnSize]
    disk_bytes: int

    @property
    def encoded_bytes_per_event(self) -> float:
        """Bytes of a row after encoding and before compression, all columns; 0 without rows."""
        encoded = sum(column.encoded_bytes for column in self.columns.values())
        return encoded / max(self.num_rows, 1)

    @property
    def disk_bytes_per_event(self) -> float:
        """Bytes of a row in the files, with its share of their footers; 0 without rows."""
        return self.disk_bytes / max(self.num_rows, 1)

    @property
    def per_event(self) -> dict[str, dict[str, float]]:
        """Encoded and compressed bytes of a row, by column."""
        rows = max(self.num_rows, 1)
        return {
            name: {"encoded": size.encoded_bytes / rows, "disk": size.disk_bytes / rows}
            for name, size in self.columns.items()
        }


def measure_sizes(location: Location) -> LatentsSizes:
    """Return what the latents version at `location` takes, from the footers of its files.

    Raises:
        StoreError: there is no such version, or a file can not be read.
    """
    manifest = read_manifest(location)
    check_latents(location, manifest)
    columns: dict[str, ColumnSize] = {}
    files = [entry for entry in manifest.files if entry.path != SHARDS]
    for entry in files:
        for name, size in _file_columns(file_location(location, manifest, entry.path)):
            total = columns.get(name, ColumnSize())
            columns[name] = ColumnSize(
                total.encoded_bytes + size.encoded_bytes, total.disk_bytes + size.disk_bytes
            )
    return LatentsSizes(
        num_rows=manifest.num_rows,
        num_files=len(files),
        columns=columns,
        disk_bytes=sum(entry.num_bytes for entry in files),
    )


def online_event_bytes(spec: CodeSpec) -> int:
    """Return the bytes of one event in an online record: its two times and its code."""
    return 2 * np.dtype(np.int64).itemsize + spec.num_bytes


def _file_columns(location: Location) -> list[tuple[str, ColumnSize]]:
    system, path = filesystem(location)
    try:
        with system.open_input_file(path) as source:
            footer = pq.read_metadata(source)
    except (OSError, pa.ArrowInvalid) as error:
        raise StoreError(f"{location} can not be read: {error}; write its version again") from error
    chunks = [
        footer.row_group(group).column(place)
        for group in range(footer.num_row_groups)
        for place in range(footer.num_columns)
    ]
    return [
        (
            chunk.path_in_schema,
            ColumnSize(chunk.total_uncompressed_size, chunk.total_compressed_size),
        )
        for chunk in chunks
    ]
