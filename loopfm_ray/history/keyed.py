"""Histories of other owners than users: of the candidate item, of its category, of a user within a category.

The events of such a key come from all users, so rows and requests change places once. Each bucket of users deals them by
key to numbered places, into one file each (`deal_bucket`). Then each place is joined like a bucket of users, with keys
in place of users (`join_place`), and puts the answers back by the bucket of the request, where `join_bucket` finds
them. All of it is local files and blocks: memory depends on the size of a block, not on the log.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.joined import source_of
from loopfm_ray.history.blocks import Block, Cutting, cut_into_blocks
from loopfm_ray.history.keys import UNKNOWN_KEY, KeyReader, place_of
from loopfm_ray.history.rows import REQUESTS, BucketRows, history_schema
from loopfm_ray.history.settings import JoinSettings, JoinStats, JoinTask
from loopfm_ray.history.slices import Histories, SlicePlan, numpy_columns
from loopfm_ray.history.spill import Answers, Spill, keep, kept_rows, kept_tables
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import disk_errors

__all__ = ["DealTask", "KeyedAnswers", "PlaceTask", "deal_bucket", "join_place"]

# Any below: pyarrow ships no types.
Table = Any

_KEY = pa.field("key", pa.int64())
_SORT_KEYS = ("key", "event_ts", "example_id")
_ASKED = pa.schema([_KEY, *(f for f in REQUESTS if f.name != "user")])
_FOUND = pa.schema([("position", pa.int64()), ("start", pa.int64()), ("length", pa.int32())])
_ANSWERS = pa.schema([("bucket", pa.int16()), ("start", pa.int64()), ("length", pa.int32())])


@dataclass(frozen=True)
class DealTask:
    """What `deal_bucket` needs to know: the bucket of users, where keys are looked up, and where files go."""

    join: JoinTask
    prepared: Location
    num_places: int
    folder: Path


@dataclass(frozen=True)
class PlaceTask:
    """What `join_place` needs to know.

    Attributes:
        key: whose histories.
        place: which of them.
        buckets: of users, all that were dealt.
        spec: of the codes.
        settings: what a history is.
        folder: where the dealt files lie, and the answers go.
        out_dir: of the joined version.
    """

    key: tuple[str, ...]
    place: int
    buckets: tuple[int, ...]
    spec: CodeSpec
    settings: JoinSettings
    folder: Path
    out_dir: Path


def deal_bucket(task: DealTask) -> None:
    """Deal the rows and requests of one bucket of users to the places of their keys.

    Raises:
        StoreError: the disk is full, or the versions do not fit each other.
    """
    join = task.join
    with disk_errors(join.out_dir), ExitStack() as stack:
        join.out_dir.mkdir(parents=True, exist_ok=True)
        rows = BucketRows(join, asked=[pa.field("item", pa.int32())])
        dealt = [_Dealing(task, key, rows.spec, stack) for key in join.settings.keys]
        for block in rows.blocks():
            for one in dealt:
                one.add(block)
        for one in dealt:
            one.keep()


class _Dealing:
    """The rows and requests of one bucket of users on their way to the places of one key."""

    def __init__(
        self, task: DealTask, key: tuple[str, ...], spec: CodeSpec, stack: ExitStack
    ) -> None:
        """Begin with nothing; `stack` closes the files."""
        settings = task.join.settings
        place = (task.join.out_dir, settings.block_rows)
        self._reader, self._num_places = KeyReader(task.prepared, key), task.num_places
        self._paths = _dealt_paths(task.folder, key, task.join.bucket)
        schemas = (_rows_schema(spec, settings), _ASKED)
        self._spills = [stack.enter_context(closing(Spill(one, *place))) for one in schemas]
        self._names = [schema.names for schema in schemas]

    def add(self, block: Block) -> None:
        """Deal a block.

        Rows that are no events go along, for then each request has its own row among those of its key, whose number
        bounds a block. An event without a key becomes a row that is none, so nobody sees it.
        """
        for table, spill, names in zip(
            (block.rows, block.requests), self._spills, self._names, strict=True
        ):
            keys = self._reader.keys_of(*numpy_columns(table, "user", "item"))
            keyed = table.append_column(_KEY, pa.array(keys)).select(names)
            if "is_event" in names:
                is_event = numpy_columns(table, "is_event")[0] & (keys != UNKNOWN_KEY)
                keyed = keyed.set_column(len(names) - 1, "is_event", pa.array(is_event))
            if len(keys):
                spill.deal(keyed, place_of(keys, self._num_places))

    def keep(self) -> None:
        """Write the files."""
        for spill, path in zip(self._spills, self._paths, strict=True):
            keep(spill, path)


def join_place(task: PlaceTask) -> JoinStats:
    """Join one place of a key: write its table of histories, and the answers for each bucket of users.

    Raises:
        StoreError: the disk is full.
    """
    settings = task.settings
    with disk_errors(task.out_dir), ExitStack() as stack:
        rows, requests = _PlaceRows(task, 0), _PlaceRows(task, 1)
        schema = _rows_schema(task.spec, settings)
        limits = (task.out_dir, settings.block_rows)
        cutting = Cutting(_SORT_KEYS, schema, _ASKED, *limits)
        history = history_schema(task.spec, settings.side)
        plan = SlicePlan(history, _ASKED, _SORT_KEYS, settings, task.out_dir)
        histories = Histories(plan, stack)
        histories.take(cut_into_blocks(rows.read, requests.read, rows.num_rows, cutting))
        source = source_of(task.key)
        histories.write(task.out_dir / "history" / source / f"bucket={task.place:03d}.arrow")
        found = stack.enter_context(closing(Spill(_FOUND, *limits)))
        number = 0
        for bucket in task.buckets:
            for table in requests.of(bucket):
                start, length = histories.read(number, number + table.num_rows)
                number += table.num_rows
                arrays = [table.column("position"), pa.array(start), pa.array(length, pa.int32())]
                answers = pa.Table.from_arrays(arrays, schema=_FOUND)
                found.deal(answers, np.full(len(start), bucket, dtype=np.int64))
        keep(found, _answers_path(task.folder, task.key, task.place))
        return histories.stats


class _PlaceRows:
    """What all buckets of users dealt to one place: rows (part 0) or requests (part 1)."""

    def __init__(self, task: PlaceTask, part: int) -> None:
        self._task, self._part = task, part
        self.num_rows = sum(kept_rows(self._path(bucket), task.place) for bucket in task.buckets)

    def _path(self, bucket: int) -> Path:
        return _dealt_paths(self._task.folder, self._task.key, bucket)[self._part]

    def of(self, bucket: int) -> Iterator[Table]:
        """Yield what one bucket dealt."""
        return kept_tables(self._path(bucket), self._task.place)

    def read(self, columns: Sequence[str]) -> Iterator[Table]:
        """Yield the named columns of all rows; the position of a request is its number among them."""
        number = 0
        for bucket in self._task.buckets:
            for table in self.of(bucket):
                found = table.select(list(columns))
                if self._part and "position" in columns:
                    numbers = pa.array(np.arange(number, number + table.num_rows))
                    at = found.column_names.index("position")
                    found = found.set_column(at, "position", numbers)
                number += table.num_rows
                yield found


class KeyedAnswers:
    """The answers of all places of one key to the requests of one bucket of users."""

    def __init__(self, task: JoinTask, key: tuple[str, ...], stack: ExitStack) -> None:
        """Read them; `stack` closes the files."""
        self._source = source_of(key)
        answers = Answers(_ANSWERS, task.out_dir, task.settings.block_rows)
        self._answers = stack.enter_context(closing(answers))
        assert task.keyed is not None, "keys are joined before the buckets of users"
        for place in range(task.keyed.num_places):
            for table in kept_tables(_answers_path(task.keyed.folder, key, place), task.bucket):
                position, start, length = numpy_columns(table, *_FOUND.names)
                where = np.where(length > 0, place, 0).astype(np.int16)
                self._answers.add(position, where, start, length)

    def columns(self, start: int, stop: int) -> dict[str, NDArray[Any]]:
        """Return the columns of the requests at positions `start` to `stop`."""
        found = self._answers.read(start, stop)
        names = {"bucket": "bucket", "start": "start", "len": "length"}
        return {f"{self._source}_{name}": found[column] for name, column in names.items()}


def _rows_schema(spec: CodeSpec, settings: JoinSettings) -> Any:
    return pa.schema([_KEY, *history_schema(spec, settings.side), pa.field("is_event", pa.bool_())])


def _dealt_paths(folder: Path, key: tuple[str, ...], bucket: int) -> tuple[Path, Path]:
    """Return where the rows and the requests of one bucket of users wait."""
    own = folder / source_of(key)
    return own / f"rows-{bucket:03d}.arrow", own / f"requests-{bucket:03d}.arrow"


def _answers_path(folder: Path, key: tuple[str, ...], place: int) -> Path:
    return folder / source_of(key) / f"answers-{place:03d}.arrow"
