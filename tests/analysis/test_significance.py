import pytest
from scipy import stats

from loopfm_ray.analysis.significance import paired_test
from loopfm_ray.errors import MetricError


def test_equals_the_textbook():
    value, baseline = [0.71, 0.72, 0.70, 0.73, 0.715], [0.70, 0.70, 0.69, 0.71, 0.705]
    found = paired_test(value, baseline)
    want = stats.ttest_rel(value, baseline)
    interval = want.confidence_interval(0.95)
    assert found.p == pytest.approx(want.pvalue)
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert found.mean == pytest.approx(0.014)
    assert found.num_pairs == 5


def test_a_single_seed_proves_nothing():
    found = paired_test([0.7], [0.6])
    assert (found.p, found.low, found.high) == (None, None, None)
    assert found.mean == pytest.approx(0.1)


def test_differences_without_spread():
    assert paired_test([1.0, 2.0], [0.5, 1.5]).p == 0.0
    assert paired_test([1.0, 2.0], [1.0, 2.0]).p == 1.0


@pytest.mark.parametrize(
    ("value", "baseline"), [([], []), ([1.0], [1.0, 2.0]), ([float("nan")], [1.0])]
)
def test_unfit_input_is_an_error(value, baseline):
    with pytest.raises(MetricError, match="paired test"):
        paired_test(value, baseline)
