"""A seeded history of many users, sorted as a store has it."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from history_data import CODE_BYTES, MICROS, SPAN_S, start_ts

_DELAY_S = 3600


@dataclass(frozen=True)
class History:
    """Events sorted by user and time; a bucket is a stretch of users, so every layout has the same rows in the same order.

    Attributes:
        user: [N].
        event_ts: [N].
        available_ts: [N].
        codes: uint8 [N, 16], random: codes of real latents hardly compress either.
        starts: [users + 1] the first row of each user.
        bucket_users: [buckets + 1] the first user of each bucket.
    """

    user: np.ndarray
    event_ts: np.ndarray
    available_ts: np.ndarray
    codes: np.ndarray
    starts: np.ndarray
    bucket_users: np.ndarray

    @property
    def num_users(self) -> int:
        """How many users there are; all have events."""
        return len(self.starts) - 1

    def table(self, bucket: int | None = None) -> Any:
        """Return the rows of a bucket, or all, as an Arrow table."""
        part = slice(None)
        if bucket is not None:
            part = slice(*self.starts[self.bucket_users[bucket : bucket + 2]])
        codes = np.ascontiguousarray(self.codes[part])
        return pa.table(
            {
                "user": self.user[part],
                "event_ts": self.event_ts[part],
                "available_ts": self.available_ts[part],
                "code": pa.FixedSizeBinaryArray.from_buffers(
                    pa.binary(CODE_BYTES), len(codes), [None, pa.py_buffer(codes)]
                ),
            }
        )


def make_history(num_users: int, events_per_user: int, num_buckets: int) -> History:
    """Return a history; users have 1 event and more, `events_per_user` on average."""
    rng = np.random.default_rng(9)
    counts = 1 + rng.poisson(events_per_user - 1, num_users)
    starts = np.concatenate([[0], np.cumsum(counts)])
    user = np.repeat(np.arange(num_users, dtype=np.int32), counts)
    second = rng.integers(0, SPAN_S, len(user))
    second = second[np.lexsort((second, user))]
    event_ts = start_ts() + second * MICROS
    return History(
        user=user,
        event_ts=event_ts,
        available_ts=event_ts + _DELAY_S * MICROS,
        codes=rng.integers(0, 256, (len(user), CODE_BYTES), dtype=np.uint8),
        starts=starts,
        bucket_users=np.linspace(0, num_users, num_buckets + 1).astype(np.int64),
    )
