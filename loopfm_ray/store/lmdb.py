"""The default online store: one read-only LMDB file per version, mapped into the process.

Readers share the page cache, take no lock and copy nothing; a version never changes once it is published.
"""

import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from loopfm_ray.errors import StoreError
from loopfm_ray.store.manifest import disk_errors, read_manifest
from loopfm_ray.store.online import UserHistory, unpack_history

__all__ = ["LmdbStore", "write_lmdb"]

FILE = "histories.lmdb"
_MAX_KEY_BYTES = 511


class LmdbStore:
    """One published version in an LMDB file; the histories it gives are views of the map.

    Threads may share a store; each reads through a transaction of its own.
    """

    def __init__(self, folder: Path) -> None:
        """Open the version in `folder`, which `write_lmdb` and a manifest made.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        manifest = read_manifest(folder)
        if manifest.kind != "online":
            raise StoreError(
                f"{folder} holds a version of kind {manifest.kind!r}, expected 'online'; publish the latents first"
            )
        self.version: str = manifest.meta["latents_version"]
        self.meta: dict[str, Any] = manifest.meta  # Any: JSON
        self._map: _Map | None = _open_map(folder / FILE)

    def get_many(self, keys: Sequence[str]) -> list[UserHistory | None]:
        """Return the history of each user, None where there is none."""
        wanted = sorted({key.encode() for key in keys})
        # LMDB takes neither an empty key nor one over its limit; none such was stored
        wanted = [key for key in wanted if 0 < len(key) <= _MAX_KEY_BYTES]
        if self._map is None:
            raise StoreError(f"the store of version {self.version} is closed; open it again")
        try:
            with self._map.transaction().cursor() as cursor:
                pairs = cursor.getmulti(wanted) if wanted else []
        except lmdb.Error as error:
            raise StoreError(
                f"reading version {self.version} failed: {error}; publish it again"
            ) from error
        histories = {bytes(key).decode(): unpack_history(value, self._map) for key, value in pairs}
        return [histories.get(key) for key in keys]

    def close(self) -> None:
        """Let go of the file; it is unmapped once no other store and no history of it is left."""
        self._map = None


class _Map:
    """One mapped file and a read transaction per thread."""

    def __init__(self, path: Path) -> None:
        # Any: lmdb ships no types
        self._env: Any = lmdb.open(
            str(path), subdir=False, readonly=True, lock=False, create=False, readahead=False
        )
        self._local = threading.local()

    def transaction(self) -> Any:
        """Return this thread's read transaction, which lives as long as the thread and the map."""
        if not hasattr(self._local, "transaction"):
            self._local.transaction = self._env.begin(buffers=True)
        return self._local.transaction


_maps: WeakValueDictionary[tuple[int, int], _Map] = WeakValueDictionary()
"""Open files by device and inode: LMDB forbids opening one twice in a process."""
_maps_lock = threading.Lock()


def _open_map(path: Path) -> _Map:
    """Return the map of the file, shared with the other stores of this process."""
    try:
        stat = path.stat()
        with _maps_lock:
            found = _maps.get((stat.st_dev, stat.st_ino))
            if found is None:
                found = _maps[(stat.st_dev, stat.st_ino)] = _Map(path)
    except (OSError, lmdb.Error) as error:
        raise StoreError(
            f"{path} can not be opened: {error}; remove its directory and publish the version again"
        ) from error
    return found


def write_lmdb(folder: Path, records: Iterable[tuple[str, bytes]], map_bytes: int) -> int:
    """Write `(user key, record)` pairs as one LMDB file in `folder` and return their number.

    Args:
        folder: a staged directory, to be made a version by its manifest.
        records: each user once; the same order gives the same bytes.
        map_bytes: the most that the file may grow to; it takes only what it needs.

    Raises:
        StoreError: a key is empty or too long, or the disk is full.
    """
    count = 0
    with _lmdb_errors(folder), disk_errors(folder):
        env = lmdb.open(
            str(folder / FILE),
            subdir=False,
            map_size=map_bytes,
            lock=False,
            sync=False,
            metasync=False,
        )
        try:
            with env.begin(write=True) as transaction:
                for key, record in records:
                    name = key.encode()
                    if not 0 < len(name) <= _MAX_KEY_BYTES:
                        raise StoreError(
                            f"a user key must have 1 to {_MAX_KEY_BYTES} bytes, found {len(name)};"
                            " shorten the keys of the log"
                        )
                    transaction.put(name, record)
                    count += 1
            env.sync(True)
        finally:
            env.close()
    return count


@contextmanager
def _lmdb_errors(folder: Path) -> Iterator[None]:
    """Turn what LMDB raises inside the block, a full disk among it, into a StoreError."""
    try:
        yield
    except lmdb.Error as error:  # LMDB reports a full disk as an input/output error
        free = shutil.disk_usage(folder).free
        raise StoreError(
            f"writing {folder / FILE} failed: {error}, {free / 2**20:.0f} MiB free;"
            " free some space or choose another path, then publish again"
        ) from error
