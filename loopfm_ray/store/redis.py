"""A shared online store: the same records in Redis, for servers that do not share a disk.

Keys are `PREFIX:NAME:h:USER`, where NAME is the published version, `PREFIX:NAME:meta`, written when all histories are in,
and `PREFIX:CURRENT`, switched last. `PREFIX:versions` lists what was begun, oldest first. One Redis server, no cluster.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from loopfm_ray.errors import StoreError
from loopfm_ray.store.online import UserHistory, unpack_history

__all__ = ["PREFIX", "RedisStore", "connect", "current_name", "publish_redis"]

PREFIX = "loopfm"
_CHUNK = 1000

# Any: redis is an optional extra without complete types.
Client = Any


def connect(url: str, timeout_s: float = 1.0) -> Client:
    """Return a client for `redis://host:port/db`; every command has `timeout_s` to answer.

    Raises:
        StoreError: the redis extra is not installed, or the address is wrong.
    """
    try:
        import redis
    except ImportError as error:
        raise StoreError(
            f"{url} needs the redis client; install it with `pip install loopfm-ray[redis]`"
        ) from error
    try:
        return redis.Redis.from_url(url, socket_timeout=timeout_s, socket_connect_timeout=timeout_s)
    except ValueError as error:
        raise StoreError(
            f"{url} is no Redis address: {error}; give redis://host:port/db"
        ) from error


def current_name(client: Client, prefix: str = PREFIX) -> str | None:
    """Return the name of the live version, None when nothing is published."""
    with _errors():
        name = client.get(f"{prefix}:CURRENT")
    return None if name is None else str(name.decode())


class RedisStore:
    """One published version in Redis."""

    def __init__(self, client: Client, name: str, prefix: str = PREFIX) -> None:
        """Open version `name`.

        Raises:
            StoreError: it is not there.
        """
        self._client = client
        self._base = f"{prefix}:{name}"
        with _errors():
            meta = client.get(f"{self._base}:meta")
        if meta is None:
            raise StoreError(f"Redis holds no version {name}; publish it, or open the current one")
        self.meta: dict[str, Any] = json.loads(meta)  # Any: JSON
        self.version: str = self.meta["latents_version"]

    def get_many(self, keys: Sequence[str]) -> list[UserHistory | None]:
        """Return the history of each user, None where there is none.

        Raises:
            StoreError: Redis does not answer in time, or the version was removed.
        """
        wanted = list(dict.fromkeys(keys))
        # the meta key goes along: without it, a version that was removed would look like users without a history
        names = [f"{self._base}:meta", *(f"{self._base}:h:{key}" for key in wanted)]
        with _errors():
            meta, *values = self._client.mget(names)
        if meta is None:
            raise StoreError(
                f"version {self.version} was removed from Redis; open the current version instead"
            )
        found = {
            key: unpack_history(value)
            for key, value in zip(wanted, values, strict=True)
            if value is not None
        }
        return [found.get(key) for key in keys]

    def close(self) -> None:
        """Close the connections; histories that were read stay valid."""
        self._client.close()


def publish_redis(
    client: Client,
    name: str,
    records: Iterable[tuple[str, bytes]],
    meta: dict[str, Any],  # Any: JSON
    *,
    keep: int,
    prefix: str = PREFIX,
) -> None:
    """Write all records of version `name`, make it current, then remove all but the newest `keep` versions.

    Killed at any point, readers still see the version before; a rerun completes it.

    Raises:
        StoreError: Redis does not answer or has no memory left.
    """
    base = f"{prefix}:{name}"
    with _errors():
        if not client.exists(f"{base}:meta"):
            client.zadd(f"{prefix}:versions", {name: client.incr(f"{prefix}:counter")})
            for chunk in _chunks(records):
                pipeline = client.pipeline(transaction=False)
                for key, record in chunk:
                    pipeline.set(f"{base}:h:{key}", record)
                pipeline.execute()
            client.set(f"{base}:meta", json.dumps(meta, sort_keys=True))
        client.set(f"{prefix}:CURRENT", name)
        _remove_old(client, name, keep, prefix)


def _chunks(records: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


def _remove_old(client: Client, current: str, keep: int, prefix: str) -> None:
    others = [item.decode() for item in client.zrevrange(f"{prefix}:versions", 0, -1)]
    others.remove(current)
    whole = [name for name in others if client.exists(f"{prefix}:{name}:meta")]
    for name in others:
        if name in whole[: keep - 1]:
            continue
        # the meta goes first, so that no reader takes a half removed version for a whole one
        client.delete(f"{prefix}:{name}:meta")
        keys = client.scan_iter(match=f"{prefix}:{name}:*", count=_CHUNK)
        while chunk := list(itertools.islice(keys, _CHUNK)):
            client.unlink(*chunk)
        client.zrem(f"{prefix}:versions", name)


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the client's errors into a StoreError."""
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise StoreError(
            f"Redis failed: {type(error).__name__}: {error}; check that the server runs and has memory left"
        ) from error
