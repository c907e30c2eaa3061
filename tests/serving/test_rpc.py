"""gRPC says what HTTP says: the same scores, the same refusals, the same keys."""

import json
import math
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from fastapi.testclient import TestClient
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.serving import scoring_pb2 as wire
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.contract import MAX_BODY_BYTES, MAX_ITEMS, RequestError
from loopfm_ray.serving.generate import _ROOT, GENERATED, generate
from loopfm_ray.serving.keys import ApiKeys, Gate, add_key
from loopfm_ray.serving.rollout import Rollouts, Served, promote
from loopfm_ray.serving.rpc import SERVICE, ScoringServicer, add_health, add_scoring
from loopfm_ray.serving.scoring_pb2_grpc import ScoringStub
from loopfm_ray.serving.service import Service
from loopfm_ray.types import MICROS_PER_DAY
from tests.serving.test_api import BATCH, NOW, SCORE, FakeScorer
from tests.serving.world import STOP

STATUS = {400: "INVALID_ARGUMENT", 401: "UNAUTHENTICATED", 404: "NOT_FOUND", 413: "INVALID_ARGUMENT",
          422: "INVALID_ARGUMENT", 429: "RESOURCE_EXHAUSTED", 500: "INTERNAL", 503: "UNAVAILABLE"}  # fmt: skip


class Clock:
    now_s = 100.0

    def __call__(self):
        return self.now_s


class Door:
    """One scorer behind both doors."""

    def __init__(self, scorer, keys=None):
        self.clock = Clock()
        gates = [Gate(keys.keys, self.clock) if keys else None for _ in range(2)]
        self.servicer = ScoringServicer(scorer, lambda: NOW, gates[0])
        self.server = grpc.server(
            ThreadPoolExecutor(4), options=[("grpc.max_receive_message_length", 64 * 2**20)]
        )
        add_scoring(self.servicer, self.server)
        add_health(self.servicer, self.server)
        port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()
        self.channel = grpc.insecure_channel(f"127.0.0.1:{port}")
        self.stub, self.health = ScoringStub(self.channel), health_pb2_grpc.HealthStub(self.channel)
        app = create_api(scorer, clock=lambda: NOW, gate=gates[1])
        self.http = TestClient(app, raise_server_exceptions=False)

    def close(self):
        self.channel.close()
        self.server.stop(None).wait()


@pytest.fixture(scope="module")
def door():
    made = Door(FakeScorer())
    yield made
    made.close()


def value_of(given):
    """Return the message that says what a JSON value says."""
    if isinstance(given, str):
        return wire.Value(text=given)
    if isinstance(given, int):
        return wire.Value(integer=given)
    if isinstance(given, float):
        return wire.Value(number=given)
    if given and isinstance(given[0], str):
        return wire.Value(texts=wire.Texts(values=given))
    return wire.Value(numbers=wire.Numbers(values=given))


def query_of(body):
    query = wire.Query(user=body.get("user", ""), items=body.get("items", []))
    when = body.get("request_ts")
    if when is not None:
        setattr(query, "rfc3339" if isinstance(when, str) else "micros", when)
    for name, value in body.get("context", {}).items():
        query.context[name].CopyFrom(value_of(value))
    return query


def refused(call):
    """Return the status, the problem and the other trailing metadata of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    trailing = dict(caught.value.trailing_metadata())
    problem = json.loads(trailing.pop("problem-bin"))
    assert caught.value.details() == problem["detail"]
    assert trailing["x-request-id"] == problem["request_id"]
    assert caught.value.code().name == STATUS[problem["status"]]
    return caught.value.code().name, problem, trailing


def same_refusal(problem, response):
    """Check that gRPC's problem is that of HTTP, but for the request id."""
    other = json.loads(response.text.replace("valid array", "valid list"))  # JSON's word for it
    assert problem | {"request_id": ""} == other | {"request_id": ""}


def score(door, body, model="vm", **more):
    return door.stub.Score(wire.ScoreRequest(model=model, query=query_of(body)), **more)


def test_what_is_committed_is_what_the_compiler_writes(tmp_path):
    generate(tmp_path)
    for name in GENERATED:
        committed = (_ROOT / "loopfm_ray/serving" / name).read_text()
        assert (tmp_path / "loopfm_ray/serving" / name).read_text() == committed, name


