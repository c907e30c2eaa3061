"""Small types that every part shares. Times are int64 microseconds UTC, intervals are half open."""

from dataclasses import dataclass

from loopfm_ray.errors import ConfigError

__all__ = ["MICROS_PER_DAY", "MICROS_PER_S", "UNKNOWN_ID", "TimeRange"]

MICROS_PER_S = 1_000_000
MICROS_PER_DAY = 86_400 * MICROS_PER_S

UNKNOWN_ID = 0
"""The id of every value that a vocabulary does not hold; its embedding is learnt as the default."""


@dataclass(frozen=True)
class TimeRange:
    """Half-open interval `[start_ts, stop_ts)` in microseconds UTC."""

    start_ts: int
    stop_ts: int

    def __post_init__(self) -> None:
        if self.stop_ts <= self.start_ts:
            raise ConfigError(
                f"time range must end after it starts, found start {self.start_ts} and stop {self.stop_ts};"
                " check data.split"
            )

    def contains(self, ts: int) -> bool:
        """Return whether `ts` lies inside."""
        return self.start_ts <= ts < self.stop_ts
