"""Every online store passes this suite: a new one needs a line in OPENERS."""

import gc
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopfm_ray.errors import StoreError
from loopfm_ray.history.asof import newest_visible
from loopfm_ray.store.codes import CodeSpec, encode
from loopfm_ray.store.lmdb import LmdbStore, write_lmdb
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.online import NUM_KEPT, visible_slice
from loopfm_ray.store.publish import load_memory, publish
from loopfm_ray.store.redis import RedisStore, connect
from loopfm_ray.store.tables import code_bytes
from loopfm_ray.store.target import (
    SpaceFollower,
    live_spaces,
    open_current,
    open_target,
    open_version,
    retire,
)
from tests.oracles import worlds

KEYS = worlds.user_keys()
NAMES = ("one", "two", "three")
"""Versions of one space: each watermark has more events."""
OTHER = "other"
"""A version of another space."""


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("online")
    examples = worlds.make_examples(seed=9)
    examples["user"][examples["user"] == 5] = 8  # user 5 has no events
    examples["user"][examples["user"] == 6] = 0  # unknown users share id 0 and have no history
    examples["bucket"] = (examples["user"] % worlds.NUM_BUCKETS).astype(np.int16)
    for number, name in enumerate(NAMES):
        # the day before the last, the last, and one event that came late
        keep = examples["event_ts"] < (3500, 4000, 4000)[number]
        keep &= (examples["example_id"] != 300) | (number == 2)
        known = {column: values[keep] for column, values in examples.items()}
        worlds.write_latents(root / name, known, snapshot_id="snap")
    worlds.write_latents(root / OTHER, examples, snapshot_id="later")
    return root


def space_of(world, name="one"):
    return read_manifest(world / name).meta["space"]


def version_of(world, name):
    return read_manifest(world / name).content


def open_memory(world, tmp_path, request, max_events):
    return load_memory(world / "one", KEYS, max_events)


def open_lmdb(world, tmp_path, request, max_events):
    publish(world / "one", KEYS, tmp_path / "live", max_events)
    return open_current(tmp_path / "live", space_of(world))


def open_redis(world, tmp_path, request, max_events):
    url = flushed(request)
    publish(world / "one", KEYS, url, max_events)
    return open_current(url, space_of(world), timeout_s=30.0)


def flushed(request):
    """Return the address of the Redis server, emptied."""
    import redis

    url = request.getfixturevalue("redis_server")
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


OPENERS = {
    "memory": open_memory,
    "lmdb": open_lmdb,
    "redis": open_redis,
}
STORES = [
    pytest.param(name, marks=pytest.mark.redis if name == "redis" else ()) for name in OPENERS
]


@pytest.fixture(params=STORES)
def open_store(request, world, tmp_path):
    """A function that opens one kind of store on the first version."""
    opened = []

    def opener(max_events=None):
        opened.append(OPENERS[request.param](world, tmp_path, request, max_events))
        return opened[-1]

    yield opener
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store):
    return open_store()


def truth(world, name="one"):
    """Return user id -> (event_ts, available_ts, codes) of the latents version."""
    reader = LatentsReader(world / name)
    found = {}
    for bucket in reader.buckets:
        table = reader.read_bucket(bucket, events_only=True)
        user = table.column("user").to_numpy()
        codes = code_bytes(table.column("code"))
        for number in np.unique(user):
            rows = user == number
            times = [table.column(n).to_numpy()[rows] for n in ("event_ts", "available_ts")]
            found[int(number)] = (*times, codes[rows])
    return found


def test_every_user_has_the_events_of_the_latents_version(store, world):
    want = truth(world)
    histories = store.get_many(KEYS)
    assert histories[0] is None
    assert histories[5] is None
    assert 0 in want
    for number in set(want) - {0}:
        history = histories[number]
        event_ts, available_ts, codes = want[number]
        assert len(history) == len(event_ts) > 0
        np.testing.assert_array_equal(history.event_ts, event_ts)
        np.testing.assert_array_equal(history.available_ts, available_ts)
        np.testing.assert_array_equal(history.codes, codes)
        assert history.codes.dtype == np.uint8
        assert history.is_complete