def test_scores_are_those_of_http(door):
    body = {"user": "u", "items": ["3", "0", "1", "0"], "context": {"a": 1, "b": [1.5, 2.0]}}
    answer = score(door, body)
    other = door.http.post(SCORE, json=body).json()
    assert list(answer.scores) == other["scores"] == [0.25, 1.0, 0.5, 1.0]
    found = MessageToDict(answer, preserving_proto_field_name=True)
    assert found["model"] == other["model"]
    assert answer.features.version == "v1"
    assert answer.features.age_s == 1.0
    assert not answer.features.HasField("reason")


def test_both_doors_ask_the_model_the_same(door):
    scorer = door.servicer.scorer
    for context in ({}, {"k": "v", "n": 3, "f": 1.0, "many": ["x"], "each": [1.0, 2.0]}):
        for when in (None, 123, "1970-01-01T02:00:01.5+02:00"):
            body = {"user": "u", "items": ["1", "2"], "context": context}
            body |= {} if when is None else {"request_ts": when}
            score(door, body)
            door.http.post(SCORE, json=body)
            mine, other = scorer.queries[-2:]
            assert mine == other
            assert {k: type(v) for k, v in mine.context.items()} == {
                k: type(v) for k, v in other.context.items()
            }


@pytest.mark.parametrize(
    "change",
    [
        {"user": ""},
        {"user": "x" * 257},
        {"items": []},
        {"items": ["1", ""]},
        {"items": ["1"] * (MAX_ITEMS + 1)},
        {"request_ts": -1},
        {"request_ts": "2026-01-01"},
        {"request_ts": 2**62},
        {"context": {"x": "v" * 257}},
        {"context": {f"x{n}": 1 for n in range(257)}},
        {"context": {"": 1}},
        {"context": {"refused": 1}},
        {"context": {"broken": 1}},
    ],
)
def test_refusals_are_those_of_http(door, change):
    body = {"user": "u", "items": ["1", "2"], **change}
    _, problem, _ = refused(lambda: score(door, body))
    same_refusal(problem, door.http.post(SCORE, json=body))


@pytest.mark.parametrize(
    "requests",
    [
        [],
        [{"user": "u", "items": ["1"]}] * 257,
        [{"user": "u", "items": ["1"] * 1000}] * 33,
        [{"user": "u", "items": ["1"]}, {"user": "", "items": ["1"]}],
        [{"user": "u", "items": ["1"]}, {"user": "u", "items": ["1"], "context": {"refused": 1}}],
    ],
)
def test_batches_are_refused_as_over_http(door, requests):
    sent = wire.BatchRequest(model="vm", requests=[query_of(one) for one in requests])
    _, problem, _ = refused(lambda: door.stub.Batch(sent))
    same_refusal(problem, door.http.post(BATCH, json={"requests": requests}))


def test_a_batch_is_answered_in_order(door):
    bodies = [{"user": "u", "items": ["1", "3"]}, {"user": "v", "items": ["0"]}]
    sent = wire.BatchRequest(model="vm", requests=[query_of(one) for one in bodies])
    answer = door.stub.Batch(sent, metadata=[("x-request-id", "a-1")])
    assert [list(result.scores) for result in answer.results] == [[0.5, 0.25], [1.0]]
    assert answer.request_id == "a-1"


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(door, number):
    for value in (number, [1.0, number]):
        body = {"user": "u", "items": ["1", "2"], "context": {"x": value}}
        _, problem, _ = refused(lambda body=body: score(door, body))
        assert [error["field"] for error in problem["errors"]] == ["context.x"]


def test_a_value_that_is_not_set_is_refused(door):
    query = query_of({"user": "u", "items": ["1"]})
    query.context["x"].SetInParent()
    _, problem, _ = refused(lambda: door.stub.Score(wire.ScoreRequest(model="vm", query=query)))
    assert [error["field"] for error in problem["errors"]] == ["context.x"]


UNKNOWN = b"\xf8\x3f\x01"  # field 1023, a varint


