"""Features from the past: worked out by hand, and equal to a slow twin on generated logs."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.data.past import NEVER, PastRows, past_features, past_names, past_values
from tests.oracles.past import Event, Request, past_twin

HOUR = 3_600_000_000


def rows(*cells: tuple[int, int, int]) -> PastRows:
    user, event_ts, value = (
        np.asarray(column, dtype=np.int64) for column in zip(*cells, strict=True)
    )
    return PastRows(user, event_ts, {"item": value})


def test_counts_and_recency_of_a_small_log() -> None:
    events = rows((1, 0, 5), (1, HOUR, 5), (1, HOUR, 6), (2, 0, 5))
    requests = rows((1, 0, 5), (1, HOUR, 5), (1, 3 * HOUR, 5), (1, 3 * HOUR, 7), (3, HOUR, 5))
    found = past_features(requests, events, events.event_ts)
    np.testing.assert_allclose(
        found["past_count_item"], np.log1p([0, 1, 2, 0, 0]).astype(np.float32), rtol=1e-6
    )
    year = math.log1p(365 * 86_400)
    expected = [NEVER, math.log1p(3600) / year, math.log1p(7200) / year, NEVER, NEVER]
    np.testing.assert_allclose(found["past_recency_item"], expected, rtol=1e-6)


def test_event_at_request_time_is_not_visible() -> None:
    events = rows((1, HOUR, 5))
    found = past_features(rows((1, HOUR, 5), (1, HOUR + 1, 5)), events, events.event_ts)
    assert found["past_count_item"].tolist() == pytest.approx([0.0, math.log(2)])


def test_event_is_not_visible_before_it_is_available() -> None:
    events = rows((1, 0, 5))
    late = np.asarray([HOUR])
    found = past_features(rows((1, HOUR - 1, 5), (1, HOUR, 5)), events, late)
    assert found["past_count_item"].tolist() == pytest.approx([0.0, math.log(2)])


def test_unknown_value_equals_nothing() -> None:
    events = rows((1, 0, 0))
    found = past_features(rows((1, HOUR, 0)), events, events.event_ts)
    assert found["past_count_item"].tolist() == [0.0]
    assert found["past_recency_item"].tolist() == [NEVER]


def test_no_events_and_no_requests() -> None:
    empty = PastRows(*(np.zeros(0, np.int64),) * 2, {"item": np.zeros(0, np.int64)})
    some = rows((1, HOUR, 5))
    assert past_features(some, empty, empty.event_ts)["past_count_item"].tolist() == [0.0]
    assert len(past_features(empty, some, some.event_ts)["past_recency_item"]) == 0
    assert len(past_features(empty, empty, empty.event_ts)["past_count_item"]) == 0


def test_names_follow_the_fields() -> None:
    assert past_names(("item", "kind"), recency=True) == (
        "past_count_item",
        "past_recency_item",
        "past_count_kind",
        "past_recency_kind",
    )
    assert past_names(("item",), recency=False) == ("past_count_item",)
    some = rows((1, HOUR, 5))
    assert list(past_features(some, some, some.event_ts, recency=False)) == ["past_count_item"]


def test_recency_is_of_order_one() -> None:
    year_us = np.asarray([365 * 86_400 * 1_000_000])
    assert past_values(np.asarray([1]), year_us)[1].tolist() == pytest.approx([1.0])


big = st.sampled_from([1, 2, 3, 2**31 - 2])
stamp = st.integers(0, 12).map(lambda n: n * HOUR // 2)
event = st.tuples(big, stamp, st.sampled_from([0, 0, 1, HOUR, 3 * HOUR]), big, st.integers(0, 3))
request = st.tuples(big, stamp, big, st.integers(0, 3))


@settings(max_examples=200, deadline=None)
@given(st.lists(event, max_size=30), st.lists(request, max_size=20))
def test_past_features_equal_the_slow_twin(
    events: list[tuple[int, ...]], requests: list[tuple[int, ...]]
) -> None:
    e = np.asarray(events, dtype=np.int64).reshape(-1, 5)
    r = np.asarray(requests, dtype=np.int64).reshape(-1, 4)
    available_ts = e[:, 1] + e[:, 2]
    found = past_features(
        PastRows(r[:, 0], r[:, 1], {"item": r[:, 2], "kind": r[:, 3]}),
        PastRows(e[:, 0], e[:, 1], {"item": e[:, 3], "kind": e[:, 4]}),
        available_ts,
    )
    twins = [Event(u, t, t + d, {"item": i, "kind": k}) for u, t, d, i, k in events]
    for row, (user, ts, item, kind) in enumerate(requests):
        expected = past_twin(Request(user, ts, {"item": item, "kind": kind}), twins)
        assert {name: values[row] for name, values in found.items()} == pytest.approx(
            expected, rel=1e-6
        )
