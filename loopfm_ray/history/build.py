"""Per-user sequences for a batch: which rows of the events each history reads, padded to one length."""

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import ShapeError

__all__ = ["distinct_windows", "pad_windows"]

Ints = NDArray[np.int64]
AnyInts = NDArray[np.integer]


def pad_windows(start: AnyInts, length: AnyInts, max_len: int) -> tuple[Ints, NDArray[np.bool_]]:
    """Return the rows of the newest `max_len` entries of each slice, oldest first, and which are real.

    Args:
        start: [G] first row of each slice.
        length: [G] rows in it.
        max_len: `L`, the longest history.

    Returns:
        rows [G, L], 0 at padding, and mask [G, L]; real entries come first.
    """
    if np.shape(start) != np.shape(length):
        raise ShapeError(
            f"start and length of the windows must match, found {np.shape(start)} and {np.shape(length)}"
        )
    size = np.minimum(length, max_len).astype(np.int64)
    first = np.asarray(start, dtype=np.int64) + length - size
    step = np.arange(max_len, dtype=np.int64)
    mask = step < size[:, None]
    rows = np.where(mask, first[:, None] + step, 0)
    return rows, mask


def distinct_windows(*columns: AnyInts) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Return which rows of `columns` differ: many candidates of one request share one history.

    Args:
        columns: [B] each, such as bucket, start, length and request_ts.

    Returns:
        first [G], one row of each distinct combination, and group [B], such that `columns[first][group]` are `columns`.
        Groups are numbered in order of first appearance.
    """
    order = np.lexsort(columns)
    changed = np.ones(len(order), dtype=bool)
    if len(order):
        changed[1:] = False
        for column in columns:
            ordered = column[order]
            changed[1:] |= ordered[1:] != ordered[:-1]
    # lexsort is stable: the head of each run is its earliest row
    heads = order[changed]
    rank = np.empty(len(heads), dtype=np.intp)
    by_appearance = np.argsort(heads)
    rank[by_appearance] = np.arange(len(heads))
    group = np.empty(len(order), dtype=np.intp)
    group[order] = rank[np.cumsum(changed) - 1]
    return heads[by_appearance], group
