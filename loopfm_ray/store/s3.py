"""One folder of an S3 store: objects put, read, listed and removed, with every failure a StoreError.

End point, region and credentials come from where every AWS client looks: the environment (`AWS_ENDPOINT_URL`,
`AWS_REGION`, `AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`), the profile, the instance. What the store answers with
"try again" (throttling, 5xx, a broken connection) is tried `ATTEMPTS` times in all, with growing waits. The client does
that for requests; a body that breaks off while it is read is asked for again here.
"""

import hashlib
import io
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from loopfm_ray.errors import StoreError

__all__ = ["ATTEMPTS", "S3Folder", "check_access", "connect", "in_threads"]

T = TypeVar("T")

ATTEMPTS = 5
NUM_THREADS = 8
_TIMEOUT_S = 60
_CONNECT_TIMEOUT_S = 5
_BLOCK_BYTES = 1 << 20
_MISSING = ("404", "NoSuchKey", "NotFound")
_LOST = ("412", "PreconditionFailed", "409", "ConditionalRequestConflict")
_REFUSED = (
    "403",
    "AccessDenied",
    "ExpiredToken",
    "InvalidAccessKeyId",
    "InvalidToken",
    "SignatureDoesNotMatch",
)


@cache
def connect() -> Any:  # Any: boto3 ships no types
    """Return this process's client; it may be shared by threads."""
    return _client(ATTEMPTS, _TIMEOUT_S)


def _client(attempts: int, timeout_s: float) -> Any:
    import boto3
    from botocore.config import Config

    # a session of its own: the default one keeps the credentials that it met first
    return boto3.session.Session().client(
        "s3",
        config=Config(
            retries={"mode": "standard", "total_max_attempts": attempts},
            connect_timeout=min(timeout_s, _CONNECT_TIMEOUT_S),
            read_timeout=timeout_s,
            max_pool_connections=2 * NUM_THREADS,
        ),
    )


def check_access(address: str) -> None:
    """Make sure that what lies at `address` can be listed, with few attempts, so that a mistake shows within seconds.

    Raises:
        StoreError: the store does not answer, refuses the credentials, or has no such bucket.
    """
    bucket, _, prefix = address.removeprefix("s3://").partition("/")
    with _errors(address):
        client = _client(2, 10)
        try:
            client.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        finally:
            client.close()


def in_threads(function: Callable[[T], object], tasks: Iterable[T]) -> None:
    """Apply `function` to each of `tasks`, some at a time; the first failure is raised once all that began have ended."""
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        running = [pool.submit(function, task) for task in tasks]
        try:
            for future in running:
                future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


