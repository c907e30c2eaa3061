"""Parts of the test set that are told apart: first purchases and repeats, short and long histories."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.history.times import visible_from

__all__ = ["SHORT_HISTORY", "is_repeat", "slice_masks"]

SHORT_HISTORY = 20
"""A history of fewer events counts as short."""

Bools = NDArray[np.bool_]
# Any integer width is accepted; ids are int32 on disk.
AnyInts = NDArray[np.integer]


def is_repeat(
    requests: tuple[AnyInts, AnyInts, AnyInts],
    events: tuple[AnyInts, AnyInts, AnyInts, AnyInts],
) -> Bools:
    """Return [R] whether the user had an event with the request's item that was visible at the request.

    Args:
        requests: `(user, item, request_ts)`, [R] each.
        events: `(user, item, event_ts, available_ts)`, [E] each, in any order.
    """
    user, item, request_ts = (np.asarray(column, np.int64) for column in requests)
    event_user, event_item, event_ts, available_ts = (
        np.asarray(column, np.int64) for column in events
    )
    if not len(event_user):
        return np.zeros(len(user), dtype=bool)
    width = int(max(event_item.max(), item.max(initial=0))) + 1
    known, place = np.unique(event_user * width + event_item, return_inverse=True)
    first = np.full(len(known), np.iinfo(np.int64).max)
    np.minimum.at(first, place, visible_from(event_ts, available_ts))
    wanted = user * width + item
    found = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    repeat: Bools = (known[found] == wanted) & (first[found] <= request_ts)
    return repeat


def slice_masks(repeat: Bools, history_len: AnyInts) -> Mapping[str, Bools]:
    """Return [R] masks by name: `repeat` and `first` purchases or clicks, `short` and `long` histories.

    Args:
        repeat: [R] from `is_repeat`.
        history_len: [R] visible events of each request's user, at most the longest history.
    """
    short = np.asarray(history_len) < SHORT_HISTORY
    return {"first": ~repeat, "repeat": repeat, "short": short, "long": ~short}
