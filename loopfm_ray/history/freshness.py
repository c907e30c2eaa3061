"""How fresh the histories of a joined version and of what is published are, and when that is an alarm."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat

from loopfm_ray.config import Config
from loopfm_ray.history.staleness import StalenessSketch
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.tables import map_ipc, read_parquet
from loopfm_ray.types import MICROS_PER_S

__all__ = [
    "Freshness",
    "FreshnessConfig",
    "Published",
    "decide",
    "decide_published",
    "freshness",
    "measure",
    "published",
]


class FreshnessConfig(Config):
    """When the freshness of histories is an alarm."""

    ages_s: tuple[PositiveFloat, ...] = (3_600.0, 86_400.0, 604_800.0)
    """Ages of the newest event at which coverage is reported, in seconds."""
    min_coverage: NonNegativeFloat = Field(default=0.0, le=1)
    """Least share of requests that must have a history."""
    max_p90_s: PositiveFloat | None = None
    """Greatest age of the newest event at the 90th percentile; none sets no limit."""
    max_published_age_s: PositiveFloat | None = None
    """Greatest age of the watermark of the published histories; none sets no limit."""


@dataclass(frozen=True)
class Freshness:
    """What was measured over all requests.

    Attributes:
        num_requests: requests.
        coverage: share of requests with a history.
        coverage_by_age: for each age in seconds, the share of requests whose newest event is not older.
        p50_s: median age of the newest event within 2.2 %, None when no request has a history.
        p90_s: 90th percentile of it.
    """

    num_requests: int
    coverage: float
    coverage_by_age: tuple[tuple[float, float], ...]
    p50_s: float | None
    p90_s: float | None

    def to_tree(self) -> dict[str, Any]:  # Any: JSON
        """Return it as JSON, coverage by age as a mapping."""
        by_age = {f"{age_s:g}": share for age_s, share in self.coverage_by_age}
        return {**vars(self), "coverage_by_age": by_age}


@dataclass(frozen=True)
class Published:
    """What readers of the online store have.

    Attributes:
        version: of the latents.
        watermark_ts: time up to which all events are in it.
        age_s: from the watermark to the time that was asked for; negative when the watermark is later.
    """

    version: str
    watermark_ts: int
    age_s: float


def measure(parts: Iterable[tuple[int, NDArray[np.int64]]], ages_s: tuple[float, ...]) -> Freshness:
    """Return the freshness of requests that come in parts, in memory that does not grow with them.

    Args:
        parts: the number of requests, and the age of the newest event of those with a history, in microseconds.
        ages_s: ages at which coverage is counted.
    """
    num_requests = num_with_history = 0
    counts = [0] * len(ages_s)
    sketch = StalenessSketch()
    for size, age_us in parts:
        num_requests += size
        num_with_history += len(age_us)
        for place, age_s in enumerate(ages_s):
            counts[place] += int(np.count_nonzero(age_us <= age_s * MICROS_PER_S))
        sketch = StalenessSketch.merge([sketch, StalenessSketch.of(age_us)])
    total = max(num_requests, 1)
    return Freshness(
        num_requests=num_requests,
        coverage=num_with_history / total,
        coverage_by_age=tuple(
            (age_s, count / total) for age_s, count in zip(ages_s, counts, strict=True)
        ),
        p50_s=sketch.quantile_s(0.5),
        p90_s=sketch.quantile_s(0.9),
    )


def freshness(joined: Location, config: FreshnessConfig) -> Freshness:
    """Return the freshness of the joined version at `joined`, from its files, one at a time.

    Raises:
        StoreError: it can not be read.
    """
    return measure(_ages(open_version(joined)), config.ages_s)


def _ages(joined: Version) -> Iterator[tuple[int, NDArray[np.int64]]]:
    for entry in joined.manifest.files:
        if not entry.path.startswith("requests/"):
            continue
        bucket = entry.path.split("/")[1]
        event_ts = map_ipc(joined.path(f"history/{bucket}.arrow")).column("event_ts").to_numpy()
        table = read_parquet(joined.path(entry.path), ["event_ts", "latent_start", "latent_len"])
        request_ts, start, length = (table.column(n).to_numpy() for n in table.column_names)
        has = length > 0
        yield len(request_ts), request_ts[has] - event_ts[start[has] + length[has] - 1]


def published(version: str, watermark_ts: int, now_ts: int) -> Published:
    """Return how old an online version with this watermark is at `now_ts`, both in microseconds UTC."""
    return Published(version, watermark_ts, (now_ts - watermark_ts) / MICROS_PER_S)


def decide(found: Freshness, config: FreshnessConfig) -> tuple[str, ...]:
    """Return what is to be alarmed about in a joined version, empty when all is well."""
    alarms = []
    if found.coverage < config.min_coverage:
        alarms.append(
            f"coverage is {found.coverage:.4f}, expected at least {config.min_coverage}; check materialize and delay"
        )
    if config.max_p90_s is not None and found.p90_s is not None and found.p90_s > config.max_p90_s:
        alarms.append(
            f"90 % of the newest events are up to {found.p90_s:.0f} s old, expected at most {config.max_p90_s:.0f} s;"
            " materialize and publish more often"
        )
    return tuple(alarms)


def decide_published(found: Published | None, config: FreshnessConfig) -> tuple[str, ...]:
    """Return what is to be alarmed about in the online store; None is a store with nothing in it."""
    if found is None:
        if config.max_published_age_s is None:
            return ()
        return ("nothing is published, so nothing can be read online; publish",)
    if found.age_s < 0:
        return (
            f"the watermark of the published histories is {-found.age_s:.0f} s later than now; check the clock, or the"
            " unit of the event times",
        )
    if config.max_published_age_s is not None and found.age_s > config.max_published_age_s:
        return (
            f"the published histories end {found.age_s:.0f} s ago, expected at most {config.max_published_age_s:.0f} s;"
            " materialize and publish again",
        )
    return ()
