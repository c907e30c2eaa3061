import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import StoreError
from loopfm_ray.store.online import UserHistory, pack_history, unpack_history, visible_slice


def make(events, num_bytes=3, is_complete=True):
    rng = np.random.default_rng(len(events))
    times = np.array(events, dtype=np.int64).reshape(-1, 2)
    codes = rng.integers(0, 256, (len(times), num_bytes), dtype=np.uint8)
    return UserHistory(times[:, 0], times[:, 1], codes, is_complete)


EVENTS = st.lists(st.tuples(st.integers(0, 2**60), st.integers(0, 2**60)), max_size=9)


@given(EVENTS, st.integers(1, 40), st.booleans())
def test_records_read_back_as_views(events, num_bytes, is_complete):
    history = make(events, num_bytes, is_complete)
    data = pack_history(history)
    assert len(data) == 16 + len(events) * (16 + num_bytes)
    got = unpack_history(data)
    np.testing.assert_array_equal(got.event_ts, history.event_ts)
    np.testing.assert_array_equal(got.available_ts, history.available_ts)
    np.testing.assert_array_equal(got.codes, history.codes)
    assert got.is_complete == is_complete
    assert not got.codes.flags.owndata


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data[:5], "too few"),
        (lambda data: b"XX" + data[2:], "has format"),
        (lambda data: data[:2] + b"\x02" + data[3:], "has format"),
        (lambda data: data[:-1], "its header says"),
    ],
)
def test_damaged_records_are_refused(change, message):
    data = pack_history(make([(1, 2), (3, 4)]))
    with pytest.raises(StoreError, match=message):
        unpack_history(change(data))


def test_visible_slice_by_hand():
    history = make([(10, 10), (20, 90), (30, 30), (40, 40)])
    assert visible_slice(history, 40, 9).tolist() == [0, 2]
    assert visible_slice(history, 41, 2).tolist() == [2, 3]
    assert visible_slice(history, 90, 9).tolist() == [0, 1, 2, 3]
    assert visible_slice(history, 90, 9, 60).tolist() == [2, 3]
    assert visible_slice(history, 10, 9).tolist() == []
    assert visible_slice(make([]), 10, 9).tolist() == []
