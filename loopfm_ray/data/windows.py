"""From a stream of rows in time order to the batches of one training worker: shuffled in windows, cut to given sizes.

Rows are shuffled by request: what one user was offered at one time stays together (in chunks), so that a batch holds far
fewer histories than rows and each is encoded once. The same stream, seed and sizes give the same batches.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.examples import (
    ExampleFile,
    Rows,
    concat_rows,
    count_rows,
    fetch,
    read_rows,
)
from loopfm_ray.errors import ConfigError
from loopfm_ray.types import TimeRange

__all__ = [
    "Learnable",
    "StepPlan",
    "assign_buckets",
    "count_learnable",
    "keep_learnable",
    "plan_steps",
    "rechunk",
    "shuffle_requests",
    "shuffle_windows",
]

MAX_CHUNK_ROWS = 16


@dataclass(frozen=True)
class StepPlan:
    """How the rows of each worker are cut into the same number of steps.

    Every row is used exactly once in an epoch: worker `r` takes `sizes(r)[s]` rows at step `s`, and the loss is divided by
    the rows of all workers in that step, so uneven workers train exactly as one worker with all their rows would.
    """

    num_rows: tuple[int, ...]
    """Rows of each worker in one epoch."""
    num_steps: int
    """Steps of one epoch."""

    def sizes(self, rank: int) -> NDArray[np.int64]:
        """Return [steps] the rows that worker `rank` takes at each step of an epoch."""
        steps = np.arange(self.num_steps + 1, dtype=np.int64)
        sizes: NDArray[np.int64] = np.diff(steps * self.num_rows[rank] // self.num_steps)
        return sizes

    def global_sizes(self) -> NDArray[np.int64]:
        """Return [steps] the rows of all workers at each step."""
        shares = [self.sizes(rank) for rank in range(len(self.num_rows))]
        total: NDArray[np.int64] = np.sum(shares, axis=0, dtype=np.int64)
        return total


def plan_steps(num_rows: Sequence[int], batch_rows: int) -> StepPlan:
    """Cut an epoch into steps of about `batch_rows` rows over all workers.

    Raises:
        ConfigError: a worker has too few rows to take part in every step.
    """
    num_steps = -(-sum(num_rows) // batch_rows)
    if num_steps == 0 or min(num_rows) < num_steps:
        raise ConfigError(
            f"training needs at least a row for each worker and step, found rows {list(num_rows)} for {num_steps} steps"
            f" of batch_rows {batch_rows}; use fewer workers, a larger batch_rows, or more data"
        )
    return StepPlan(tuple(num_rows), num_steps)


def assign_buckets(sizes: Sequence[int], num_workers: int) -> list[list[int]]:
    """Spread buckets of these sizes over workers so that the largest share is small; returns buckets by worker.

    Raises:
        ConfigError: there are fewer buckets than workers.
    """
    if num_workers > len(sizes):
        raise ConfigError(
            f"{num_workers} workers can not share {len(sizes)} buckets; raise data.num_buckets or use fewer workers"
        )
    loads = [0] * num_workers
    shares: list[list[int]] = [[] for _ in range(num_workers)]
    for bucket in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        lightest = min(
            range(num_workers), key=lambda worker: (loads[worker], len(shares[worker]), worker)
        )
        loads[lightest] += sizes[bucket]
        shares[lightest].append(bucket)
    return [sorted(share) for share in shares]


@dataclass(frozen=True)
class Learnable:
    """Which rows a model may learn from that is trained until a moment: `PreparedData.learnable` makes it.

    A row of an item that had not been met by then is a negative that was drawn from what came later in its period: the item is
    unknown to the model, and so all that it would learn from such rows is that new items are not bought.
    """

    time_range: TimeRange
    until_ts: int
    num_items: int
    """Ids of items that had been met, 0 included."""

    columns = ("event_ts", "label_ts", "item")
    """What `mask` reads."""

    def mask(self, rows: Rows) -> NDArray[np.bool_]:
        """Return [n] which rows lie in the range, with an item and a label that were known by then."""
        event_ts = rows["event_ts"]
        kept: NDArray[np.bool_] = event_ts >= self.time_range.start_ts
        kept &= event_ts < self.time_range.stop_ts
        kept &= rows["label_ts"] <= self.until_ts
        kept &= rows["item"] < self.num_items
        return kept


def count_learnable(files: Sequence[ExampleFile], learnable: Learnable) -> dict[int, int]:
    """Return by bucket the rows that may be trained on."""
    fetch(files)
    counts: dict[int, int] = {}
    for file in files:
        rows = read_rows([file], learnable.time_range, columns=Learnable.columns)
        counts[file.bucket] = counts.get(file.bucket, 0) + int(
            np.count_nonzero(learnable.mask(rows))
        )
    return counts


def keep_learnable(blocks: Iterable[Rows], learnable: Learnable) -> Iterator[Rows]:
    """Yield the rows of each block that `count_learnable` counts."""
    for rows in blocks:
        kept = learnable.mask(rows)
        yield rows if kept.all() else {name: values[kept] for name, values in rows.items()}


def shuffle_requests(rows: Rows, generator: np.random.Generator) -> NDArray[np.int64]:
    """Return [n] an order of `rows` in which chunks of at most 16 rows of one request stand in random order."""
    user, event_ts = rows["user"], rows["event_ts"]
    by_request = np.lexsort((rows["example_id"], user, event_ts))
    same = np.zeros(len(by_request), dtype=bool)
    same[1:] = (np.diff(user[by_request]) == 0) & (np.diff(event_ts[by_request]) == 0)
    starts = np.flatnonzero(~same)
    place = np.arange(len(by_request)) - np.repeat(starts, np.diff([*starts, len(by_request)]))
    is_chunk_start = place % MAX_CHUNK_ROWS == 0
    chunk = np.cumsum(is_chunk_start) - 1
    rank = generator.permutation(int(np.count_nonzero(is_chunk_start)))
    shuffled: NDArray[np.int64] = by_request[np.argsort(rank[chunk], kind="stable")]
    return shuffled


def shuffle_windows(
    blocks: Iterable[Rows], window_rows: int, seed: Sequence[int]
) -> Iterator[Rows]:
    """Yield windows of about `window_rows` rows of the stream, each shuffled by request.

    Args:
        blocks: rows in time order.
        window_rows: a window ends with the block that fills it.
        seed: window `w` is shuffled by a generator seeded with `[*seed, w]`.
    """
    for number, window in enumerate(_windows(blocks, window_rows)):
        order = shuffle_requests(window, np.random.default_rng([*seed, number]))
        yield {name: values[order] for name, values in window.items()}


def rechunk(blocks: Iterable[Rows], sizes: Iterable[int]) -> Iterator[Rows]:
    """Cut a stream of blocks into batches of exactly these sizes; the stream must hold that many rows."""
    source = iter(blocks)
    held: Rows = {}
    begin = 0
    for size in sizes:
        parts: list[Rows] = []
        missing = int(size)
        while missing:
            available = count_rows(held) - begin
            if available == 0:
                held, begin = next(source), 0
                continue
            take = min(available, missing)
            parts.append({name: values[begin : begin + take] for name, values in held.items()})
            begin += take
            missing -= take
        yield concat_rows(parts)


def _windows(blocks: Iterable[Rows], window_rows: int) -> Iterator[Rows]:
    parts: list[Rows] = []
    num_rows = 0
    for block in blocks:
        if count_rows(block) == 0:
            continue
        parts.append(block)
        num_rows += count_rows(block)
        if num_rows >= window_rows:
            yield concat_rows(parts)
            parts, num_rows = [], 0
    if parts:
        yield concat_rows(parts)
