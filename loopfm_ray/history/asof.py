"""The point-in-time join over sorted columns: which of a user's events a request could see.

An event is visible when `event_ts < request_ts and available_ts <= request_ts`. Both say "its first visible instant
`max(event_ts + 1, available_ts)` has come", so one search per request finds the visible events wherever that instant
does not fall along a user's events. Where it does (a label that arrives late), the events a request sees are no slice of
the table, and `HistoryIndex.rows` lists them.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import DataError
from loopfm_ray.history.times import visible_from

__all__ = ["EventColumns", "HistoryIndex", "RequestColumns", "newest_visible"]

Ints = NDArray[np.int64]
# Any integer width is accepted; ids are int32 on disk.
AnyInts = NDArray[np.integer]
RequestColumns = tuple[AnyInts, AnyInts]
"""`(user, request_ts)`, [R] each, in any order."""
EventColumns = tuple[AnyInts, AnyInts, AnyInts]
"""`(user, event_ts, available_ts)`, [E] each, sorted by user, then event_ts, then example_id."""

_MAX_KEY = 2**62
_CHUNK_CELLS = 1 << 22


@dataclass(frozen=True)
class HistoryIndex:
    """The history of every request, as slices.

    `start` and `length` are int64 [R]. With `rows` None a slice counts rows of the events themselves; otherwise it counts
    entries of `rows`, int64 [E + extra], which hold row numbers of the events and begin with `0 .. E - 1`.
    """

    start: Ints
    length: Ints
    rows: Ints | None


def newest_visible(
    requests: RequestColumns,
    events: EventColumns,
    max_len: int,
    retention_us: int | None = None,
    row: Ints | None = None,
) -> HistoryIndex:
    """Find the newest `max_len` events that each request could see, oldest first.

    Events of equal `event_ts` keep the order they have in the table, which is by example_id.

    Args:
        requests: `(user, request_ts)`, [R] each.
        events: `(user, event_ts, available_ts)`, [E] each, sorted by user and event_ts.
        max_len: the longest history.
        retention_us: events older than this at the request are left out; None keeps all.
        row: [E] where the events stand in a larger table of which these are a part, rising. A history is a slice only if
            it is one there; positions in the answer count the events given.

    Raises:
        DataError: the events are not sorted.
    """
    user, request_ts = requests
    event_user, event_ts, available_ts = events
    first = _first_rows(event_user, event_ts)
    segment = _segments(np.asarray(user), np.asarray(event_user)[first[:-1]])
    ready_ts = visible_from(np.asarray(event_ts, np.int64), np.asarray(available_ts, np.int64))
    asked_ts = np.asarray(request_ts, np.int64)
    oldest = first[segment]
    if retention_us is not None:
        times = np.asarray(event_ts, np.int64)
        kept = _search(first, times, segment, asked_ts - retention_us, "left")
        oldest = np.maximum(oldest, kept)

    same_user = np.ones(max(len(ready_ts) - 1, 0), dtype=bool)
    same_user[first[1:-1] - 1] = False
    has_holes = row is not None and np.any(np.diff(row) != 1)
    if has_holes or np.any((ready_ts[1:] < ready_ts[:-1]) & same_user):
        return _indirect(first, ready_ts, (segment, asked_ts, oldest), max_len, row)
    stop = _search(first, ready_ts, segment, asked_ts, "right")
    start = np.maximum(oldest, stop - max_len)
    return _index(start, stop - start, None)


def _index(start: Ints, length: Ints, rows: Ints | None) -> HistoryIndex:
    """Give every empty history the slice `[0, 0)`, so that equal answers have equal bytes."""
    empty = length <= 0
    start[empty] = 0
    length[empty] = 0
    return HistoryIndex(start, length, rows)


def _first_rows(user: AnyInts, event_ts: AnyInts) -> Ints:
    """Return [U + 1] the first row of every user and the row count, after checking the order."""
    user = np.asarray(user)
    event_ts = np.asarray(event_ts)
    step = user[1:] > user[:-1]
    falls = (user[1:] < user[:-1]) | (~step & (event_ts[1:] < event_ts[:-1]))
    if np.any(falls):
        row = int(np.argmax(falls)) + 1
        raise DataError(
            f"events must be sorted by user, event_ts and example_id, found row {row} before row {row - 1};"
            " sort the table before the join"
        )
    head = [0] if len(user) else []
    return np.concatenate([head, np.flatnonzero(step) + 1, [len(user)]]).astype(np.int64)


def _segments(user: AnyInts, known: AnyInts) -> Ints:
    """Return [R] the position of each request's user in `known` [U], U for a user without events."""
    if not len(known):
        return np.zeros(len(user), dtype=np.int64)
    place = np.minimum(np.searchsorted(known, user), len(known) - 1)
    return np.where(known[place] == user, place, len(known)).astype(np.int64)


def _search(first: Ints, times: Ints, segment: Ints, ts: Ints, side: str) -> Ints:
    """Return [R] where `ts` falls among the times of its segment, as a row of the whole table.

    `times` [E] does not fall within a segment. Segment and time become one key, so that one search serves all requests.
    """
    num_segments = len(first) - 1
    if not len(times):
        return np.zeros(len(ts), dtype=np.int64)
    low, high = int(times.min()), int(times.max())
    if (high - low + 3) * (num_segments + 1) < _MAX_KEY:
        place, offset, span = (
            times - low + 1,
            np.clip(ts, low - 1, high + 1) - low + 1,
            high - low + 3,
        )
    else:  # microseconds of many years times many users overflow: count distinct times instead
        distinct, place = np.unique(times, return_inverse=True)
        # odd numbers are the times themselves, even numbers the gaps between them
        place = 2 * place + 1
        left = np.searchsorted(distinct, ts, "left")
        offset = left + np.searchsorted(distinct, ts, "right")
        span = 2 * len(distinct) + 2
    keys = np.repeat(np.arange(num_segments, dtype=np.int64) * span, np.diff(first))
    keys += place
    wanted = segment * span + offset
    order = np.argsort(wanted)
    found = np.empty(len(ts), dtype=np.int64)
    # sorted needles walk the haystack once instead of missing the cache each time
    found[order] = np.searchsorted(keys, wanted[order], "left" if side == "left" else "right")
    return found


