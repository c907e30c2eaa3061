"""Local paths and `s3://` addresses behind one pair: a pyarrow file system and a path in it.

End point, region and credentials of S3 come from where every client looks: see `s3`.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from loopfm_ray.errors import StoreError
from loopfm_ray.store.s3 import S3Folder

__all__ = [
    "CACHE_BYTES",
    "CACHE_DIR",
    "Location",
    "Remote",
    "absolute",
    "filesystem",
    "is_remote",
    "join",
    "locate",
    "read_bytes",
    "remove_tree",
]

CACHE_DIR = "~/.cache/loopfm"
CACHE_BYTES = 20 * 2**30


@dataclass(frozen=True)
class Remote:
    """An address in an object store, and where each machine keeps what it reads from there.

    Attributes:
        address: such as `s3://bucket/key`.
        cache_dir: folder on every machine that reads; `~` is the home of its user.
        cache_bytes: what the folder may hold.
    """

    address: str
    cache_dir: str = CACHE_DIR
    cache_bytes: int = CACHE_BYTES

    def __str__(self) -> str:
        return self.address

    @classmethod
    def of(cls, location: "Location") -> "Remote":
        """Return an `s3://` address with its cache, the default one if `location` says nothing else."""
        return location if isinstance(location, Remote) else cls(str(location))

    def cache_folder(self) -> Path:
        """Return the folder of the cache on this machine; made if it is not there.

        Raises:
            StoreError: it can not be made.
        """
        folder = Path(self.cache_dir).expanduser().absolute()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StoreError(
                f"what is read from and written to {self.address} needs the folder {folder}, which can not be made:"
                f" {error.strerror}; set cache_dir to a folder you can write to"
            ) from error
        return folder


Location = str | Path | Remote
"""A local path, or an address such as `s3://bucket/key`, alone or with its cache."""


def locate(text: str, cache_dir: str = CACHE_DIR, cache_bytes: int = CACHE_BYTES) -> Location:
    """Return what a config names: an `s3://` address with its cache, or a local path."""
    return Remote(text, cache_dir, cache_bytes) if is_remote(text) else Path(text)


def is_remote(location: Location) -> bool:
    """Return whether `location` is an address in an object store."""
    return isinstance(location, Remote) or str(location).startswith("s3://")


def absolute(location: Location) -> Location:
    """Return the location with a local path made absolute."""
    return location if is_remote(location) else Path(str(location)).absolute()


# Any: pyarrow ships no types.
def filesystem(location: Location) -> tuple[Any, str]:
    """Return the pyarrow file system of `location` and the path inside it.

    Raises:
        StoreError: the address names no file system that pyarrow can open.
    """
    text = str(location)
    if "://" not in text:
        return pafs.LocalFileSystem(), str(Path(text).absolute())
    try:
        system, path = pafs.FileSystem.from_uri(text)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise StoreError(
            f"{text} can not be opened: {error}; give a local path or s3://bucket/key with AWS_ENDPOINT_URL set"
        ) from error
    return system, path


def join(location: Location, *parts: str) -> Location:
    """Return the location of a file inside `location`, of the same kind."""
    if isinstance(location, Path):
        return location.joinpath(*parts)
    address = "/".join([str(location).rstrip("/"), *parts])
    if isinstance(location, Remote):
        return Remote(address, location.cache_dir, location.cache_bytes)
    return address


def remove_tree(location: Location) -> None:
    """Remove all that lies below `location`, which is no version; nothing there is no error."""
    if is_remote(location):
        folder = S3Folder.of(str(location))
        folder.remove(list(folder.sizes()))
    else:
        shutil.rmtree(Path(str(location)), ignore_errors=True)


def read_bytes(location: Location) -> bytes:
    """Return the content of one file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it can not be read.
        StoreError: the object store does not answer.
    """
    if not is_remote(location):
        system, path = filesystem(location)
        with system.open_input_stream(path) as stream:
            data: bytes = stream.read()
        return data
    folder, _, name = str(location).rpartition("/")
    found = S3Folder.of(folder).read(name)
    if found is None:
        raise FileNotFoundError(str(location))
    return found[0]