def test_fields_that_the_service_does_not_know_are_refused_at_every_depth(door):
    query = query_of({"user": "u", "items": ["1"], "context": {"x": 1}})
    inner = wire.Query.FromString(query.SerializeToString() + UNKNOWN)
    value = wire.Query.FromString(query.SerializeToString())
    value.context["x"].MergeFromString(UNKNOWN)
    outer = wire.ScoreRequest(model="vm", query=query).SerializeToString() + UNKNOWN
    for sent in (
        wire.ScoreRequest.FromString(outer),
        wire.ScoreRequest(model="vm", query=inner),
        wire.ScoreRequest(model="vm", query=value),
    ):
        _, problem, _ = refused(lambda sent=sent: door.stub.Score(sent))
        assert problem["status"] == 422
        assert "scoring.proto" in problem["detail"]


def test_a_message_over_the_limit_is_refused(door):
    query = query_of({"user": "u", "items": ["1"]})
    query.context["x"].text = "x" * (MAX_BODY_BYTES + 1)
    _, problem, _ = refused(lambda: door.stub.Score(wire.ScoreRequest(model="vm", query=query)))
    assert problem["status"] == 413


@pytest.mark.parametrize("letter", ["c", "é", "\U0001f600", '"'])
def test_a_problem_of_many_fields_fits_trailing_metadata(door, letter):
    context = {f"{letter * 120}{n}": "v" * 257 for n in range(256)}
    body = {"user": "u", "items": [""] * 1000, "context": context}
    _, problem, _ = refused(lambda: score(door, body))
    expected = door.http.post(SCORE, json=body).json()["errors"]
    assert 0 < len(problem["errors"]) < len(expected)
    for mine, other in zip(problem["errors"], expected, strict=False):
        assert mine["field"] == other["field"]
    assert len(json.dumps(problem, ensure_ascii=False).encode()) < 4500


def test_a_long_detail_is_cut(door, monkeypatch):
    def refuse(name, query, request_id):
        raise RequestError("é" * 4000)

    monkeypatch.setattr(door.servicer.scorer, "respond", refuse)
    _, problem, _ = refused(lambda: score(door, {"user": "u", "items": ["1"]}))
    assert problem["detail"] == "é" * 250


def test_own_failure_tells_nothing_of_the_inside(door):
    _, problem, _ = refused(
        lambda: score(door, {"user": "u", "items": ["1"], "context": {"broken": 1}})
    )
    assert "secret" not in json.dumps(problem)


def test_models_are_told_as_over_http(door):
    models = door.stub.ListModels(wire.ListModelsRequest())
    assert models.revision == 3
    assert [(one.name, one.version) for one in models.models] == [("vm", "abc")]
    answer = door.stub.GetModel(wire.GetModelRequest(model="vm"))
    assert MessageToDict(answer.description) == door.http.get("/v1/models/vm").json()
    for call in (
        lambda: door.stub.GetModel(wire.GetModelRequest(model="other")),
        lambda: score(door, {"user": "u", "items": ["1"]}, model="other"),
        lambda: score(door, {"user": "u", "items": ["1"]}, model=""),
    ):
        assert refused(call)[0] == "NOT_FOUND"


def test_request_ids_are_kept_when_plain(door):
    body = {"user": "u", "items": ["1"]}
    assert score(door, body, metadata=[("x-request-id", "a-1")]).request_id == "a-1"
    made = score(door, body, metadata=[("x-request-id", "a b")])
    assert len(made.request_id) == 32
    _, call = door.stub.Score.with_call(
        wire.ScoreRequest(model="vm", query=query_of(body)), metadata=[("x-request-id", "a-2")]
    )
    assert dict(call.trailing_metadata())["x-request-id"] == "a-2"


