"""Apply a plain function to many tasks on the cluster: the Ray form of the core's `Mapper`."""

import json
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import ray
from ray.exceptions import RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from loopfm_ray.errors import JobError, LoopFMError

__all__ = ["Progress", "RayMapper", "anywhere", "on_this_node", "silent", "unwrap", "watch"]

T = TypeVar("T")
R = TypeVar("R")

Progress = Callable[[str, int, int], None]
"""Called with a stage, the steps done and the steps in all."""


def silent(stage: str, done: int, total: int) -> None:
    """Report no progress."""


@contextmanager
def watch(metrics_files: Mapping[Path, str], progress: Progress) -> Iterator[None]:
    """Report the last step in the metrics files of trainings as progress, once a second, inside the block.

    Args:
        metrics_files: what each training is called, by its file; they are trained in this order.
        progress: is told.
    """
    stop = threading.Event()

    def follow() -> None:
        told: dict[str, int] = {}
        while not stop.wait(1.0):
            for metrics_file, stage in metrics_files.items():
                point = _last_point(metrics_file)
                if point is not None and told.get(stage) != point["step"]:
                    told[stage] = point["step"]
                    progress(stage, point["step"], point["total"])

    thread = threading.Thread(target=follow, daemon=True)
    progress(next(iter(metrics_files.values())), 0, 1)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
    for stage in metrics_files.values():
        progress(stage, 1, 1)


def _last_point(metrics_file: Path) -> dict[str, Any] | None:  # Any: JSON
    if not metrics_file.is_file():
        return None
    *_, last = metrics_file.read_text(encoding="utf-8").splitlines() or [""]
    if not last.endswith("}"):
        return None
    point: dict[str, Any] = json.loads(last)
    return point


def on_this_node() -> dict[str, Any]:  # Any: Ray ships no types
    """Return the options that keep a task or an actor on the machine that this process runs on."""
    node_id = ray.get_runtime_context().get_node_id()
    return {"scheduling_strategy": NodeAffinitySchedulingStrategy(node_id, soft=False)}


def anywhere() -> dict[str, Any]:  # Any: Ray ships no types
    """Return the options that let a task run wherever there is room.

    Without them a task that is started inside a trial of Tune waits for ever for room in the trial's own placement group.
    """
    return {"scheduling_strategy": "DEFAULT"}


@dataclass(frozen=True)
class RayMapper:
    """Runs one Ray task for each task of the core, a bounded number at a time, and yields results in order.

    The tasks it is given must be safe to repeat: Ray runs one again when its worker dies. With `is_here` they run on this
    machine, since they read and write its disk.
    """

    parallel_tasks: int
    stage: str = ""
    progress: Progress = silent
    num_cpus: float = 1.0
    max_retries: int = 3
    is_here: bool = False

    def __call__(self, function: Callable[[T], R], tasks: Sequence[T]) -> Iterator[R]:
        """Yield `function(task)` for each of `tasks`, in order.

        Raises:
            LoopFMError: the one that `function` raised.
            JobError: a worker died more often than `max_retries`, or raised something else.
        """
        where = on_this_node() if self.is_here else anywhere()
        remote: Any = ray.remote(num_cpus=self.num_cpus, max_retries=self.max_retries, **where)(
            function
        )
        running: deque[Any] = deque()  # Any: Ray's references carry no type here
        waiting = iter(tasks)
        for done in range(len(tasks)):
            while len(running) < self.parallel_tasks:
                task = next(waiting, None)
                if task is None:
                    break
                running.append(remote.remote(task))
            self.progress(self.stage, done, len(tasks))
            yield self._get(running.popleft())
        self.progress(self.stage, len(tasks), len(tasks))

    def _get(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except Exception as error:  # the edge to Ray: every failure becomes one of ours
            raise unwrap(error, self.stage) from error


def unwrap(error: BaseException, stage: str) -> LoopFMError:
    """Return the error that stopped a Ray program, as one of this package's."""
    seen: list[BaseException] = [error]
    while seen:
        current = seen.pop()
        if isinstance(current, LoopFMError) and not isinstance(current, RayTaskError):
            return current
        seen += [cause for cause in _causes(current) if isinstance(cause, BaseException)]
    # the last line of a traceback is the error itself
    *_, last_line = str(error).strip().splitlines() or [type(error).__name__]
    return JobError(
        f"stage {stage!r} failed on the cluster: {last_line.strip()}; the log of the worker in Ray's session folder has more,"
        " and running the same command again goes on where it stopped"
    )


def _causes(error: BaseException) -> list[object]:
    causes: list[object] = [getattr(error, "cause", None), error.__cause__]
    failures = getattr(error, "worker_failures", None)
    if isinstance(failures, dict):
        causes += failures.values()
    causes += [getattr(error, "training_failed_error", None), getattr(error, "_failure", None)]
    return causes
