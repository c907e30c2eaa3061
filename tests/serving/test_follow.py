"""A newer version of the space is read without a restart, and no answer mixes two."""

import itertools
import sys
import threading
from dataclasses import replace

import numpy as np
import pytest

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import StoreError
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.store.online import MemoryStore
from loopfm_ray.store.publish import load_memory, publish
from loopfm_ray.store.target import retire
from loopfm_ray.types import MICROS_PER_DAY
from tests.serving.world import STOP, write_latents

TS = STOP + MICROS_PER_DAY
PAST = {"past_count_item": 0.0, "past_recency_item": 0.5}
QUERIES = [ScoreQuery(f"u{user}", TS, ("i1", "i2", "i3"), dict(PAST)) for user in range(8)]
DAYS = (9, 6, 3, 0)
"""Days before the end of the log at which versions were made."""


@pytest.fixture(scope="module")
def versions(world, tmp_path_factory):
    """Versions of the bundle's space, oldest first, with the scores that each gives."""
    root = tmp_path_factory.mktemp("versions")
    prepared, bundle = PreparedData.open(world.prepared), load_bundle(world.bundle)
    found = []
    for days in DAYS:
        path = root / str(days)
        write_latents(prepared, path, stop_ts=STOP - days * MICROS_PER_DAY)
        store = load_memory(path, prepared.users.keys)
        scores = [scored.probs for scored in map(Predictor(bundle, store).score, QUERIES)]
        found.append((path, store.version, scores))
    for (_, _, one), (_, _, two) in itertools.pairwise(found):
        differ = [not np.array_equal(a, b) for a, b in zip(one, two, strict=True)]
        assert sum(differ) > len(QUERIES) / 2  # a mix would show
    return prepared.users.keys, found


@pytest.fixture(params=["lmdb", pytest.param("redis", marks=pytest.mark.redis)])
def target(request, tmp_path):
    if request.param == "lmdb":
        return tmp_path / "online"
    import redis

    url = request.getfixturevalue("redis_server")
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


def test_every_answer_while_versions_change_is_that_of_one_version(world, versions, target):
    keys, found = versions
    expected = {version: scores for _, version, scores in found}
    order = {version: number for number, (_, version, _) in enumerate(found)}
    publish(found[0][0], keys, target)
    predictor = load_predictor(world.bundle, target, history_timeout_s=30.0)
    answers, wrong, is_done = [], [], threading.Event()

    def score():
        seen, number = [], 0
        while not is_done.is_set() or number % len(QUERIES):
            answer = predictor.respond(QUERIES[number % len(QUERIES)], "r")
            version = answer.features.version
            want = expected[version][number % len(QUERIES)]
            if answer.features.reason == "store_failed" or not np.array_equal(answer.scores, want):
                wrong.append((version, number, answer))
            seen.append(order[version])
            number += 1
        answers.append(seen)

    threads = [threading.Thread(target=score) for _ in range(3)]
    for thread in threads:
        thread.start()
    for path, version, _ in found[1:]:
        publish(path, keys, target)
        assert predictor.reload()
        assert predictor.latents_version == version
        assert not predictor.reload()
        for _ in range(5):  # some work in every version, whatever the threads do
            assert predictor.respond(QUERIES[0], "r").features.version == version
    is_done.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(answers) == 3
    for seen in answers:
        assert seen == sorted(seen)  # never back to an older one
    assert predictor.respond(QUERIES[0], "r").features.version == found[-1][1]
    assert predictor.counters.reloads == len(found) - 1
    assert predictor.counters.reload_failures == predictor.counters.store_failures == 0


def test_another_space_beside_it_changes_no_answer(world, versions, target, tmp_path):
    keys, found = versions
    publish(found[-1][0], keys, target)
    predictor = load_predictor(world.bundle, target, history_timeout_s=30.0)
    write_latents(PreparedData.open(world.prepared), tmp_path / "other", snapshot="other")
    publish(tmp_path / "other", keys, target)
    assert not predictor.reload()
    for query, want in zip(QUERIES, found[-1][2], strict=True):
        np.testing.assert_array_equal(predictor.score(query).probs, want)


def test_a_space_that_was_retired_is_said_once_and_counted(world, versions, tmp_path, caplog):
    keys, found = versions
    publish(found[0][0], keys, tmp_path)
    predictor = load_predictor(world.bundle, tmp_path)
    retire(tmp_path, predictor.bundle.spec.history.space.id, force=True)
    with caplog.at_level("WARNING", "loopfm_ray"):
        assert not predictor.reload()
        assert not predictor.reload()
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "nothing is published" in caplog.text
    assert predictor.counters.reload_failures == 2
    # what is mapped stays readable
    np.testing.assert_array_equal(predictor.score(QUERIES[0]).probs, found[0][2][0])
    publish(found[1][0], keys, tmp_path)
    assert predictor.reload()
    np.testing.assert_array_equal(predictor.score(QUERIES[0]).probs, found[1][2][0])


class Source:
    """Gives what it was told to, one after the other."""

    def __init__(self, *answers):
        self.answers = list(answers)

    def poll(self):
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_a_store_of_another_space_is_never_switched_to(world, versions):
    bundle = load_bundle(world.bundle)
    keys, found = versions
    first, second = (load_memory(path, keys) for path, _, _ in found[:2])
    space = replace(bundle.spec.history.space, snapshot_id="other")
    alien = MemoryStore({}, "alien", {**second.meta, **space.to_meta()})
    source = Source(alien, StoreError("no answer"), None, second)
    predictor = Predictor(bundle, first, source)
    for _ in range(3):
        assert not predictor.reload()
        assert predictor.latents_version == first.version
    assert predictor.counters.reload_failures == 2
    assert predictor.reload()
    assert predictor.latents_version == second.version


def test_a_predictor_without_a_source_keeps_its_store(world, versions):
    keys, found = versions
    predictor = Predictor(load_bundle(world.bundle), load_memory(found[0][0], keys))
    assert not predictor.reload()
    assert predictor.latents_version == found[0][1]


opened = None
"""Names of the files that were opened since this became a list."""


def note_open(event, arguments):
    if event == "open" and opened is not None:
        opened.append(str(arguments[0]))


def test_a_request_looks_at_no_file(world, versions, tmp_path):
    global opened
    sys.addaudithook(note_open)
    keys, found = versions
    publish(found[0][0], keys, tmp_path)
    predictor = load_predictor(world.bundle, tmp_path)
    predictor.respond(QUERIES[0], "r")
    opened = []
    try:
        for query in QUERIES:
            predictor.respond(query, "r")
        assert opened == []
        predictor.reload()
        assert [name.endswith("CURRENT") for name in opened] == [True]
    finally:
        opened = None
