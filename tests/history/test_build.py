import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.errors import ShapeError
from loopfm_ray.history.build import distinct_windows, pad_windows
from loopfm_ray.history.staleness import StalenessSketch

SLICES = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 9)), max_size=12)


@given(SLICES, st.integers(0, 6))
def test_padded_windows_hold_the_newest_rows_of_each_slice(slices, max_len):
    start = np.array([s for s, _ in slices], dtype=np.int64)
    length = np.array([n for _, n in slices], dtype=np.int32)
    rows, mask = pad_windows(start, length, max_len)
    assert rows.shape == mask.shape == (len(slices), max_len)
    for g, (first, size) in enumerate(slices):
        want = list(range(first, first + size))[-max_len:] if max_len else []
        assert rows[g, : len(want)].tolist() == want
        assert mask[g].tolist() == [True] * len(want) + [False] * (max_len - len(want))
        assert not rows[g, len(want) :].any()


def test_windows_of_different_counts_are_refused():
    with pytest.raises(ShapeError):
        pad_windows(np.zeros(2, dtype=np.int64), np.zeros(3, dtype=np.int64), 4)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=30))
def test_distinct_windows_keep_first_appearances(rows):
    columns = [np.array([row[i] for row in rows], dtype=np.int64) for i in range(2)]
    first, group = distinct_windows(*columns)
    assert [rows[i] for i in first] == list(dict.fromkeys(rows))
    assert [rows[first[g]] for g in group] == rows


def test_sketch_quantiles_lie_within_five_percent_and_merge():
    ages = np.random.default_rng(0).lognormal(20, 2, 5000).astype(np.int64)
    whole = StalenessSketch.of(ages)
    parts = StalenessSketch.merge(
        [StalenessSketch.of(ages[:100]), StalenessSketch.of(ages[100:]), StalenessSketch()]
    )
    assert parts == whole
    for share in (0.1, 0.5, 0.9):
        want = np.quantile(ages, share, method="inverted_cdf") / 1e6
        assert whole.quantile_s(share) == pytest.approx(want, rel=0.05)
