import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import metrics as sk

from loopfm_ray.errors import MetricError, ShapeError
from loopfm_ray.metrics.binary import (
    BinarySums,
    auc,
    logloss,
    mean_ranks,
    normalized_entropy,
    sigmoid,
)
from tests.oracles import metrics as oracle

# Few distinct scores, so that ties are common.
ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 6).map(lambda n: (n + 1) / 8)),
    min_size=2,
    max_size=40,
).filter(lambda rows: 0 < sum(y for y, _ in rows) < len(rows))


@given(ROWS)
def test_fast_metrics_equal_their_definitions(rows):
    label, prob = zip(*rows, strict=True)
    assert auc(label, prob) == pytest.approx(oracle.auc(label, prob))
    assert logloss(label, prob) == pytest.approx(oracle.logloss(label, prob))
    assert normalized_entropy(label, prob) == pytest.approx(oracle.normalized_entropy(label, prob))


@given(ROWS, st.randoms(use_true_random=False))
def test_row_order_does_not_matter(rows, rng):
    shuffled = rng.sample(rows, len(rows))
    for metric in (auc, logloss, normalized_entropy):
        label, prob = zip(*rows, strict=True)
        other_label, other_prob = zip(*shuffled, strict=True)
        assert metric(label, prob) == metric(other_label, other_prob)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 1), st.floats(-30, 30)), max_size=60), st.data())
def test_shards_merge_to_the_same_bits(rows, data):
    label = np.array([y for y, _ in rows], float)
    logit = np.array([x for _, x in rows], float)
    whole = BinarySums.from_logits(label, logit)
    shard = np.array([data.draw(st.integers(0, 3)) for _ in rows], int)
    parts = [BinarySums.from_logits(label[shard == k], logit[shard == k]) for k in range(4)]
    random.Random(0).shuffle(parts)
    assert sum(parts, BinarySums()) == whole


def test_equal_to_sklearn():
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 5000)
    prob = np.round(rng.random(5000) * 0.98 + 0.01, 2)
    assert auc(label, prob) == pytest.approx(sk.roc_auc_score(label, prob), abs=1e-12)
    assert logloss(label, prob) == pytest.approx(sk.log_loss(label, prob), abs=1e-9)


def test_known_values():
    assert auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auc([0, 1], [0.5, 0.5]) == 0.5
    assert logloss([1, 0], [0.5, 0.5]) == pytest.approx(math.log(2))
    assert normalized_entropy([1, 0, 0, 0], [0.25] * 4) == pytest.approx(1.0)
    assert mean_ranks(np.array([3.0, 1.0, 3.0])).tolist() == [2.5, 1.0, 2.5]


def test_sums_give_means_and_calibration():
    sums = BinarySums.from_probs([1, 0, 0, 1], [0.5, 0.25, 0.25, 0.5])
    assert (sums.num_rows, sums.mean_label, sums.mean_prob) == (4, 0.5, 0.375)
    assert sums.calibration == 0.75


def test_extreme_predictions_stay_finite():
    assert math.isfinite(logloss([0, 1], [1.0, 0.0]))
    assert BinarySums.from_logits([0], [1e6]).logloss == pytest.approx(-math.log(1e-7), rel=1e-6)
    assert sigmoid([-1e6, 0.0, 1e6]).tolist() == [0.0, 0.5, 1.0]


@pytest.mark.parametrize("metric", [auc, normalized_entropy])
@pytest.mark.parametrize("label", [[], [1, 1], [0, 0]])
def test_one_class_or_no_rows_is_an_error(metric, label):
    with pytest.raises(MetricError):
        metric(label, [0.5] * len(label))


def test_bad_columns_are_errors():
    with pytest.raises(MetricError, match="at least one row"):
        logloss([], [])
    with pytest.raises(ShapeError):
        auc([0, 1], [0.1])
    with pytest.raises(MetricError, match="finite"):
        auc([0, 1], [0.1, math.nan])
    with pytest.raises(MetricError, match="0 or 1"):
        auc([0, 0.5], [0.1, 0.2])
    with pytest.raises(MetricError, match="positive label"):
        BinarySums.from_probs([0], [0.5]).calibration  # noqa: B018
