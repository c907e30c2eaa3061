"""The default online store: one read-only LMDB file per version, mapped into the process.

Readers share the page cache, take no lock and copy nothing; a version never changes once it is published.

A target is a directory: `spaces/SPACE/versions/NAME/` holds one published version, and `spaces/SPACE/CURRENT`, a text file
with the name of the live one, is replaced in one step once that is complete. Killed at any point, readers still see the
version before; a rerun completes the new one. The newest versions stay, for readers that have yet to switch.
"""

import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import lmdb

from loopfm_ray.config import config_hash
from loopfm_ray.errors import StoreError
from loopfm_ray.store.manifest import (
    MANIFEST,
    commit,
    disk_errors,
    read_manifest,
    recover,
    stage,
    sync,
    verify,
)
from loopfm_ray.store.online import NUM_KEPT, UserHistory, unpack_history
from loopfm_ray.store.tables import write_atomically

__all__ = ["LmdbStore", "LmdbTarget", "write_lmdb"]

FILE = "histories.lmdb"
_CURRENT = "CURRENT"
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
        if self._map is None:
            raise StoreError(f"the store of version {self.version} is closed; open it again")
        # in order, so that neighbours are read one after the other
        wanted = [(key, key.encode()) for key in (sorted(set(keys)) if len(keys) > 1 else keys)]
        transaction, found = self._map.transaction(), dict[str, UserHistory]()
        try:
            for key, name in wanted:
                # LMDB takes neither an empty key nor one over its limit; none such was stored
                value = transaction.get(name) if 0 < len(name) <= _MAX_KEY_BYTES else None
                if value is not None:
                    found[key] = unpack_history(value, self._map)
        except lmdb.Error as error:
            raise StoreError(
                f"reading version {self.version} failed: {error}; publish it again"
            ) from error
        return [found.get(key) for key in keys]

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


class LmdbTarget:
    """A directory that versions are published to; one process at a time may write to it."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def spaces(self) -> list[str]:
        """Return the spaces that have a live version, sorted."""
        pointers = (self._root / "spaces").glob(f"*/{_CURRENT}")
        return sorted(path.parent.name for path in pointers if path.parent.name[0] != ".")

    def current(self, space: str) -> str | None:
        """Return the name of the live version of a space, None when there is none."""
        try:
            return (self._folder(space) / _CURRENT).read_text(encoding="utf-8").strip()
        except (FileNotFoundError, NotADirectoryError):
            return None
        except OSError as error:
            raise StoreError(
                f"{self._folder(space) / _CURRENT} can not be read: {error}; check access to it"
            ) from error

    def names(self, space: str) -> list[str]:
        """Return the names of the whole versions of a space, sorted."""
        folders = (self._folder(space) / "versions").glob(f"*/{MANIFEST}")
        return sorted(path.parent.name for path in folders if path.parent.name[0] != ".")

    def describe(self, space: str, name: str) -> dict[str, Any]:  # Any: JSON
        """Return the meta of a version and `published_at`, when it was first written here."""
        manifest = read_manifest(self._version(space, name))
        return {**manifest.meta, "published_at": manifest.created_at}

    def open(self, space: str, name: str) -> LmdbStore:
        """Open a version.

        Raises:
            StoreError: there is none, or it is damaged.
        """
        return LmdbStore(self._version(space, name))

    def write(
        self,
        space: str,
        name: str,
        records: Iterable[tuple[str, bytes]],
        meta: dict[str, Any],  # Any: JSON
        max_bytes: int,
    ) -> None:
        """Write a version unless it is there, make it the live one of its space, and remove all but the newest.

        Raises:
            StoreError: the version that is there is damaged, a key can not be stored, or the disk is full.
        """
        self._clear_retired()
        folder = self._version(space, name)
        recover(folder)
        if (folder / MANIFEST).is_file():
            verify(folder)
        else:
            with stage(folder) as staged:
                num_users = write_lmdb(staged, records, max_bytes)
                commit(
                    staged,
                    kind="online",
                    config_hash=config_hash(meta["max_events_per_user"]),
                    inputs={"latents": meta["latents_version"]},
                    meta=meta,
                    num_rows=num_users,
                )
        _switch(self._folder(space), name)
        _remove_old(self._folder(space), name)

    def remove(self, space: str) -> bool:
        """Remove a space and what killed runs left of it; return whether there was anything.

        Maps that readers have open stay readable until they let go.
        """
        had_rest = self._clear_retired(space)
        folder = self._folder(space)
        if not folder.is_dir():
            return had_rest
        # hidden first: no reader meets a half removed space
        doomed = folder.parent / f".{space}.gone"
        folder.rename(doomed)
        sync(folder.parent)
        shutil.rmtree(doomed)
        return True

    def close(self) -> None:
        """Do nothing: a directory needs no closing."""

    def _folder(self, space: str) -> Path:
        return self._root / "spaces" / space

    def _version(self, space: str, name: str) -> Path:
        return self._folder(space) / "versions" / name

    def _clear_retired(self, space: str = "*") -> bool:
        """Remove what a killed `remove` left; return whether there was any."""
        found = list((self._root / "spaces").glob(f".{space}.gone"))
        for doomed in found:
            shutil.rmtree(doomed)
        return bool(found)


def _switch(folder: Path, name: str) -> None:
    """Make `name` the live version of the space in `folder`, in one step."""
    write_atomically(
        folder / _CURRENT, lambda staged: staged.write_text(f"{name}\n", encoding="utf-8")
    )
    for changed in (folder, folder.parent, folder.parent.parent):
        sync(changed)


def _remove_old(folder: Path, name: str) -> None:
    """Remove all versions but the live one and the newest others, and what killed runs left."""
    for leftover in folder.glob(f".{_CURRENT}.tmp-*"):
        leftover.unlink()
    # hidden ones sort first: what a killed run left gives its name free
    versions = sorted(path for path in (folder / "versions").iterdir() if path.name != name)
    whole = [path for path in versions if (path / MANIFEST).is_file() and path.name[0] != "."]
    whole.sort(key=lambda path: (path / MANIFEST).stat().st_mtime_ns, reverse=True)
    kept = whole[: NUM_KEPT - 1]
    with disk_errors(folder):
        for path in versions:
            if path not in kept:
                # hidden first: no reader meets a half removed version
                doomed = path.parent / f".{path.name.lstrip('.')}.gone"
                path.rename(doomed)
                shutil.rmtree(doomed)


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
