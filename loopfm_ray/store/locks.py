"""Locks of files that hold between the processes of one machine; the system lets go of them when their process dies."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

__all__ = ["is_locked", "locked", "take_lock"]


def take_lock(path: Path) -> TextIO:
    """Return the file at `path`, made if it is missing, once nobody else holds it; closing it gives the lock back."""
    path.parent.mkdir(parents=True, exist_ok=True)
    stream = path.open("a", encoding="utf-8")
    fcntl.flock(stream, fcntl.LOCK_EX)
    return stream


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold `path` alone inside the block."""
    with take_lock(path):
        yield


def is_locked(path: Path) -> bool:
    """Return whether a process holds `path`; one that is missing is not held."""
    try:
        with path.open("r", encoding="utf-8") as stream:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except FileNotFoundError:
        return False
    return False
