"""Versions as local files: those on this disk as they are, those on S3 through a cache that each machine keeps.

```text
CACHE/VERSION/manifest.json   what the version holds
CACHE/VERSION/...             its files, each once a reader asked for it, whole and checked
CACHE/VERSION.lock            held by all who read the version, so that nobody removes it
```

A version never changes, so its name is all that a cached file depends on. A file is downloaded under a hidden name, checked
against size and SHA-256 of the manifest, and renamed; of many processes one downloads it and the others wait. When the
cache holds more than it may, the versions that were opened longest ago and that nobody reads are removed.
"""

import fcntl
import os
import secrets
import shutil
import weakref
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location, Remote, is_remote
from loopfm_ray.store.format import (
    MANIFEST,
    FileEntry,
    Manifest,
    file_location,
    manifest_text,
    read_manifest,
)
from loopfm_ray.store.locks import locked
from loopfm_ray.store.s3 import S3Folder, in_threads
from loopfm_ray.store.tables import write_atomically

__all__ = ["Version", "VersionFile", "open_version"]

_LOCK_SLOTS = 64
_LOCKS = ".locks"


class _Lease:
    """The right to read one version of a cache; it ends with this object, or with its process."""

    def __init__(self, cache: Path, version: str) -> None:
        self.cache = cache
        self.folder = cache / version
        handle = _lock(cache / f"{version}.lock")
        os.utime(handle)
        weakref.finalize(self, os.close, handle)


@dataclass(frozen=True)
class Version:
    """One version, whose files can be read from this machine's disk.

    It keeps its files in the cache as long as it lives. Picklable: in another process it opens the same version, on
    another machine through the cache there.

    Attributes:
        location: where the version lies.
        manifest: what it holds.
        folder: where its files are, those on S3 once they were asked for with `path` or `fetch`.
    """

    location: Location
    manifest: Manifest
    folder: Path
    _lease: _Lease | None = field(default=None, repr=False, compare=False)

    def __reduce__(self) -> tuple[Any, ...]:  # Any: as pickle asks for it
        return _open_as, (self.location, self.manifest)

    def __contains__(self, name: str) -> bool:
        """Return whether the version has a file of this name."""
        return name in self._entries

    def path(self, name: str) -> Path:
        """Return the local path of one file.

        Raises:
            StoreError: the version has no such file, or it can not be fetched.
        """
        return self.fetch([name]) / name

    def fetch(self, names: Iterable[str] | None = None) -> Path:
        """Make sure that files are on this disk, all of them if no names are given, and return `folder`.

        Raises:
            StoreError: the version has no such file; the store does not answer, no longer holds it or holds another
                content; or the disk is full.
        """
        if self._lease is None:
            return self.folder
        wanted = self._entries.values() if names is None else [self._entry(name) for name in names]
        missing = [entry for entry in wanted if not _is_whole(self.folder, entry)]
        if missing:
            num_bytes = sum(entry.num_bytes for entry in missing)
            limit = Remote.of(self.location).cache_bytes
            _make_room(self._lease.cache, limit - num_bytes, self.folder)
            in_threads(self._download, missing)
        return self.folder

    @cached_property
    def _entries(self) -> dict[str, FileEntry]:
        return {entry.path: entry for entry in self.manifest.files}

    def _entry(self, name: str) -> FileEntry:
        if name not in self._entries:
            raise StoreError(
                f"version {self.manifest.version} at {self.location} has no file {name!r}; write it again with this code"
            )
        return self._entries[name]

    def _download(self, entry: FileEntry) -> None:
        """Put one file into the cache, unless another process has done so by the time that it is our turn."""
        path = self.folder / entry.path
        slot = zlib.crc32(entry.path.encode()) % _LOCK_SLOTS
        with locked(self.folder / _LOCKS / str(slot)):
            if _is_whole(self.folder, entry):
                return
            for leftover in path.parent.glob(f".{path.name}.tmp-*"):
                leftover.unlink()
            write_atomically(path, lambda staged: self._copy(entry, staged))

    def _copy(self, entry: FileEntry, staged: Path) -> None:
        data = self.manifest.data
        name = f"{data}/{entry.path}" if data else entry.path
        with staged.open("wb") as sink:
            found = S3Folder.of(str(self.location)).digest(name, sink)
        where = file_location(self.location, self.manifest, entry.path)
        if found is None:
            raise StoreError(
                f"{where} of version {self.manifest.version} is gone; the version was replaced since it was opened:"
                " run again to read the one that is there now"
            )
        if found != (entry.num_bytes, entry.sha256):
            raise StoreError(
                f"{where} is damaged: found {found[0]} bytes with sha256 {found[1][:16]}, expected {entry.num_bytes}"
                f" with {entry.sha256[:16]}; remove {self.location} and write it again"
            )