def test_health_is_that_of_readyz():
    door = Door(None)
    try:
        states = health_pb2.HealthCheckResponse
        assert door.health.Check(health_pb2.HealthCheckRequest()).status == states.NOT_SERVING
        status, problem, trailing = refused(lambda: score(door, {"user": "u", "items": ["1"]}))
        assert (status, trailing["retry-after"]) == ("UNAVAILABLE", "1")
        same_refusal(problem, door.http.post(SCORE, json={"user": "u", "items": ["1"]}))
        door.servicer.scorer = FakeScorer()
        for service in ("", SERVICE):
            request = health_pb2.HealthCheckRequest(service=service)
            assert door.health.Check(request).status == states.SERVING
        for call, code in (
            (lambda: door.health.Check(health_pb2.HealthCheckRequest(service="no")), "NOT_FOUND"),
            (lambda: list(door.health.Watch(health_pb2.HealthCheckRequest())), "UNIMPLEMENTED"),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call()
            assert caught.value.code().name == code
    finally:
        door.close()


def test_keys_and_rates_are_those_of_http():
    keys, free = add_key(ApiKeys(), "free")
    keys, slow = add_key(keys, "slow", rate_per_s=2.0, burst=3)
    door = Door(FakeScorer(), keys)
    body = {"user": "u", "items": ["1"]}

    def ask(secret, scheme="Bearer"):
        return score(door, body, metadata=[("authorization", f"{scheme} {secret}")])

    try:
        assert ask(free).scores
        for call in (
            lambda: score(door, body),
            lambda: ask("no"),
            lambda: ask(free, "Basic"),
            lambda: door.stub.ListModels(wire.ListModelsRequest()),
            lambda: door.stub.GetModel(wire.GetModelRequest(model="vm")),
            lambda: door.stub.Batch(wire.BatchRequest(model="vm")),
        ):
            status, problem, _ = refused(call)
            assert status == "UNAUTHENTICATED"
            same_refusal(problem, door.http.post(SCORE, json=body))
        assert door.health.Check(health_pb2.HealthCheckRequest()).status == 1
        for _ in range(3):
            ask(slow)
        status, _, trailing = refused(lambda: ask(slow))
        assert (status, trailing["retry-after"]) == ("RESOURCE_EXHAUSTED", "1")
        door.clock.now_s += 1.0
        assert ask(slow).scores
    finally:
        door.close()


@settings(max_examples=200, deadline=None)
@given(body=st.binary(max_size=80))
def test_no_bytes_make_the_service_fail(body):
    """What parses as a request is answered or refused; nothing else comes out."""

    class Context:
        code = None

        def invocation_metadata(self):
            return ()

        def set_code(self, code):
            self.code = code

        def set_details(self, details):
            assert details

        def set_trailing_metadata(self, trailing):
            self.trailing = dict(trailing)

    for kind, method in ((wire.ScoreRequest, "Score"), (wire.BatchRequest, "Batch")):
        try:
            sent = kind.FromString(body)
        except Exception:  # noqa: BLE001 - grpc answers what does not parse
            continue
        context = Context()
        getattr(ScoringServicer(FakeScorer(), lambda: NOW), method)(sent, context)
        assert context.code in (None, *map(grpc.StatusCode.__getitem__, set(STATUS.values())))
        assert context.code is not grpc.StatusCode.INTERNAL


def test_a_real_model_gives_the_same_answer_at_both_doors(world):
    service = Service(ServeConfig(bundle="unused").open)
    served = Served(bundle=str(world.bundle), online=str(world.online))
    assert service.apply(promote(Rollouts(), "vm", served)) == {}
    door = Door(service)
    try:
        for user, context in (
            ("u1", {"past_count_item": 0.0, "past_recency_item": 0.5, "tags": ["t1", "t2"]}),
            ("u2", {"past_count_item": [1.0, 2.0], "past_recency_item": 3, "device": "nowhere"}),
            ("nobody", {"past_count_item": 1, "past_recency_item": 0.5, "shown": 3.5}),
        ):
            body = {"user": user, "items": ["i1", "i2"], "context": context}
            body["request_ts"] = STOP - MICROS_PER_DAY
            other = door.http.post(SCORE, json=body).json()
            answer = score(door, body)
            assert list(answer.scores) == other["scores"]
            features = dict(other["features"])
            for name in ("version", "snapshot_id", "age_s", "reason"):
                given = features.pop(name)
                has = answer.features.HasField(name)
                assert (getattr(answer.features, name) if has else None) == given
            for name, given in features.items():
                found = getattr(answer.features, name)
                assert (list(found) if isinstance(given, list) else found) == given
            assert answer.unknown_items == other["unknown_items"]
        described = MessageToDict(door.stub.GetModel(wire.GetModelRequest(model="vm")).description)
        expected = door.http.get("/v1/models/vm").json()
        assert described == expected
    finally:
        door.close()
        service.close()
