"""Popularity negatives: distribution, exclusion, seeds."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.negatives import SampledNegatives, sample_negatives


def draw(
    user, item, event_ts, group=None, *, per_positive=1, max_tries=10, seed=0
) -> SampledNegatives:
    rows = (np.asarray(user, np.int32), np.asarray(item, np.int32), np.asarray(event_ts, np.int64))
    groups = np.zeros(len(user), np.int64) if group is None else np.asarray(group, np.int64)
    return sample_negatives(rows, groups, per_positive=per_positive, max_tries=max_tries, seed=seed)


def test_items_are_drawn_by_popularity() -> None:
    item = np.repeat([1, 2, 3], [6000, 3000, 1000])
    num = len(item)
    # a request of its own for each row, and items 1, 2, 3 can only be given to rows of another item
    found = draw(np.arange(num) + 1, item, np.arange(num))
    taken_one = item[found.source] == 1
    counts = Counter(found.item[taken_one].tolist())
    assert set(counts) == {2, 3}
    assert abs(counts[2] / (counts[2] + counts[3]) - 0.75) < 0.02


def test_item_of_the_same_request_is_never_drawn() -> None:
    user, event_ts = [1, 1, 1, 2, 2, 1], [5, 5, 5, 5, 5, 6]
    item = [1, 2, 3, 4, 1, 9]
    requests: dict[tuple[int, int], set[int]] = {}
    for u, t, i in zip(user, event_ts, item, strict=True):
        requests.setdefault((u, t), set()).add(i)
    for seed in range(50):
        found = draw(user, item, event_ts, seed=seed, max_tries=100)
        assert found.source.tolist() == [0, 1, 2, 3, 4, 5]
        for row, drawn in zip(found.source, found.item, strict=True):
            assert int(drawn) not in requests[user[row], event_ts[row]]


def test_negative_is_given_up_when_all_tries_fail() -> None:
    found = draw([1, 1], [1, 2], [5, 5])
    assert len(found.source) == 0
    assert found.num_given_up == 2


def test_negatives_of_one_positive_differ() -> None:
    user = np.arange(6) + 1
    found = draw(user, np.arange(6) + 1, np.arange(6), per_positive=3, max_tries=200)
    assert found.num_given_up == 0
    assert found.source.tolist() == np.repeat(np.arange(6), 3).tolist()
    for row in range(6):
        drawn = found.item[found.source == row].tolist()
        assert len(set(drawn)) == 3
        assert row + 1 not in drawn


@settings(max_examples=50, deadline=None)
@given(st.integers(1, 30), st.integers(1, 30), st.integers(0, 5))
def test_groups_do_not_touch_each_other(num_first: int, num_second: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    user = rng.integers(1, 5, num_first + num_second)
    item = rng.integers(1, 9, num_first + num_second)
    item[num_first:] += 100
    event_ts = np.arange(num_first + num_second) // 2
    group = np.repeat([3, 8], [num_first, num_second])
    both = draw(user, item, event_ts, group, seed=seed)
    alone = draw(
        user[:num_first], item[:num_first], event_ts[:num_first], group[:num_first], seed=seed
    )
    first = both.source < num_first
    assert both.item[first].tolist() == alone.item.tolist()
    assert both.source[first].tolist() == alone.source.tolist()
    assert (both.item[first] < 100).all()
    assert (both.item[~first] > 100).all()


def test_seed_changes_the_draw() -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(1, 50, 200), rng.integers(1, 50, 200), np.arange(200)
    assert draw(*rows, seed=1).item.tolist() == draw(*rows, seed=1).item.tolist()
    assert draw(*rows, seed=1).item.tolist() != draw(*rows, seed=2).item.tolist()
