import json
import math
from dataclasses import replace

import numpy as np
import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

import loopfm_ray.serving.predictor as module
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, StoreError
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.contract import RequestError, ScoreQuery
from loopfm_ray.serving.features import FeatureBuilder, read_histories
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.serving.rollout import Rollout, Rollouts, Served
from loopfm_ray.serving.service import Service
from loopfm_ray.store.codes import decode
from loopfm_ray.store.online import MemoryStore, UserHistory
from loopfm_ray.store.publish import load_memory, publish
from loopfm_ray.types import MICROS_PER_DAY
from tests.serving.world import CODE, FM_STOP, MAX_LEN, STOP, write_latents

TS = STOP - MICROS_PER_DAY
PAST = {"past_count_item": 0.0, "past_recency_item": 0.5}


def read_history(found, pin, ts):
    _, (read,) = read_histories([found], pin, [ts], [4])
    return read


def query(items=("i1", "i2", "i3"), user="u1", ts=TS, **context):
    return ScoreQuery(user, ts, tuple(items), {**PAST, **context})


@pytest.fixture(scope="module")
def bundle(world):
    return load_bundle(world.bundle)


@pytest.fixture
def store(world):
    return load_memory(world.latents, PreparedData.open(world.prepared).users.keys)


@pytest.fixture
def predictor(bundle, store):
    return Predictor(bundle, store)


class FailingStore:
    def __init__(self, like):
        self.version, self.meta = like.version, like.meta

    def get_many(self, keys):
        raise StoreError("timed out")

    def close(self):
        pass


def test_order_of_items_is_the_order_of_scores(predictor):
    items = [f"i{n}" for n in range(30)]
    forward = predictor.score(query(items)).probs
    backward = predictor.score(query(items[::-1])).probs
    assert len(set(forward.tolist())) == 30
    np.testing.assert_allclose(forward, backward[::-1], atol=1e-7)
    alone = [predictor.score(query([item])).probs[0] for item in items]
    np.testing.assert_allclose(forward, alone, atol=1e-7)


MANY = [
    query(["i1", "new", "i3"], "u1"),
    query(["i2"], "nobody", tags=["t1"]),
    query([f"i{n}" for n in range(40)], "u3", TS - 3 * MICROS_PER_DAY, shown=3.5, device="phone"),
    query(["i4", "i4"], "u1", FM_STOP + 8 * MICROS_PER_DAY),
    query(["i5"], "u2", tags=["t1", "t2", "t3"], shown=[0.5]),
]


def test_many_queries_in_one_pass_score_as_each_alone(bundle, store):
    """Other users, times, context, sequences of other lengths: nothing of one query shows in another."""
    together, alone = Predictor(bundle, store), Predictor(bundle, store)
    found = together.score_many(MANY)
    for scored, one in zip(found, map(alone.score, MANY), strict=True):
        np.testing.assert_allclose(scored.probs, one.probs, atol=1e-6)
        assert replace(scored, probs=0) == replace(one, probs=0)
    assert together.counters == alone.counters
    assert len({scored.history.length for scored in found}) > 2
    assert together.score_many([]) == []


def test_more_rows_than_one_pass_takes_are_cut_between_queries(bundle, store, monkeypatch):
    whole = Predictor(bundle, store).score_many(MANY)
    passes = []
    real = module.score_probs
    monkeypatch.setattr(module, "score_probs", lambda b, x: passes.append(len(x)) or real(b, x))
    monkeypatch.setattr(module, "_MAX_ROWS", 5)
    cut = Predictor(bundle, store).score_many(MANY)
    assert passes == [4, 40, 3]
    for scored, one in zip(cut, whole, strict=True):
        np.testing.assert_allclose(scored.probs, one.probs, atol=1e-6)


def test_a_wrong_query_among_many_is_named_and_none_is_answered(bundle, store, monkeypatch):
    predictor = Predictor(bundle, store)
    for rows in (5, 8192):
        monkeypatch.setattr(module, "_MAX_ROWS", rows)
        with pytest.raises(RequestError, match="colour") as caught:
            predictor.score_many([*MANY, query(colour="red"), query()])
        assert caught.value.index == len(MANY)
    assert (predictor.counters.refused, predictor.counters.requests) == (2, 0)


def test_unknown_items_share_one_default_and_are_counted(predictor):
    scored = predictor.score(query(["new-1", "i1", "new-2", "new-1"]))
    assert scored.features.num_unknown_items == 3
    assert len({scored.probs[n] for n in (0, 2, 3)}) == 1
    assert predictor.counters.unknown_items == 3


def test_an_unknown_user_is_scored_without_history_and_says_so(predictor):
    answer = predictor.respond(query(user="nobody"), "r")
    assert answer.features.unknown_user
    assert answer.features.degraded
    assert answer.features.reason == "not_in_store"
    assert answer.features.history_len == 0
    assert answer.features.age_s is None
    assert predictor.counters.unknown_users == predictor.counters.history_misses == 1


