"""Two logs of a replica, both off unless asked for.

The request log tells of each request how it went, and nothing of what was in it: the user is a keyed hash. The parity log
keeps a share of the requests whole, so that `loopfm parity --requests` can score them again; it names users, and only its
owner may read it.
"""

import hashlib
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, PositiveInt

from loopfm_ray.config import Config
from loopfm_ray.errors import StoreError
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.keys import is_private
from loopfm_ray.serving.lines import LineWriter

if TYPE_CHECKING:
    from loopfm_ray.serving.predictor import Scored

__all__ = [
    "PARITY_FORMAT",
    "ParityLog",
    "ParityLogConfig",
    "RequestLog",
    "RequestLogConfig",
    "is_sampled",
]

PARITY_FORMAT = 1
_MIN_SALT_BYTES = 16

Share = Annotated[float, Field(gt=0, le=1)]


class RequestLogConfig(Config):
    """One JSON line for each request."""

    path: str
    """Folder; each replica appends to a file of its own in it."""
    sample: Share = 1.0
    """Share of the requests, by a hash of the request id."""
    salt_file: str | None = None
    """File of at least 16 secret bytes that only its owner may read: the key of the users' hashes, so that one user has one
    hash in all files. null draws a key for each process."""
    max_bytes: PositiveInt = 64 * 2**20
    """Of a file, before the next begins."""
    keep: PositiveInt = 5
    """Files of a replica."""


class ParityLogConfig(Config):
    """Requests that are kept whole, with users in clear."""

    path: str
    """Folder; each replica appends to a file of its own in it."""
    sample: Share = 0.001
    """Share of the requests, by a hash of the request id: the same request is kept wherever it is asked."""
    max_bytes: PositiveInt = 64 * 2**20
    """Of a file, before the next begins."""
    keep: PositiveInt = 5
    """Files of a replica."""


def is_sampled(request_id: str, share: float) -> bool:
    """Return whether a request is among the sampled `share`; a larger share keeps those of a smaller one."""
    digest = hashlib.blake2b(request_id.encode(), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


class RequestLog:
    """Tells of each request how it went. Threads may share it."""

    def __init__(self, config: RequestLogConfig) -> None:
        """Open it.

        Raises:
            StoreError: the folder can not be written to, or the salt is missing, short, or open to others.
        """
        self._share = config.sample
        self._salt = secrets.token_bytes(32) if config.salt_file is None else _salt(config)
        self.lines = LineWriter(
            Path(config.path), "requests", max_bytes=config.max_bytes, keep=config.keep
        )

    def hash_user(self, user: str) -> str:
        """Return 16 hexadecimal digits that stand for a user."""
        return hashlib.blake2b(user.encode(), key=self._salt, digest_size=8).hexdigest()

    def wants(self, request_id: str) -> bool:
        """Return whether this request is told of."""
        return self._share >= 1 or is_sampled(request_id, self._share)

    def put(self, record: Mapping[str, Any]) -> None:  # Any: JSON
        """Take what is told of one request; never waits."""
        self.lines.put(record)


def _salt(config: RequestLogConfig) -> bytes:
    path = Path(config.salt_file or "")
    try:
        salt = path.read_bytes()
    except OSError as error:
        raise StoreError(
            f"{path} can not be read: {error.strerror}; write {_MIN_SALT_BYTES} random bytes or more there, or leave salt_file out"
        ) from error
    if not is_private(path):
        raise StoreError(f"{path} can be read or written by others; run `chmod 600 {path}`")
    if len(salt) < _MIN_SALT_BYTES:
        raise StoreError(
            f"{path} holds {len(salt)} bytes, at least {_MIN_SALT_BYTES} are needed; write random ones there"
        )
    return hashlib.blake2b(salt).digest()  # a key may be 64 bytes long


class ParityLog:
    """Keeps a share of the requests whole. Threads may share it."""

    def __init__(self, config: ParityLogConfig) -> None:
        """Open it.

        Raises:
            StoreError: the folder can not be written to.
        """
        self._share = config.sample
        self.lines = LineWriter(
            Path(config.path), "parity", max_bytes=config.max_bytes, keep=config.keep
        )

    def wants(self, request_id: str) -> bool:
        """Return whether this request is kept."""
        return is_sampled(request_id, self._share)

    def put(
        self,
        request_id: str,
        index: int,
        model: Mapping[str, str],
        asked: ScoreQuery,
        found: "Scored",
    ) -> None:
        """Take one query and its answer; never waits.

        Args:
            request_id: of the request.
            index: of the query among those of its request.
            model: `name`, `version` and `variant` of what answered.
            asked: the query.
            found: the answer.
        """
        read = found.history
        self.lines.put(
            {
                "format": PARITY_FORMAT,
                "request_id": request_id,
                "index": index,
                "model": dict(model),
                "latents": found.latents_version,
                "user": asked.user,
                "request_ts": asked.request_ts,
                "items": asked.items,
                "context": asked.context,
                "scores": found.probs.tolist(),
                "history_len": read.length if read else 0,
                "age_s": read.age_s if read else None,
                "reason": read.reason if read else None,
            }
        )
