"""An online target: embedding spaces side by side, each with its own live version.

A target is a directory (LMDB, the default) or a `redis://` address. Every space has its own pointer and its own two
newest versions, so publishing, switching or removing one touches no other: VMs of an old snapshot and of a new one read
the same target.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from loopfm_ray.errors import StoreError
from loopfm_ray.store.lmdb import LmdbTarget
from loopfm_ray.store.online import OnlineStore
from loopfm_ray.store.redis import RedisTarget, connect
from loopfm_ray.store.space import check_space_id

__all__ = [
    "LiveSpace",
    "OnlineTarget",
    "SpaceFollower",
    "is_redis",
    "live_spaces",
    "open_current",
    "open_target",
    "open_version",
    "retire",
]


class OnlineTarget(Protocol):
    """Where versions are published. Killed anywhere in `write` or `remove`, readers see whole versions only."""

    def spaces(self) -> list[str]:
        """Return the spaces that have a live version, sorted."""
        ...

    def current(self, space: str) -> str | None:
        """Return the name of the live version of a space, None when there is none; one small read."""
        ...

    def names(self, space: str) -> list[str]:
        """Return the names of the whole versions of a space, sorted."""
        ...

    def describe(self, space: str, name: str) -> dict[str, Any]:  # Any: JSON
        """Return the meta of a version and `published_at`, when it was first written here."""
        ...

    def open(self, space: str, name: str) -> OnlineStore:
        """Open a version."""
        ...

    def write(
        self,
        space: str,
        name: str,
        records: Iterable[tuple[str, bytes]],
        meta: dict[str, Any],  # Any: JSON
        max_bytes: int,
    ) -> None:
        """Write a version unless it is there, make it the live one of its space, and remove all but the newest."""
        ...

    def remove(self, space: str) -> bool:
        """Remove a space and what killed runs left of it; return whether there was anything."""
        ...

    def close(self) -> None:
        """Let go of connections; stores that were opened may share them."""
        ...


@dataclass(frozen=True)
class LiveSpace:
    """What is live in one space of a target."""

    space: str
    snapshot_id: str
    version: str
    """The latents version."""
    watermark_ts: int
    published_at: str
    """When this version was first written to the target, ISO 8601 UTC."""


class SpaceFollower:
    """Reads the live pointer of one space, and opens what it names when that has changed."""

    def __init__(self, target: str | Path, space: str, *, timeout_s: float = 1.0) -> None:
        """Follow `space` of `target`; `timeout_s` bounds each command to Redis."""
        self._where = str(target)
        self._target = open_target(target, timeout_s)
        self._space = space
        self._name: str | None = None

    def poll(self) -> OnlineStore | None:
        """Return the live version if it is another one than this gave last, else None.

        Raises:
            StoreError: the space is not live, or its version can not be opened.
        """
        check_space_id(self._space)
        name = self._target.current(self._space)
        if name is None:
            raise _not_live(self._where, self._space, self._target.spaces())
        if name == self._name:
            return None
        store = self._target.open(self._space, name)
        self._name = name
        return store


def open_target(target: str | Path, timeout_s: float = 60.0) -> OnlineTarget:
    """Return the target at a directory or `redis://` address; nothing has to be there yet.

    Raises:
        StoreError: the address is wrong, or the Redis client is not installed.
    """
    if is_redis(target):
        return RedisTarget(connect(str(target), timeout_s))
    return LmdbTarget(Path(target))


def open_current(target: str | Path, space: str, *, timeout_s: float = 1.0) -> OnlineStore:
    """Open the live version of `space` at `target`, a directory or a `redis://` address.

    Args:
        target: where `publish` wrote.
        space: id of the space, as manifests and bundles name it.
        timeout_s: for each look-up in Redis.

    Raises:
        StoreError: nothing is published in that space.
    """
    store = SpaceFollower(target, space, timeout_s=timeout_s).poll()
    assert store is not None  # the first look always opens
    return store


def open_version(
    target: str | Path, space: str, version: str, *, timeout_s: float = 1.0
) -> OnlineStore:
    """Open one latents version of `space`, live or the one before, to compare it with its offline twin.

    Raises:
        StoreError: the target does not hold it (any more).
    """
    check_space_id(space)
    opened = open_target(target, timeout_s)
    names = opened.names(space)
    held = {name: opened.describe(space, name)["latents_version"] for name in names}
    found = sorted(name for name in held if held[name] == version)
    if not found:
        opened.close()
        raise StoreError(
            f"{target} holds latents {sorted(set(held.values()))} in space {space}, not {version}; publish that version,"
            " or load it with load_memory"
        )
    current = opened.current(space)
    return opened.open(space, current if current in found else found[0])


def live_spaces(target: str | Path) -> list[LiveSpace]:
    """Return what is live at `target`, by space id.

    Raises:
        StoreError: a version is damaged, or Redis does not answer.
    """
    opened = open_target(target)
    try:
        found = []
        for space in opened.spaces():
            name = opened.current(space)
            if name is not None:
                meta = opened.describe(space, name)
                found.append(
                    LiveSpace(
                        space,
                        meta["snapshot_id"],
                        meta["latents_version"],
                        int(meta["watermark_ts"]),
                        meta["published_at"],
                    )
                )
        return found
    finally:
        opened.close()


def retire(target: str | Path, space: str, *, force: bool = False) -> None:
    """Remove one space from `target`; the others stay as they are. Killed half way, the same call completes it.

    Servers that still read the space keep what they have open (LMDB) or score without history (Redis), so move their
    VMs first.

    Args:
        target: where `publish` wrote.
        space: id of the space.
        force: whether the last live space may go too.

    Raises:
        StoreError: the space is not there, or it is the last one and `force` is not given.
    """
    check_space_id(space)
    opened = open_target(target)
    try:
        live = opened.spaces()
        if live == [space] and not force:
            raise StoreError(
                f"space {space} is the last live one at {target}: without it every VM that reads a history is left without;"
                " publish another space first, or ask for it with force"
            )
        if not opened.remove(space):
            raise _not_live(str(target), space, live)
    finally:
        opened.close()


def is_redis(target: str | Path) -> bool:
    """Return whether `target` is the address of a Redis server."""
    return str(target).startswith(("redis://", "rediss://", "unix://"))


def _not_live(target: str, space: str, live: list[str]) -> StoreError:
    if not live:
        return StoreError(f"nothing is published at {target}; run publish first")
    return StoreError(
        f"{target} holds no space {space}, found {live}; publish latents of that space there, or load a bundle whose VM"
        " was trained in one that is live"
    )
