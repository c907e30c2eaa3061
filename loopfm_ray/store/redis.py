"""A shared online store: the same records in Redis, for servers that do not share a disk.

`loopfm:spaces` is the set of spaces that were begun. The keys of a space begin with `loopfm:SPACE`: `:NAME:h:USER`, where
NAME is the published version, `:NAME:meta`, written when all histories are in, and `:CURRENT`, switched last.
`:versions` lists what was begun, oldest first. One Redis server, no cluster.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from loopfm_ray.errors import StoreError, UnreachableError
from loopfm_ray.store.online import NUM_KEPT, UserHistory, unpack_history

__all__ = ["RedisStore", "RedisTarget", "connect"]

_PREFIX = "loopfm"
_SPACES = f"{_PREFIX}:spaces"
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


class RedisStore:
    """One published version in Redis."""

    def __init__(self, client: Client, space: str, name: str) -> None:
        """Open version `name` of `space`.

        Raises:
            StoreError: it is not there.
        """
        self._client = client
        self._base = _base(space, name)
        self.meta = _read_meta(client, space, name)
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


class RedisTarget:
    """A Redis server that versions are published to; one process at a time may write a space."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def spaces(self) -> list[str]:
        """Return the spaces that have a live version, sorted."""
        with _errors():
            begun = sorted(item.decode() for item in self._client.smembers(_SPACES))
        return [space for space in begun if self.current(space) is not None]

    def current(self, space: str) -> str | None:
        """Return the name of the live version of a space, None when there is none."""
        with _errors():
            name = self._client.get(f"{_PREFIX}:{space}:CURRENT")
        return None if name is None else str(name.decode())

    def names(self, space: str) -> list[str]:
        """Return the names of the whole versions of a space, sorted."""
        with _errors():
            begun = [n.decode() for n in self._client.zrange(f"{_PREFIX}:{space}:versions", 0, -1)]
            return sorted(name for name in begun if self._is_whole(space, name))

    def describe(self, space: str, name: str) -> dict[str, Any]:  # Any: JSON
        """Return the meta of a version, with `published_at`, when it was first written here."""
        return _read_meta(self._client, space, name)

    def open(self, space: str, name: str) -> RedisStore:
        """Open a version.

        Raises:
            StoreError: it is not there, or Redis does not answer.
        """
        return RedisStore(self._client, space, name)

    def write(
        self,
        space: str,
        name: str,
        records: Iterable[tuple[str, bytes]],
        meta: dict[str, Any],  # Any: JSON
        max_bytes: int,  # noqa: ARG002  what a file may grow to; Redis has a limit of its own
    ) -> None:
        """Write a version unless it is there, make it the live one of its space, and remove all but the newest.

        Killed at any point, readers still see the version before; a rerun completes it.

        Raises:
            StoreError: Redis does not answer or has no memory left.
        """
        client, base = self._client, _base(space, name)
        with _errors():
            client.sadd(_SPACES, space)
            if not self._is_whole(space, name):
                number = client.incr(f"{_PREFIX}:{space}:counter")
                client.zadd(f"{_PREFIX}:{space}:versions", {name: number})
                for chunk in _chunks(records):
                    pipeline = client.pipeline(transaction=False)
                    for key, record in chunk:
                        pipeline.set(f"{base}:h:{key}", record)
                    pipeline.execute()
                now = datetime.now(UTC).isoformat(timespec="seconds")
                text = json.dumps({**meta, "published_at": now}, sort_keys=True)
                client.set(f"{base}:meta", text)
            client.set(f"{_PREFIX}:{space}:CURRENT", name)
            self._remove_old(space, name)

    def remove(self, space: str) -> bool:
        """Remove a space and what killed runs left of it; return whether there was anything."""
        client = self._client
        with _errors():
            if not client.sismember(_SPACES, space):
                return False
            # the pointer first: from here on the space is not live
            client.delete(f"{_PREFIX}:{space}:CURRENT")
            for name in client.zrange(f"{_PREFIX}:{space}:versions", 0, -1):
                self._remove_version(space, name.decode())
            client.delete(f"{_PREFIX}:{space}:versions", f"{_PREFIX}:{space}:counter")
            client.srem(_SPACES, space)
        return True

    def close(self) -> None:
        """Close the connections."""
        self._client.close()

    def _is_whole(self, space: str, name: str) -> bool:
        return bool(self._client.exists(f"{_base(space, name)}:meta"))

    def _remove_old(self, space: str, current: str) -> None:
        newest = self._client.zrevrange(f"{_PREFIX}:{space}:versions", 0, -1)
        others = [name for name in (item.decode() for item in newest) if name != current]
        whole = [name for name in others if self._is_whole(space, name)]
        for name in others:
            if name not in whole[: NUM_KEPT - 1]:
                self._remove_version(space, name)

    def _remove_version(self, space: str, name: str) -> None:
        # the meta goes first, so that no reader takes a half removed version for a whole one
        self._client.delete(f"{_base(space, name)}:meta")
        keys = self._client.scan_iter(match=f"{_base(space, name)}:*", count=_CHUNK)
        while chunk := list(itertools.islice(keys, _CHUNK)):
            self._client.unlink(*chunk)
        self._client.zrem(f"{_PREFIX}:{space}:versions", name)


def _base(space: str, name: str) -> str:
    return f"{_PREFIX}:{space}:{name}"


def _read_meta(client: Client, space: str, name: str) -> dict[str, Any]:  # Any: JSON
    with _errors():
        text = client.get(f"{_base(space, name)}:meta")
    if text is None:
        raise StoreError(
            f"Redis holds no version {name} of space {space}; publish it, or open the current one"
        )
    meta: dict[str, Any] = json.loads(text)
    return meta


def _chunks(records: Iterable[tuple[str, bytes]]) -> Iterator[list[tuple[str, bytes]]]:
    iterator = iter(records)
    while chunk := list(itertools.islice(iterator, _CHUNK)):
        yield chunk


@contextmanager
def _errors() -> Iterator[None]:
    """Turn the client's errors into a StoreError."""
    import redis

    try:
        yield
    except (redis.ConnectionError, redis.TimeoutError) as error:
        raise UnreachableError(
            f"Redis failed: {type(error).__name__}: {error}; check that the server runs and can be reached"
        ) from error
    except redis.RedisError as error:
        raise StoreError(
            f"Redis failed: {type(error).__name__}: {error}; check that the server runs and has memory left"
        ) from error
