"""What a join is asked for, and what it found: `JoinSettings`, `JoinTask`, `JoinStats`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from loopfm_ray.data.joined import EVENT_TYPE, LABEL, SIDE_COLUMNS
from loopfm_ray.history.staleness import StalenessSketch
from loopfm_ray.store.cache import VersionFile
from loopfm_ray.store.filesystem import Location
from loopfm_ray.types import TimeRange

__all__ = [
    "BLOCK_ROWS",
    "JoinSettings",
    "JoinStats",
    "JoinTask",
    "KeyedPlaces",
    "StoredSide",
    "merge_stats",
]

BLOCK_ROWS = 2_000_000
"""Rows of a block, if nothing else is asked for."""
ExampleFiles = tuple[tuple[int, Path | VersionFile], ...]
"""`(period, file)` of one bucket, local or of a version."""


@dataclass(frozen=True)
class StoredSide:
    """Columns of the prepared examples that are kept beside each event of a history; None keeps none.

    Attributes:
        label: the task whose label it is; `label_ts` is kept with it, and readers must not tell it earlier.
        event_type: the categorical field of the request's context that tells what kind of event it was.
    """

    label: str | None = None
    event_type: str | None = None

    @property
    def origins(self) -> dict[str, str]:
        """The column of the examples that each column of a history comes from."""
        found = {LABEL: self.label, EVENT_TYPE: self.event_type}
        return {name: origin for name, origin in found.items() if origin is not None}

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns that a history table has more."""
        return tuple(column for name in self.origins for column in SIDE_COLUMNS[name])


@dataclass(frozen=True)
class JoinSettings:
    """What a history is, what stands beside it, and how much is in memory to find it.

    Attributes:
        max_len: the longest history.
        retention_us: how old an event may be at the request; None keeps all.
        block_rows: rows that are joined at once; changes no byte of the answer.
        with_own_latent: whether requests get the code of their own row.
        side: what is kept beside each event.
        keys: whose histories there are beside those of the user.
    """

    max_len: int
    retention_us: int | None = None
    block_rows: int = BLOCK_ROWS
    with_own_latent: bool = False
    side: StoredSide = StoredSide()
    keys: tuple[tuple[str, ...], ...] = ()

    @property
    def content(self) -> tuple[Any, ...]:
        """All that the bytes of the answer depend on."""
        side = tuple(sorted(self.side.origins.items()))
        return self.max_len, self.retention_us, self.with_own_latent, side, self.keys


@dataclass(frozen=True)
class KeyedPlaces:
    """Where the answers of the places of all keys wait for the buckets of users."""

    folder: Path
    num_places: int


@dataclass(frozen=True)
class JoinTask:
    """What `join_bucket` needs to know.

    Attributes:
        bucket: of users.
        examples: the files that may have requests.
        latents: the version of latents.
        out_dir: where the files go.
        time_range: of the requests.
        settings: what is asked for.
        earlier: files of examples before the requests, whose events may be in a history; needed with `settings.side`.
        keyed: where the answers of `settings.keys` wait; none without keys.
    """

    bucket: int
    examples: ExampleFiles
    latents: Location
    out_dir: Path
    time_range: TimeRange
    settings: JoinSettings
    earlier: ExampleFiles = ()
    keyed: KeyedPlaces | None = None


@dataclass(frozen=True)
class JoinStats:
    """What the join found; sums, so that buckets merge exactly.

    `coverage` is the share of requests with a history; staleness is the age of its newest event.
    """

    num_requests: int = 0
    num_with_history: int = 0
    sum_length: int = 0
    num_history_rows: int = 0
    num_extra_rows: int = 0
    num_late_scores: int = 0
    """Requests whose label was known before their teacher prediction could be read."""
    staleness: StalenessSketch = field(default_factory=StalenessSketch)

    @property
    def coverage(self) -> float:
        """Share of requests that have a history; 0 without requests."""
        return self.num_with_history / max(self.num_requests, 1)

    @property
    def mean_length(self) -> float:
        """Mean history length over all requests; 0 without requests."""
        return self.sum_length / max(self.num_requests, 1)


def merge_stats(stats: Sequence[JoinStats]) -> JoinStats:
    """Return the stats of all buckets together."""
    return JoinStats(
        num_requests=sum(item.num_requests for item in stats),
        num_with_history=sum(item.num_with_history for item in stats),
        sum_length=sum(item.sum_length for item in stats),
        num_history_rows=sum(item.num_history_rows for item in stats),
        num_extra_rows=sum(item.num_extra_rows for item in stats),
        num_late_scores=sum(item.num_late_scores for item in stats),
        staleness=StalenessSketch.merge([item.staleness for item in stats]),
    )
