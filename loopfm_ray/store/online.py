"""The online history store: what serving reads per request, and the store that lives in memory.

Every store holds one latents version and gives each user's events oldest first. Which of them a request may see is
decided at the request by `visible_slice`, with the rules of the offline join.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.errors import StoreError
from loopfm_ray.history.times import is_visible

__all__ = [
    "NUM_KEPT",
    "MemoryStore",
    "OnlineStore",
    "UserHistory",
    "is_cut",
    "pack_history",
    "unpack_history",
    "visible_slice",
]

NUM_KEPT = 2
"""Versions of a space that stay online: the live one and the one before."""

Ints = NDArray[np.int64]

_HEADER = struct.Struct("<2sBBIII")
"""Magic, format version, flags, events, bytes of a code, and 4 bytes of zeros: 16 bytes in all."""
_MAGIC = b"LH"
_FORMAT_VERSION = 1
_COMPLETE = 1


@dataclass(frozen=True, eq=False)
class UserHistory:
    """The stored events of one user, sorted by event_ts and example_id, oldest first.

    `is_complete` says that no older event was left out when it was published. The arrays may be views of the store;
    `owner` keeps it open as long as they are in use.
    """

    event_ts: Ints
    available_ts: Ints
    codes: NDArray[np.uint8]
    is_complete: bool
    owner: object = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.event_ts)


class OnlineStore(Protocol):
    """One published latents version, by user key."""

    @property
    def version(self) -> str:
        """The latents version it holds."""
        ...

    @property
    def meta(self) -> Mapping[str, Any]:  # Any: JSON
        """snapshot_id, code_spec, watermark_ts and the other meta of the latents version."""
        ...

    def get_many(self, keys: Sequence[str]) -> list[UserHistory | None]:
        """Return the history of each user in the order of `keys`, None for users that are not in the store.

        Raises:
            StoreError: the store can not be reached or a record is damaged.
        """
        ...

    def close(self) -> None:
        """Let go of what the store holds open; histories it gave stay readable."""
        ...


def visible_slice(
    history: UserHistory, request_ts: int, max_len: int, retention_us: int | None = None
) -> Ints:
    """Return which entries of `history` a request may see: the newest `max_len`, oldest first.

    Exactly what `history.asof.newest_visible` gives offline, unless `is_cut` says that some of it was not published.
    """
    seen = is_visible(history.event_ts, history.available_ts, request_ts)
    if retention_us is not None:
        seen &= history.event_ts >= request_ts - retention_us
    rows: Ints = np.flatnonzero(seen).astype(np.int64)
    return rows[max(len(rows) - max_len, 0) :]


def is_cut(
    history: UserHistory,
    num_seen: int,
    request_ts: int,
    max_len: int,
    retention_us: int | None = None,
) -> bool:
    """Return whether a request may have lost events because the history was cut when it was published.

    Args:
        history: what the store gave.
        num_seen: entries that `visible_slice` gave of it for the same request.
        request_ts: of the request.
        max_len: the longest history.
        retention_us: events older than this at the request are left out; None keeps all.
    """
    if history.is_complete or num_seen >= max_len:
        return False
    # all that was left out is not newer than the oldest that is there
    oldest_ts = int(history.event_ts[0]) if len(history) else request_ts
    return retention_us is None or oldest_ts >= request_ts - retention_us


def pack_history(history: UserHistory) -> bytes:
    """Return the bytes of one record: a versioned header, then event_ts, available_ts and codes."""
    num_events, num_bytes = history.codes.shape
    flags = _COMPLETE if history.is_complete else 0
    head = _HEADER.pack(_MAGIC, _FORMAT_VERSION, flags, num_events, num_bytes, 0)
    return b"".join(
        [
            head,
            np.ascontiguousarray(history.event_ts, dtype="<i8").tobytes(),
            np.ascontiguousarray(history.available_ts, dtype="<i8").tobytes(),
            np.ascontiguousarray(history.codes).tobytes(),
        ]
    )


def unpack_history(data: bytes | memoryview, owner: object = None) -> UserHistory:
    """Return views of one record.

    Raises:
        StoreError: the record is damaged or of an unknown format.
    """
    if len(data) < _HEADER.size:
        raise StoreError(
            f"a history record has {len(data)} bytes, too few; publish the version again"
        )
    magic, found, flags, num_events, num_bytes, _ = _HEADER.unpack_from(data)
    if magic != _MAGIC or found != _FORMAT_VERSION:
        raise StoreError(
            f"a history record has format {magic!r} {found}, this code reads {_MAGIC!r} {_FORMAT_VERSION};"
            " publish the version again"
        )
    expected = _HEADER.size + num_events * (16 + num_bytes)
    if len(data) != expected:
        raise StoreError(
            f"a history record has {len(data)} bytes, its header says {expected}; publish the version again"
        )
    times = np.frombuffer(data, dtype="<i8", count=2 * num_events, offset=_HEADER.size)
    codes = np.frombuffer(data, dtype=np.uint8, offset=_HEADER.size + 16 * num_events)
    return UserHistory(
        times[:num_events],
        times[num_events:],
        codes.reshape(num_events, num_bytes),
        bool(flags & _COMPLETE),
        owner,
    )


class MemoryStore:
    """An online store in this process, from a mapping of user key to history."""

    def __init__(
        self,
        histories: Mapping[str, UserHistory],
        version: str,
        meta: Mapping[str, Any],  # Any: JSON
    ) -> None:
        self._histories = dict(histories)
        self.version = version
        self.meta = dict(meta)

    def get_many(self, keys: Sequence[str]) -> list[UserHistory | None]:
        """Return the history of each user, None where there is none."""
        return [self._histories.get(key) for key in keys]

    def close(self) -> None:
        """Do nothing: memory needs no closing."""
