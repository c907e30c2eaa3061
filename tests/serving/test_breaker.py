"""A store that does not answer is asked again after a while, and not before."""

import pytest

from loopfm_ray.errors import StoreError, UnreachableError
from loopfm_ray.serving.breaker import Breaker
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.predictor import STORE_FAILED, STORE_PAUSED, Predictor
from loopfm_ray.store.target import open_current
from tests.serving.test_predictor import query


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def test_it_opens_after_failures_in_a_row_and_lets_one_call_try(clock):
    breaker = Breaker(clock, max_failures=3, open_s=2.0)
    for _ in range(2):
        assert breaker.allows()
        breaker.failed()
    breaker.succeeded()
    for _ in range(3):  # a success between starts the count anew
        assert breaker.allows()
        breaker.failed()
    assert breaker.is_open
    assert not breaker.allows()
    clock.now = 1.9
    assert not breaker.allows()
    clock.now = 2.0
    assert [breaker.allows() for _ in range(3)] == [True, False, False]
    breaker.failed()
    clock.now = 3.9
    assert not breaker.allows()
    clock.now = 4.1
    assert breaker.allows()
    breaker.succeeded()
    assert not breaker.is_open
    assert [breaker.allows() for _ in range(3)] == [True, True, True]
    assert breaker.num_opened == 1


def test_a_try_that_never_tells_does_not_keep_it_open(clock):
    breaker = Breaker(clock, max_failures=1, open_s=1.0)
    breaker.failed()
    clock.now = 1.0
    assert breaker.allows()
    clock.now = 2.0
    assert breaker.allows()


class Flaky:
    """A store that can be made to fail."""

    def __init__(self, store):
        self._store, self.error, self.calls = store, None, 0
        self.version, self.meta = store.version, store.meta

    def get_many(self, keys):
        self.calls += 1
        if self.error is not None:
            raise self.error
        return self._store.get_many(keys)

    def close(self):
        self._store.close()


@pytest.fixture
def flaky(world):
    pin = load_bundle(world.bundle).spec.history
    return Flaky(open_current(world.online, pin.space.id))


def test_a_request_does_not_wait_for_a_store_that_is_away(world, flaky, clock):
    breaker = Breaker(clock, max_failures=2, open_s=5.0)
    predictor = Predictor(load_bundle(world.bundle), flaky, breaker=breaker)
    expected = predictor.score(query())
    flaky.error = UnreachableError("Redis failed: TimeoutError")
    reasons = [predictor.score(query()).history.reason for _ in range(4)]
    assert reasons == [STORE_FAILED, STORE_FAILED, STORE_PAUSED, STORE_PAUSED]
    assert flaky.calls == 3
    answer = predictor.respond(query(), "r")
    assert answer.features.degraded
    assert answer.features.reason == STORE_PAUSED
    assert predictor.counters.store_failures == 5
    flaky.error, clock.now = None, 5.0
    found = predictor.score(query())
    assert found.history == expected.history
    assert (found.probs == expected.probs).all()


def test_a_damaged_record_of_one_user_holds_nobody_else_back(world, flaky, clock):
    breaker = Breaker(clock, max_failures=2)
    predictor = Predictor(load_bundle(world.bundle), flaky, breaker=breaker)
    flaky.error = StoreError("a history record has 3 bytes")
    for _ in range(5):
        assert predictor.score(query()).history.reason == STORE_FAILED
    assert flaky.calls == 5
    assert not breaker.is_open


def test_redis_that_is_gone_is_unreachable():
    pytest.importorskip("redis")
    from loopfm_ray.store.redis import RedisTarget, connect

    with pytest.raises(UnreachableError, match="Redis failed"):
        RedisTarget(connect("redis://127.0.0.1:1/0", timeout_s=0.2)).spaces()


def test_the_predictor_has_a_breaker_of_its_own(world, flaky):
    predictor = Predictor(load_bundle(world.bundle), flaky)
    flaky.error = UnreachableError("away")
    for _ in range(20):
        predictor.score(query())
    assert 3 <= flaky.calls < 20
    assert predictor.counters.store_failures == 20
