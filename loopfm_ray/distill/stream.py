"""Progressive training on a stream: every chunk of time is predicted before it is learnt from, in one pass.

A row is predicted by a VM that has seen only labels known when the row's chunk began, and learnt from in the chunk in which
its label becomes known, with the ids that were known when it was predicted: what is first met during the chunk is unknown in both. Were
it known while learning, the unknown would be the negatives alone, and every new item would be predicted to be one. The state after any step is all that is needed to go on, so a stream that is killed ends in the same
bits as one that was not.

Source: ExFM, arXiv 2502.17494, section 2 (streaming data, one pass) and the evaluation by chunks of papers on online
learning, in which a chunk is evaluated on before it is trained on.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, model_validator

from loopfm_ray.config import Config
from loopfm_ray.data.base_config import Moment, to_ts
from loopfm_ray.data.batch import Batch
from loopfm_ray.data.examples import Rows, concat_rows, count_rows
from loopfm_ray.data.split import Splits, format_ts
from loopfm_ray.data.windows import plan_steps, rechunk, shuffle_requests
from loopfm_ray.errors import ConfigError
from loopfm_ray.train.evaluate import Predictions, predict
from loopfm_ray.train.loop import Hooks, LoopConfig, fit
from loopfm_ray.train.state import TrainState
from loopfm_ray.train.step import Objective
from loopfm_ray.types import MICROS_PER_S, TimeRange

__all__ = ["LabelBuffer", "StreamConfig", "StreamTask", "StreamWindow", "cut_chunks", "run_stream"]

_PREDICT_ROWS = 4096
_NO_END = 1 << 62
"""Steps of a stream, from which the learning rate follows: it never falls."""
_NAME = r"^[A-Za-z0-9][A-Za-z0-9_-]*$"


class StreamConfig(Config):
    """Trains VMs on the joined set as on a stream."""

    chunk_s: PositiveInt = 86_400
    """Length of a chunk: its rows are predicted by the VM as it was when the chunk began."""
    start: Moment | None = None
    """Where the stream begins; null is the start of the VM window."""
    measure_from: Moment | None = None
    """Progressive metrics are taken from here on; null is the start of the test window. What comes before is for tuning."""
    stop: Moment | None = None
    """Where it ends; null is the end of the test window."""
    vms: tuple[str, ...] | None = None
    """The VMs that are trained; null is all. `learning` gives their batches and optimizer; epochs is always one and the rate does not
    fall at the end, since a stream has none."""
    verticals: dict[str, dict[str, tuple[str, ...]]] = Field(default={"all": {}}, min_length=1)
    """By name, the values of categorical fields that make a row one of the vertical's own; each VM is trained for each
    vertical. No values take all rows."""
    checkpoint_steps: PositiveInt = 500
    """Steps between checkpoints inside a chunk; there is one after each chunk."""

    @model_validator(mode="after")
    def _names_are_file_names(self) -> "StreamConfig":
        for name in self.verticals:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(
                    f"stream.verticals: names become file names, found {name!r}; use letters, digits, underscores and hyphens"
                )
        return self

    def window(self, splits: Splits) -> "StreamWindow":
        """Return the stream's times.

        Raises:
            ConfigError: it would be empty, or lie outside of what is joined.
        """
        given = {
            "start": (self.start, splits.vm.start_ts),
            "measure_from": (self.measure_from, splits.test.start_ts),
            "stop": (self.stop, splits.test.stop_ts),
        }
        times = {
            name: to_ts(one) if one is not None else other for name, (one, other) in given.items()
        }
        first, last = splits.vm.start_ts, splits.test.stop_ts
        if not first <= times["start"] < times["stop"] <= last:
            raise ConfigError(
                f"stream.start to stream.stop is {format_ts(times['start'])} to {format_ts(times['stop'])}; expected a"
                f" stretch inside the VM and test windows, {format_ts(first)} to {format_ts(last)}"
            )
        if not times["start"] <= times["measure_from"] < times["stop"]:
            raise ConfigError(
                f"stream.measure_from is {format_ts(times['measure_from'])}; expected a moment of the stream, which runs from"
                f" {format_ts(times['start'])} to {format_ts(times['stop'])}"
            )
        whole = TimeRange(times["start"], times["stop"])
        return StreamWindow(whole, times["measure_from"], self.chunk_s * MICROS_PER_S)


@dataclass(frozen=True)
class StreamWindow:
    """When a stream begins and ends, and how it is cut."""

    whole: TimeRange
    measure_from_ts: int
    chunk_us: int

    @property
    def num_chunks(self) -> int:
        """How many chunks there are."""
        return -(-(self.whole.stop_ts - self.whole.start_ts) // self.chunk_us)

    def chunk(self, number: int) -> TimeRange:
        """Return the time of one chunk; the last one may be shorter."""
        start_ts = self.whole.start_ts + number * self.chunk_us
        return TimeRange(start_ts, min(start_ts + self.chunk_us, self.whole.stop_ts))

    def number(self, event_ts: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return [n] the chunk of each moment."""
        found: NDArray[np.int64] = (event_ts - self.whole.start_ts) // self.chunk_us
        return found


