import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import DataError
from loopfm_ray.history import asof
from loopfm_ray.history.asof import newest_visible
from tests.oracles.asof import newest_visible_slow


def columns(rows, width):
    return tuple(np.array([row[i] for row in rows], dtype=np.int64) for i in range(width))


def windows(index):
    answers = []
    for start, length in zip(index.start.tolist(), index.length.tolist(), strict=True):
        rows = range(start, start + length)
        answers.append(list(rows) if index.rows is None else index.rows[list(rows)].tolist())
    return answers


@st.composite
def logs(draw, max_delay=12, unit=1):
    """Small logs full of equal timestamps, late availability, empty users and duplicates."""
    users = st.integers(-1, 5)
    events = draw(
        st.lists(st.tuples(users, st.integers(0, 15), st.integers(0, max_delay)), max_size=40)
    )
    rows = sorted(((u, t * unit, (t + d) * unit) for u, t, d in events), key=lambda r: r[:2])
    asked = draw(st.lists(st.tuples(users, st.integers(-2, 31)), max_size=20))
    requests = [(u, t * unit) for u, t in asked]
    max_len = draw(st.integers(1, 8))
    retention = draw(st.one_of(st.none(), st.integers(0, 10).map(lambda r: r * unit)))
    return columns(requests, 2), columns(rows, 3), max_len, retention


@settings(max_examples=400, deadline=None)
@given(logs())
def test_windows_equal_the_slow_twin(log):
    assert windows(newest_visible(*log)) == newest_visible_slow(*log)


@settings(max_examples=100, deadline=None)
@given(logs(max_delay=0))
def test_windows_without_delay_are_slices_of_the_events(log):
    index = newest_visible(*log)
    assert index.rows is None
    assert windows(index) == newest_visible_slow(*log)


@settings(max_examples=100, deadline=None)
@given(logs(unit=2**57))
def test_times_too_far_apart_for_one_key_give_the_same_windows(log):
    assert windows(newest_visible(*log)) == newest_visible_slow(*log)


def test_small_chunks_change_no_window(monkeypatch):
    rng = np.random.default_rng(0)
    user = np.sort(rng.integers(0, 4, 200))
    event_ts = rng.integers(0, 60, 200)
    event_ts = event_ts[np.lexsort((event_ts, user))]
    events = (user, event_ts, event_ts + rng.integers(0, 30, 200))
    requests = (rng.integers(0, 5, 300), rng.integers(0, 100, 300))
    want = newest_visible_slow(requests, events, 5, 20)
    assert windows(newest_visible(requests, events, 5, 20)) == want
    monkeypatch.setattr(asof, "_CHUNK_CELLS", 7)
    assert windows(newest_visible(requests, events, 5, 20)) == want


@settings(max_examples=150, deadline=None)
@given(logs(), st.integers(0, 5), st.integers(0, 20), st.integers(0, 20))
def test_a_later_event_changes_no_earlier_row(log, user, event_ts, delay):
    (request_user, request_ts), (owner, times, ready), max_len, retention = log
    before = windows(newest_visible(*log))
    at = int(np.searchsorted(owner * 1000 + times, user * 1000 + event_ts, "right"))
    events = (
        np.insert(owner, at, user),
        np.insert(times, at, event_ts),
        np.insert(ready, at, event_ts + delay),
    )
    after = windows(newest_visible((request_user, request_ts), events, max_len, retention))
    for row, asked in enumerate(request_ts):
        if request_user[row] == user and event_ts < asked and event_ts + delay <= asked:
            continue
        assert [r - (r > at) for r in after[row]] == before[row]


@settings(max_examples=50, deadline=None)
@given(logs(), st.randoms())
def test_request_order_changes_no_window(log, random):
    (user, request_ts), *rest = log
    order = list(range(len(user)))
    random.shuffle(order)
    before = windows(newest_visible((user, request_ts), *rest))
    after = windows(newest_visible((user[order], request_ts[order]), *rest))
    assert after == [before[row] for row in order]


def test_event_at_request_time_is_not_visible():
    index = newest_visible(([1, 1], [10, 11]), columns([(1, 10, 10)], 3), 5)
    assert windows(index) == [[], [0]]


def test_event_available_at_request_time_is_visible():
    index = newest_visible(([1, 1], [14, 15]), columns([(1, 10, 15)], 3), 5)
    assert windows(index) == [[], [0]]


def test_retention_keeps_the_event_exactly_that_old():
    events = columns([(1, 10, 10), (1, 11, 11)], 3)
    assert windows(newest_visible(([1], [21]), events, 5, 10)) == [[1]]
    assert windows(newest_visible(([1], [21]), events, 5, 11)) == [[0, 1]]


def test_late_event_leaves_a_gap_that_rows_list():
    events = columns([(1, 1, 1), (1, 2, 50), (1, 3, 3)], 3)
    index = newest_visible(([1, 1, 1], [10, 60, 2]), events, 2)
    assert index.rows is not None
    assert index.rows.tolist() == [0, 1, 2, 0, 2]
    assert index.start.tolist() == [3, 1, 0]
    assert index.length.tolist() == [2, 2, 1]


def test_no_events_give_empty_histories():
    none = np.array([], dtype=np.int64)
    index = newest_visible(([1, 2], [10, 11]), (none, none, none), 5, 3)
    assert index.length.tolist() == [0, 0]
    assert index.start.tolist() == [0, 0]


@pytest.mark.parametrize("rows", [[(2, 1, 1), (1, 2, 2)], [(1, 2, 2), (1, 1, 1)]])
def test_unsorted_events_are_refused(rows):
    with pytest.raises(DataError, match="found row 1 before row 0"):
        newest_visible(([1], [10]), columns(rows, 3), 5)
