import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopfm_ray.data.windows import (
    MAX_CHUNK_ROWS,
    assign_buckets,
    plan_steps,
    rechunk,
    shuffle_requests,
    shuffle_windows,
)
from loopfm_ray.errors import ConfigError


def log(num_rows, num_users=3, num_times=4, seed=0):
    generator = np.random.default_rng(seed)
    event_ts = np.sort(generator.integers(0, num_times, num_rows))
    return {
        "example_id": np.arange(num_rows),
        "user": generator.integers(0, num_users, num_rows),
        "event_ts": event_ts,
    }


def blocks_of(rows, size):
    for begin in range(0, len(rows["example_id"]), size):
        yield {name: values[begin : begin + size] for name, values in rows.items()}


@given(st.lists(st.integers(0, 500), min_size=1, max_size=5), st.integers(1, 64))
def test_every_row_is_in_exactly_one_step(num_rows, batch_rows):
    num_steps = -(-sum(num_rows) // batch_rows)
    if num_steps == 0 or min(num_rows) < num_steps:
        with pytest.raises(ConfigError, match="at least a row"):
            plan_steps(num_rows, batch_rows)
        return
    plan = plan_steps(num_rows, batch_rows)
    for rank, rows in enumerate(num_rows):
        sizes = plan.sizes(rank)
        assert sizes.sum() == rows
        assert len(sizes) == plan.num_steps
        assert sizes.min() >= 1
        assert sizes.max() - sizes.min() <= 1
    assert plan.global_sizes().sum() == sum(num_rows)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=20), st.integers(1, 6))
def test_every_bucket_has_one_worker(sizes, num_workers):
    if num_workers > len(sizes):
        with pytest.raises(ConfigError, match="can not share"):
            assign_buckets(sizes, num_workers)
        return
    shares = assign_buckets(sizes, num_workers)
    assert sorted(bucket for share in shares for bucket in share) == list(range(len(sizes)))
    assert all(shares)
    loads = [sum(sizes[bucket] for bucket in share) for share in shares]
    assert max(loads) - min(loads) <= max(sizes)


@given(st.integers(1, 300), st.integers(1, 4), st.integers(1, 5), st.integers(0, 3))
def test_a_shuffle_keeps_every_row_and_the_chunks_of_a_request(num_rows, users, times, seed):
    rows = log(num_rows, users, times)
    order = shuffle_requests(rows, np.random.default_rng(seed))
    assert sorted(order) == list(range(num_rows))
    keys = np.stack([rows["user"][order], rows["event_ts"][order]], axis=1)
    changes = 1 + np.count_nonzero((np.diff(keys, axis=0) != 0).any(axis=1))
    _, counts = np.unique(keys, axis=0, return_counts=True)
    assert changes <= sum(-(-count // MAX_CHUNK_ROWS) for count in counts)


def test_windows_hold_all_rows_in_time_order_of_windows():
    rows = log(1000, num_times=50)
    windows = list(shuffle_windows(blocks_of(rows, 90), 200, (1, 2)))
    found = np.concatenate([window["example_id"] for window in windows])
    assert sorted(found) == list(range(1000))
    assert max(len(window["example_id"]) for window in windows) < 200 + 90
    edges = [(window["event_ts"].min(), window["event_ts"].max()) for window in windows]
    assert all(first[1] <= second[0] for first, second in itertools.pairwise(edges))


def test_the_seed_alone_decides_the_order():
    def ids(seed):
        windows = shuffle_windows(blocks_of(log(500), 100), 250, seed)
        return np.concatenate([window["example_id"] for window in windows])

    assert (ids((1, 0)) == ids((1, 0))).all()
    assert (ids((1, 0)) != ids((1, 1))).any()


@given(st.integers(1, 200), st.integers(1, 50), st.data())
def test_rechunk_gives_the_sizes_asked_for(num_rows, block, data):
    sizes = []
    while sum(sizes) < num_rows:
        sizes.append(data.draw(st.integers(1, num_rows - sum(sizes))))
    rows = log(num_rows)
    batches = list(rechunk(blocks_of(rows, block), sizes))
    assert [len(batch["user"]) for batch in batches] == sizes
    assert (np.concatenate([batch["example_id"] for batch in batches]) == np.arange(num_rows)).all()


def test_sequences_of_different_widths_are_padded_together():
    first = {"example_id": np.array([1]), "history": np.array([[7]])}
    second = {"example_id": np.array([2]), "history": np.array([[8, 9]])}
    (batch,) = rechunk([first, second], [2])
    assert batch["history"].tolist() == [[7, 0], [8, 9]]
