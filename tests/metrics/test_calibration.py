import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import logloss, sigmoid
from loopfm_ray.metrics.calibration import PlattScaling, calibration, calibration_bins, fit_platt


def test_calibration_is_the_ratio_of_sums():
    assert calibration([1, 0, 1, 0], [0.5, 0.5, 0.25, 0.25]) == 0.75
    with pytest.raises(MetricError):
        calibration([0, 0], [0.5, 0.5])


def test_bins_hold_every_row_once_and_keep_ties_together():
    rng = np.random.default_rng(0)
    prob = np.round(rng.random(999), 2)
    label = (rng.random(999) < prob).astype(float)
    bins = calibration_bins(label, prob, 10)
    assert sum(b.count for b in bins) == 999
    assert sum(b.count * b.mean_prediction for b in bins) == pytest.approx(prob.sum())
    assert sum(b.count * b.mean_label for b in bins) == pytest.approx(label.sum())
    means = [b.mean_prediction for b in bins]
    assert means == sorted(means)
    order = rng.permutation(999)
    again = calibration_bins(label[order], prob[order], 10)
    assert [b.count for b in again] == [b.count for b in bins]
    assert len(calibration_bins([0, 1, 1], [0.5, 0.5, 0.5], 10)) == 1
    with pytest.raises(MetricError):
        calibration_bins([], [], 10)


def test_platt_equals_unpenalised_logistic_regression():
    rng = np.random.default_rng(0)
    logit = rng.normal(size=3000) * 3 + 1
    label = (rng.random(3000) < sigmoid(0.4 * logit - 0.7)).astype(int)
    reference = LogisticRegression(C=np.inf, tol=1e-10, max_iter=1000).fit(logit[:, None], label)
    platt = fit_platt(label, logit)
    assert platt.slope == pytest.approx(reference.coef_[0, 0], rel=1e-4)
    assert platt.bias == pytest.approx(reference.intercept_[0], rel=1e-4)
    after = sigmoid(platt.apply(logit))
    assert logloss(label, after) < logloss(label, sigmoid(logit))
    assert calibration(label, after) == pytest.approx(1.0)


def test_platt_of_a_constant_logit_moves_the_bias_only():
    platt = fit_platt([1, 0, 0, 0], [2.0] * 4)
    assert platt.slope == 1.0
    assert sigmoid(platt.apply([2.0])) == pytest.approx([0.25])
    assert PlattScaling().apply([3.0]).tolist() == [3.0]


def test_platt_without_an_optimum_is_an_error():
    with pytest.raises(MetricError, match="both labels"):
        fit_platt([1, 1], [0.1, 0.2])
    with pytest.raises(MetricError, match="separate"):
        fit_platt([0, 1], [0.1, 0.2])
