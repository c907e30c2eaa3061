"""User and item tables: read whole, then cut to the users and items of the log, in id order."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.data.canonical import float_column, key_column
from loopfm_ray.data.config import EntityConfig
from loopfm_ray.data.events import read_raw_blocks
from loopfm_ray.data.vocabulary import VocabularyBuilder
from loopfm_ray.errors import ConfigError, DataError

__all__ = ["EntityBuilder", "EntitySource", "Standard", "standard_of"]

_BLOCK_ROWS = 262_144
# Any: pyarrow ships no types.
Array = Any
Table = Any
Standard = tuple[float, float]
"""Mean and standard deviation; a value enters the models as `(value - mean) / std`."""


class EntitySource:
    """The rows of a user or item table by key; `columns` maps each field name to an Arrow array."""

    def __init__(
        self, keys: Sequence[str], categorical: dict[str, Array], numeric: dict[str, Array]
    ) -> None:
        self.row_of = {key: row for row, key in enumerate(keys)}
        self.categorical = categorical
        self.numeric = numeric
        if len(self.row_of) < len(keys):
            seen: set[str] = set()
            repeated = next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]  # `add` gives None, which is the point
            raise DataError(
                f"an entity table has key {repeated!r} more than once, {len(keys) - len(self.row_of)} rows too"
                " many; expected one row for each user or item"
            )

    @classmethod
    def read(cls, config: EntityConfig) -> "EntitySource":
        """Read the table that `config` names.

        Raises:
            SchemaError: a column is missing or has the wrong type.
            DataError: a key is missing or repeated, or a number is not finite.
        """
        fields = {**config.categorical, **config.numeric}
        names = list(dict.fromkeys([config.key, *fields.values()]))
        keys: list[str] = []
        chunks: dict[str, list[Array]] = {name: [] for name in fields}
        for place, block in read_raw_blocks(config.path, names, _BLOCK_ROWS):
            block_keys = key_column(block, config.key, place).to_pylist()
            if None in block_keys:
                raise DataError(
                    f"{place.at(config.key, block_keys.index(None))}: the key is missing, expected text or an"
                    " integer; drop rows without a key"
                )
            keys += block_keys
            for name, column in fields.items():
                read = key_column if name in config.categorical else float_column
                chunks[name].append(read(block, column, place))
        columns = {
            name: pa.concat_arrays(parts)
            if parts
            else pa.array([], pa.string() if name in config.categorical else pa.float64())
            for name, parts in chunks.items()
        }
        return cls(
            keys,
            {name: columns[name] for name in config.categorical},
            {name: columns[name] for name in config.numeric},
        )

    @classmethod
    def from_table(
        cls, table: Table, key: str, categorical: Sequence[str], numeric: Sequence[str]
    ) -> "EntitySource":
        """Take an Arrow table that is already right."""
        return cls(
            table.column(key).to_pylist(),
            {name: table.column(name).combine_chunks() for name in categorical},
            {name: table.column(name).combine_chunks() for name in numeric},
        )

    def joined(self, other: "EntitySource", place: str) -> "EntitySource":
        """Return these rows with the fields of the rows of the same keys in `other`, which was read from `place`.

        Raises:
            ConfigError: a field is in both.
            DataError: a key has no row in `other`.
        """
        both = sorted({*self.categorical, *self.numeric} & {*other.categorical, *other.numeric})
        if both:
            raise ConfigError(
                f"{place} has fields {both}, which the data has already; name them otherwise with NAME: COLUMN"
            )
        missing = [key for key in self.row_of if key not in other.row_of]
        if missing:
            raise DataError(
                f"{place} has no row for {len(missing)} of {len(self.row_of)} keys, such as {missing[:3]}; expected one for"
                " each, with a value that stands for what is not known"
            )
        rows = pa.array([other.row_of[key] for key in self.row_of], pa.int64())
        return EntitySource(
            list(self.row_of),
            self.categorical | {name: col.take(rows) for name, col in other.categorical.items()},
            self.numeric | {name: col.take(rows) for name, col in other.numeric.items()},
        )


class EntityBuilder:
    """Grows the table of the entities met so far; row 0 is the unknown entity."""

    def __init__(self, source: EntitySource | None) -> None:
        self._source = source
        self.vocabulary = VocabularyBuilder()
        self.fields = {name: VocabularyBuilder() for name in (source.categorical if source else ())}
        self._ids: dict[str, list[NDArray[np.int32]]] = {name: [] for name in self.fields}
        self._numeric: dict[str, list[NDArray[np.float64]]] = {
            name: [] for name in (source.numeric if source else ())
        }
        self.num_missing = 0
        """Entities of the log that the table does not hold."""

    def encode(self, keys: Array, event_ts: NDArray[np.int64]) -> NDArray[np.int32]:
        """Return [n] ids of the entity `keys` met at `event_ts`, adding rows for new ones."""
        known = len(self.vocabulary)
        ids = self.vocabulary.encode(keys, event_ts)
        if self._source is not None and len(self.vocabulary) > known:
            self._add_rows(self._source, known)
        return ids

    def _add_rows(self, source: EntitySource, known: int) -> None:
        find = source.row_of.get
        rows = [find(key) for key in self.vocabulary.keys_from(known)]
        self.num_missing += rows.count(None)
        index = pa.array(rows, pa.int64())
        first_ts = self.vocabulary.first_ts()[known:]
        for name, values in source.categorical.items():
            self._ids[name].append(self.fields[name].encode(values.take(index), first_ts))
        for name, values in source.numeric.items():
            self._numeric[name].append(
                values.take(index).to_numpy(zero_copy_only=False).astype(np.float64)
            )

    def ids(self) -> dict[str, NDArray[np.int32]]:
        """Return [N + 1] ids of each categorical field, row 0 unknown."""
        zero = np.zeros(1, dtype=np.int32)
        return {name: np.concatenate([zero, *parts]) for name, parts in self._ids.items()}

    def standards(self, stop_ts: int) -> dict[str, Standard]:
        """Return mean and deviation of each numeric field over the entities first seen before `stop_ts`."""
        num = int(np.searchsorted(self.vocabulary.first_ts(), stop_ts, side="left"))
        return {
            name: standard_of(np.concatenate([np.zeros(0), *parts])[:num])
            for name, parts in self._numeric.items()
        }

    def numeric(self, standards: dict[str, Standard]) -> dict[str, NDArray[np.float32]]:
        """Return [N + 1] standardised values of each numeric field; 0, the mean, where missing."""
        out = {}
        for name, parts in self._numeric.items():
            mean, std = standards[name]
            values = (np.concatenate([np.full(1, np.nan), *parts]) - mean) / std
            out[name] = np.nan_to_num(values, nan=0.0).astype(np.float32)
        return out


def standard_of(values: NDArray[np.float64]) -> Standard:
    """Return mean and standard deviation of the values that are not NaN; deviation 1 if they do not vary."""
    known = values[~np.isnan(values)]
    if not len(known):
        return 0.0, 1.0
    mean, std = float(known.mean()), float(known.std())
    return mean, std if std > 1e-12 * max(1.0, abs(mean)) else 1.0
