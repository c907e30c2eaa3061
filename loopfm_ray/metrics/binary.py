"""Metrics of a yes/no prediction: logloss, normalized entropy, AUC, and sums that merge exactly across workers."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from loopfm_ray.errors import MetricError, ShapeError

__all__ = [
    "PROB_EPSILON",
    "BinarySums",
    "Floats",
    "as_columns",
    "auc",
    "is_positive",
    "logloss",
    "mean_ranks",
    "normalized_entropy",
    "sigmoid",
]

Floats = NDArray[np.float64]

PROB_EPSILON = 1e-7
"""Probabilities are kept this far from 0 and 1 in a logarithm: one float32 step below 1."""

_FRACTION_BITS = 32


@dataclass(frozen=True)
class BinarySums:
    """Row count and sums from which logloss, NE and calibration follow.

    The sums are whole numbers of `2**-32`, so adding shards gives the same bits in any order and any split.
    """

    num_rows: int = 0
    label_units: int = 0
    prob_units: int = 0
    loss_units: int = 0

    @classmethod
    def from_probs(cls, label: ArrayLike, prob: ArrayLike) -> "BinarySums":
        """Sum over rows with labels [N] in [0, 1] and probabilities [N]."""
        label, prob = as_columns(label, prob)
        clipped = np.clip(prob, PROB_EPSILON, 1.0 - PROB_EPSILON)
        loss = -(label * np.log(clipped) + (1.0 - label) * np.log1p(-clipped))
        return cls(len(label), _units(label), _units(prob), _units(loss))

    @classmethod
    def from_logits(cls, label: ArrayLike, logit: ArrayLike) -> "BinarySums":
        """Sum over rows with labels [N] in [0, 1] and logits [N]."""
        label, logit = as_columns(label, logit)
        return cls.from_probs(label, sigmoid(logit))

    def __add__(self, other: "BinarySums") -> "BinarySums":
        return BinarySums(
            self.num_rows + other.num_rows,
            self.label_units + other.label_units,
            self.prob_units + other.prob_units,
            self.loss_units + other.loss_units,
        )

    @property
    def has_both_labels(self) -> bool:
        """Whether NE is defined: the mean label is neither 0 nor 1."""
        return 0 < self.label_units < self.num_rows << _FRACTION_BITS

    @property
    def mean_label(self) -> float:
        """Mean label; raises MetricError without rows."""
        return self.label_units / self._row_units()

    @property
    def mean_prob(self) -> float:
        """Mean prediction; raises MetricError without rows."""
        return self.prob_units / self._row_units()

    @property
    def logloss(self) -> float:
        """Mean negative log-likelihood, natural log; raises MetricError without rows."""
        return self.loss_units / self._row_units()

    @property
    def normalized_entropy(self) -> float:
        """Logloss over the entropy of the mean label of the same rows; raises MetricError for one class."""
        mean = self.mean_label
        if not self.has_both_labels:
            raise MetricError(
                f"normalized entropy needs both labels, found mean label {mean} over {self.num_rows}"
                " rows; evaluate on more rows"
            )
        return self.logloss / -(mean * math.log(mean) + (1.0 - mean) * math.log1p(-mean))

    @property
    def calibration(self) -> float:
        """Sum of predictions over sum of labels; raises MetricError without positives."""
        if self.label_units == 0:
            raise MetricError(
                f"calibration needs a positive label, found none in {self.num_rows} rows;"
                " evaluate on more rows"
            )
        return self.prob_units / self.label_units

    def _row_units(self) -> int:
        if self.num_rows == 0:
            raise MetricError("metrics need at least one row, found none; check the split")
        return self.num_rows << _FRACTION_BITS


def logloss(label: ArrayLike, prob: ArrayLike) -> float:
    """Return the mean negative log-likelihood of labels [N] under probabilities [N], natural log."""
    return BinarySums.from_probs(label, prob).logloss


def normalized_entropy(label: ArrayLike, prob: ArrayLike) -> float:
    """Return logloss over the entropy of the mean label of these rows; under 1 beats the base rate.

    Raises:
        MetricError: no rows, or all labels equal.
    """
    return BinarySums.from_probs(label, prob).normalized_entropy


def auc(label: ArrayLike, score: ArrayLike) -> float:
    """Return the chance that a positive row outscores a negative one, ties counted half.

    Args:
        label: [N] 0 or 1.
        score: [N] any monotone score.

    Raises:
        MetricError: no rows, labels other than 0 and 1, or only one of them.
    """
    label, score = as_columns(label, score)
    positive = is_positive(label)
    num_positive = int(positive.sum())
    num_negative = len(label) - num_positive
    if num_positive == 0 or num_negative == 0:
        raise MetricError(
            f"AUC needs both labels, found {num_positive} positives and {num_negative} negatives;"
            " evaluate on more rows"
        )
    rank_sum = float(mean_ranks(score)[positive].sum())
    return (rank_sum - num_positive * (num_positive + 1) / 2) / (num_positive * num_negative)


def mean_ranks(score: Floats) -> Floats:
    """Return the rank of each score [N] from 1 upwards; equal scores share the mean of their ranks."""
    _, inverse, counts = np.unique(score, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Floats = (last - (counts - 1) / 2.0)[inverse]
    return ranks


def is_positive(label: Floats) -> NDArray[np.bool_]:
    """Return which labels [N] are 1; raises MetricError when one is neither 0 nor 1."""
    positive: NDArray[np.bool_] = label == 1.0
    if not bool(np.all(positive | (label == 0.0))):
        raise MetricError("ranking metrics need labels of 0 or 1, found others; threshold them")
    return positive


def as_columns(*columns: ArrayLike) -> tuple[Floats, ...]:
    """Return the columns as float64 [N] of one length.

    Raises:
        ShapeError: a column is not flat, or lengths differ.
        MetricError: a value is not finite.
    """
    arrays = tuple(np.asarray(column, dtype=np.float64) for column in columns)
    shapes = [array.shape for array in arrays]
    if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
        raise ShapeError(f"metrics take flat columns of one length, found shapes {shapes}")
    if not all(bool(np.isfinite(array).all()) for array in arrays):
        raise MetricError("metrics need finite labels and predictions, found nan or inf")
    return arrays


def sigmoid(logit: ArrayLike) -> Floats:
    """Return the probability of each logit, in float64 and without overflow."""
    x = np.asarray(logit, dtype=np.float64)
    small = np.exp(-np.abs(x))
    result: Floats = np.where(x >= 0, 1.0, small) / (1.0 + small)
    return result


def _units(values: NDArray[Any]) -> int:
    units = np.rint(values * 2.0**_FRACTION_BITS).astype(np.int64)
    # Two halves, so that no sum of up to 2**31 rows overflows.
    high, low = units >> _FRACTION_BITS, units & ((1 << _FRACTION_BITS) - 1)
    return (int(high.sum()) << _FRACTION_BITS) + int(low.sum())
