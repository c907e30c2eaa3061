"""Quantiles of ages that merge across buckets: counts on a fixed logarithmic grid."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.types import MICROS_PER_S

__all__ = ["StalenessSketch"]

_STEPS_PER_DOUBLING = 16
"""Neighbouring grid points differ by 4.4 %, which bounds the relative error of a quantile."""
_NUM_CELLS = 52 * _STEPS_PER_DOUBLING


@dataclass(frozen=True)
class StalenessSketch:
    """How many ages fell into each cell of the grid; empty until filled."""

    counts: tuple[int, ...] = ()

    @classmethod
    def of(cls, ages_us: NDArray[np.int64]) -> "StalenessSketch":
        """Return the sketch of ages in microseconds, [N], at least 1 each."""
        cell = np.log2(np.maximum(ages_us, 1)) * _STEPS_PER_DOUBLING
        cell = np.clip(np.floor(cell).astype(np.int64), 0, _NUM_CELLS - 1)
        return cls(tuple(np.bincount(cell, minlength=_NUM_CELLS).tolist()))

    @classmethod
    def merge(cls, sketches: Sequence["StalenessSketch"]) -> "StalenessSketch":
        """Return the sketch of all ages together."""
        total = np.zeros(_NUM_CELLS, dtype=np.int64)
        for sketch in sketches:
            if sketch.counts:
                total += np.asarray(sketch.counts)
        return cls(tuple(total.tolist()))

    def quantile_s(self, share: float) -> float | None:
        """Return the age in seconds that `share` of all ages do not exceed, None without ages."""
        total = sum(self.counts)
        if not total:
            return None
        cell = int(np.searchsorted(np.cumsum(self.counts), share * total))
        # the middle of the cell, on the logarithmic scale
        age_us: float = 2.0 ** ((cell + 0.5) / _STEPS_PER_DOUBLING)
        return age_us / MICROS_PER_S

    def quantiles(self) -> dict[str, float | None]:
        """Return the quantiles that reports show, in seconds."""
        return {"p50": self.quantile_s(0.5), "p90": self.quantile_s(0.9)}