def test_answers_follow_the_order_of_the_keys_and_repeat_with_them(store):
    keys = [KEYS[3], "nobody", KEYS[1], KEYS[3], "", "x" * 600]
    histories = store.get_many(keys)
    assert [history is None for history in histories] == [False, True, False, False, True, True]
    np.testing.assert_array_equal(histories[0].event_ts, histories[3].event_ts)
    np.testing.assert_array_equal(store.get_many([KEYS[1]])[0].event_ts, histories[2].event_ts)
    assert store.get_many([]) == []


def test_store_tells_what_it_holds(store, world):
    manifest = read_manifest(world / "one")
    assert store.version == manifest.content
    assert store.meta["snapshot_id"] == "snap"
    assert store.meta["space"] == space_of(world) == manifest.meta["space"]
    assert CodeSpec.from_tree(store.meta["code_spec"]) == worlds.SPEC
    assert store.meta["watermark_ts"] == 4000
    assert store.meta["max_events_per_user"] is None


def test_cut_histories_keep_the_newest_and_say_so(open_store, world):
    store = open_store(max_events=4)
    for number, (event_ts, _, codes) in truth(world).items():
        if number == 0:
            continue
        (history,) = store.get_many([KEYS[number]])
        np.testing.assert_array_equal(history.event_ts, event_ts[-4:])
        np.testing.assert_array_equal(history.codes, codes[-4:])
        assert history.is_complete == (len(event_ts) <= 4)
    assert store.meta["max_events_per_user"] == 4


def test_visible_slice_equals_the_offline_join_at_any_time(store, world):
    want = truth(world)
    histories = dict(zip(range(len(KEYS)), store.get_many(KEYS), strict=True))

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.integers(1, len(KEYS) - 1),
        st.integers(900, 4500),
        st.integers(1, 60),
        st.one_of(st.none(), st.integers(0, 3000)),
    )
    def check(number, request_ts, max_len, retention_us):
        if number not in want:
            assert histories[number] is None
            return
        event_ts, available_ts, codes = want[number]
        user = np.full(len(event_ts), number)
        index = newest_visible(
            ([number], [request_ts]), (user, event_ts, available_ts), max_len, retention_us
        )
        rows = np.arange(index.start[0], index.start[0] + index.length[0])
        rows = rows if index.rows is None else index.rows[rows]
        seen = visible_slice(histories[number], request_ts, max_len, retention_us)
        assert seen.tolist() == rows.tolist()
        np.testing.assert_array_equal(histories[number].codes[seen], codes[rows])

    check()


def test_histories_outlive_their_store(open_store):
    store = open_store()
    histories = [history for history in store.get_many(KEYS) if history is not None]
    copies = [history.codes.copy() for history in histories]
    store.close()
    del store
    gc.collect()
    for history, copy in zip(histories, copies, strict=True):
        np.testing.assert_array_equal(history.codes, copy)