def _indirect(
    first: Ints,
    ready_ts: Ints,
    requests: tuple[Ints, Ints, Ints],
    max_len: int,
    row: Ints | None = None,
) -> HistoryIndex:
    """Answer requests `(segment, request_ts, oldest row)` when readiness is out of order within a user.

    What a request sees depends only on how many of its user's events are ready. Each such state that some request meets
    gets its window once; a window without gaps stays a slice of the events, another is appended to `rows`.
    """
    segment, asked_ts, oldest = requests
    num_events = len(ready_ts)
    owner = np.repeat(np.arange(len(first) - 1), np.diff(first))
    order = np.lexsort((ready_ts, owner))
    rank = np.empty(num_events, dtype=np.int64)
    rank[order] = np.arange(num_events)
    # a state is named by the rows ready so far, counted over the table
    state = _search(first, ready_ts[order], segment, asked_ts, "right")
    begin = first[segment]
    # rows of a later user exceed all of an earlier one, so one running maximum serves all users
    newest = np.maximum.accumulate(order)

    states, back = np.unique(np.where(state > begin, state, 0), return_inverse=True)
    used = np.flatnonzero(states)
    floor = first[owner[states[used] - 1]]
    top = newest[states[used] - 1]
    rows, place, count = _windows(rank, (states[used], floor, top), max_len, row)

    lowest = np.zeros(len(states), dtype=np.int64)
    size = np.zeros(len(states), dtype=np.int64)
    lowest[used], size[used] = place, count
    start, length = lowest[back], size[back]
    sliced = start < num_events
    cut = np.where(sliced, np.clip(oldest - start, 0, length), 0)
    extra = np.flatnonzero(~sliced)
    if len(extra):  # rows of one window rise, windows follow each other: one search again
        windows = np.flatnonzero(lowest >= num_events)
        windows = windows[np.argsort(lowest[windows])]
        edges = np.append(lowest[windows] - num_events, len(rows) - num_events)
        which = np.searchsorted(lowest[windows], start[extra])
        cut[extra] = _search(edges, rows[num_events:], which, oldest[extra], "left") - edges[which]
    return _index(start + cut, length - cut, rows)


def _windows(
    rank: Ints, states: tuple[Ints, Ints, Ints], max_len: int, number: Ints | None
) -> tuple[Ints, Ints, Ints]:
    """Return `rows`, and [S] start and length in it of the window of each `(state, floor, top)`.

    An event of row `r` is ready in a state when `rank[r] < state`; `floor` and `top` are the first row of the user and
    the newest that is ready. `number` [E] says where the events stand in a larger table; None where they are all of it.
    """
    num_events = len(rank)
    pieces: list[Ints] = [np.arange(num_events, dtype=np.int64)]
    starts: list[Ints] = []
    counts: list[Ints] = []
    used = num_events
    step = max(1, _CHUNK_CELLS // max(max_len, 1))
    for begin in range(0, len(states[0]), step):
        ready, floor, top = (column[begin : begin + step] for column in states)
        which, row = _newest_ready(rank, ready, floor, top, max_len)
        count = np.bincount(which, minlength=len(ready)).astype(np.int64)
        begins = np.cumsum(count) - count
        lowest = row[begins]
        width = top - lowest if number is None else number[top] - number[lowest]
        gapped = width + 1 > count
        place = np.where(gapped, used + np.cumsum(count * gapped) - count * gapped, lowest)
        pieces.append(row[gapped[which]])
        used += len(pieces[-1])
        starts.append(place)
        counts.append(count)
    if not starts:
        return pieces[0], pieces[0][:0], pieces[0][:0]
    return np.concatenate(pieces), np.concatenate(starts), np.concatenate(counts)


def _newest_ready(
    rank: Ints, ready: Ints, floor: Ints, top: Ints, max_len: int
) -> tuple[NDArray[np.intp], Ints]:
    """Return `(state, row)` pairs, states rising and rows rising within each: its newest `max_len`."""
    found_state: list[NDArray[np.intp]] = []
    found_row: list[Ints] = []
    pending = np.arange(len(ready))
    have = np.zeros(len(ready), dtype=np.int64)
    head = top.copy()
    back = np.arange(max_len)
    while len(pending):
        row = head[pending, None] - back
        is_ready = row >= floor[pending, None]
        is_ready &= rank[np.maximum(row, 0)] < ready[pending, None]
        is_ready &= np.cumsum(is_ready, axis=1) + have[pending, None] <= max_len
        which, column = np.nonzero(is_ready)
        found_state.append(pending[which])
        found_row.append(row[which, column])
        have[pending] += is_ready.sum(axis=1)
        head[pending] -= max_len
        pending = pending[(have[pending] < max_len) & (head[pending] >= floor[pending])]
    state = np.concatenate(found_state)
    row = np.concatenate(found_row)
    order = np.lexsort((row, state))
    return state[order], row[order]
