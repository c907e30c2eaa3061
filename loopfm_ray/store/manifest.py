"""What one dataset version is: a directory whose `manifest.json`, written last, says what is in it.

A version appears in one rename. Its files are staged in a hidden sibling directory, flushed to disk and named in the
manifest with their checksums, then the directory takes its final name. A run that is killed leaves a hidden directory
that no reader looks at and that the next `stage` of the same name removes. On S3, where nothing can be renamed, a
version appears with one conditional put of its manifest: see `remote`.
"""

import errno
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location, Remote, is_remote
from loopfm_ray.store.format import (
    FORMAT_VERSION,
    MANIFEST,
    FileEntry,
    Manifest,
    digest,
    file_location,
    find_manifest,
    manifest_text,
    read_manifest,
    verify,
    version_id,
)
from loopfm_ray.store.provenance import code_version
from loopfm_ray.store.remote import claim_of, commit_folder, remove_remote, stage_remote

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "code_version",
    "commit",
    "disk_errors",
    "draft",
    "file_location",
    "find_manifest",
    "finish",
    "install",
    "read_manifest",
    "recover",
    "remove_version",
    "stage",
    "sync",
    "verify",
    "write_manifest",
]

_KINDS = (
    "prepared",
    "fm",
    "snapshot",
    "latents",
    "joined",
    "vm",
    "bundle",
    "run",
    "online",
    "kge",
    "item_features",
)


@contextmanager
def stage(final_dir: Location) -> Iterator[Path]:
    """Give a fresh hidden directory beside `final_dir` to write a version into; end with `commit`.

    For an `s3://` address the directory lies in the cache of this machine and `commit` uploads it. On an error the
    directory is removed. Leftovers of killed runs of the same name are cleared first. Only one process may stage a local
    name at a time; on S3 several may, and the first to commit wins.

    Raises:
        StoreError: the disk is full, or the object store can not be reached.
    """
    if is_remote(final_dir):
        with stage_remote(Remote.of(final_dir), _staging_name) as staged:
            yield staged
        return
    final_dir = Path(str(final_dir))
    with disk_errors(final_dir.parent):
        final_dir.parent.mkdir(parents=True, exist_ok=True)
        recover(final_dir)
        staged = final_dir.parent / _staging_name(final_dir.name)
        staged.mkdir()
        try:
            yield staged
        finally:
            shutil.rmtree(staged, ignore_errors=True)


def commit(
    staged: Path,
    *,
    kind: str,
    config_hash: str,
    inputs: Mapping[str, str],
    meta: Mapping[str, Any],  # Any: JSON, different for each kind
    num_rows: int,
    replace_other: bool = False,
) -> Manifest:
    """Make what was written into `staged` (from `stage`) a version under its final name.

    Args:
        staged: the directory that `stage` gave.
        kind: what the version is, such as "latents".
        config_hash: of the settings that shaped it.
        inputs: version of each input, by name.
        meta: JSON that readers of this kind need.
        num_rows: rows of the main table.
        replace_other: whether another version under the final name gives way; an equal one always stays.

    Raises:
        StoreError: the final name holds another version, or something that is no version; on S3 also when another
            writer committed since `stage`, or the store does not answer.
    """
    final_name, _, suffix = staged.name[1:].rpartition(".tmp-")
    seconds = (time.time_ns() - int(suffix.partition("-")[0], 16)) / 1e9
    manifest = draft(
        kind=kind,
        config_hash=config_hash,
        inputs=inputs,
        meta=meta,
        num_rows=num_rows,
        seconds=seconds,
    )
    return finish(staged, staged.parent / final_name, manifest, replace_other=replace_other)


def finish(
    staged: Path,
    final_dir: Path,
    manifest: Manifest,
    *,
    replace_other: bool = False,
    keep_equal: bool = True,
) -> Manifest:
    """Write a drafted manifest into `staged` and make the directory the version, as `commit` does.

    Args:
        staged: the directory with all files; one with a claim is uploaded to where that says.
        final_dir: the final name on a local disk.
        manifest: from `draft`.
        replace_other: whether another version under the final name gives way.
        keep_equal: whether an equal one on a local disk stays; see `install`.

    Raises:
        StoreError: as `commit`, or the disk is full.
    """
    with disk_errors(staged):
        manifest = write_manifest(staged, manifest)
        claim = claim_of(staged)
        if claim is not None:
            return commit_folder(claim, staged, manifest, replace_other=replace_other)
        return install(staged, final_dir, replace_other=replace_other, keep_equal=keep_equal)


