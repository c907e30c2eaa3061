"""Keys to ids: given out by first appearance in time from 1 on, so what was known at a time is a prefix."""

from collections.abc import Callable, Sequence
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from loopfm_ray.errors import StoreError
from loopfm_ray.types import UNKNOWN_ID

__all__ = ["Vocabulary", "VocabularyBuilder"]

# Any: pyarrow ships no types.
Array = Any
Ids = NDArray[np.int32]


class Vocabulary:
    """The known keys of one field; key `i` has id `i + 1` and 0 stands for all others."""

    def __init__(self, keys: Sequence[str], first_ts: NDArray[np.int64] | None = None) -> None:
        self.keys = list(keys)
        self.first_ts = np.zeros(len(self.keys), np.int64) if first_ts is None else first_ts
        self._ids = {key: number for number, key in enumerate(self.keys, start=1)}

    def __len__(self) -> int:
        return len(self.keys)

    def encode(self, keys: Sequence[str | None]) -> Ids:
        """Return [n] int32 ids of `keys`; 0 where a key is None or not known."""
        find: Callable[..., int] = self._ids.get  # None is no key
        return np.fromiter(map(find, keys, repeat(UNKNOWN_ID)), np.int32, len(keys))

    def cardinality_as_of(self, ts: int) -> int:
        """Return the number of ids, 0 included, of keys first seen before `ts`."""
        return int(np.searchsorted(self.first_ts, ts, side="left")) + 1

    def write(self, path: Path) -> None:
        """Write the keys and when each was first seen as Parquet."""
        pq.write_table(
            pa.table({"key": pa.array(self.keys, pa.string()), "first_ts": self.first_ts}), path
        )

    @classmethod
    def read(cls, path: Path) -> "Vocabulary":
        """Read what `write` wrote.

        Raises:
            StoreError: the file is missing or not a vocabulary.
        """
        try:
            table = pq.read_table(path)
            return cls(table.column("key").to_pylist(), table.column("first_ts").to_numpy())
        except (OSError, pa.ArrowInvalid, KeyError) as error:
            raise StoreError(f"no vocabulary at {path}: {error}; prepare the data again") from error


class VocabularyBuilder:
    """Gives ids to keys in the order in which they are met."""

    def __init__(self) -> None:
        self._ids: dict[str, int] = {}
        self._keys: list[str] = []
        self._first_ts: list[int] = []

    def __len__(self) -> int:
        return len(self._keys)

    def encode(self, keys: Array, event_ts: NDArray[np.int64]) -> Ids:
        """Return [n] int32 ids of the text array `keys`, met at `event_ts` [n] in time order; null is 0."""
        encoded = keys.dictionary_encode()
        if isinstance(encoded, pa.ChunkedArray):
            encoded = encoded.unify_dictionaries().combine_chunks()
        codes = encoded.indices.fill_null(-1).to_numpy()
        distinct, first_row = np.unique(codes, return_index=True)
        first_row = first_row[distinct >= 0]
        table = np.zeros(len(encoded.dictionary) + 1, dtype=np.int32)  # the last entry serves null
        for code, key in enumerate(encoded.dictionary.to_pylist()):
            known = self._ids.get(key)
            if known is None:
                self._keys.append(key)
                known = len(self._keys)
                self._ids[key] = known
                self._first_ts.append(int(event_ts[first_row[code]]))
            table[code] = known
        ids: Ids = table[codes]
        return ids

    def keys_from(self, start: int) -> list[str]:
        """Return the keys of ids `start + 1` and later, in order."""
        return self._keys[start:]

    def first_ts(self) -> NDArray[np.int64]:
        """Return [len] when each key was first seen."""
        return np.asarray(self._first_ts, dtype=np.int64)

    def build(self) -> Vocabulary:
        """Return the finished vocabulary."""
        return Vocabulary(self._keys, self.first_ts())
