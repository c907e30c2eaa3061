"""Where a training keeps its checkpoints: in its run of Ray Train, or in a folder of one process."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

import ray.train

__all__ = ["KEY", "Checkpoints", "LocalCheckpoints", "RayCheckpoints"]

KEY = "training"
"""Label of a checkpoint: the training that it is of."""

Labels = dict[str, Any]  # Any: Ray keeps them as JSON


class Checkpoints(Protocol):
    """Where a training keeps its checkpoints."""

    def latest(self, key: str) -> AbstractContextManager[Path | None]:
        """Give the folder of the last checkpoint of the training `key` inside the block; None if there is none."""
        ...

    def keep(self, fill: Callable[[Path], None], labels: Labels, step: int) -> None:
        """Make a checkpoint of what `fill` writes into a folder; every worker has to call it."""
        ...


class RayCheckpoints:
    """Checkpoints of the run of Ray Train that this process is a worker of.

    The first worker writes; with `all_write` every worker does, files of other names, which Ray puts into one folder.
    """

    def __init__(self, *, is_first: bool, all_write: bool = False) -> None:
        self._is_first, self._all_write = is_first, all_write

    @contextmanager
    def latest(self, key: str) -> Iterator[Path | None]:
        """Give the folder of the last checkpoint of the training `key`."""
        checkpoint = ray.train.get_checkpoint()
        if checkpoint is None or checkpoint.get_metadata().get(KEY) != key:
            yield None
            return
        with checkpoint.as_directory() as folder:
            yield Path(folder)

    def keep(self, fill: Callable[[Path], None], labels: Labels, step: int) -> None:
        """Make a checkpoint and report it."""
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = None
            if self._is_first or self._all_write:
                fill(Path(folder))
                checkpoint = ray.train.Checkpoint.from_directory(folder)
            if checkpoint is not None and self._is_first:
                checkpoint.set_metadata(labels)
            ray.train.report({"step": step}, checkpoint=checkpoint)


class LocalCheckpoints:
    """Checkpoints of one process in a folder of its own, outside of any run of Ray Train; the newest is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @contextmanager
    def latest(self, key: str) -> Iterator[Path | None]:
        """Give the folder of the last checkpoint of the training `key`."""
        found = sorted(self._folder.glob(f"{key}.[0-9]*"), key=_step_of)
        yield found[-1] if found else None

    def keep(self, fill: Callable[[Path], None], labels: Labels, step: int) -> None:
        """Make a checkpoint, whole or not at all, and remove those before."""
        self._folder.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(prefix=".tmp-", dir=self._folder))
        fill(staged)
        made = self._folder / f"{labels[KEY]}.{step}"
        shutil.rmtree(made, ignore_errors=True)
        staged.rename(made)
        for other in self._folder.iterdir():
            if other != made:
                shutil.rmtree(other, ignore_errors=True)

    def clear(self) -> None:
        """Remove all, once the training has ended."""
        shutil.rmtree(self._folder, ignore_errors=True)


def _step_of(folder: Path) -> int:
    return int(folder.name.rpartition(".")[2])