@dataclass(frozen=True)
class S3Folder:
    """The objects whose keys begin with `prefix/`."""

    bucket: str
    prefix: str

    @classmethod
    def of(cls, address: str) -> "S3Folder":
        """Return the folder at `s3://bucket/prefix`.

        Raises:
            StoreError: the address lacks the bucket or the prefix.
        """
        bucket, _, prefix = address.removeprefix("s3://").partition("/")
        prefix = prefix.strip("/")
        if not address.startswith("s3://") or not bucket or not prefix:
            raise StoreError(f"{address!r} is no folder in an object store; give s3://bucket/name")
        return cls(bucket, prefix)

    @property
    def address(self) -> str:
        """The folder's address."""
        return f"s3://{self.bucket}/{self.prefix}"

    def read(self, name: str) -> tuple[bytes, str] | None:
        """Return content and ETag of one object, None if there is none."""
        sink = io.BytesIO()
        found = self._read_into(name, sink)
        return None if found is None else (sink.getvalue(), found[2])

    def digest(self, name: str, sink: BinaryIO | None = None) -> tuple[int, str] | None:
        """Return bytes and SHA-256 of one object, None if there is none; its content goes to `sink`, which can seek."""
        found = self._read_into(name, sink)
        return None if found is None else found[:2]

    def put(self, name: str, data: bytes) -> None:
        """Write one object, in place of another."""
        with _errors(self._where(name)):
            connect().put_object(Bucket=self.bucket, Key=self._key(name), Body=data)

    def put_if(self, name: str, data: bytes, etag: str | None) -> bool:
        """Write one object if the one there has this `etag` (None: if there is none); return whether it was written.

        False says that the condition did not hold at some attempt: an earlier one, whose answer was lost, may have
        written the object. Read it to know.
        """
        condition = {"IfNoneMatch": "*"} if etag is None else {"IfMatch": etag}
        with _errors(self._where(name)):
            try:
                connect().put_object(
                    Bucket=self.bucket, Key=self._key(name), Body=data, **condition
                )
            except _client_error() as error:
                # an If-Match on an object that was removed since is answered with "not found"
                if _code(error) in (*_LOST, *_MISSING[:2]):
                    return False
                raise
        return True

    def upload(self, path: Path, name: str) -> None:
        """Copy a local file into the folder."""
        with _errors(self._where(name)):
            connect().upload_file(str(path), self.bucket, self._key(name))

    def copy(self, source: str, name: str) -> None:
        """Copy an object of this bucket, whose whole key is `source`, into the folder, within the store."""
        with _errors(self._where(name)):
            connect().copy({"Bucket": self.bucket, "Key": source}, self.bucket, self._key(name))

    def sizes(self, under: str = "") -> dict[str, int]:
        """Return name and bytes of all objects whose name begins with `under`."""
        found: dict[str, int] = {}
        with _errors(self.address):
            pages = connect().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(under)):
                for entry in page.get("Contents", ()):
                    found[entry["Key"][len(self.prefix) + 1 :]] = int(entry["Size"])
        return found

    def folders(self) -> tuple[list[str], list[str]]:
        """Return the names of the folders and of the objects directly inside."""
        folders: list[str] = []
        files: list[str] = []
        start = len(self.prefix) + 1
        with _errors(self.address):
            pages = connect().get_paginator("list_objects_v2")
            for page in pages.paginate(Bucket=self.bucket, Prefix=self._key(""), Delimiter="/"):
                folders += [
                    entry["Prefix"][start:].rstrip("/") for entry in page.get("CommonPrefixes", ())
                ]
                files += [entry["Key"][start:] for entry in page.get("Contents", ())]
        return folders, files

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects; those that are not there are no error."""
        for begin in range(0, len(names), 1000):
            doomed = [{"Key": self._key(name)} for name in names[begin : begin + 1000]]
            with _errors(self.address):
                answer = connect().delete_objects(
                    Bucket=self.bucket, Delete={"Objects": doomed, "Quiet": True}
                )
            if answer.get("Errors"):
                first = answer["Errors"][0]
                raise StoreError(
                    f"{first.get('Key')} of {self.address} can not be removed: {first.get('Code')};"
                    " check that the credentials may delete"
                )

    def _read_into(self, name: str, sink: BinaryIO | None) -> tuple[int, str, str] | None:
        """Read one object; return its bytes, SHA-256 and ETag, None if there is none."""
        with _errors(self._where(name)):
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    answer = connect().get_object(Bucket=self.bucket, Key=self._key(name))
                    return *_consume(answer["Body"], sink), str(answer["ETag"])
                except _client_error() as error:
                    if _code(error) in _MISSING:
                        return None
                    raise
                except _broken_body():
                    if attempt == ATTEMPTS:
                        raise
                    _wait(attempt)
        return None

    def _key(self, name: str) -> str:
        return f"{self.prefix}/{name}"

    def _where(self, name: str) -> str:
        return f"{self.address}/{name}"


def _consume(body: Any, sink: BinaryIO | None) -> tuple[int, str]:  # Any: botocore ships no types
    """Read a body to its end, into `sink` from its start; return bytes and SHA-256."""
    sha256, num_bytes = hashlib.sha256(), 0
    if sink is not None:
        sink.seek(0)
        sink.truncate()
    for block in body.iter_chunks(_BLOCK_BYTES):
        sha256.update(block)
        num_bytes += len(block)
        if sink is not None:
            sink.write(block)
    return num_bytes, sha256.hexdigest()


def _wait(attempt: int) -> None:
    time.sleep(random.random() * 2 ** (attempt - 1))


def _broken_body() -> tuple[Any, ...]:  # Any: botocore ships no types
    from botocore.exceptions import IncompleteReadError, ResponseStreamingError
    from urllib3.exceptions import ProtocolError

    # the client lets the last through where the body of an error breaks off
    return IncompleteReadError, ResponseStreamingError, ProtocolError


def _client_error() -> Any:  # Any: botocore ships no types
    from botocore.exceptions import ClientError

    return ClientError


def _code(error: Any) -> str:  # Any: botocore ships no types
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def _errors(where: str) -> Iterator[None]:
    """Turn what the client raises inside the block into a StoreError that names `where`."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError
    from urllib3.exceptions import HTTPError

    try:
        yield
    except (BotoCoreError, Boto3Error, ClientError, HTTPError) as error:
        raise StoreError(f"{where}: {_explain(error)}") from error


def _explain(error: Exception) -> str:
    """Return what failed and what to do about it."""
    from botocore import exceptions as known

    code = _code(error) if isinstance(error, known.ClientError) else ""
    if code == "NoSuchBucket":
        return f"there is no such bucket ({error}); make it, or correct the address"
    without = (
        known.NoCredentialsError,
        known.PartialCredentialsError,
        known.CredentialRetrievalError,
        known.ProfileNotFound,
    )
    if code in _REFUSED or isinstance(error, without):
        return (
            f"the object store refuses the credentials: {error}; check the environment"
            " (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY), the profile or the role, and its rights to this address"
        )
    if isinstance(error, known.EndpointConnectionError | known.ConnectTimeoutError):
        return f"the object store does not answer: {error}; check AWS_ENDPOINT_URL and the network, then run again"
    return (
        f"the object store failed: {error}; what can be tried again was tried {ATTEMPTS} times."
        " Run again: what is done is kept"
    )
