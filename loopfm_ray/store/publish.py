"""Copy one latents version online, then switch readers to it.

A target is a directory (LMDB, the default) or a `redis://` address. On disk a target holds `versions/NAME/` and `CURRENT`,
a text file with the name of the live version, replaced in one step once the version is complete. Killed at any point,
readers still see the version before; a rerun completes the new one. The two newest versions stay, for readers that have
yet to switch.
"""

import itertools
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from loopfm_ray.config import config_hash
from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.lmdb import LmdbStore, write_lmdb
from loopfm_ray.store.manifest import (
    MANIFEST,
    commit,
    disk_errors,
    recover,
    stage,
    sync,
    verify,
)
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.online import MemoryStore, OnlineStore, UserHistory, pack_history
from loopfm_ray.store.redis import RedisStore, connect, current_name, publish_redis
from loopfm_ray.store.tables import code_bytes, write_atomically

__all__ = ["NUM_KEPT", "iterate_histories", "load_memory", "open_current", "publish"]

NUM_KEPT = 2
"""Versions that stay online: the live one and the one before."""

_CURRENT = "CURRENT"
_PAGE_BYTES = 4096


def publish(
    latents: Location,
    user_keys: Sequence[str],
    target: str | Path,
    max_events_per_user: int | None = None,
) -> str:
    """Publish the latents version at `target`, make it the live one and return it.

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
    version = reader.manifest.content
    name = version if max_events_per_user is None else f"{version}-{max_events_per_user}"
    histories = iterate_histories(reader, user_keys, max_events_per_user)
    records = ((key, pack_history(history)) for key, history in histories)
    meta = _meta(reader, max_events_per_user)
    if _is_redis(target):
        client = connect(str(target), timeout_s=60.0)
        try:
            publish_redis(client, name, records, meta, keep=NUM_KEPT)
        finally:
            client.close()
        return version
    root = Path(target)
    folder = root / "versions" / name
    recover(folder)
    if (folder / MANIFEST).is_file():
        verify(folder)
    else:
        with stage(folder) as staged:
            num_users = write_lmdb(staged, records, _map_bytes(reader, len(user_keys)))
            commit(
                staged,
                kind="online",
                config_hash=config_hash(max_events_per_user),
                inputs={"latents": version},
                meta=meta,
                num_rows=num_users,
            )
    _switch(root, name)
    _remove_old(root, name)
    return version


def open_current(
    target: str | Path, expected_version: str | None = None, *, timeout_s: float = 1.0
) -> OnlineStore:
    """Open the live version at `target`, a directory or a `redis://` address.

    Args:
        target: where `publish` wrote.
        expected_version: the latents version that a bundle was trained on; None takes any.
        timeout_s: for each look-up in Redis.

    Raises:
        StoreError: nothing is published, or another version is live.
    """
    store: OnlineStore
    if _is_redis(target):
        client = connect(str(target), timeout_s)
        name = current_name(client)
        if name is None:
            raise StoreError(f"nothing is published at {target}; run publish first")
        store = RedisStore(client, name)
    else:
        root = Path(target)
        try:
            name = (root / _CURRENT).read_text(encoding="utf-8").strip()
        except FileNotFoundError as error:
            raise StoreError(f"nothing is published at {target}; run publish first") from error
        store = LmdbStore(root / "versions" / name)
    if expected_version is not None and store.version != expected_version:
        found = store.version
        store.close()
        raise StoreError(
            f"{target} serves latents {found}, expected {expected_version}; publish the version that the bundle"
            " names, or load the bundle that was trained on the live one"
        )
    return store


def load_memory(
    latents: Location, user_keys: Sequence[str], max_events_per_user: int | None = None
) -> MemoryStore:
    """Return the latents version as a store in this process's memory.

    Raises:
        StoreError: the version can not be read, or ids and keys do not fit.
    """
    reader = LatentsReader(latents)
    histories = dict(iterate_histories(reader, user_keys, max_events_per_user))
    return MemoryStore(histories, reader.manifest.content, _meta(reader, max_events_per_user))


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


def _is_redis(target: str | Path) -> bool:
    return str(target).startswith(("redis://", "rediss://", "unix://"))


def _meta(reader: LatentsReader, max_events_per_user: int | None) -> dict[str, Any]:  # Any: JSON
    return {
        **reader.manifest.meta,
        "latents_version": reader.manifest.content,
        "max_events_per_user": max_events_per_user,
    }


def _map_bytes(reader: LatentsReader, num_users: int) -> int:
    """Return more bytes than the LMDB file can need: half empty pages, a rounded up page per user, and some."""
    events = int(reader.manifest.meta["num_events"]) * (16 + reader.spec.num_bytes)
    return 2 * (events + num_users * _PAGE_BYTES) + (16 << 20)


def _switch(root: Path, name: str) -> None:
    """Make `name` the live version, in one step."""
    write_atomically(
        root / _CURRENT, lambda staged: staged.write_text(f"{name}\n", encoding="utf-8")
    )
    sync(root)


def _remove_old(root: Path, name: str) -> None:
    """Remove all versions but the live one and the newest others, and what killed runs left."""
    for leftover in root.glob(f".{_CURRENT}.tmp-*"):
        leftover.unlink()
    # hidden ones sort first: what a killed run left gives its name free
    folders = sorted(path for path in (root / "versions").iterdir() if path.name != name)
    whole = [
        folder for folder in folders if (folder / MANIFEST).is_file() and folder.name[0] != "."
    ]
    whole.sort(key=lambda folder: (folder / MANIFEST).stat().st_mtime_ns, reverse=True)
    kept = whole[: NUM_KEPT - 1]
    with disk_errors(root):
        for folder in folders:
            if folder not in kept:
                # hidden first: no reader meets a half removed version
                doomed = folder.parent / f".{folder.name.lstrip('.')}.gone"
                folder.rename(doomed)
                shutil.rmtree(doomed)