@dataclass(frozen=True)
class VersionFile:
    """One file of a version, fetched when its path is asked for."""

    version: Version
    name: str

    @property
    def path(self) -> Path:
        """Where the file is on this machine's disk."""
        return self.version.path(self.name)


def open_version(location: Location, kind: str | None = None) -> Version:
    """Open the version at a local directory or `s3://` address; of one on S3, files are fetched as they are asked for.

    Args:
        location: of the version.
        kind: what it has to be, such as "latents"; None takes any.

    Raises:
        StoreError: there is none, or it is of another kind, or the store does not answer.
    """
    manifest = read_manifest(location)
    if kind is not None and manifest.kind != kind:
        raise StoreError(
            f"{location} is a version of kind {manifest.kind!r}, expected {kind!r}; correct the path"
        )
    return _open_as(location, manifest)


def _open_as(location: Location, manifest: Manifest) -> Version:
    if not is_remote(location):
        return Version(location, manifest, Path(str(location)))
    lease = _Lease(Remote.of(location).cache_folder(), manifest.version)
    (lease.folder / _LOCKS).mkdir(parents=True, exist_ok=True)
    if not (lease.folder / MANIFEST).is_file():
        # in the cache the files lie beside the manifest
        text = manifest_text(replace(manifest, data="", previous_data=""))
        write_atomically(
            lease.folder / MANIFEST, lambda staged: staged.write_text(text, encoding="utf-8")
        )
    return Version(location, manifest, lease.folder, lease)


def _is_whole(folder: Path, entry: FileEntry) -> bool:
    try:
        return (folder / entry.path).stat().st_size == entry.num_bytes
    except FileNotFoundError:
        return False


def _make_room(cache: Path, limit_bytes: int, own: Path) -> None:
    """Remove versions that nobody reads, those opened longest ago first, until the cache holds `limit_bytes` or less."""
    for leftover in cache.glob(".*.gone-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    sizes = {lock.with_suffix(""): _num_bytes(lock.with_suffix("")) for lock in _locks(cache)}
    total = sum(sizes.values())
    for lock in _locks(cache):
        if total <= limit_bytes:
            return
        folder = lock.with_suffix("")
        if folder != own and _remove_unread(lock, folder):
            total -= sizes.get(folder, 0)


def _locks(cache: Path) -> list[Path]:
    """Return the lock of every version, the one that was opened longest ago first."""
    found = []
    for lock in cache.glob("*.lock"):
        try:
            found.append((lock.stat().st_mtime_ns, lock))
        except FileNotFoundError:  # another process removed the version
            continue
    return [lock for _, lock in sorted(found)]


def _num_bytes(folder: Path) -> int:
    total = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += (Path(root) / name).stat().st_size
            except FileNotFoundError:
                continue
    return total


def _remove_unread(lock: Path, folder: Path) -> bool:
    """Remove a version unless a process holds its lock; return whether it was removed."""
    try:
        handle = os.open(lock, os.O_RDWR)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if not _is_open(lock, handle):
            return False
        if folder.exists():
            # hidden first: what a killed process leaves half removed is no version
            doomed = folder.parent / f".{folder.name}.gone-{secrets.token_hex(4)}"
            folder.rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)
        lock.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(handle)
    return True


def _lock(path: Path) -> int:
    """Return a shared lock on `path`, which whoever removes the version takes for itself alone."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH)
        if _is_open(path, handle):
            return handle
        os.close(handle)  # the version was removed while we waited: lock the next of that name


def _is_open(path: Path, handle: int) -> bool:
    """Return whether `handle` is the file that is at `path` now, not one that was removed since it was opened."""
    try:
        return path.stat().st_ino == os.fstat(handle).st_ino
    except FileNotFoundError:
        return False
