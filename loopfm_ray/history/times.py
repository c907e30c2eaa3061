"""Delay and visibility: when an event can be read.

An event happens at `event_ts`, becomes readable at `available_ts` and is visible to a request when
`event_ts < request_ts and available_ts <= request_ts`. The first is strict: a request never sees its own instant.
"""

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_S

__all__ = ["available_from", "delay_to_us", "is_visible", "visible_from"]

Ints = NDArray[np.int64]


def delay_to_us(delay_s: float) -> int:
    """Return a delay in whole microseconds.

    Raises:
        ConfigError: the delay is negative.
    """
    if not delay_s >= 0:
        raise ConfigError(
            f"history.delay_s must be >= 0, found {delay_s}; an event can not be read before it happened"
        )
    return round(delay_s * MICROS_PER_S)


def available_from(event_ts: Ints, label_ts: Ints | None, delay_us: int) -> Ints:
    """Return [E] when each event is readable: after the delay and not before its label.

    Args:
        event_ts: [E].
        label_ts: [E] when the label was known, if being an event tells the label (a log whose events are its positives);
            None when every impression is an event.
        delay_us: time from event to readable, not negative.
    """
    ready = np.asarray(event_ts, dtype=np.int64) + delay_us
    return ready if label_ts is None else np.maximum(ready, label_ts)


def is_visible(event_ts: Ints, available_ts: Ints, request_ts: int | Ints) -> NDArray[np.bool_]:
    """Return whether each event could be seen at `request_ts` (a scalar or broadcast)."""
    return (event_ts < request_ts) & (available_ts <= request_ts)


def visible_from(event_ts: Ints, available_ts: Ints) -> Ints:
    """Return [E] the first instant at which each event is visible."""
    ready = event_ts + 1
    return np.maximum(ready, available_ts, out=ready)
