"""Copy one latents version online, then switch the readers of its space to it.

Where it goes and how several spaces live side by side: `store/target.py`.
"""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.online import MemoryStore, UserHistory, pack_history
from loopfm_ray.store.space import Space
from loopfm_ray.store.tables import code_bytes
from loopfm_ray.store.target import open_target

__all__ = ["iterate_histories", "load_memory", "publish"]

_PAGE_BYTES = 4096


def publish(
    latents: Location,
    user_keys: Sequence[str],
    target: str | Path,
    max_events_per_user: int | None = None,
) -> str:
    """Publish the latents version at `target`, make it the live one of its space and return its id.

    Other spaces at `target` stay as they are.

    Args:
        latents: the latents version, local or on S3.
        user_keys: the user key of each id; entry 0, the unknown user, has no history.
        target: a directory, or a `redis://` address.
        max_events_per_user: only the newest so many events of a user go online; None keeps all. A cut history is marked
            as not complete: requests older than its oldest event would see less than offline.

    Raises:
        StoreError: the versions can not be read or written, or ids and keys do not fit.
    """
    reader = LatentsReader(latents)
    meta = _meta(reader, max_events_per_user)
    version: str = meta["latents_version"]
    name = version if max_events_per_user is None else f"{version}-{max_events_per_user}"
    histories = iterate_histories(reader, user_keys, max_events_per_user)
    records = ((key, pack_history(history)) for key, history in histories)
    opened = open_target(target)
    try:
        opened.write(meta["space"], name, records, meta, _map_bytes(reader, len(user_keys)))
    finally:
        opened.close()
    return version


def load_memory(
    latents: Location, user_keys: Sequence[str], max_events_per_user: int | None = None
) -> MemoryStore:
    """Return the latents version as a store in this process's memory.

    Raises:
        StoreError: the version can not be read, or ids and keys do not fit.
    """
    reader = LatentsReader(latents)
    histories = dict(iterate_histories(reader, user_keys, max_events_per_user))
    meta = _meta(reader, max_events_per_user)
    return MemoryStore(histories, meta["latents_version"], meta)


def iterate_histories(
    reader: LatentsReader, user_keys: Sequence[str], max_events_per_user: int | None = None
) -> Iterator[tuple[str, UserHistory]]:
    """Yield the key and history of every known user that has events, bucket by bucket in id order.

    Raises:
        StoreError: an id has no key.
    """
    columns = ["user", "event_ts", "available_ts", "code"]
    for bucket in reader.buckets:
        table = reader.read_bucket(bucket, columns=columns, events_only=True)
        user = table.column("user").to_numpy()
        if len(user) and int(user[-1]) >= len(user_keys):
            raise StoreError(
                f"user id {int(user[-1])} has no key, {len(user_keys)} keys were given;"
                " give the vocabulary of the prepared version that was embedded"
            )
        event_ts = table.column("event_ts").to_numpy()
        available_ts = table.column("available_ts").to_numpy()
        codes = code_bytes(table.column("code"))
        edges = [0, *(np.flatnonzero(np.diff(user)) + 1).tolist(), len(user)]
        for start, stop in itertools.pairwise(edges):
            if start == stop or user[start] == 0:
                continue
            first = start if max_events_per_user is None else max(start, stop - max_events_per_user)
            rows = slice(first, stop)
            yield (
                user_keys[int(user[start])],
                UserHistory(event_ts[rows], available_ts[rows], codes[rows], first == start),
            )


def _meta(reader: LatentsReader, max_events_per_user: int | None) -> dict[str, Any]:  # Any: JSON
    return {
        **reader.manifest.meta,
        **Space.of_meta(reader.manifest.meta).to_meta(),
        "latents_version": reader.manifest.content,
        "max_events_per_user": max_events_per_user,
    }


def _map_bytes(reader: LatentsReader, num_users: int) -> int:
    """Return more bytes than the LMDB file can need: half empty pages, a rounded up page per user, and some."""
    events = int(reader.manifest.meta["num_events"]) * (16 + reader.spec.num_bytes)
    return 2 * (events + num_users * _PAGE_BYTES) + (16 << 20)