def test_threads_read_together(store):
    want = [None if h is None else h.event_ts.tolist() for h in store.get_many(KEYS)]
    wrong = []

    def read():
        for _ in range(50):
            got = [None if h is None else h.event_ts.tolist() for h in store.get_many(KEYS)]
            if got != want:
                wrong.append(got)

    threads = [threading.Thread(target=read) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


PUBLISHED = [pytest.param("lmdb"), pytest.param("redis", marks=pytest.mark.redis)]


@pytest.fixture(params=PUBLISHED)
def target(request, tmp_path):
    """Where versions are published: a directory, or a Redis server."""
    return flushed(request) if request.param == "redis" else tmp_path / "live"


def test_nothing_published_is_a_store_error(target, world):
    with pytest.raises(StoreError, match="nothing is published"):
        open_current(target, space_of(world))
    with pytest.raises(StoreError, match="nothing is published"):
        retire(target, space_of(world))
    assert live_spaces(target) == []


def test_publishing_switches_readers_that_open_afterwards(target, world):
    one = publish(world / "one", KEYS, target)
    first = open_current(target, space_of(world))
    assert first.version == one
    two = publish(world / "two", KEYS, target)
    assert first.version == one
    assert first.get_many(KEYS)[1] is not None
    second = open_current(target, space_of(world))
    assert second.version == two
    assert one != two
    assert sum(len(h) for h in second.get_many(KEYS) if h) > sum(
        len(h) for h in first.get_many(KEYS) if h
    )


def test_only_the_two_newest_versions_of_a_space_stay_and_a_live_one_can_return(target, world):
    space = space_of(world)
    one = publish(world / "one", KEYS, target)
    first = open_current(target, space)
    publish(world / "two", KEYS, target)
    three = publish(world / "three", KEYS, target)
    kept = {version_of(world, name) for name in ("two", "three")}
    assert set(open_target(target).names(space)) == kept
    assert {name for name in stored_names(target, space) if name[0] != "."} == kept
    if isinstance(target, str):
        with pytest.raises(StoreError, match="was removed"):
            first.get_many(KEYS)
    else:  # the map outlives the directory
        assert first.get_many(KEYS)[1] is not None
    assert publish(world / "three", KEYS, target) == three
    assert publish(world / "one", KEYS, target) == one
    assert open_current(target, space).version == one
    assert len(stored_names(target, space)) == NUM_KEPT == 2


def stored_names(target, space):
    """Return the versions of a space of which anything is stored, whatever the target itself says."""
    if not isinstance(target, str):
        return {path.name for path in (target / "spaces" / space / "versions").iterdir()}
    import redis

    with redis.Redis.from_url(target) as client:
        keys = [key.decode().split(":") for key in client.keys(f"loopfm:{space}:*")]
    return {key[2] for key in keys if len(key) > 3}


def test_spaces_live_side_by_side_each_with_versions_of_its_own(target, world):
    one = publish(world / "one", KEYS, target)
    other = publish(world / OTHER, KEYS, target)
    old, new = space_of(world), space_of(world, OTHER)
    assert old != new
    served = open_current(target, old)
    before = [None if h is None else h.codes.tobytes() for h in served.get_many(KEYS)]
    assert (served.version, open_current(target, new).version) == (one, other)
    for name in ("two", "three"):
        publish(world / name, KEYS, target)
    assert open_current(target, new).version == other
    assert stored_names(target, new) == {other}
    publish(world / "one", KEYS, target)
    again = open_current(target, old).get_many(KEYS)
    assert [None if h is None else h.codes.tobytes() for h in again] == before
    found = {item.space: item for item in live_spaces(target)}
    assert list(found) == sorted([old, new])
    assert (found[old].snapshot_id, found[old].version) == ("snap", one)
    assert (found[new].snapshot_id, found[new].version) == ("later", other)
    assert found[new].watermark_ts == 4000
    assert found[new].published_at.startswith("20")


def test_a_space_that_is_not_there_is_refused_with_those_that_are(target, world):
    publish(world / "one", KEYS, target)
    for act in (open_current, retire):
        with pytest.raises(StoreError, match=rf"holds no space .*found \['{space_of(world)}'\]"):
            act(target, space_of(world, OTHER))
        with pytest.raises(StoreError, match="16 hex digits"):
            act(target, "../versions")


def test_retiring_a_space_leaves_the_others(target, world):
    old, new = space_of(world), space_of(world, OTHER)
    for name in ("one", "two", OTHER):
        publish(world / name, KEYS, target)
    reader = open_current(target, old)
    retire(target, old)
    assert [item.space for item in live_spaces(target)] == [new]
    assert open_current(target, new).get_many(KEYS)[1] is not None
    if isinstance(target, str):
        assert stored_names(target, old) == set()
        with pytest.raises(StoreError, match="was removed"):
            reader.get_many(KEYS)
    else:
        assert [path.name for path in (target / "spaces").iterdir()] == [new]
        assert reader.get_many(KEYS)[1] is not None
    with pytest.raises(StoreError, match="holds no space"):
        retire(target, old)
    publish(world / "one", KEYS, target)  # it can come back
    assert open_current(target, old).version == version_of(world, "one")


def test_the_last_space_goes_only_when_forced(target, world):
    publish(world / "one", KEYS, target)
    with pytest.raises(StoreError, match="is the last live one"):
        retire(target, space_of(world))
    assert open_current(target, space_of(world)).get_many(KEYS)[1] is not None
    retire(target, space_of(world), force=True)
    assert live_spaces(target) == []
    with pytest.raises(StoreError, match="nothing is published"):
        open_current(target, space_of(world))


def test_a_follower_opens_what_is_newer_and_nothing_else(target, world):
    publish(world / "one", KEYS, target)
    follower = SpaceFollower(target, space_of(world), timeout_s=30.0)
    first = follower.poll()
    assert first.version == version_of(world, "one")
    assert follower.poll() is None
    publish(world / OTHER, KEYS, target)  # another space is none of its business
    assert follower.poll() is None
    publish(world / "two", KEYS, target)
    second = follower.poll()
    assert second.version == version_of(world, "two")
    assert follower.poll() is None
    assert first.get_many(KEYS)[1] is not None
    # the same events cut to fewer are another thing to read, under the same latents version
    publish(world / "two", KEYS, target, 2)
    third = follower.poll()
    assert (third.version, third.meta["max_events_per_user"]) == (second.version, 2)
    retire(target, space_of(world))
    with pytest.raises(StoreError, match="holds no space"):
        follower.poll()


def test_the_version_before_the_live_one_can_be_opened(target, world):
    space, one, two = space_of(world), *(version_of(world, name) for name in ("one", "two"))
    publish(world / "one", KEYS, target)
    publish(world / "two", KEYS, target)
    assert open_version(target, space, one).version == one
    assert open_version(target, space, two).version == two
    with pytest.raises(StoreError, match=f"not {version_of(world, 'three')}"):
        open_version(target, space, version_of(world, "three"))


def test_user_without_a_key_is_refused(target, world):
    with pytest.raises(StoreError, match="has no key"):
        publish(world / "one", KEYS[:4], target)
    with pytest.raises(StoreError, match="nothing is published"):
        open_current(target, space_of(world))


@pytest.mark.redis
@pytest.mark.parametrize("stop_at", [1, 2, 3, 4, 5, 6, 7, 8])
def test_redis_publish_that_fails_keeps_the_old_version_and_completes(
    request, world, monkeypatch, stop_at
):
    import redis

    url = flushed(request)
    one = publish(world / "one", KEYS, url)
    sent = 0
    real = redis.connection.AbstractConnection.send_packed_command

    def failing(self, *args, **kwargs):
        nonlocal sent
        sent += 1
        if sent >= stop_at:
            raise redis.ConnectionError("gone")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(redis.connection.AbstractConnection, "send_packed_command", failing)
        with pytest.raises(StoreError, match="Redis failed"):
            publish(world / "two", KEYS, url)
    store = open_current(url, space_of(world), timeout_s=30.0)
    assert store.version == one
    assert store.get_many(KEYS)[1] is not None
    two = publish(world / "two", KEYS, url)
    store = open_current(url, space_of(world), timeout_s=30.0)
    assert store.version == two
    assert {history is None for history in store.get_many([KEYS[1], KEYS[2]])} == {False}


@pytest.mark.redis
@pytest.mark.parametrize("stop_at", range(1, 14))
def test_redis_retire_that_fails_leaves_the_space_whole_or_gone_and_completes(
    request, world, monkeypatch, stop_at
):
    import redis

    url = flushed(request)
    for name in ("one", "two", OTHER):
        publish(world / name, KEYS, url)
    old, new = space_of(world), space_of(world, OTHER)
    sent = 0
    real = redis.connection.AbstractConnection.send_packed_command

    def failing(self, *args, **kwargs):
        nonlocal sent
        sent += 1
        if sent >= stop_at:
            raise redis.ConnectionError("gone")
        return real(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(redis.connection.AbstractConnection, "send_packed_command", failing)
        with pytest.raises(StoreError, match="Redis failed"):
            retire(url, old)
    live = [item.space for item in live_spaces(url)]
    assert live in ([new], sorted([old, new]))
    if old in live:
        assert open_current(url, old, timeout_s=30.0).get_many(KEYS)[1] is not None
    retire(url, old)
    assert stored_names(url, old) == set()
    assert open_current(url, new, timeout_s=30.0).get_many(KEYS)[1] is not None
    with redis.Redis.from_url(url) as client:
        assert client.keys(f"loopfm:{old}:*") == []
        assert client.smembers("loopfm:spaces") == {new.encode()}


@pytest.mark.redis
def test_redis_that_does_not_answer_is_a_store_error():
    with pytest.raises(StoreError, match="Redis failed"):
        open_current("redis://127.0.0.1:1/0", "0" * 16)
    with pytest.raises(StoreError, match="no Redis address"):
        open_current("redis://127.0.0.1:port/0", "0" * 16)


@pytest.mark.redis
def test_only_known_redis_versions_open(request):
    with pytest.raises(StoreError, match="holds no version nope"):
        RedisStore(connect(flushed(request)), "0" * 16, "nope")


def test_a_directory_that_is_no_online_version_is_refused(world, tmp_path):
    with pytest.raises(StoreError, match="expected 'online'"):
        LmdbStore(world / "one")
    publish(world / "one", KEYS, tmp_path / "live")
    (folder,) = (tmp_path / "live" / "spaces" / space_of(world) / "versions").iterdir()
    (folder / "histories.lmdb").write_bytes(b"damaged")
    with pytest.raises(StoreError, match="can not be opened"):
        open_current(tmp_path / "live", space_of(world))
    with pytest.raises(StoreError, match="is damaged"):
        publish(world / "one", KEYS, tmp_path / "live")


def test_a_closed_store_says_so(world, tmp_path):
    publish(world / "one", KEYS, tmp_path / "live")
    store = open_current(tmp_path / "live", space_of(world))
    other = open_current(tmp_path / "live", space_of(world))
    store.close()
    with pytest.raises(StoreError, match="is closed"):
        store.get_many(KEYS)
    assert other.get_many(KEYS)[1] is not None


def test_records_that_do_not_fit_are_a_store_error(tmp_path):
    records = [(f"user-{number}", b"x" * 1000) for number in range(1000)]
    with pytest.raises(StoreError, match=r"failed: .* MiB free"):
        write_lmdb(tmp_path, records, map_bytes=1 << 16)


def test_keys_that_lmdb_can_not_hold_are_refused(world, tmp_path):
    keys = [KEYS[0], "x" * 600, *KEYS[2:]]
    with pytest.raises(StoreError, match="1 to 511 bytes, found 600"):
        publish(world / "one", keys, tmp_path / "live")
    assert live_spaces(tmp_path / "live") == []


def test_stored_codes_decode_to_the_latents(store, world):
    table = LatentsReader(world / "one").read_bucket(1, events_only=True)
    number = int(table.column("user").to_numpy()[-1])
    ids = table.column("example_id").to_numpy()[table.column("user").to_numpy() == number]
    (history,) = store.get_many([KEYS[number]])
    np.testing.assert_array_equal(history.codes, encode(worlds.latents_of(ids)[0], worlds.SPEC))
