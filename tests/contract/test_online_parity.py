"""At any time, what an online store gives is what the offline join gives on the version that was live then.

Random logs with late events and late labels, published at random watermarks, cut at random; random requests at any time.
"""

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopfm_ray.history.asof import newest_visible
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.online import is_cut, visible_slice
from loopfm_ray.store.publish import load_memory, publish
from loopfm_ray.store.tables import code_bytes
from loopfm_ray.store.target import SpaceFollower, open_current
from tests.oracles import worlds
from tests.oracles.asof import newest_visible_slow

USERS = 3
KEYS = worlds.user_keys(USERS)
START = worlds.TRAINED_UNTIL_TS + 1

EVENT = st.tuples(
    st.integers(1, USERS),
    st.integers(START, START + 60),  # few instants, so that many are equal
    st.integers(0, 40),  # until it is in the log: late events
    st.integers(0, 40),  # until its label is known: late labels
    st.booleans(),
)
REQUEST = st.tuples(
    st.integers(1, USERS),
    st.integers(START - 5, START + 130),
    st.integers(1, 6),
    st.one_of(st.none(), st.integers(0, 60)),
)
STEP = st.tuples(
    st.integers(START + 20, START + 130),  # watermark
    st.one_of(st.none(), st.integers(1, 3), st.integers(4, 9)),  # max_events_per_user
    st.lists(REQUEST, min_size=1, max_size=12),
)


def write_version(folder, log, watermark_ts):
    """Write what had arrived by the watermark as a latents version."""
    known = [row for row in log if row[1] + row[2] <= watermark_ts]
    # ids in time order, as prepared data gives them: a late event renumbers what follows
    known.sort(key=lambda row: row[1])
    user, event_ts, _, late, is_event = (np.array(column) for column in zip(*known, strict=True))
    ids = np.arange(len(known), dtype=np.int64)
    latents, prob = worlds.latents_of(ids)
    rows = {
        "example_id": ids,
        "user": user.astype(np.int32),
        "item": np.zeros(len(known), dtype=np.int32),
        "event_ts": event_ts.astype(np.int64),
        "label_ts": (event_ts + late).astype(np.int64),
        "is_event": is_event.astype(bool),
        "fm_prob": prob,
    }
    writer = worlds.make_writer(folder)
    writer.begin([(0, 0)])
    writer.write(0, 0, rows, latents)
    return writer.finish([(0, 0)], watermark_ts=watermark_ts)


def offline(folder):
    """Return the columns (user, event_ts, available_ts) and codes of the events of a version."""
    table = LatentsReader(folder).read_bucket(0, events_only=True)
    columns = tuple(table.column(n).to_numpy() for n in ("user", "event_ts", "available_ts"))
    return columns, code_bytes(table.column("code"))


def joined_rows(columns, request):
    """Return the rows that the offline join gives a request, after asking the slow oracle as well."""
    user, request_ts, max_len, retention_us = request
    index = newest_visible(([user], [request_ts]), columns, max_len, retention_us)
    rows = np.arange(index.start[0], index.start[0] + index.length[0])
    rows = rows if index.rows is None else index.rows[rows]
    want = newest_visible_slow(([user], [request_ts]), columns, max_len, retention_us)
    assert rows.tolist() == list(want[0])
    return rows


class Tally:
    """What the examples met, so that the test can not pass by meeting nothing."""

    def __init__(self):
        self.equal = self.cut = self.found = self.late = 0


def check(store, columns, codes, request, tally):
    """Compare one answer of the store with the join."""
    user, request_ts, max_len, retention_us = request
    want = joined_rows(columns, request)
    (history,) = store.get_many([KEYS[user]])
    if history is None:
        assert not (columns[0] == user).any()
        assert len(want) == 0
        return
    seen = visible_slice(history, request_ts, max_len, retention_us)
    event_ts, got = history.event_ts[seen], history.codes[seen]
    tally.found += len(want) > 0
    if is_cut(history, len(seen), request_ts, max_len, retention_us):
        assert not history.is_complete
        # what is there is still the newest of the truth
        want = want[len(want) - len(seen) :]
        tally.cut += 1
        limit = store.meta["max_events_per_user"]
        is_newer = (history.event_ts < request_ts) & (history.available_ts <= request_ts)
        kept = retention_us is None or history.event_ts[0] >= request_ts - retention_us
        # a request that sees all that was kept, and keeps no more than that, lost nothing
        assert not (is_newer.all() and limit >= max_len and kept)
    else:
        tally.equal += 1
    assert event_ts.tolist() == columns[1][want].tolist()
    np.testing.assert_array_equal(got, codes[want])


@pytest.fixture(params=["memory", "lmdb", pytest.param("redis", marks=pytest.mark.redis)])
def kind(request):
    if request.param == "redis":
        return request.getfixturevalue("redis_server")
    return request.param


def test_online_history_equals_the_join_on_the_live_version_at_any_time(kind):
    tally = Tally()

    # the same examples every time, since what they met is counted
    @settings(max_examples=60, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(
        st.lists(EVENT, min_size=12, max_size=40),
        st.lists(STEP, min_size=1, max_size=3, unique_by=lambda step: step[0]),
    )
    def run(log, steps):
        with tempfile.TemporaryDirectory() as folder:
            replay(kind, Path(folder), log, sorted(steps, key=lambda step: step[0]), tally)

    run()
    assert tally.equal > 50
    assert tally.cut > 2
    assert tally.found > 20
    assert tally.late > 0


def replay(kind, root, log, steps, tally):
    """Publish at every watermark in turn and ask after each, through a reader that follows and a fresh one."""
    target = root / "online" if kind == "lmdb" else kind
    follower = None
    if kind.startswith("redis"):
        import redis

        with redis.Redis.from_url(kind) as client:
            client.flushdb()
    before = 0
    for number, (watermark_ts, max_events, requests) in enumerate(steps):
        if not any(row[1] + row[2] <= watermark_ts for row in log):
            continue
        manifest = write_version(root / str(number), log, watermark_ts)
        columns, codes = offline(root / str(number))
        tally.late += sum(row[1] <= before < row[1] + row[2] <= watermark_ts for row in log)
        before = watermark_ts
        if kind == "memory":
            stores = [load_memory(root / str(number), KEYS, max_events)]
        else:
            publish(root / str(number), KEYS, target, max_events)
            space = manifest.meta["space"]
            follower = follower or SpaceFollower(target, space, timeout_s=30.0)
            stores = [follower.poll(), open_current(target, space, timeout_s=30.0)]
        for store in stores:
            assert store.version == manifest.content
            for request in requests:
                check(store, columns, codes, request, tally)
            store.close()
