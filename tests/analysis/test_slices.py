import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.analysis.slices import SHORT_HISTORY, is_repeat, slice_masks

small = st.integers(0, 3)
times = st.integers(0, 12)


def columns(rows, width):
    return tuple(np.array([row[i] for row in rows], dtype=np.int64) for i in range(width))


@given(
    st.lists(st.tuples(small, small, times), max_size=20),
    st.lists(st.tuples(small, small, times, times), max_size=20),
)
def test_equals_looking_at_every_event(requests, events):
    want = [
        any((u, i) == (user, item) and ts < asked and ready <= asked for u, i, ts, ready in events)
        for user, item, asked in requests
    ]
    assert is_repeat(columns(requests, 3), columns(events, 4)).tolist() == want


def test_masks_part_the_rows():
    masks = slice_masks(np.array([True, False, False]), np.array([0, SHORT_HISTORY, 1]))
    assert {name: mask.tolist() for name, mask in masks.items()} == {
        "first": [False, True, True],
        "repeat": [True, False, False],
        "short": [True, False, True],
        "long": [False, True, False],
    }
