import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from loopfm_ray.errors import MetricError, ShapeError
from loopfm_ray.metrics.binary import auc
from loopfm_ray.metrics.grouped import GroupedAuc, grouped_auc
from tests.oracles import metrics as oracle

ROWS = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 4), st.integers(-2, 3)), min_size=1, max_size=60
)


@given(ROWS, st.randoms(use_true_random=False))
def test_equals_the_definition_in_any_row_order(rows, rng):
    expected = oracle.grouped_auc(*zip(*rows, strict=True))
    label, score, group = zip(*rng.sample(rows, len(rows)), strict=True)
    if expected is None:
        with pytest.raises(MetricError, match="both labels"):
            grouped_auc(label, score, group)
        return
    result = grouped_auc(label, score, group)
    assert (result.value, result.share, result.num_groups) == pytest.approx(expected)


def test_one_group_is_plain_auc_and_equals_sklearn():
    rng = np.random.default_rng(1)
    label, score = rng.integers(0, 2, 1000), np.round(rng.normal(size=1000), 1)
    result = grouped_auc(label, score, np.zeros(1000, int))
    assert result == GroupedAuc(pytest.approx(auc(label, score)), 1.0, 1)
    assert result.value == pytest.approx(roc_auc_score(label, score))


def test_users_with_one_label_are_left_out_and_counted():
    result = grouped_auc([1, 0, 1, 1], [0.9, 0.1, 0.5, 0.4], [7, 7, 8, 8])
    assert result == GroupedAuc(1.0, 0.5, 1)


def test_weight_is_the_number_of_rows():
    # user 1: AUC 1 over 2 rows, user 2: AUC 0 over 4 rows
    result = grouped_auc([1, 0, 1, 0, 0, 0], [2, 1, 0, 1, 2, 3], [1, 1, 2, 2, 2, 2])
    assert result.value == pytest.approx(2 / 6)


def test_bad_input_is_an_error():
    with pytest.raises(MetricError, match="at least one row"):
        grouped_auc([], [], np.zeros(0, int))
    with pytest.raises(ShapeError):
        grouped_auc([0, 1], [0, 1], [0])
