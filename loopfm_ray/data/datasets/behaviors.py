"""Join Taobao's behaviour log to its impressions, point in time: what a user did strictly before each impression.

Both logs are spilled by user, then one part of the users at a time is sorted and joined, so memory holds a buffer or one part.
"""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.datasets.published import Layout, PublishedFile, read_layout
from loopfm_ray.data.runs import runs
from loopfm_ray.history.asof import newest_visible

__all__ = ["BEHAVIOR_LOG", "SEQUENCES", "with_behaviors"]

# Any: pyarrow ships no types.
Table = Any
SEQUENCES = ("btag_his", "cate_his", "brand_his")
BEHAVIOR_LOG = Layout(
    "behavior_log.csv of Tianchi data set 56",
    {
        "user": "integer",
        "time_stamp": "integer",
        "btag": "key",
        "cate": "number",
        "brand": "number",
    },
    missing=("", "NULL"),
)
_SOURCES = {"btag_his": "btag", "cate_his": "cate", "brand_his": "brand"}
_OUT_ROWS = 32_768


def with_behaviors(
    impressions: Iterator[Table],
    log: PublishedFile,
    max_len: int,
    spill_dir: str | None,
    num_parts: int = 256,
    buffer_rows: int = 2_000_000,
) -> Iterator[Table]:
    """Yield the impressions, part by part of the users, with the newest `max_len` behaviours before each, oldest first.

    Behaviours of the second of the impression are not before it; those of one second keep the order of the file.

    Args:
        impressions: blocks with integer columns user and time_stamp, and others.
        log: behavior_log.csv.
        max_len: longest sequence.
        spill_dir: where a temporary folder is made; None is the system's.
        num_parts: parts of the users; one must fit in memory.
        buffer_rows: rows held before they are written by part.
    """
    with tempfile.TemporaryDirectory(prefix="loopfm-taobao-", dir=spill_dir) as folder:
        asked = _spill(_buffered(impressions, buffer_rows), Path(folder) / "asked", num_parts)
        done = _spill(_buffered(_compact(log), buffer_rows), Path(folder) / "done", num_parts)
        for part in sorted(asked):
            rows = _read(asked[part])
            yield from _joined(rows, _read(done[part]) if part in done else None, max_len)


def _compact(log: PublishedFile) -> Iterator[Table]:
    kind = pa.dictionary(pa.int32(), pa.string())
    for _, block in read_layout(log, BEHAVIOR_LOG):
        columns = {name: block.column(name) for name in ("user", "time_stamp")}
        columns |= {name: block.column(name).cast(pa.int32()) for name in ("cate", "brand")}
        # kinds of behaviour are four: text costs most of the row, so it is spilled as a dictionary
        yield pa.table({**columns, "btag": block.column("btag").cast(kind)})


def _spill(blocks: Iterator[Table], folder: Path, num_parts: int) -> dict[int, Path]:
    """Write the rows of each part of the users into a file, in their order; return the files by part."""
    folder.mkdir()
    files: dict[int, Path] = {}
    with contextlib.ExitStack() as stack:
        writers: dict[int, Any] = {}
        for block in blocks:
            part = np.mod(block.column("user").to_numpy(), num_parts)
            order = np.argsort(part, kind="stable")
            block = block.take(pa.array(order))
            for value, start, stop in runs(part[order]):
                if value not in writers:
                    files[value] = folder / f"{value:04d}.arrow"
                    sink = stack.enter_context(pa.OSFile(str(files[value]), "wb"))
                    writers[value] = stack.enter_context(pa.ipc.new_stream(sink, block.schema))
                writers[value].write_table(block.slice(start, stop - start).combine_chunks())
    return files


def _buffered(blocks: Iterator[Table], buffer_rows: int) -> Iterator[Table]:
    held: list[Table] = []
    num_rows = 0
    for block in blocks:
        held.append(block)
        num_rows += block.num_rows
        if num_rows >= buffer_rows:
            yield pa.concat_tables(held).unify_dictionaries()
            held, num_rows = [], 0
    if held:
        yield pa.concat_tables(held).unify_dictionaries()


def _read(file: Path) -> Table:
    with pa.OSFile(str(file), "rb") as source:
        table = pa.ipc.open_stream(source).read_all()
    file.unlink()
    return table.unify_dictionaries().combine_chunks()


def _joined(rows: Table, done: Table | None, max_len: int) -> Iterator[Table]:
    request_user = rows.column("user").to_numpy()
    request_ts = rows.column("time_stamp").to_numpy()
    if done is None:
        start = length = np.zeros(len(request_user), dtype=np.int64)
        columns = dict.fromkeys(SEQUENCES, pa.array([], pa.string()))
    else:
        user, event_ts = done.column("user").to_numpy(), done.column("time_stamp").to_numpy()
        order = np.lexsort((event_ts, user))  # stable: ties keep the order of the file
        user, event_ts = user[order], event_ts[order]
        index = newest_visible((request_user, request_ts), (user, event_ts, event_ts), max_len)
        start, length = index.start, index.length
        done = done.take(pa.array(order))
        columns = {name: done.column(source) for name, source in _SOURCES.items()}
    for begin in range(0, rows.num_rows, _OUT_ROWS):
        span = slice(begin, begin + _OUT_ROWS)
        block = rows.slice(begin, _OUT_ROWS)
        for name, values in columns.items():
            block = block.append_column(name, _lists(values, start[span], length[span]))
        yield block


def _lists(values: Any, start: NDArray[np.int64], length: NDArray[np.int64]) -> Any:
    """Return lists of text: the `length` values from `start` on, for each row."""
    offsets = np.concatenate([[0], np.cumsum(length)])
    place = np.arange(offsets[-1]) - np.repeat(offsets[:-1] - start, length)
    taken = values.take(pa.array(place)).cast(pa.string())
    if isinstance(taken, pa.ChunkedArray):
        taken = taken.combine_chunks()
    return pa.ListArray.from_arrays(pa.array(offsets.astype(np.int32)), taken)
