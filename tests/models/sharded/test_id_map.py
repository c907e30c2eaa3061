import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.models.sharded.hash_index import HashIndex
from loopfm_ray.models.sharded.id_map import IdConfig, IdMap
from tests.oracles.ids import DictIds

EDGES = [-(2**63), -1, 0, 2**63 - 1]
IDS = st.one_of(st.integers(0, 12), st.sampled_from(EDGES))
# some steps look up twice: by histories, for one
CALLS = st.lists(st.tuples(st.sets(IDS, max_size=8), st.booleans()), max_size=14)


def ints(keys):
    return np.array(sorted(keys), np.int64)


@settings(max_examples=60)
@given(
    calls=CALLS,
    capacity=st.integers(1, 7),
    min_sightings=st.integers(1, 3),
    eviction=st.sampled_from(["lru", "lfu"]),
    evict_share=st.sampled_from([0.0, 0.4, 1.0]),
)
def test_the_map_does_what_dictionaries_do(calls, capacity, min_sightings, eviction, evict_share):
    config = IdConfig(
        capacity=capacity, min_sightings=min_sightings, eviction=eviction, evict_share=evict_share
    )
    ids, twin = IdMap(config, capacity), DictIds(config, capacity)
    step, row_of = 1, {}
    for keys, is_next in calls:
        step += is_next
        keys = ints(keys)
        admission = ids.meet(keys, step)
        has_row, new = twin.meet(keys.tolist(), step)
        assert set(keys[admission.rows >= 0].tolist()) == has_row
        assert set(keys[admission.is_new].tolist()) == new
        row_of = {key: row for key, row in row_of.items() if key in twin.members and key not in new}
        for key, row in zip(keys.tolist(), admission.rows.tolist(), strict=True):
            assert row == -1 or row_of.setdefault(key, row) == row
        assert len(set(row_of.values())) == len(row_of) == ids.size == len(twin.members)
        everything = ints({*range(13), *EDGES})
        found = dict(zip(everything.tolist(), ids.find(everything).tolist(), strict=True))
        assert {key: row for key, row in found.items() if row >= 0} == row_of
        for entries, expected in ((ids.members()[0], twin.members), (ids.waiting(), twin.waiting)):
            assert entries.keys.tolist() == sorted(expected)
            values = [list(one) for one in zip(entries.counts, entries.last_steps, strict=True)]
            assert values == [expected[key] for key in sorted(expected)]
        assert all(0 <= row < capacity for row in row_of.values())


@settings(max_examples=30)
@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(-40, 40), max_size=12)), max_size=20))
def test_the_index_does_what_a_dictionary_does(changes):
    index, twin = HashIndex(16), {}
    for is_insert, keys in changes:
        if is_insert:
            free = sorted(set(range(16)) - set(twin.values()))
            fresh = sorted(keys - set(twin))[: len(free)]
            index.insert(np.array(fresh, np.int64), np.array(free[: len(fresh)], np.int64))
            twin.update(zip(fresh, free, strict=False))
        else:
            gone = [twin.pop(key) for key in sorted(keys & set(twin))]
            index.remove(np.array(gone, np.int64))
        asked = np.arange(-41, 42)
        assert index.find(asked).tolist() == [twin.get(key, -1) for key in asked.tolist()]
        assert index.slots.tolist() == sorted(twin.values())
        assert index.size == len(twin)


def test_an_id_gets_its_row_at_the_kth_step_and_a_burst_counts_once():
    ids = IdMap(IdConfig(capacity=4, min_sightings=2), 4)
    assert ids.meet(ints({5}), 1).rows.tolist() == [-1]
    assert ids.meet(ints({5}), 1).rows.tolist() == [-1]
    assert ids.meet(ints({5}), 2).rows.tolist() == [0]
    assert not ids.waiting().keys.size


@pytest.mark.parametrize(("eviction", "gone"), [("lru", 1), ("lfu", 2)])
def test_who_gives_way(eviction, gone):
    ids = IdMap(IdConfig(capacity=2, eviction=eviction, evict_share=0), 2)
    for step, keys in enumerate([{1}, {1}, {2}, {3}], 1):
        rows = ids.meet(ints(keys), step).rows
    assert rows.tolist() == [gone - 1]
    assert ids.find(ints({gone})).tolist() == [-1]


def test_ids_of_this_step_keep_their_rows_and_smaller_ones_come_first():
    ids = IdMap(IdConfig(capacity=2), 2)
    assert ids.meet(ints({7}), 1).rows.tolist() == [0]
    assert ids.meet(ints({7, 9, 3}), 2).rows.tolist() == [1, 0, -1]


def test_a_map_that_is_too_small_for_a_checkpoint_keeps_what_would_stay_longest():
    ids = IdMap(IdConfig(capacity=4, min_sightings=2), 4)
    for step, keys in enumerate([{1, 2}, {1, 2}, {2, 3}, {3, 4}], 1):
        ids.meet(ints(keys), step)
    small = IdMap(IdConfig(capacity=2, min_sightings=2), 2)
    assert small.restore(ids.members()[0], ids.waiting()).tolist() == [-1, 0, 1]
    assert small.find(ints({1, 2, 3})).tolist() == [-1, 0, 1]
    assert small.waiting().keys.tolist() == [4]
