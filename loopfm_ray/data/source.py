"""What a reader hands over: canonical blocks of rows, the names of their fields, and the user and item tables."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from loopfm_ray.data.entities import EntitySource

__all__ = ["EventLog", "LogFields"]


@dataclass(frozen=True)
class LogFields:
    """Names of what the rows of a log hold beside user, item, times and label."""

    tasks: tuple[str, ...] = ()
    categorical: tuple[str, ...] = ()
    numeric: tuple[str, ...] = ()
    sequence: tuple[str, ...] = ()


@dataclass(frozen=True)
class EventLog:
    """A log to prepare; `blocks` starts a new pass over the canonical blocks, in any order."""

    # Any: pyarrow ships no types.
    blocks: Callable[[], Iterator[Any]]
    fields: LogFields
    items: EntitySource | None
    users: EntitySource | None
