"""Who may ask: keys that are stored as hashes alone, compared in constant time, each with a rate of its own.

A key is 32 random bytes, so its SHA-256 can not be turned back by trying, and needs no salt. A replica counts for itself:
with N replicas a key may ask up to N times its rate.
"""

import hashlib
import hmac
import json
import secrets
import stat
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, PositiveFloat, ValidationError, model_validator

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.store.tables import write_text

__all__ = [
    "ApiKey",
    "ApiKeys",
    "Gate",
    "Verdict",
    "add_key",
    "is_private",
    "read_keys",
    "write_keys",
]

_BYTES = 32


class ApiKey(Config):
    """One caller."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]
    """Of the caller, for logs and counters."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """Of the key."""
    rate_per_s: PositiveFloat | None = None
    """Requests a second that a replica lets through in the long run; null is without limit."""
    burst: PositiveFloat = 20.0
    """Requests that may come at once after a pause."""


class ApiKeys(Config):
    """All callers."""

    keys: tuple[ApiKey, ...] = ()

    @model_validator(mode="after")
    def _names_differ(self) -> Self:
        names = [key.name for key in self.keys]
        if len(set(names)) < len(names):
            raise ConfigError(f"names of keys must differ, found {sorted(names)}")
        return self


def add_key(
    keys: ApiKeys, name: str, rate_per_s: float | None = None, burst: float = 20.0
) -> tuple[ApiKeys, str]:
    """Return the keys with a new one, and that key itself, which is nowhere else.

    Raises:
        ConfigError: the name is taken.
    """
    if name in {key.name for key in keys.keys}:
        raise ConfigError(f"there is a key {name!r} already; take another name, or remove that one")
    secret = secrets.token_urlsafe(_BYTES)
    made = ApiKey(name=name, sha256=_hash(secret), rate_per_s=rate_per_s, burst=burst)
    return ApiKeys(keys=(*keys.keys, made)), secret


def read_keys(path: Path) -> ApiKeys:
    """Read a key file.

    Raises:
        StoreError: there is none, it is damaged, or others than its owner may read or write it.
    """
    try:
        found = ApiKeys.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise StoreError(f"{path} is not there; `loopfm key` writes one") from error
    except (OSError, ValueError, ValidationError) as error:
        raise StoreError(f"{path} is no key file: {error}; restore it") from error
    if not is_private(path):
        raise StoreError(f"{path} can be read or written by others; run `chmod 600 {path}`")
    return found


def write_keys(path: Path, keys: ApiKeys) -> None:
    """Write a key file that its owner alone may read, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(keys.model_dump(mode="json"), indent=1) + "\n", mode=0o600)


def is_private(path: Path) -> bool:
    """Return whether nobody but the owner may read or write a file."""
    return not path.stat().st_mode & (stat.S_IRWXG | stat.S_IRWXO)


@dataclass(frozen=True)
class Verdict:
    """What a gate says to a request."""

    name: str | None
    """Whose key it came with; None when it is no key of ours."""
    retry_after_s: float = 0.0
    """How long to wait before the next; 0 lets this one through."""


@dataclass
class _Bucket:
    """Tokens of one key: `rate` come each second, up to `burst`."""

    rate: float
    burst: float
    tokens: float
    last_s: float = field(default=0.0)

    def take(self, now_s: float) -> float:
        """Take a token, or return how long until there is one."""
        self.tokens = min(self.burst, self.tokens + (now_s - self.last_s) * self.rate)
        self.last_s = now_s
        if self.tokens >= 1.0:
            self.tokens -= 1.0
            return 0.0
        return (1.0 - self.tokens) / self.rate


class Gate:
    """Knows the keys, and how much each has asked. Threads may share it."""

    def __init__(self, keys: Sequence[ApiKey], clock_s: Callable[[], float]) -> None:
        """Take the keys and a clock that never goes back, in seconds."""
        self._keys, self._clock_s = tuple(keys), clock_s
        now_s = clock_s()
        self._buckets = {
            key.name: _Bucket(key.rate_per_s, key.burst, key.burst, now_s)
            for key in keys
            if key.rate_per_s is not None
        }
        self._lock = threading.Lock()

    def check(self, secret: str) -> Verdict:
        """Judge a request that came with `secret`."""
        given, name = _hash(secret), None
        for key in self._keys:  # all of them, so that the time tells nothing
            if hmac.compare_digest(given, key.sha256):
                name = key.name
        bucket = self._buckets.get(name) if name is not None else None
        if bucket is None:
            return Verdict(name)
        with self._lock:
            return Verdict(name, bucket.take(self._clock_s()))


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()
