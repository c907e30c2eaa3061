"""Are predicted probabilities right on average: the ratio, bins, and Platt scaling."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import BinarySums, Floats, as_columns, sigmoid

__all__ = ["CalibrationBin", "PlattScaling", "calibration", "calibration_bins", "fit_platt"]

_MAX_STEPS = 100
_TOLERANCE = 1e-10


@dataclass(frozen=True)
class CalibrationBin:
    """Rows of similar prediction."""

    mean_prediction: float
    mean_label: float
    count: int


@dataclass(frozen=True)
class PlattScaling:
    """The map `logit -> slope * logit + bias`."""

    slope: float = 1.0
    bias: float = 0.0

    def apply(self, logit: ArrayLike) -> Floats:
        """Return the corrected logits [N]."""
        return self.slope * np.asarray(logit, dtype=np.float64) + self.bias


def calibration(label: ArrayLike, prob: ArrayLike) -> float:
    """Return the sum of predictions over the sum of labels; 1 is right on average.

    Raises:
        MetricError: no row is positive.
    """
    return BinarySums.from_probs(label, prob).calibration


def calibration_bins(
    label: ArrayLike, prob: ArrayLike, num_bins: int = 20
) -> tuple[CalibrationBin, ...]:
    """Return up to `num_bins` bins of about equal row count, by rising prediction.

    Equal predictions share a bin, so row order does not matter and there may be fewer bins.

    Raises:
        MetricError: no rows.
    """
    label, prob = as_columns(label, prob)
    if len(label) == 0:
        raise MetricError("calibration bins need at least one row, found none; check the split")
    order = np.sort(prob)
    edges = order[np.linspace(0, len(order), num_bins + 1).astype(np.int64)[1:-1]]
    which = np.searchsorted(np.unique(edges), prob, side="right")
    count = np.bincount(which)
    prob_sum, label_sum = (
        np.bincount(which, weights=prob),
        np.bincount(which, weights=label),
    )
    return tuple(
        CalibrationBin(float(p / n), float(y / n), int(n))
        for p, y, n in zip(prob_sum, label_sum, count, strict=True)
        if n > 0
    )


def fit_platt(label: ArrayLike, logit: ArrayLike) -> PlattScaling:
    """Return the slope and bias of least logloss, found by Newton steps with halving.

    Args:
        label: [N] in [0, 1].
        logit: [N] model outputs before the sigmoid.

    Raises:
        MetricError: one class, or labels that the logits separate (no finite optimum).
    """
    label, logit = as_columns(label, logit)
    if not BinarySums.from_logits(label, logit).has_both_labels:
        raise MetricError("Platt scaling needs both labels, found one; fit on more rows")
    _check_overlap(label, logit)
    # A constant logit leaves the slope open: keep it at 1 and fit the bias alone.
    features = np.stack([logit - logit.mean(), np.ones_like(logit)], axis=1)
    features = features if float(np.ptp(logit)) > 0 else features[:, 1:]
    weights = np.zeros(features.shape[1])
    loss = _loss(features @ weights, label)
    for _ in range(_MAX_STEPS):
        prob = sigmoid(features @ weights)
        gradient = features.T @ (prob - label)
        hessian = (features * (prob * (1 - prob))[:, None]).T @ features
        step = np.linalg.lstsq(hessian, gradient, rcond=None)[0]
        weights, loss, is_done = _halving_step(features, label, weights, step, loss)
        if is_done:
            break
    if len(weights) == 1:
        return PlattScaling(1.0, float(weights[0] - logit.mean()))
    return PlattScaling(float(weights[0]), float(weights[1] - weights[0] * logit.mean()))


def _check_overlap(label: Floats, logit: Floats) -> None:
    positive, negative = logit[label > 0], logit[label < 1]
    if positive.min() > negative.max() or positive.max() < negative.min():
        raise MetricError(
            "Platt scaling has no optimum: the logits separate the labels; fit on more rows"
        )


def _halving_step(
    features: Floats, label: Floats, weights: Floats, step: Floats, loss: float
) -> tuple[Floats, float, bool]:
    size = 1.0
    while size > 1e-8:
        trial = weights - size * step
        trial_loss = _loss(features @ trial, label)
        if trial_loss <= loss:
            scale = 1.0 + float(np.abs(trial).max())
            return trial, trial_loss, float(np.abs(size * step).max()) < _TOLERANCE * scale
        size /= 2
    return weights, loss, True


def _loss(logit: Floats, label: Floats) -> float:
    return float(np.sum(np.logaddexp(0.0, logit) - label * logit))
