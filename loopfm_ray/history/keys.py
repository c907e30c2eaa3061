"""The keys that histories are kept by: what a row says of its key, and where the rows of a key lie."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import Side
from loopfm_ray.errors import ConfigError
from loopfm_ray.store.filesystem import Location

__all__ = ["UNKNOWN_KEY", "KeyReader", "place_of"]

Ints = NDArray[np.int64]
AnyInts = NDArray[np.integer[Any]]

UNKNOWN_KEY = -1
"""Key of rows of which a part is unknown (id 0): their events are in no history, their requests have none."""
_MAX_KEY = 2**62
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))


class KeyReader:
    """Gives the key of rows from their user and item."""

    def __init__(self, prepared: Location, key: Sequence[str]) -> None:
        """Read what the parts of the key are looked up in.

        Args:
            prepared: the prepared version.
            key: `user`, `item`, and categorical fields of their tables.

        Raises:
            ConfigError: a part is none of these, or there are too many values of the key.
        """
        self._parts = [(name, *_lookup(prepared, name)) for name in key]
        self._sizes = [_size(table) for _, _, table in self._parts]
        total = float(np.prod([float(size) for size in self._sizes]))
        if len(key) > 1 and total > _MAX_KEY:
            raise ConfigError(
                f"history.keys has {list(key)}, of which there are {total:.3g} values, more than {_MAX_KEY:.3g};"
                " take a part out"
            )

    def keys_of(self, user: AnyInts, item: AnyInts) -> Ints:
        """Return [N] the key of each row, `UNKNOWN_KEY` where a part is unknown."""
        out = np.zeros(len(user), dtype=np.int64)
        is_known = np.ones(len(user), dtype=bool)
        for (_, side, table), size in zip(self._parts, self._sizes, strict=True):
            value = user if side == Side.USER else item
            if table is not None:
                value = table[value]
            out *= size
            out += value
            is_known &= value > 0
        out[~is_known] = UNKNOWN_KEY
        return out


def place_of(keys: Ints, num_places: int) -> NDArray[np.int16]:
    """Return [N] which of `num_places` each key lies in; neighbours are spread, so that large ones do not meet.

    The finalizer of SplitMix64.
    """
    mixed = keys.astype(np.uint64)  # wraps around, as all that follows
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX[0]
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX[1]
    mixed ^= mixed >> np.uint64(31)
    return (mixed % np.uint64(num_places)).astype(np.int16)


def _lookup(prepared: Location, name: str) -> tuple[Side, NDArray[np.int32] | None]:
    """Return whose table a part of a key is looked up in, and its values by id; None is the id itself."""
    if name in (Side.USER.value, Side.ITEM.value):
        return Side(name), None
    data = PreparedData.open(prepared)
    tables = {Side.USER: data.users, Side.ITEM: data.items}
    for side, table in tables.items():
        if name in table.ids:
            return side, table.ids[name]
    known = ["user", "item", *(field for table in tables.values() for field in table.ids)]
    raise ConfigError(
        f"history.keys has the part {name!r}, which is neither an id nor a field of the users or items; there are {known}"
    )


def _size(table: NDArray[np.int32] | None) -> int:
    """Return a bound of the values of a part; ids themselves are 31 bits."""
    return 2**31 if table is None else int(table.max(initial=0)) + 1
