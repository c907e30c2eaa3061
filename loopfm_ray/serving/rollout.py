"""Which bundles serve under which name, and how one takes over from another: a small file that replicas follow.

A VM has a stable bundle. Beside it may stand a canary, which answers for a fixed share of the users, and a shadow, which
scores along without answering. `promote` and `rollback` change the file; a replica loads what is new before it lets go of
what is old, so no request is lost, and keeps the old where the new can not be loaded.
"""

import fcntl
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, NonNegativeInt, ValidationError, model_validator

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.store.tables import write_text

__all__ = [
    "ModelName",
    "Rollout",
    "Rollouts",
    "Served",
    "editing",
    "is_canary_user",
    "promote",
    "read_rollouts",
    "rollback",
    "start_canary",
    "start_shadow",
    "write_rollouts",
]

_MAX_PREVIOUS = 10
ModelName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=64)]


class Served(Config):
    """A bundle, and where its histories are published."""

    bundle: str
    """Folder or `s3://` address of the VM bundle."""
    online: str | None = None
    """Directory or `redis://` address of the online store; null for a VM without history."""
    version: str | None = None
    """Version of the bundle that has to lie there; null takes what lies there when it is loaded. `loopfm promote` writes it, so that
    a folder that was written over is noticed and never served under an old name."""


class Rollout(Config):
    """What serves under one name."""

    stable: Served
    """Answers."""
    canary: Served | None = None
    """Answers for `canary_share` of the users."""
    canary_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the users. Who is among them hangs on user and name alone: a larger share keeps those of a smaller one."""
    shadow: Served | None = None
    """Scores what `stable` answers, without being heard; the differences are told by the service."""
    previous: tuple[Served, ...] = ()
    """What was stable before, the newest last."""

    @model_validator(mode="after")
    def _has_a_canary(self) -> Self:
        if (self.canary is None) != (self.canary_share == 0):
            raise ConfigError(
                f"a canary takes a canary_share above 0, and no canary one of 0; found {self.canary_share}"
            )
        return self


class Rollouts(Config):
    """All names of a service."""

    revision: NonNegativeInt = 0
    """Rises with every change."""
    models: dict[ModelName, Rollout] = Field(default_factory=dict)
    """By name."""

    def with_model(self, name: str, rollout: Rollout) -> "Rollouts":
        """Return the next revision, with `rollout` under `name`."""
        tree = self.model_dump()
        tree["models"][name] = rollout.model_dump()
        return Rollouts.model_validate({**tree, "revision": self.revision + 1})

    def of(self, name: str) -> Rollout:
        """Return what serves under `name`.

        Raises:
            ConfigError: nothing does.
        """
        if name not in self.models:
            raise ConfigError(f"no model {name!r} is served, there are {sorted(self.models)}")
        return self.models[name]


def is_canary_user(name: str, user: str, share: float) -> bool:
    """Return whether the canary of `name` answers for a user, the same on every machine and at every time."""
    digest = hashlib.blake2b(f"{name}\x00{user}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def start_canary(rollouts: Rollouts, name: str, served: Served, share: float) -> Rollouts:
    """Return the next revision, in which `served` answers for a share of the users of `name`.

    Raises:
        ConfigError: there is no such name, or the share is not between 0 and 1.
    """
    if not 0 < share < 1:
        raise ConfigError(f"a canary answers for a share between 0 and 1, found {share}")
    changed = {"canary": served, "canary_share": share}
    return rollouts.with_model(name, rollouts.of(name).model_copy(update=changed))


def start_shadow(rollouts: Rollouts, name: str, served: Served) -> Rollouts:
    """Return the next revision, in which `served` scores along under `name`.

    Raises:
        ConfigError: there is no such name.
    """
    return rollouts.with_model(name, rollouts.of(name).model_copy(update={"shadow": served}))


def promote(rollouts: Rollouts, name: str, served: Served | None = None) -> Rollouts:
    """Return the next revision, in which `served`, or else the canary, is stable; canary and shadow end.

    A name that is new begins with `served`.

    Raises:
        ConfigError: there is neither a bundle to take nor a canary.
    """
    if name not in rollouts.models and served is not None:
        return rollouts.with_model(name, Rollout(stable=served))
    now = rollouts.of(name)
    taken = served or now.canary
    if taken is None:
        raise ConfigError(
            f"model {name!r} has no canary to promote; name a bundle, or start a canary first"
        )
    previous = (*now.previous, now.stable)[-_MAX_PREVIOUS:]
    return rollouts.with_model(name, Rollout(stable=taken, previous=previous))


def rollback(rollouts: Rollouts, name: str) -> Rollouts:
    """Return the next revision, in which the canary of `name` is gone, or else what was stable before is stable again.

    Raises:
        ConfigError: there is no such name, and nothing to go back to.
    """
    now = rollouts.of(name)
    if now.canary is not None:
        gone = {"canary": None, "canary_share": 0.0}
        return rollouts.with_model(name, now.model_copy(update=gone))
    if not now.previous:
        raise ConfigError(
            f"model {name!r} has no canary and was never another bundle: there is nothing to go back to"
        )
    *older, last = now.previous
    return rollouts.with_model(name, Rollout(stable=last, previous=tuple(older)))


def read_rollouts(path: Path) -> Rollouts:
    """Read the file.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    try:
        return Rollouts.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise StoreError(
            f"{path} is not there; `loopfm promote` with a bundle begins one"
        ) from error
    except (OSError, ValueError, ValidationError) as error:
        raise StoreError(f"{path} is no rollout file: {error}; restore it") from error


def write_rollouts(path: Path, rollouts: Rollouts) -> None:
    """Write the file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(rollouts.model_dump(mode="json"), indent=1) + "\n")


@contextmanager
def editing(path: Path) -> Iterator[Rollouts]:
    """Give what the file holds, or nothing yet, while nobody else edits it; write the next revision before it ends.

    Raises:
        StoreError: the file is damaged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / f".{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield read_rollouts(path) if path.exists() else Rollouts()
