"""When epochs of a training begin and end: of the library's own jobs in their Ray workers, and of any other loop.

A job is not changed for it: the task that it hands to `jobs.training.train` gets a reader and a validation that note the time.
"""

import importlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

from loopfm_ray.data.examples import Rows
from loopfm_ray.jobs.training import Task, Worker

Record = dict[str, Any]  # Any: JSON


class EpochClock:
    """Notes wall and processor time where an epoch begins and where it ends; what lies between two epochs is left out."""

    def __init__(self) -> None:
        self.begun: list[tuple[float, float]] = []
        self.first_rows: list[float] = []
        self.ended: list[tuple[float, float]] = []

    def begin(self) -> None:
        """Note that an epoch begins."""
        self.begun.append((time.perf_counter(), time.process_time()))

    def see_rows(self) -> None:
        """Note that the first rows of an epoch are there."""
        self.first_rows.append(time.perf_counter())

    def end(self) -> None:
        """Note that an epoch has ended."""
        self.ended.append((time.perf_counter(), time.process_time()))

    def spans(self) -> Record:
        """Return the seconds of each epoch by wall and processor, and those until its first rows."""
        pairs = list(zip(self.begun, self.ended, strict=True))
        return {
            "seconds": [end[0] - begin[0] for begin, end in pairs],
            "cpu_seconds": [end[1] - begin[1] for begin, end in pairs],
            "until_first_rows": [
                first - begin[0] for begin, first in zip(self.begun, self.first_rows, strict=False)
            ],
        }


def watched(task: Task, clock: EpochClock) -> Task:
    """Return the same task with a clock at both ends of an epoch: its first row is asked for, its validation begins."""

    def blocks(epoch: int) -> Iterator[Rows]:
        clock.begin()
        for number, rows in enumerate(task.blocks(epoch)):
            if number == 0:
                clock.see_rows()
            yield rows

    def validate() -> Any:
        clock.end()
        return task.validate()

    return replace(task, blocks=blocks, validate=validate)


def run_worker(module: str, marks: str, config: Record) -> None:
    """Run the worker of a training job, such as `loopfm_ray.jobs.train_vm`, and write what its epochs took beside `marks`."""
    job = importlib.import_module(module)
    train = job.train

    def timed(task: Task, worker: Worker, *rest: Any) -> Any:
        clock = EpochClock()
        found = train(watched(task, clock), worker, *rest)
        record = {
            **clock.spans(),
            "num_rows": task.plan.num_rows[worker.rank],
            "num_parameters": sum(value.numel() for value in task.model.parameters()),
        }
        path = Path(f"{marks}-{worker.rank}.json")
        path.write_text(json.dumps(record), encoding="utf-8")
        return found

    with mock.patch.object(job, "train", timed):
        job._worker(config)


class _TakenError(Exception):
    def __init__(self, task: Task) -> None:
        super().__init__()
        self.task = task


def task_of(module: Any, start: Callable[[], object]) -> Task:
    """Return the task that `start` would have trained with `train` of a module."""

    def take(task: Task, *_: object) -> None:
        raise _TakenError(task)

    with mock.patch.object(module, "train", take):
        try:
            start()
        except _TakenError as taken:
            return taken.task
    raise AssertionError("nothing was trained")


def merged(records: list[Record]) -> Record:
    """Return the best epoch but the first, which warms up, of workers that train together."""
    seconds = [max(of) for of in zip(*(record["seconds"] for record in records), strict=True)]
    cpu = [sum(of) for of in zip(*(record["cpu_seconds"] for record in records), strict=True)]
    waits = [max(of) for of in zip(*(r["until_first_rows"] for r in records), strict=True)]
    return {
        "num": sum(record["num_rows"] for record in records),
        "seconds": min(seconds[1:]),
        "cpu_seconds": min(cpu[1:]),
        "epoch_seconds": seconds,
        "until_first_rows": waits,
        "num_parameters": records[0]["num_parameters"],
    }
