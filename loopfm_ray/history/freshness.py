"""How fresh the histories of a joined version are, and when that is an alarm."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeFloat, PositiveFloat

from loopfm_ray.config import Config
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.tables import map_ipc, read_parquet
from loopfm_ray.types import MICROS_PER_S

__all__ = ["Freshness", "FreshnessConfig", "decide", "freshness", "measure"]


class FreshnessConfig(Config):
    """When the freshness of histories is an alarm."""

    ages_s: tuple[PositiveFloat, ...] = (3_600.0, 86_400.0, 604_800.0)
    """Ages at which coverage is reported, in seconds."""
    min_coverage: NonNegativeFloat = 0.0
    """Least share of requests that must have a history."""
    max_p90_s: PositiveFloat | None = None
    """Greatest age of the newest event at the 90th percentile; none sets no limit."""


@dataclass(frozen=True)
class Freshness:
    """What was measured over all requests.

    Attributes:
        num_requests: requests.
        coverage: share of requests with a history.
        coverage_by_age: for each age in seconds, the share of requests whose newest event is not older.
        p50_s: median age of the newest event, None when no request has a history.
        p90_s: 90th percentile of it.
    """

    num_requests: int
    coverage: float
    coverage_by_age: tuple[tuple[float, float], ...]
    p50_s: float | None
    p90_s: float | None


def measure(num_requests: int, age_us: NDArray[np.int64], ages_s: tuple[float, ...]) -> Freshness:
    """Return the freshness of `num_requests` of which those with a history have these ages of the newest event."""
    total = max(num_requests, 1)
    by_age = tuple(
        (age_s, int(np.count_nonzero(age_us <= age_s * MICROS_PER_S)) / total) for age_s in ages_s
    )
    p50, p90 = (
        (None, None) if not len(age_us) else np.quantile(age_us, [0.5, 0.9], method="inverted_cdf")
    )
    return Freshness(
        num_requests=num_requests,
        coverage=len(age_us) / total,
        coverage_by_age=by_age,
        p50_s=None if p50 is None else float(p50) / MICROS_PER_S,
        p90_s=None if p90 is None else float(p90) / MICROS_PER_S,
    )


def freshness(joined: Location, config: FreshnessConfig) -> Freshness:
    """Return the freshness of the joined version at `joined`, from its files.

    Raises:
        StoreError: it can not be read.
    """
    ages, num_requests = [np.empty(0, dtype=np.int64)], 0
    version = open_version(joined)
    for entry in version.manifest.files:
        if not entry.path.startswith("requests/"):
            continue
        bucket = entry.path.split("/")[1]
        event_ts = map_ipc(version.path(f"history/{bucket}.arrow")).column("event_ts").to_numpy()
        table = read_parquet(version.path(entry.path), ["event_ts", "latent_start", "latent_len"])
        request_ts, start, length = (table.column(n).to_numpy() for n in table.column_names)
        has = length > 0
        ages.append(request_ts[has] - event_ts[start[has] + length[has] - 1])
        num_requests += len(request_ts)
    return measure(num_requests, np.concatenate(ages), config.ages_s)


def decide(found: Freshness, config: FreshnessConfig) -> tuple[str, ...]:
    """Return what is to be alarmed about, empty when all is well."""
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
