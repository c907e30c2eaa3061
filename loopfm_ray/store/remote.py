"""Versions on S3: files under a folder of their own, and one conditional put of the manifest that makes them the version.

```text
NAME/manifest.json           the version: names its folder `data`, and the one before
NAME/data-BASE-ID/...        the files of one commit; BASE stands for the manifest it may replace
NAME/work-BASE-KEY/...       markers and counts of a job that is under way
```

A writer reads the ETag of the manifest when it begins and puts its own only if that ETag still stands (`If-Match`, or
`If-None-Match` where there is none). So of two writers one wins, and the other is told. A folder whose BASE is not the
manifest that lies there now can never be committed any more: whoever comes next removes it, however alive its writer.
The folder of the version before stays until the next commit, for readers that have yet to switch.
"""

import fcntl
import hashlib
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Remote
from loopfm_ray.store.format import MANIFEST, Manifest, manifest_text, parse_manifest
from loopfm_ray.store.s3 import S3Folder, in_threads

__all__ = [
    "STAGING",
    "Claim",
    "base_name",
    "claim",
    "claim_of",
    "clean",
    "commit_folder",
    "commit_objects",
    "read_current",
    "remove_remote",
    "stage_remote",
    "write_claim",
]

STAGING = "staging"
"""Folder of the cache where versions wait for the upload."""
_CLAIM = "claim.json"
_FOLDERS = ("data-", "work-")


@dataclass(frozen=True)
class Claim:
    """What a writer saw when it began: the address, and the ETag of the manifest there, None for none."""

    address: str
    etag: str | None


def base_name(etag: str | None) -> str:
    """Return how folders name the manifest that they may replace."""
    return "new" if etag is None else hashlib.sha256(etag.encode()).hexdigest()[:16]


def claim(address: str) -> Claim:
    """Return the claim of a writer that begins now, and remove what can no longer be committed.

    Raises:
        StoreError: the store does not answer, or what lies there is damaged or no version.
    """
    current = read_current(address)
    if current is None:
        _check_free(address)
    clean(address)
    return Claim(address, None if current is None else current[1])


def read_current(address: str) -> tuple[Manifest, str] | None:
    """Return the manifest at `address` and its ETag, None if there is none.

    Raises:
        StoreError: the store does not answer, or the manifest is damaged.
    """
    found = S3Folder.of(address).read(MANIFEST)
    return None if found is None else (parse_manifest(found[0], address), found[1])


def remove_remote(address: str) -> None:
    """Remove the version at `address` and the folders of all commits to it, if there is one."""
    folder = S3Folder.of(address)
    folder.remove([MANIFEST])
    for name in folder.folders()[0]:
        if name.startswith(_FOLDERS):
            folder.remove(list(folder.sizes(f"{name}/")))


def clean(address: str) -> None:
    """Remove the folders at `address` that are neither in use nor can be committed any more."""
    folder = S3Folder.of(address)
    # the folders first: one that is begun after this is not looked at
    names = [name for name in folder.folders()[0] if name.startswith(_FOLDERS)]
    current = read_current(address)
    kept = set() if current is None else {current[0].data, current[0].previous_data}
    base = base_name(None if current is None else current[1])
    for name in names:
        if name not in kept and name.split("-")[1] != base:
            folder.remove(list(folder.sizes(f"{name}/")))


@contextmanager
def stage_remote(remote: Remote, staging_name: Callable[[str], str]) -> Iterator[Path]:
    """Give a fresh directory below the cache for a version that `commit_folder` uploads to the address of `remote`.

    Raises:
        StoreError: the store does not answer.
    """
    address = remote.address
    begun = claim(address)
    folder = remote.cache_folder() / STAGING
    folder.mkdir(exist_ok=True)
    pattern = f"{hashlib.sha256(address.encode()).hexdigest()[:16]}-"
    _remove_dead(folder, pattern)
    root, lock = _make_locked(folder, pattern)
    try:
        write_claim(begun, root)
        staged = root / staging_name(address.rstrip("/").rpartition("/")[2])
        staged.mkdir()
        yield staged
    finally:
        shutil.rmtree(root, ignore_errors=True)
        os.close(lock)


def write_claim(begun: Claim, folder: Path) -> None:
    """Leave the claim in `folder`, where `claim_of` finds it for the directories inside."""
    (folder / _CLAIM).write_text(json.dumps(asdict(begun)), encoding="utf-8")


def claim_of(staged: Path) -> Claim | None:
    """Return the claim of a directory that `stage_remote` gave, None for any other."""
    try:
        text = (staged.parent / _CLAIM).read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Claim(**json.loads(text))