def draft(
    *,
    kind: str,
    config_hash: str,
    inputs: Mapping[str, str],
    meta: Mapping[str, Any],  # Any: JSON, different for each kind
    num_rows: int,
    seconds: float = 0.0,
    record: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return a manifest that still lacks its files and version; `write_manifest` fills them in.

    Raises:
        StoreError: the kind is unknown.
    """
    if kind not in _KINDS:
        raise StoreError(f"kind of a version must be one of {_KINDS}, found {kind!r}")
    return Manifest(
        format_version=FORMAT_VERSION,
        kind=kind,
        version="",
        config_hash=config_hash,
        inputs=dict(inputs),
        meta=dict(meta),
        files=(),
        num_rows=num_rows,
        code_version=code_version(),
        created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(max(seconds, 0.0), 3),
        record=dict(record or {}),
    )


def write_manifest(staged: Path, manifest: Manifest) -> Manifest:
    """Fill in files and version of `manifest` from the files in `staged`, flush all to disk and write it there.

    Hidden files, which killed writers leave, are removed.
    """
    for leftover in staged.rglob(".*.tmp-*"):
        leftover.unlink()
    entries = []
    for path in sorted(item for item in staged.rglob("*") if item.is_file()):
        name = path.relative_to(staged).as_posix()
        if name != MANIFEST:
            entries.append(_file_entry(path, name))
    # through JSON, so that the manifest in hand equals the one that is read back
    tree = json.loads(json.dumps(asdict(replace(manifest, files=()))))
    tree.pop("files")
    manifest = Manifest(files=tuple(sorted(entries, key=lambda entry: entry.path)), **tree)
    manifest = replace(manifest, version=version_id(manifest))
    (staged / MANIFEST).write_text(manifest_text(manifest), encoding="utf-8")
    for folder in [staged, *(item for item in staged.rglob("*") if item.is_dir())]:
        for path in folder.iterdir():
            if path.is_file():
                sync(path)
        sync(folder)
    return manifest


def install(
    staged: Path, final_dir: Path, *, replace_other: bool, keep_equal: bool = True
) -> Manifest:
    """Rename a directory with a manifest to its final name and return the manifest that lies there.

    An equal version that is already there stays and `staged` is dropped, unless `keep_equal` is False: then it gives way
    like another, in case its files are damaged. Another version gives way when `replace_other`: it is renamed away, the
    new one in; a kill between the two is undone by `recover`.

    Raises:
        StoreError: the final name holds another version, or something that is no version.
    """
    manifest = read_manifest(staged)
    if final_dir.exists():
        if not (final_dir / MANIFEST).is_file():
            raise StoreError(
                f"{final_dir} exists and is no dataset version (it has no {MANIFEST});"
                " move it away or choose another path"
            )
        present = read_manifest(final_dir)
        is_equal = present.version == manifest.version
        if is_equal and keep_equal:
            shutil.rmtree(staged)
            return present
        if not is_equal and not replace_other:
            raise StoreError(
                f"{final_dir} holds version {present.version}, the new one is {manifest.version};"
                " remove it, choose another path, or ask for it to be replaced"
            )
        old = final_dir.parent / f".{final_dir.name}.old-{secrets.token_hex(4)}"
        final_dir.rename(old)
        try:
            staged.rename(final_dir)
        except OSError:
            old.rename(final_dir)
            raise
        sync(final_dir.parent)
        shutil.rmtree(old)
    else:
        staged.rename(final_dir)
        sync(final_dir.parent)
    return manifest


def recover(final_dir: Path) -> None:
    """Clear what killed runs left beside `final_dir`, putting back an old version that had no successor yet."""
    for old in sorted(final_dir.parent.glob(f".{final_dir.name}.old-*")):
        if final_dir.exists():
            shutil.rmtree(old)
        else:
            old.rename(final_dir)
    for leftover in final_dir.parent.glob(f".{final_dir.name}.tmp-*"):
        shutil.rmtree(leftover)


def remove_version(location: Location) -> None:
    """Remove the version at `location`, if there is one; readers see it whole or no more.

    Raises:
        StoreError: the object store does not answer, or the credentials may not delete.
    """
    if is_remote(location):
        remove_remote(str(location))
        return
    final_dir = Path(str(location))
    if final_dir.exists():
        doomed = final_dir.parent / _staging_name(final_dir.name)
        final_dir.rename(doomed)
        shutil.rmtree(doomed)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn "no space left" inside the block into a StoreError that names `path` and the free space.

    Raises:
        StoreError: the disk is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        place = path if path.exists() else path.parent
        free = shutil.disk_usage(place).free if place.exists() else 0
        raise StoreError(
            f"writing under {path} failed: no space left, {free / 2**20:.0f} MiB free;"
            " free some space or choose another path, then run again"
        ) from error


def sync(path: Path) -> None:
    """Flush one file or directory to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _staging_name(name: str) -> str:
    """Return a new hidden name that tells when the work began, for `seconds` and for people."""
    return f".{name}.tmp-{time.time_ns():x}-{secrets.token_hex(4)}"


def _file_entry(path: Path, name: str) -> FileEntry:
    with path.open("rb") as stream:
        num_bytes, sha256 = digest(stream)
    return FileEntry(name, num_bytes, _count_rows(path), sha256)


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    return 0
