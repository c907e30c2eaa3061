"""The order every history table has: by user, then event_ts, then example_id."""

import numpy as np
from numpy.typing import NDArray

__all__ = ["time_order"]

Ints = NDArray[np.int64]
# Any integer width is accepted; ids are int32 on disk.
AnyInts = NDArray[np.integer]

_MAX_KEY = 2**62


def time_order(user: AnyInts, event_ts: AnyInts, example_id: AnyInts) -> Ints:
    """Return [E] the rows sorted by user, event_ts and example_id; equal rows keep their order.

    The answer of `np.lexsort`, in a fraction of its time: user and time become one key, for which NumPy has a vectorised
    sort that is not stable, and only rows of an equal key are sorted again.
    """
    if not len(user):
        return np.zeros(0, dtype=np.int64)
    low_user, low_ts = int(np.min(user)), int(np.min(event_ts))
    span = int(np.max(event_ts)) - low_ts + 1
    if (int(np.max(user)) - low_user + 1) * span >= _MAX_KEY:
        return np.lexsort((example_id, event_ts, user)).astype(np.int64)
    key = np.asarray(user, np.int64) - low_user
    key *= span
    key += np.asarray(event_ts, np.int64) - low_ts
    order = np.argsort(key)
    key = key[order]
    equal = key[1:] == key[:-1]
    if not np.any(equal):
        return order
    tied = np.zeros(len(key), dtype=bool)
    tied[1:] = equal
    tied[:-1] |= equal
    places = np.flatnonzero(tied)
    rows = order[places]
    order[places] = rows[np.lexsort((rows, np.asarray(example_id)[rows], key[places]))]
    return order
