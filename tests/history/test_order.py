import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.history.order import time_order


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(-3, 3), st.integers(-5, 5), st.integers(0, 4)), max_size=60),
    st.sampled_from([1, 2**57]),
)
def test_order_equals_a_stable_sort_by_all_columns(rows, unit):
    user = np.array([row[0] for row in rows], dtype=np.int32)
    event_ts = np.array([row[1] * unit for row in rows], dtype=np.int64)
    example_id = np.array([row[2] for row in rows], dtype=np.int64)
    want = sorted(range(len(rows)), key=lambda row: (user[row], event_ts[row], example_id[row]))
    assert time_order(user, event_ts, example_id).tolist() == want


@pytest.mark.parametrize("num_times", [10, 10**9])
def test_order_of_a_long_table_equals_lexsort(num_times):
    rng = np.random.default_rng(0)
    user = rng.integers(0, 300, 50_000).astype(np.int32)
    event_ts = rng.integers(0, num_times, 50_000)
    example_id = rng.permutation(50_000)
    want = np.lexsort((example_id, event_ts, user))
    assert np.array_equal(time_order(user, event_ts, example_id), want)