def commit_folder(
    begun: Claim, staged: Path, manifest: Manifest, *, replace_other: bool
) -> Manifest:
    """Upload the files of `manifest` from `staged` and make them the version; return the manifest that lies there.

    Raises:
        StoreError: as `commit_objects`.
    """
    data = f"data-{base_name(begun.etag)}-{secrets.token_hex(8)}"
    folder = S3Folder.of(begun.address)

    def upload() -> None:
        in_threads(
            lambda entry: folder.upload(staged / entry.path, f"{data}/{entry.path}"),
            manifest.files,
        )

    return commit_objects(begun, data, manifest, upload, replace_other=replace_other)


def commit_objects(
    begun: Claim,
    data: str,
    manifest: Manifest,
    upload: Callable[[], None],
    *,
    replace_other: bool,
) -> Manifest:
    """Make the objects in the folder `data`, once `upload` has put them there, the version of `manifest`.

    An equal version that is already there stays. Returns the manifest that lies there.

    Raises:
        StoreError: another version is there and `replace_other` is not asked for, another writer committed since the
            claim, something there is no version, an object is missing, or the store does not answer.
    """
    present = _check(begun, manifest, replace_other=replace_other)
    if present is not None and present.version == manifest.version:
        _remove(begun.address, data, unless=present)
        return present
    upload()
    folder = S3Folder.of(begun.address)
    _check_arrived(begun, data, manifest, replace_other=replace_other)
    previous = "" if present is None else present.data
    manifest = replace(manifest, data=data, previous_data=previous)
    folder.put_if(MANIFEST, manifest_text(manifest).encode(), begun.etag)
    # whether this put was the one that counted, only what lies there tells: an answer may have been lost
    current = read_current(begun.address)
    if current is None or current[0].version != manifest.version:
        _remove(begun.address, data)
        raise _lost(begun, None if current is None else current[0], manifest)
    if current[0].data != data:
        _remove(begun.address, data)
    clean(begun.address)
    return current[0]


def _check(begun: Claim, manifest: Manifest, *, replace_other: bool) -> Manifest | None:
    """Return the version that lies there, having made sure that `manifest` may take its place."""
    current = read_current(begun.address)
    if current is None:
        if begun.etag is not None:
            raise _lost(begun, None, manifest)
        _check_free(begun.address)
        return None
    present, etag = current
    if present.version == manifest.version:
        return present
    if etag != begun.etag:
        raise _lost(begun, present, manifest)
    if not replace_other:
        raise StoreError(
            f"{begun.address} holds version {present.version}, the new one is {manifest.version};"
            " remove it, choose another path, or ask for it to be replaced"
        )
    return present


def _check_free(address: str) -> None:
    """Make sure that nothing lies at `address` but what writers of versions leave."""
    folders, files = S3Folder.of(address).folders()
    strange = [name for name in folders if not name.startswith(_FOLDERS)]
    strange += [name for name in files if name != MANIFEST]  # another writer may have been faster
    if strange:
        raise StoreError(
            f"{address} holds {strange[0]!r} and is no dataset version (it has no {MANIFEST});"
            " move it away or choose another path"
        )


def _check_arrived(begun: Claim, data: str, manifest: Manifest, *, replace_other: bool) -> None:
    sizes = S3Folder.of(begun.address).sizes(f"{data}/")
    for entry in manifest.files:
        found = sizes.get(f"{data}/{entry.path}")
        if found != entry.num_bytes:
            # a writer that was overtaken finds its objects removed
            _check(begun, manifest, replace_other=replace_other)
            raise StoreError(
                f"{begun.address}/{data}/{entry.path} has {found} bytes, expected {entry.num_bytes};"
                " the version is not committed, run again"
            )


def _lost(begun: Claim, present: Manifest | None, manifest: Manifest) -> StoreError:
    found = "removed the version" if present is None else f"committed version {present.version}"
    return StoreError(
        f"{begun.address}: another writer {found} while {manifest.version} was written; nothing was changed."
        " Let one job write one name, then run again"
    )


def _remove(address: str, data: str, unless: Manifest | None = None) -> None:
    """Remove the folder of a commit that did not come to be, unless `unless` uses it."""
    if unless is not None and data in (unless.data, unless.previous_data):
        return
    folder = S3Folder.of(address)
    folder.remove(list(folder.sizes(f"{data}/")))


def _make_locked(folder: Path, pattern: str) -> tuple[Path, int]:
    """Return a new local directory and the lock on it, which the end of this process lets go."""
    while True:
        root = Path(tempfile.mkdtemp(prefix=pattern, dir=folder))
        # until it is locked, another writer may take it for a dead one and remove it
        try:
            lock = os.open(root, os.O_RDONLY)
        except FileNotFoundError:
            continue
        fcntl.flock(lock, fcntl.LOCK_EX)
        if root.exists():
            return root, lock
        os.close(lock)


def _remove_dead(folder: Path, pattern: str) -> None:
    """Remove the local directories of writers that are gone: those whose lock is free."""
    for root in folder.glob(f"{pattern}*"):
        try:
            lock = os.open(root, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            continue
        else:
            shutil.rmtree(root, ignore_errors=True)
        finally:
            os.close(lock)
