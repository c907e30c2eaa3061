"""Rows that wait on disk: dealt to numbered places, read place by place.

Files have no name, so a killed process leaves none. What fits into a block never leaves memory.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.runs import runs
from loopfm_ray.store.tables import code_bytes, code_column, write_atomically

__all__ = ["Answers", "Spill", "keep", "kept_rows", "kept_tables"]

# Any below: pyarrow ships no types.
Table = Any
Ints = NDArray[np.int64]

_INDEX = b"loopfm.places"


class Spill:
    """Rows of numbered places. First all are added, then they are read; close it at the end."""

    def __init__(self, schema: Any, folder: Path, block_rows: int) -> None:
        """Begin with no rows.

        Args:
            schema: of the rows.
            folder: whose disk is to take them.
            block_rows: rows that are held before they are written; fewer stay in memory.
        """
        self._schema = schema
        self._folder = folder
        self._block_rows = block_rows
        self._stack = ExitStack()
        self._held: dict[int, list[Table]] = {}
        self._num_held = 0
        self._num_rows: dict[int, int] = {}
        self._batches: dict[int, list[int]] = {}
        self._num_batches = 0
        self._file: Any = None
        self._writer: Any = None
        self._reader: Any = None

    def close(self) -> None:
        """Forget all rows."""
        self._held.clear()
        self._stack.close()

    @property
    def schema(self) -> Any:
        """Of the rows."""
        return self._schema

    @property
    def places(self) -> list[int]:
        """The places that have rows, rising."""
        return sorted(self._num_rows)

    def num_rows(self, place: int) -> int:
        """Return the rows of one place."""
        return self._num_rows.get(place, 0)

    def num_tables(self, place: int) -> int:
        """Return how many tables `tables` gives of one place."""
        self._seal()
        return len(self._batches.get(place, ())) + len(self._held.get(place, ()))

    def deal(self, table: Table, place: NDArray[np.integer]) -> None:
        """Add rows, each to its place, [N]; rows of one place keep their order."""
        if np.any(place[1:] < place[:-1]):
            # NumPy sorts 16 bits by counting
            small = place.astype(np.uint16) if int(place.max()) < 1 << 16 else place
            order = np.argsort(small, kind="stable")
            table, place = table.take(pa.array(order)), place[order]
        for number, start, stop in runs(place):
            self._held.setdefault(number, []).append(table.slice(start, stop - start))
            self._num_rows[number] = self.num_rows(number) + stop - start
        self._num_held += table.num_rows
        if self._num_held > self._block_rows:
            self._flush()

    def tables(self, place: int) -> Iterator[Table]:
        """Yield the rows of one place in the order in which they were added, in tables of at most two blocks."""
        self._seal()
        for number in self._batches.get(place, ()):
            yield pa.Table.from_batches([self._reader.get_batch(number)])
        yield from self._held.get(place, ())

    def _flush(self) -> None:
        if self._writer is None:
            self._file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115  the stack closes it
            self._writer = pa.ipc.new_file(pa.PythonFile(self._file, mode="w"), self._schema)
        for place, tables in sorted(self._held.items()):
            for batch in pa.concat_tables(tables).combine_chunks().to_batches():
                self._writer.write_batch(batch)
                self._batches.setdefault(place, []).append(self._num_batches)
                self._num_batches += 1
        self._held.clear()
        self._num_held = 0

    def _seal(self) -> None:
        if self._reader is None and self._writer is not None:
            self._flush()
            self._writer.close()
            self._file.flush()
            self._reader = pa.ipc.open_file(pa.PythonFile(self._file, mode="r"))


def keep(spill: Spill, path: Path) -> None:
    """Write the rows of all places to one Arrow file, whole or not at all, from which `kept_tables` reads a place."""
    index, number = {}, 0
    for place in spill.places:
        index[place] = (number, spill.num_tables(place), spill.num_rows(place))
        number += spill.num_tables(place)
    schema = spill.schema.with_metadata({_INDEX: json.dumps(index)})

    def write(staged: Path) -> None:
        with pa.OSFile(str(staged), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            for place in index:
                for table in spill.tables(place):
                    writer.write_batch(_one_batch(table, schema))

    write_atomically(path, write)


def kept_tables(path: Path, place: int) -> Iterator[Table]:
    """Yield what `Spill.tables` gave of one place when `keep` wrote it."""
    # not mapped: pages of a mapped file would count as memory of the task
    with pa.OSFile(str(path)) as source:
        reader = pa.ipc.open_file(source)
        first, num_tables, _ = _index_of(reader, place)
        for number in range(first, first + num_tables):
            table = pa.Table.from_batches([reader.get_batch(number)])
            yield table.replace_schema_metadata(None)


def kept_rows(path: Path, place: int) -> int:
    """Return how many rows of one place `keep` wrote."""
    with pa.OSFile(str(path)) as source:
        return _index_of(pa.ipc.open_file(source), place)[2]


def _index_of(reader: Any, place: int) -> tuple[int, int, int]:
    """Return the first batch of a place, and the numbers of its batches and rows."""
    index = json.loads(reader.schema.metadata[_INDEX])
    first, num_tables, num_rows = index.get(str(place), (0, 0, 0))
    return first, num_tables, num_rows


def _one_batch(table: Table, schema: Any) -> Any:
    arrays = [column.combine_chunks() for column in table.columns]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


class Answers:
    """Columns of numbers and codes (uint8 [N, bytes]) that are found in any order of rows and read in order; close it at the end."""

    def __init__(self, schema: Any, folder: Path, block_rows: int) -> None:
        """Begin with no rows; for the arguments see `Spill`."""
        self._schema = schema.insert(0, pa.field("position", pa.int64()))
        self._spill = Spill(self._schema, folder, block_rows)
        self._block_rows = block_rows
        self._chunk = -1
        self._rows: dict[str, NDArray[Any]] = {}

    def close(self) -> None:
        """Forget all rows."""
        self._spill.close()

    def add(self, position: Ints, *columns: NDArray[Any]) -> None:
        """Take the values of the rows at `position`, [N] each."""
        arrays = [
            code_column(values) if values.ndim == 2 else pa.array(values, field.type)
            for values, field in zip((position, *columns), self._schema, strict=True)
        ]
        table = pa.Table.from_arrays(arrays, schema=self._schema)
        self._spill.deal(table, position // self._block_rows)

    def read(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Return the columns of rows `start` to `stop`, all of which were added; cheapest if asked for in order."""
        parts = []
        while start < stop:
            chunk, first = divmod(start, self._block_rows)
            last = min(self._block_rows, first + stop - start)
            rows = self._load(chunk)
            parts.append({name: values[first:last] for name, values in rows.items()})
            start += last - first
        names = self._schema.names[1:]
        return {name: np.concatenate([part[name] for part in parts]) for name in names}

    def _load(self, chunk: int) -> dict[str, NDArray[Any]]:
        if chunk != self._chunk:
            table = pa.concat_tables(self._spill.tables(chunk))
            where = table.column("position").to_numpy() - chunk * self._block_rows
            self._rows = {}
            for field in list(self._schema)[1:]:
                column = table.column(field.name)
                is_code = pa.types.is_fixed_size_binary(field.type)
                values = code_bytes(column) if is_code else column.to_numpy()
                placed = np.empty_like(values)
                placed[where] = values
                self._rows[field.name] = placed
            self._chunk = chunk
        return self._rows
