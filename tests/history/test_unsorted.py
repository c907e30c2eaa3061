import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.history import unsorted
from loopfm_ray.history.asof import newest_visible
from loopfm_ray.history.unsorted import LogChunk, join_log
from tests.history.test_asof import windows
from tests.oracles.asof import newest_visible_slow

EVENT = st.tuples(st.integers(-2, 12), st.integers(0, 15), st.integers(0, 12))


def chunks_of(rows, cuts):
    user, event_ts, delay = (np.array([row[i] for row in rows], dtype=np.int64) for i in range(3))
    ids = np.arange(len(rows))[::-1].copy()
    parts = [np.split(c, cuts) for c in (user, event_ts, event_ts + delay, ids)]
    return [LogChunk(*columns, carried=(columns[3],)) for columns in zip(*parts, strict=True)], (
        user,
        event_ts,
        event_ts + delay,
        ids,
    )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(EVENT, max_size=40),
    st.lists(st.tuples(st.integers(-4, 14), st.integers(-2, 31)), max_size=20),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 10)),
    st.integers(1, 3),
    st.sampled_from([1, 4, 1 << 19]),
)
def test_unsorted_log_gives_the_slow_twins_windows(
    rows, requests, max_len, retention, num_threads, range_rows
):
    chunks, columns = chunks_of(rows, [len(rows) // 3, len(rows) // 2])
    order = np.lexsort((columns[3], columns[1], columns[0]))
    events = tuple(column[order] for column in columns[:3])
    asked = tuple(np.array([r[i] for r in requests], dtype=np.int64) for i in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(unsorted, "_RANGE_ROWS", range_rows)
        found = join_log(asked, chunks, max_len, retention, num_threads)
    assert found.carried[0].tolist() == columns[3][order].tolist()
    assert windows(found.index) == newest_visible_slow(asked, events, max_len, retention)
    whole = newest_visible(asked, events, max_len, retention)
    assert found.index.start.tolist() == whole.start.tolist()
    assert (found.index.rows is None) == (whole.rows is None)
    if whole.rows is not None:
        assert found.index.rows.tolist() == whole.rows.tolist()
