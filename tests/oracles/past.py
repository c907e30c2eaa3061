"""Slow twins of the features from the past and of the raw history: plain loops, one rule at a time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

YEAR_S = 365 * 86_400
NEVER = 1.5


@dataclass(frozen=True)
class Event:
    user: object
    event_ts: int
    available_ts: int
    values: Mapping[str, object]
    """Value of each counted field; None (or id 0) is unknown and equals nothing."""
    name: object = None


@dataclass(frozen=True)
class Request:
    user: object
    request_ts: int
    values: Mapping[str, object]


def is_visible(event: Event, request: Request) -> bool:
    return event.event_ts < request.request_ts and event.available_ts <= request.request_ts


def past_twin(request: Request, events: Sequence[Event]) -> dict[str, float]:
    """Return the past features of one request by going through all events."""
    out: dict[str, float] = {}
    for field, value in request.values.items():
        times = [
            event.event_ts
            for event in events
            if event.user == request.user
            and value not in (None, 0)
            and event.values[field] == value
            and is_visible(event, request)
        ]
        out[f"past_count_{field}"] = math.log1p(len(times))
        age_s = (request.request_ts - max(times)) / 1e6 if times else 0.0
        out[f"past_recency_{field}"] = math.log1p(age_s) / math.log1p(YEAR_S) if times else NEVER
    return out


def raw_history_twin(request: Request, events: Sequence[Event], max_len: int) -> list[object]:
    """Return the names of the newest visible events of the user, oldest first; `events` are in their tie order."""
    seen = [e for e in events if e.user == request.user and is_visible(e, request)]
    seen.sort(key=lambda event: event.event_ts)
    return [event.name for event in seen[-max_len:]]
