"""Paired comparison of two models over the same seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from loopfm_ray.errors import MetricError

__all__ = ["PairedTest", "paired_test"]


@dataclass(frozen=True)
class PairedTest:
    """A paired t-test of `value - baseline`.

    Attributes:
        num_pairs: seeds.
        mean: of the differences.
        low: lower end of the confidence interval of the mean, None with one pair.
        high: upper end of it.
        p: two-sided probability of a difference as large under equal means, None with one pair.
    """

    num_pairs: int
    mean: float
    low: float | None
    high: float | None
    p: float | None


def paired_test(
    value: Sequence[float], baseline: Sequence[float], confidence: float = 0.95
) -> PairedTest:
    """Compare two models, one number for each seed, in the same order.

    Differences that are all equal have an interval of no width, and p 0 (1 if they are 0).

    Raises:
        MetricError: the lengths differ, there are no pairs, or a number is not finite.
    """
    if len(value) != len(baseline) or not value:
        raise MetricError(
            f"a paired test needs as many values as baselines, found {len(value)} and {len(baseline)};"
            " give one of each for every seed"
        )
    difference = np.asarray(value, np.float64) - np.asarray(baseline, np.float64)
    if not np.isfinite(difference).all():
        raise MetricError("a paired test needs finite numbers, found NaN or infinity")
    mean = float(difference.mean())
    count = len(difference)
    if count == 1:
        return PairedTest(1, mean, None, None, None)
    error = float(difference.std(ddof=1)) / math.sqrt(count)
    if error <= 1e-15 * max(1.0, abs(mean)):
        return PairedTest(count, mean, mean, mean, 0.0 if mean else 1.0)
    reach = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * error
    p = float(2 * stats.t.sf(abs(mean / error), count - 1))
    return PairedTest(count, mean, mean - reach, mean + reach, p)