def test_history_enters_the_score_and_is_described(predictor, bundle, store):
    answer = predictor.respond(query(), "r")
    assert answer.features.history_len == MAX_LEN
    assert not answer.features.degraded
    assert answer.features.age_s > 0
    assert answer.features.version == store.version
    assert answer.features.snapshot_id == "snap"
    empty = Predictor(bundle, MemoryStore({}, store.version, store.meta))
    assert not np.allclose(empty.score(query()).probs, answer.scores)


def test_before_anything_is_visible_the_reason_says_so(predictor):
    answer = predictor.respond(query(ts=FM_STOP), "r")
    assert answer.features.reason == "nothing_visible"
    assert not answer.features.unknown_user


def test_an_event_at_request_time_is_not_visible(bundle):
    codes = np.arange(3 * CODE.num_bytes, dtype=np.uint8).reshape(3, -1)
    ts = np.asarray([TS - 5, TS - 1, TS], dtype=np.int64)
    found = UserHistory(ts, ts, codes, True)
    history, (read,) = read_histories([found], bundle.spec.history, [TS], [4])
    assert read.length == 2
    assert read.age_s == pytest.approx(1e-6)
    np.testing.assert_array_equal(history.latents[0].numpy(), decode(codes[:2], CODE))
    late = UserHistory(ts, ts + 3, codes, True)
    assert read_history(late, bundle.spec.history, TS).length == 1


def test_a_history_cut_in_the_store_is_degraded_only_when_it_is_too_short(bundle):
    def found(size, is_complete):
        ts = TS - np.arange(size, 0, -1, dtype=np.int64)
        return UserHistory(ts, ts, np.zeros((size, CODE.num_bytes), np.uint8), is_complete)

    pin = bundle.spec.history
    assert read_history(found(3, False), pin, TS).reason == "cut_in_store"
    assert read_history(found(MAX_LEN, False), pin, TS).reason is None
    # what was left out is older than what the model reads
    assert read_history(found(3, False), pin, TS - 2 + pin.retention_us).reason is None
    assert read_history(found(3, False), pin, TS - 3 + pin.retention_us).reason == "cut_in_store"
    assert read_history(found(3, True), pin, TS).reason is None


def test_a_failing_store_degrades_and_is_counted(bundle, store):
    predictor = Predictor(bundle, FailingStore(store))
    answer = predictor.respond(query(), "r")
    assert answer.features.reason == "store_failed"
    assert not answer.features.unknown_user
    assert predictor.counters.store_failures == predictor.counters.history_misses == 1
    empty = Predictor(bundle, MemoryStore({}, store.version, store.meta))
    np.testing.assert_array_equal(answer.scores, empty.score(query()).probs)


def test_fields_left_out_take_their_default_and_are_listed(predictor, bundle):
    answer = predictor.respond(query(), "r")
    assert set(answer.features.default_fields) == {"device", "shown", "tags"}
    mean = next(field.mean for field in bundle.spec.schema.fields if field.name == "shown")
    given = predictor.respond(query(shown=mean, tags=[], device="never seen"), "r")
    np.testing.assert_allclose(given.scores, answer.scores, atol=1e-7)
    assert given.features.default_fields == []
    assert given.features.unknown_fields == ["device"]


def test_every_field_moves_the_score(predictor):
    base = predictor.score(query(device="d0", shown=300.0, tags=["t1"])).probs
    for change in (
        {"device": "d1"}, {"shown": 330}, {"tags": ["t1", "t2"]}, {"past_count_item": 2.0},
        {"past_recency_item": [0.1, 0.2, 0.3]}, {"user": "u2"}, {"ts": TS - MICROS_PER_DAY},
    ):  # fmt: skip
        other = predictor.score(query(**{"device": "d0", "shown": 300.0, "tags": ["t1"], **change}))
        assert not np.allclose(base, other.probs), change


def test_only_the_last_keys_of_a_sequence_count(predictor, bundle):
    long = ["t2"] * 10 + ["t1"] * bundle.spec.sequence_len
    cut = predictor.score(query(tags=["t1"] * bundle.spec.sequence_len)).probs
    np.testing.assert_array_equal(predictor.score(query(tags=long)).probs, cut)


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({"price": 1.0}, r"\['price'\] are unknown"),
        ({"nothing": 1.0}, r"\['nothing'\] are unknown; the model reads \['device'"),
        ({"hour": "3"}, "computed from request_ts"),
        ({"device": 1.5}, "string or integer"),
        ({"device": ["d1"]}, "string or integer"),
        ({"shown": "1"}, "takes a number"),
        ({"shown": [1.0]}, "1 numbers for 3 items"),
        ({"shown": []}, "0 numbers for 3 items"),
        ({"shown": ["1", "2", "3"]}, "takes a number"),
        ({"shown": 1e300}, "too large"),
        ({"tags": "t1"}, "list of strings"),
        ({"tags": [1.0]}, "list of strings"),
    ],
)
def test_context_that_does_not_fit_is_refused_by_name(predictor, context, message):
    with pytest.raises(RequestError, match=message):
        predictor.score(query(**context))
    assert predictor.counters.refused == 1
    assert predictor.counters.requests == 0


def test_a_field_that_counts_the_past_has_no_default(predictor):
    with pytest.raises(RequestError, match=r"past_count_item.*no default"):
        predictor.score(ScoreQuery("u1", TS, ("i1",), {}))


