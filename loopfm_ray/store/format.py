"""The manifest of a dataset version: what it says, how it is read and checked.

Files lie beside the manifest, or in the folder that `data` names: on object stores, where nothing can be renamed, every
commit has a folder of its own.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from loopfm_ray.errors import StoreError
from loopfm_ray.store.filesystem import Location, is_remote, join, read_bytes
from loopfm_ray.store.s3 import S3Folder

__all__ = [
    "FORMAT_VERSION",
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "digest",
    "file_location",
    "find_manifest",
    "manifest_text",
    "parse_manifest",
    "read_manifest",
    "verify",
    "version_id",
]

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_BLOCK_BYTES = 1 << 20
_OPTIONAL = ("record", "data", "previous_data")
"""Fields that are not written when they are empty, and no part of the version's name."""


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

    `version` depends on everything but `created_at`, `seconds`, `record`, `data` and `previous_data`, so the same inputs
    give the same version, however and wherever it is made.

    Attributes:
        record: what the making of it found, such as how much was taken over from the version before.
        data: the folder that holds the files; empty when they lie beside the manifest.
        previous_data: the folder of the version that this one replaced, kept for readers that have yet to switch.
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
    record: dict[str, Any] = field(default_factory=dict)  # Any: JSON, different for each kind
    data: str = ""
    previous_data: str = ""

    @property
    def content(self) -> str:
        """What names the rows, however they are laid out in files; `version` where that makes no difference.

        Two latents versions of one content give the same to every reader, so what was made from one holds for the other.
        """
        return str(self.meta.get("content", self.version))

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(entry.num_bytes for entry in self.files)


def read_manifest(location: Location) -> Manifest:
    """Read the manifest of the version at a local directory or `s3://` address.

    Raises:
        StoreError: there is none, it is damaged, or its format is not known.
    """
    manifest = find_manifest(location)
    if manifest is None:
        raise StoreError(
            f"{location} is no dataset version: it has no {MANIFEST}; run the step that writes it, or correct the path"
        )
    return manifest


def find_manifest(location: Location) -> Manifest | None:
    """Return the manifest of the version at a local directory or `s3://` address, None if there is none.

    Raises:
        StoreError: it can not be read, it is damaged, or its format is not known.
    """
    try:
        return parse_manifest(read_bytes(join(location, MANIFEST)), location)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise StoreError(
            f"{join(location, MANIFEST)} can not be read: {error}; check access to it"
        ) from error


def parse_manifest(data: bytes, location: Location) -> Manifest:
    """Return the manifest of the version at `location` from its text.

    Raises:
        StoreError: it is damaged, or its format is not known.
    """
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


def manifest_text(manifest: Manifest) -> str:
    """Return the text that `parse_manifest` reads back."""
    tree = asdict(manifest)
    for name in _OPTIONAL:
        if not tree[name]:
            del tree[name]
    return json.dumps(tree, indent=1, sort_keys=True) + "\n"


def file_location(location: Location, manifest: Manifest, path: str) -> Location:
    """Return where a file of the version at `location` lies."""
    folder = [manifest.data] if manifest.data else []
    return join(location, *folder, *path.split("/"))


def verify(location: Location) -> None:
    """Check every file of the version at `location` against the manifest.

    Raises:
        StoreError: a file is missing, or its size or checksum differs.
    """
    manifest = read_manifest(location)
    for entry in manifest.files:
        where = file_location(location, manifest, entry.path)
        try:
            num_bytes, sha256 = _digest_file(where)
        except OSError as error:
            raise StoreError(
                f"{where} of version {manifest.version} can not be read: {error}; write the version again"
            ) from error
        if (num_bytes, sha256) != (entry.num_bytes, entry.sha256):
            raise StoreError(
                f"{where} is damaged: found {num_bytes} bytes with sha256 {sha256[:16]}, expected {entry.num_bytes}"
                f" with {entry.sha256[:16]}; remove {location} and write it again"
            )


def digest(stream: BinaryIO) -> tuple[int, str]:
    """Return size and sha256 of what is left in an open binary file."""
    sha256 = hashlib.sha256()
    num_bytes = 0
    while block := stream.read(_BLOCK_BYTES):
        sha256.update(block)
        num_bytes += len(block)
    return num_bytes, sha256.hexdigest()


def _digest_file(location: Location) -> tuple[int, str]:
    if not is_remote(location):
        with Path(str(location)).open("rb") as stream:
            return digest(stream)
    folder, _, name = str(location).rpartition("/")
    found = S3Folder.of(folder).digest(name)
    if found is None:
        raise FileNotFoundError("there is no such object")
    return found


def version_id(manifest: Manifest) -> str:
    """Return the 16 hex digits that name what `manifest` describes, however and wherever it was made."""
    tree = asdict(manifest)
    for name in ("version", "created_at", "seconds", *_OPTIONAL):
        del tree[name]
    text = json.dumps(tree, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _check_id(manifest: Manifest, location: Location) -> None:
    expected = version_id(manifest)
    if manifest.version != expected:
        raise StoreError(
            f"{join(location, MANIFEST)} was changed: it says version {manifest.version}, its content is {expected};"
            " write the version again"
        )
