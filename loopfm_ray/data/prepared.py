"""Read what `prepare` wrote: schema, vocabularies, entity tables, history events and examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.data.examples import ExampleSet
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.data.vocabulary import Vocabulary
from loopfm_ray.data.windows import Learnable
from loopfm_ray.errors import StoreError
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest
from loopfm_ray.store.tables import map_ipc
from loopfm_ray.types import TimeRange

__all__ = ["EntityTable", "PreparedData", "read_entities", "read_histories", "read_history"]

# Any: pyarrow ships no types.
Table = Any


@dataclass(frozen=True)
class EntityTable:
    """Users or items by id; row 0 is the unknown one, with id 0 and value 0 in every field.

    Attributes:
        ids: [N + 1] ids of each categorical field.
        numeric: [N + 1] standardised values of each numeric field.
        keys: [N + 1] keys, the first is "".
    """

    ids: Mapping[str, NDArray[np.int32]]
    numeric: Mapping[str, NDArray[np.float32]]
    keys: list[str]

    def __len__(self) -> int:
        return len(self.keys)


@dataclass(frozen=True)
class PreparedData:
    """A prepared version; its arrays are read when they are first asked for."""

    version: Version
    schema: FeatureSchema

    @classmethod
    def open(cls, location: Location) -> "PreparedData":
        """Open the version at a local directory or `s3://` address.

        Raises:
            StoreError: there is none, or it is not prepared data.
        """
        version = open_version(location, "prepared")
        text = version.path("schema.json").read_text(encoding="utf-8")
        return cls(version, FeatureSchema.from_json(text))

    @property
    def manifest(self) -> Manifest:
        """What the version holds."""
        return self.version.manifest

    @property
    def num_buckets(self) -> int:
        """How many buckets users are spread over."""
        return int(self.manifest.meta["num_buckets"])

    @property
    def log_range(self) -> tuple[int, int]:
        """Times of the first and the last event."""
        return int(self.manifest.meta["min_ts"]), int(self.manifest.meta["max_ts"])

    @property
    def examples(self) -> ExampleSet:
        """The examples of all times and buckets."""
        return ExampleSet.of(self.version, "examples")

    @property
    def items(self) -> EntityTable:
        """The item table."""
        return self._side(Side.ITEM)

    @property
    def users(self) -> EntityTable:
        """The user table."""
        return self._side(Side.USER)

    def _side(self, side: Side) -> EntityTable:
        folder = self.version.fetch([f"vocab/{side.value}.parquet", f"{side.value}s.parquet"])
        return _read_side(folder, self.manifest.version, side.value, self.schema)

    def vocabulary(self, field: str) -> Vocabulary:
        """Return the vocabulary of a categorical or sequence field.

        Raises:
            StoreError: there is no such field.
        """
        path = self.version.path(f"vocab/{field}.parquet")
        return _read_vocabulary(path, self.manifest.version)

    def schema_as_of(self, ts: int) -> FeatureSchema:
        """Return the schema with the ids of keys first seen before `ts` only; what a model trained until then knows."""
        fields = tuple(
            field
            if field.kind == Kind.NUMERIC
            else replace(field, cardinality=self.vocabulary(field.name).cardinality_as_of(ts))
            for field in self.schema.fields
        )
        return replace(self.schema, fields=fields)

    def learnable(self, time_range: TimeRange, until_ts: int) -> Learnable:
        """Return which rows of a range a model may learn from that is trained until `until_ts`."""
        num_items = self.vocabulary(Side.ITEM.value).cardinality_as_of(until_ts)
        return Learnable(time_range, until_ts, num_items)

    def events(self, bucket: int) -> Table:
        """Return the history events of one bucket, memory mapped; it has no rows where the bucket has no users.

        Rows after the first event count of the bucket are copies that only history pointers refer to (late labels).
        """
        return read_history(self.version, f"events/bucket={bucket:03d}.arrow")

    def all_events(self) -> dict[int, Table]:
        """Return the history events of every bucket."""
        return read_histories(self.version, "events", range(self.num_buckets))


def read_history(version: Version, name: str) -> Table:
    """Memory-map one Arrow IPC file of history rows; a file that the version does not have is a bucket without users."""
    return map_ipc(version.path(name)) if name in version else _no_events()


def read_histories(version: Version, folder: str, buckets: Iterable[int]) -> dict[int, Table]:
    """Memory-map the history rows of `buckets` in `folder` (`events` or `history`) of a version."""
    names = {bucket: f"{folder}/bucket={bucket:03d}.arrow" for bucket in buckets}
    version.fetch(name for name in names.values() if name in version)
    return {bucket: read_history(version, name) for bucket, name in names.items()}


def read_entities(path: Path, keys: list[str], schema: FeatureSchema, side: Side) -> EntityTable:
    """Read `users.parquet` or `items.parquet` with the fields of one side of `schema`.

    Raises:
        StoreError: the file is missing, lacks a field or does not fit the keys.
    """
    categorical = [f.name for f in schema.of(Kind.CATEGORICAL, side) if f.name != side.value]
    numeric = [f.name for f in schema.of(Kind.NUMERIC, side)]
    try:
        table = pq.read_table(path)
        ids = {name: table.column(name).to_numpy() for name in categorical}
        values = {name: table.column(name).to_numpy() for name in numeric}
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise StoreError(f"no entity table at {path}: {error}; write the version again") from error
    if table.num_rows != len(keys) + 1:
        raise StoreError(
            f"{path} has {table.num_rows} rows, expected {len(keys) + 1}, one for each key and the unknown;"
            " write the version again"
        )
    return EntityTable(ids, values, ["", *keys])


@lru_cache(maxsize=8)
def _read_side(path: Path, version: str, side: str, schema: FeatureSchema) -> EntityTable:
    """Read one entity table; `version` is there for the cache, since a path may come to hold another version."""
    keys = _read_vocabulary(path / "vocab" / f"{side}.parquet", version).keys
    return read_entities(path / f"{side}s.parquet", keys, schema, Side(side))


@lru_cache(maxsize=64)
def _read_vocabulary(path: Path, version: str) -> Vocabulary:
    del version  # for the cache alone
    return Vocabulary.read(path)


def _no_events() -> Table:
    types = [("example_id", pa.int64()), ("user", pa.int32()), ("item", pa.int32())]
    types += [("event_ts", pa.int64()), ("available_ts", pa.int64())]
    return pa.schema(types).empty_table()
