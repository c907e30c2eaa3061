"""Read event logs block by block, and hand them on period by period in time order.

The log may be in any order and larger than memory: blocks are cut by period and spilled, then one period at a time is
read back and sorted. Rows are sorted by all their columns, time first, so the order of the input never shows.
"""

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.fs as pafs

from loopfm_ray.data.canonical import BlockPlace, canonical_block
from loopfm_ray.data.config import ColumnsConfig
from loopfm_ray.data.runs import runs
from loopfm_ray.data.split import format_ts
from loopfm_ray.errors import ConfigError, DataError, SchemaError

__all__ = ["PeriodRows", "iterate_periods", "open_files", "read_blocks", "required_columns"]

# Any: pyarrow ships no types.
Fragment = Any


@dataclass(frozen=True)
class PeriodRows:
    """The rows of one period, sorted by all scalar columns with `event_ts` first."""

    period: int
    rows: pl.DataFrame
    num_dropped: int
    """Duplicates that were left out."""


def open_files(path: str) -> list[Fragment]:
    """Return the files of a dataset, by name: one file, a directory or an s3:// address, Parquet or CSV.

    Raises:
        ConfigError: nothing is there, or it can not be opened.
    """
    try:
        filesystem, inner = (
            pafs.FileSystem.from_uri(path)
            if "://" in path
            else (pafs.LocalFileSystem(), str(Path(path)))
        )
        kind = "csv" if path.partition("?")[0].endswith(".csv") else "parquet"
        found = filesystem.get_file_info(inner)
        if found.type == pafs.FileType.NotFound:
            raise ConfigError(
                f"no data at {path}; expected a file or directory of Parquet or CSV, set the path in data"
            )
        if found.type == pafs.FileType.Directory:
            inside = filesystem.get_file_info(pafs.FileSelector(inner, recursive=True))
            files = sorted(f.path for f in inside if f.extension in ("parquet", "csv"))
            if not files:
                raise ConfigError(
                    f"directory {path} holds no .parquet or .csv file; set the path in data"
                )
            kind = "csv" if files[0].endswith(".csv") else "parquet"
            files = [file for file in files if file.endswith(kind)]
        else:
            files = [inner]
        dataset = pads.dataset(files, filesystem=filesystem, format=kind)
        return list(dataset.get_fragments())
    except (OSError, pa.ArrowInvalid) as error:
        raise ConfigError(f"data at {path} can not be read: {error}") from error


def required_columns(columns: ColumnsConfig) -> list[str]:
    """Return the names of the columns that the config reads, each once."""
    fixed = [columns.user, columns.item, columns.event_ts, columns.label, columns.label_ts]
    groups = (columns.task_columns, columns.categorical, columns.numeric, columns.sequence)
    names = [name for name in fixed if name] + [name for group in groups for name in group.values()]
    return list(dict.fromkeys(names))


def read_raw_blocks(
    path: str, names: list[str], block_rows: int
) -> Iterator[tuple[BlockPlace, pa.Table]]:
    """Yield blocks of the columns `names` of every file, with their places.

    Raises:
        SchemaError: a file lacks a column.
    """
    for fragment in open_files(path):
        found = fragment.physical_schema.names
        missing = [name for name in names if name not in found]
        if missing:
            raise SchemaError(
                f"{fragment.path}: columns {missing} are missing, the file has {found};"
                " correct the names under data"
            )
        first_row = 0
        # the scanner would otherwise buffer and decode far ahead of us, up to the whole file
        parquet = isinstance(fragment, pads.ParquetFileFragment)
        lean = pads.ParquetFragmentScanOptions(pre_buffer=False, use_buffered_stream=True)
        batches = fragment.to_batches(
            columns=names,
            batch_size=block_rows,
            batch_readahead=0,
            use_threads=False,
            fragment_readahead=1,
            fragment_scan_options=lean if parquet else None,
        )
        for batch in batches:
            if batch.num_rows:
                yield BlockPlace(fragment.path, first_row), pa.Table.from_batches([batch])
            first_row += batch.num_rows


def read_blocks(
    path: str, columns: ColumnsConfig, *, block_rows: int, label_delay_us: int
) -> Iterator[pa.Table]:
    """Yield the log as canonical blocks (see `canonical_block`), in file order."""
    for place, block in read_raw_blocks(path, required_columns(columns), block_rows):
        yield canonical_block(block, columns, place, label_delay_us)


def iterate_periods(
    blocks: Iterable[pa.Table],
    spill_dir: Path,
    *,
    origin_ts: int,
    period_us: int,
    drop_duplicates: bool,
) -> Iterator[PeriodRows]:
    """Yield the rows of canonical `blocks` period by period; what is spilled is removed once read.

    Raises:
        DataError: there are no rows, or a row is repeated and `drop_duplicates` is not set.
        ConfigError: a row is older than period 0.
    """
    parts = _spill(blocks, spill_dir, origin_ts, period_us)
    if not parts:
        raise DataError("the log has no rows; expected at least one event, check data.path")
    for period in sorted(parts):
        frame = pl.concat([_read_part(file) for file in parts[period]])
        for file in parts[period]:
            file.unlink()
        yield _sorted_period(period, frame, drop_duplicates)


def _spill(
    blocks: Iterable[pa.Table], spill_dir: Path, origin_ts: int, period_us: int
) -> dict[int, list[Path]]:
    spill_dir.mkdir(parents=True, exist_ok=True)
    parts: dict[int, list[Path]] = {}
    numbers = itertools.count()
    for block in blocks:
        event_ts = block.column("event_ts").to_numpy()
        period = (event_ts - origin_ts) // period_us
        if len(period) and period.min() < 0:
            raise ConfigError(
                f"an event at {format_ts(int(event_ts.min()))} is older than data.period_origin"
                f" {format_ts(origin_ts)}; set it earlier, or check data.columns.timestamp_unit"
            )
        order = np.argsort(period, kind="stable")
        block = block.take(order)
        for value, start, stop in runs(period[order]):
            file = spill_dir / f"period={value:04d}-{next(numbers):06d}.arrow"
            piece = block.slice(start, stop - start).combine_chunks()
            with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_file(sink, piece.schema) as writer:
                writer.write_table(piece)
            parts.setdefault(value, []).append(file)
    return parts


def _read_part(file: Path) -> pl.DataFrame:
    with pa.OSFile(str(file), "rb") as source:
        return pl.DataFrame(pa.ipc.open_file(source).read_all())


def _sorted_period(period: int, frame: pl.DataFrame, drop_duplicates: bool) -> PeriodRows:
    scalars = [name for name, kind in frame.schema.items() if not isinstance(kind, pl.List)]
    key = ["event_ts", "user", "item", "label"]
    frame = frame.sort([*key, *(name for name in scalars if name not in key)], maintain_order=True)
    same = [frame[name].eq(frame[name].shift(1)).fill_null(False) for name in key]
    repeated = same[0] & same[1] & same[2] & same[3]
    num_repeated = int(repeated.sum())
    if num_repeated and not drop_duplicates:
        row = frame.row(int(repeated.arg_max() or 0), named=True)
        raise DataError(
            f"{num_repeated} events in the period from {format_ts(row['event_ts'])} on repeat another with the same"
            f" user, item, time and label (first at {format_ts(row['event_ts'])}); expected none,"
            " remove them or set data.duplicates to drop"
        )
    return PeriodRows(period, frame.filter(~repeated) if num_repeated else frame, num_repeated)