def test_any_version_of_the_space_is_taken_and_no_other_space(world, bundle, store, tmp_path):
    prepared = PreparedData.open(world.prepared)
    write_latents(prepared, tmp_path / "younger", stop_ts=STOP - 5 * MICROS_PER_DAY)
    younger = load_memory(tmp_path / "younger", prepared.users.keys)
    assert younger.version != bundle.spec.history.latents_version
    answer = Predictor(bundle, younger).respond(query(), "r")
    assert answer.features.version == younger.version
    write_latents(prepared, tmp_path / "other", snapshot="other")
    other = load_memory(tmp_path / "other", prepared.users.keys)
    with pytest.raises(BundleError, match=r"space .*snapshot_id is other, expected snap"):
        Predictor(bundle, other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshot_id": "x"}, "snapshot_id is x, expected snap"),
        ({"code_spec": replace(CODE, bits=8).to_tree()}, "code_spec is"),
        ({"delay_us": 0}, "delay_us is 0, expected 3600000000"),
        ({"waits_for_label": False}, "waits_for_label is False"),
    ],
)
def test_every_part_of_the_space_counts_and_is_named(bundle, store, change, message):
    meta = {**store.meta, **change}
    del meta["space"]
    with pytest.raises(BundleError, match=message):
        Predictor(bundle, MemoryStore({}, store.version, meta))
    with pytest.raises(BundleError, match="its parts are those of"):
        Predictor(bundle, MemoryStore({}, store.version, {**store.meta, **change}))


def test_what_is_not_part_of_the_space_does_not_count(bundle, store):
    meta = {**store.meta, "watermark_ts": 1, "latents_version": "x", "max_events_per_user": 3}
    assert Predictor(bundle, MemoryStore({}, "x", meta)).latents_version == "x"


def test_a_vm_with_history_needs_a_store(world, bundle, tmp_path):
    with pytest.raises(BundleError, match="give the online store"):
        Predictor(bundle)
    with pytest.raises(StoreError, match="nothing is published"):
        load_predictor(world.bundle, tmp_path)
    prepared = PreparedData.open(world.prepared)
    write_latents(prepared, tmp_path / "latents", snapshot="other")
    publish(tmp_path / "latents", prepared.users.keys, tmp_path / "online")
    with pytest.raises(StoreError, match=f"holds no space {bundle.spec.history.space.id}"):
        load_predictor(world.bundle, tmp_path / "online")


def test_describe_names_versions_fields_and_limits(predictor, bundle):
    body = predictor.describe()
    assert body["model"]["version"] == bundle.version
    assert body["features"]["version"] == bundle.spec.history.latents_version
    assert body["features"]["trained_on"] == bundle.spec.history.latents_version
    assert body["features"]["space"] == bundle.spec.history.space.id
    sources = {field["name"]: field["source"] for field in body["fields"]}
    assert sources["device"] == sources["past_count_item"] == "request"
    assert sources["hour"] == "request_ts"
    assert sources["item"] == sources["city"] == "bundle"
    assert body["limits"]["items"] == 1000
    assert body["counters"]["requests"] == 0


def test_builder_gives_one_row_per_item_and_no_label(bundle):
    batch, _ = FeatureBuilder(bundle).build([query()])
    assert batch.ids.shape == (3, len(bundle.spec.schema.categorical))
    assert batch.label.sum() == 0


@pytest.fixture(scope="module")
def client(world, bundle):
    store = load_memory(world.latents, PreparedData.open(world.prepared).users.keys)
    service = Service(lambda served: Predictor(bundle, store))
    service.apply(Rollouts(models={"vm": Rollout(stable=Served(bundle="any"))}))
    return TestClient(create_api(service, clock=lambda: TS))


VALUES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.lists(st.text(max_size=4), max_size=3) | st.lists(st.floats(), max_size=3)
    | st.sampled_from(["d0", "t1", 300.0, 0])
)  # fmt: skip
NAMES = st.sampled_from(["device", "shown", "tags", "hour", *PAST, "other"])


@settings(max_examples=200, deadline=None)
@given(
    user=st.text(max_size=5) | st.sampled_from(["u1", "u2"]),
    items=st.lists(st.text(max_size=3) | st.sampled_from(["i1", "i2", "i90"]), max_size=4),
    context=st.dictionaries(NAMES, VALUES, max_size=5),
    ts=st.none() | st.integers(min_value=-1, max_value=2**63) | st.just(TS),
    has_past=st.booleans(),
)
def test_no_request_makes_the_predictor_fail(client, user, items, context, ts, has_past):
    body = {"user": user, "items": items, "context": {**(PAST if has_past else {}), **context}}
    if ts is not None:
        body["request_ts"] = ts
    text = json.dumps(body)
    response = client.post("/v1/models/vm:score", content=text)
    assert response.status_code in (200, 400, 422), response.text
    if response.status_code == 200:
        scores = response.json()["scores"]
        assert len(scores) == len(items)
        assert all(math.isfinite(score) and 0 <= score <= 1 for score in scores)
