"""Features from a user's earlier events, as they stood at the request: how often, and how long ago.

The same functions serve training (all requests of a bucket at once) and serving (one user's history).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.types import MICROS_PER_S

__all__ = ["NEVER", "PastRows", "past_features", "past_names", "past_values"]

Ints = NDArray[np.int64]

NEVER = 1.5
"""The recency of something that never happened; a year ago is 1."""
_YEAR = np.log1p(365 * 86_400.0)
_MAX_KEY = 2**62


@dataclass(frozen=True)
class PastRows:
    """Events or requests: `user` and `event_ts` [N], and `values` [N] of each counted field (0 is never equal)."""

    user: Ints
    event_ts: Ints
    values: dict[str, Ints]


def past_names(count_fields: Sequence[str], recency: bool) -> tuple[str, ...]:
    """Return the names of the features, in the order of the schema."""
    kinds = ("count", "recency") if recency else ("count",)
    return tuple(f"past_{kind}_{field}" for field in count_fields for kind in kinds)


def past_values(count: Ints, age_us: Ints) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return the features for `count` earlier events, the last of them `age_us` ago (any value where count is 0).

    The count is `log1p`; the age is `log1p` of seconds over that of a year, `NEVER` without an event.
    """
    age_s = np.maximum(age_us, 0) / MICROS_PER_S
    recency = np.where(count > 0, np.log1p(age_s) / _YEAR, NEVER)
    return np.log1p(count).astype(np.float32), recency.astype(np.float32)


def past_features(
    requests: PastRows, events: PastRows, available_ts: Ints, *, recency: bool = True
) -> dict[str, NDArray[np.float32]]:
    """Return float32 [R] for each name of `past_names`, from the events visible to each request.

    An event counts for a field when the same user met the same value. Visible is
    `event_ts < request_ts and available_ts <= request_ts`.

    Args:
        requests: R rows in any order.
        events: E rows in any order, with the same fields.
        available_ts: [E] when each event could be read.
        recency: whether the time since the last such event is given too.
    """
    visible_ts = np.maximum(events.event_ts + 1, available_ts)
    times, rank = np.unique(np.concatenate([visible_ts, requests.event_ts]), return_inverse=True)
    event_rank, request_rank = rank[: len(visible_ts)], rank[len(visible_ts) :]
    out: dict[str, NDArray[np.float32]] = {}
    for name, values in requests.values.items():
        groups = _groups((events.user, events.values[name]), (requests.user, values), len(times))
        count, last_ts = _count_visible(
            (groups[0], event_rank, events.event_ts), (groups[1], request_rank), len(times)
        )
        count = np.where(values == 0, 0, count)
        features = past_values(count, requests.event_ts - last_ts)
        out[f"past_count_{name}"] = features[0]
        if recency:
            out[f"past_recency_{name}"] = features[1]
    return out


def _groups(
    events: tuple[Ints, Ints], requests: tuple[Ints, Ints], num_times: int
) -> tuple[Ints, Ints]:
    """Return one number for each (user, value), small enough to pack with a time rank."""
    user = np.concatenate([events[0], requests[0]]).astype(np.int64)
    value = np.concatenate([events[1], requests[1]]).astype(np.int64)
    if not len(user):
        return user, user
    span = int(value.max()) + 1
    low = int(user.min())
    if (int(user.max()) - low + 1) * span * num_times < _MAX_KEY:
        group = (user - low) * span + value
    else:
        _, user = np.unique(user, return_inverse=True)
        _, group = np.unique(user * span + value, return_inverse=True)
    return group[: len(events[0])], group[len(events[0]) :]


def _count_visible(
    events: tuple[Ints, Ints, Ints], requests: tuple[Ints, Ints], num_times: int
) -> tuple[Ints, Ints]:
    """Return [R] how many events of the group are visible and the latest `event_ts` among them (0 if none)."""
    group, rank, event_ts = events
    if not len(group):
        return np.zeros(len(requests[0]), np.int64), np.zeros(len(requests[0]), np.int64)
    key = group * num_times + rank
    order = np.argsort(key, kind="stable")
    sorted_key, sorted_group = key[order], group[order]
    wanted = requests[0] * num_times + requests[1]
    # Needles in order walk the sorted keys once instead of missing the cache each time.
    needle_order = np.argsort(wanted, kind="stable")
    stop, start = np.empty_like(wanted), np.empty_like(wanted)
    sorted_wanted = wanted[needle_order]
    stop[needle_order] = np.searchsorted(sorted_key, sorted_wanted, side="right")
    first = requests[0][needle_order] * num_times
    start[needle_order] = np.searchsorted(sorted_key, first, side="left")
    last = _running_latest(sorted_group, event_ts[order])
    count = stop - start
    return count, np.where(count > 0, last[np.maximum(stop - 1, 0)], 0)


def _running_latest(group: Ints, event_ts: Ints) -> Ints:
    """Return [E] the latest time so far within each group; groups rise."""
    distinct, rank = np.unique(event_ts, return_inverse=True)
    _, place = np.unique(group, return_inverse=True)
    latest = np.maximum.accumulate(place * len(distinct) + rank)
    return np.asarray(distinct[latest % len(distinct)])