class LabelBuffer:
    """Rows that wait for their label."""

    def __init__(self) -> None:
        self._parts: list[Rows] = []

    def add(self, rows: Rows) -> None:
        """Let rows wait."""
        if count_rows(rows):
            self._parts.append(rows)

    def release(self, known_by_ts: int) -> Rows:
        """Return the rows whose label is known at a moment, in order of (event_ts, example_id); the others go on waiting."""
        if not self._parts:
            return {}
        waiting = concat_rows(self._parts)
        is_known = waiting["label_ts"] <= known_by_ts
        left = {name: values[~is_known] for name, values in waiting.items()}
        self._parts = [left] if count_rows(left) else []
        known = {name: values[is_known] for name, values in waiting.items()}
        order = np.lexsort((known["example_id"], known["event_ts"]))
        return {name: values[order] for name, values in known.items()}


@dataclass(frozen=True)
class StreamTask:
    """One VM on one stream."""

    state: TrainState
    """Changed in place; one that was loaded goes on where it was saved."""
    objective: Objective
    window: StreamWindow
    loop: LoopConfig
    """Its `checkpoint_every` counts steps of the whole stream."""
    hooks: Hooks
    """`on_checkpoint` is called inside of chunks and after each."""
    collate: Callable[[int], Callable[[Mapping[str, NDArray[Any]]], Batch]]
    """From the begin of a chunk to what makes batches of its rows with what was known then: ids that nobody had met are unknown."""
    keep: Callable[[int, Rows, Predictions], None]
    """Takes the number of a chunk, its rows and what is predicted of them, before the VM learns from the chunk. After a kill it may be
    called again with the same."""
    seed: int


def cut_chunks(blocks: Iterable[Rows], window: StreamWindow, first: int = 0) -> Iterator[Rows]:
    """Yield the rows of each chunk from `first` to the last; {} where a chunk has none.

    Args:
        blocks: rows of these chunks in order of time.
        window: how the stream is cut.
        first: number of the first chunk.
    """
    held: list[Rows] = []
    number = first
    for block in blocks:
        if not count_rows(block):
            continue
        chunks = window.number(block["event_ts"])
        edges = [0, *(np.flatnonzero(np.diff(chunks)) + 1).tolist(), len(chunks)]
        for begin, end in pairwise(edges):
            while number < chunks[begin]:
                yield concat_rows(held)
                held, number = [], number + 1
            held.append({name: values[begin:end] for name, values in block.items()})
    while number < window.num_chunks:
        yield concat_rows(held)
        held, number = [], number + 1


def run_stream(task: StreamTask, blocks: Iterable[Rows], waiting: LabelBuffer) -> None:
    """Predict and learn chunk after chunk, from where `task.state` stands to the end of the stream.

    Args:
        task: the VM and its settings.
        blocks: rows of the chunks from `task.state.counters.chunk` on, in order of time.
        waiting: rows of earlier chunks whose label was not known when the chunk before began.

    Raises:
        DataError: a loss is not finite.
    """
    counters = task.state.counters
    for rows in cut_chunks(blocks, task.window, counters.chunk):
        span = task.window.chunk(counters.chunk)
        done = counters.step - counters.chunk_first_step
        if done == 0 and count_rows(rows):
            task.keep(counters.chunk, rows, _predict(task, rows, span.start_ts))
        waiting.add(rows)
        _learn(task, waiting.release(span.stop_ts), done)
        counters.chunk += 1
        counters.chunk_first_step = counters.step
        task.hooks.on_checkpoint(task.state)


def _predict(task: StreamTask, rows: Rows, known_by_ts: int) -> Predictions:
    collate = task.collate(known_by_ts)
    parts = (
        {name: values[begin : begin + _PREDICT_ROWS] for name, values in rows.items()}
        for begin in range(0, count_rows(rows), _PREDICT_ROWS)
    )
    return predict(task.state.model, ((part["user"], collate(part)) for part in parts))


def _learn(task: StreamTask, rows: Rows, done: int) -> None:
    """Take the steps of a chunk but for those that are done."""
    if not count_rows(rows):
        return
    batches = (
        task.collate(task.window.chunk(number).start_ts)(batch)
        for number, batch in islice(_batches(task, rows), done, None)
    )
    fit(task.state, batches, task.objective, task.loop, _NO_END, task.hooks)


def _batches(task: StreamTask, rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Yield shuffled batches, each of rows of one chunk with its number: rows whose label came late first."""
    now, chunks = task.state.counters.chunk, task.window.number(rows["event_ts"])
    for number in np.unique(chunks).tolist():
        part = {name: values[chunks == number] for name, values in rows.items()}
        order = shuffle_requests(part, np.random.default_rng([task.seed, now, number]))
        sizes = plan_steps([len(order)], task.loop.batch_rows).sizes(0).tolist()
        shuffled = {name: values[order] for name, values in part.items()}
        for batch in rechunk([shuffled], sizes):
            yield number, batch
