"""What one dataset version is: a directory whose `manifest.json`, written last, says what is in it.

A version appears in one rename. Its files are staged in a hidden sibling directory, flushed to disk and named in the
manifest with their checksums, then the directory takes its final name. A run that is killed leaves a hidden directory
that no reader looks at and that the next `stage` of the same name removes. Versions are read from local disk and S3;
they are written locally.
"""

import errno
import hashlib
import json
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location, filesystem, join, read_bytes
from loopfm_ray.store.provenance import code_version

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "code_version",
    "commit",
    "disk_errors",
    "draft",
    "install",
    "read_manifest",
    "recover",
    "stage",
    "sync",
    "verify",
    "write_manifest",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_KINDS = ("prepared", "snapshot", "latents", "joined", "vm", "bundle", "run", "online")
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class FileEntry:
    """One file of a version; `num_rows` is 0 for files that are not tables."""

    path: str
    num_bytes: int
    num_rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a version holds and what it was made from.

    `version` depends on everything but `created_at` and `seconds`, so the same inputs give the same version.
    """

    format_version: int
    kind: str
    version: str
    config_hash: str
    inputs: dict[str, str]
    meta: dict[str, Any]  # Any: JSON, different for each kind
    files: tuple[FileEntry, ...]
    num_rows: int
    code_version: str
    created_at: str
    seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.num_bytes for entry in self.files)


def read_manifest(location: Location) -> Manifest:
    """Read the manifest of the version at a local directory or `s3://` address.

    Raises:
        StoreError: there is none, it is damaged, or its format is not known.
    """
    try:
        data = read_bytes(join(location, MANIFEST))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(
            f"{location} is no dataset version: it has no {MANIFEST}; run the step that writes it, or correct the path"
        ) from error
    except OSError as error:
        raise StoreError(
            f"{join(location, MANIFEST)} can not be read: {error}; check access to it"
        ) from error
    try:
        tree = json.loads(data)
        found = tree["format_version"]
        if found == FORMAT_VERSION:
            files = tuple(FileEntry(**entry) for entry in tree.pop("files"))
            manifest = Manifest(files=files, **tree)
            _check_id(manifest, location)
            return manifest
    except (ValueError, KeyError, TypeError) as error:
        raise StoreError(
            f"{join(location, MANIFEST)} is damaged ({error}); remove the directory and write it again"
        ) from error
    raise StoreError(
        f"{location} has format_version {found}, this code reads {FORMAT_VERSION}; write it again with this code"
    )


def verify(location: Location) -> None:
    """Check every file of the version at `location` against the manifest.

    Raises:
        StoreError: a file is missing, or its size or checksum differs.
    """
    manifest = read_manifest(location)
    for entry in manifest.files:
        where = join(location, *entry.path.split("/"))
        system, path = filesystem(where)
        try:
            with system.open_input_stream(path) as stream:
                num_bytes, digest = _digest(stream)
        except OSError as error:
            raise StoreError(
                f"{where} of version {manifest.version} can not be read: {error}; write the version again"
            ) from error
        if (num_bytes, digest) != (entry.num_bytes, entry.sha256):
            raise StoreError(
                f"{where} is damaged: found {num_bytes} bytes with sha256 {digest[:16]}, expected {entry.num_bytes}"
                f" with {entry.sha256[:16]}; remove {location} and write it again"
            )


@contextmanager
def stage(final_dir: Path) -> Iterator[Path]:
    """Give a fresh hidden directory beside `final_dir` to write a version into; end with `commit`.

    On an error the directory is removed. Leftovers of killed runs of the same name are cleared first. Only one process
    may stage a name at a time.

    Raises:
        StoreError: the disk is full.
    """
    final_dir = Path(final_dir)
    with disk_errors(final_dir.parent):
        final_dir.parent.mkdir(parents=True, exist_ok=True)
        recover(final_dir)
        # the name tells when the work began, for `seconds` and for people
        staged = (
            final_dir.parent / f".{final_dir.name}.tmp-{time.time_ns():x}-{secrets.token_hex(4)}"
        )
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
        StoreError: the final name holds another version, or something that is no version.
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
    with disk_errors(staged):
        manifest = write_manifest(staged, manifest)
        return install(staged, staged.parent / final_name, replace_other=replace_other)


def draft(
    *,
    kind: str,
    config_hash: str,
    inputs: Mapping[str, str],
    meta: Mapping[str, Any],  # Any: JSON, different for each kind
    num_rows: int,
    seconds: float = 0.0,
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
    manifest = replace(manifest, version=_version_id(manifest))
    text = json.dumps(asdict(manifest), indent=1, sort_keys=True) + "\n"
    (staged / MANIFEST).write_text(text, encoding="utf-8")
    for folder in [staged, *(item for item in staged.rglob("*") if item.is_dir())]:
        for path in folder.iterdir():
            if path.is_file():
                sync(path)
        sync(folder)
    return manifest


def install(staged: Path, final_dir: Path, *, replace_other: bool) -> Manifest:
    """Rename a directory with a manifest to its final name and return the manifest that lies there.

    An equal version that is already there stays and `staged` is dropped. Another version gives way when
    `replace_other`: it is renamed away, the new one in; a kill between the two is undone by `recover`.

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
        if present.version == manifest.version:
            shutil.rmtree(staged)
            return present
        if not replace_other:
            raise StoreError(
                f"{final_dir} holds version {present.version}, the new one is {manifest.version};"
                " remove it, choose another path, or ask for it to be replaced"
            )
        old = final_dir.parent / f".{final_dir.name}.old-{secrets.token_hex(4)}"
        final_dir.rename(old)
        staged.rename(final_dir)
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


def _file_entry(path: Path, name: str) -> FileEntry:
    with path.open("rb") as stream:
        num_bytes, digest = _digest(stream)
    return FileEntry(name, num_bytes, _count_rows(path), digest)


def _count_rows(path: Path) -> int:
    if path.suffix == ".parquet":
        return int(pq.read_metadata(path).num_rows)
    if path.suffix == ".arrow":
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            return sum(reader.get_batch(i).num_rows for i in range(reader.num_record_batches))
    return 0


def _digest(stream: Any) -> tuple[int, str]:  # Any: a Python or a pyarrow file
    """Return size and sha256 of what is left in an open binary file."""
    digest = hashlib.sha256()
    num_bytes = 0
    while block := stream.read(_BLOCK_BYTES):
        digest.update(block)
        num_bytes += len(block)
    return num_bytes, digest.hexdigest()


def _version_id(manifest: Manifest) -> str:
    tree = asdict(manifest)
    for name in ("version", "created_at", "seconds"):
        del tree[name]
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_id(manifest: Manifest, location: Location) -> None:
    expected = _version_id(manifest)
    if manifest.version != expected:
        raise StoreError(
            f"{join(location, MANIFEST)} was changed: it says version {manifest.version}, its content is {expected};"
            " write the version again"
        )
