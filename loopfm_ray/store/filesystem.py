"""Local paths and `s3://` addresses behind one pair: a pyarrow file system and a path in it.

The S3 end point, region and credentials come from the `AWS_*` variables that every S3 client reads
(`AWS_ENDPOINT_URL`, `AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`).
"""

from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs as pafs

from loopfm_ray.errors import StoreError

__all__ = ["Location", "filesystem", "is_remote", "join", "read_bytes"]

Location = str | Path
"""A local path, or an address such as `s3://bucket/key`."""


def is_remote(location: Location) -> bool:
    """Return whether `location` is an address in an object store."""
    return isinstance(location, str) and location.startswith("s3://")


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
    return "/".join([location.rstrip("/"), *parts])


def read_bytes(location: Location) -> bytes:
    """Return the content of one file.

    Raises:
        FileNotFoundError: there is none.
        OSError: it can not be read.
    """
    system, path = filesystem(location)
    with system.open_input_stream(path) as stream:
        data: bytes = stream.read()
    return data
