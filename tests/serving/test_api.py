import json
import math

import pytest
from fastapi.testclient import TestClient
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.contract import (
    MAX_BODY_BYTES,
    MAX_ITEMS,
    BatchResponse,
    FeatureInfo,
    ModelInfo,
    RequestError,
    ScoreQuery,
    ScoreResponse,
    UnknownModelError,
)

SCORE = "/v1/models/vm:score"
BATCH = "/v1/models/vm:batch"
NOW = 1_700_000_000_000_000


class FakeScorer:
    """Scores an item by its number, so that order shows."""

    def __init__(self):
        self.queries: list[ScoreQuery] = []

    def respond(self, name, query, request_id):
        self.queries.append(query)
        if name != "vm":
            raise UnknownModelError(f"no model {name!r} is served, there are ['vm']")
        if "refused" in query.context:
            raise RequestError("context field 'refused' is unknown")
        if "broken" in query.context:
            raise RuntimeError("secret inside")
        scores = [
            1 / (1 + int(item)) if item.isdecimal() and item.isascii() else 0.5
            for item in query.items
        ]
        features = FeatureInfo(
            version="v1", snapshot_id="s1", age_s=1.0, history_len=2, degraded=False, reason=None,
            unknown_user=False, unknown_fields=[], default_fields=[],
        )  # fmt: skip
        model = ModelInfo(name="vm", version="abc", variant="stable")
        return ScoreResponse(
            scores=scores, model=model, features=features, unknown_items=0, request_id=request_id
        )

    def respond_many(self, name, queries, request_id):
        results = []
        for index, query in enumerate(queries):
            try:
                results.append(self.respond(name, query, request_id))
            except RequestError as error:
                error.index = index
                raise
        return BatchResponse(results=results, request_id=request_id)

    def describe(self, name):
        if name != "vm":
            raise UnknownModelError(f"no model {name!r} is served")
        return {"name": "vm"}

    def summary(self):
        return {"revision": 3, "models": [{"name": "vm", "version": "abc"}]}


@pytest.fixture(scope="module")
def scorer():
    return FakeScorer()


@pytest.fixture(scope="module")
def client(scorer):
    return TestClient(create_api(scorer, clock=lambda: NOW), raise_server_exceptions=False)


def post(client, **changes):
    body = {"user": "u", "items": ["1", "2"], **changes}
    return client.post(SCORE, json=body)


def assert_problem(response, status):
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    problem = response.json()
    assert problem["status"] == status
    assert problem["title"]
    assert problem["detail"]
    assert problem["request_id"] == response.headers["x-request-id"]
    return problem


def test_scores_come_in_request_order(client):
    response = post(client, items=["3", "0", "1", "0"])
    assert response.status_code == 200
    assert response.json()["scores"] == [0.25, 1.0, 0.5, 1.0]
    assert response.json()["model"] == {"name": "vm", "version": "abc", "variant": "stable"}
    assert response.json()["features"]["snapshot_id"] == "s1"


def test_time_defaults_to_now_at_the_edge(client, scorer):
    post(client)
    assert scorer.queries[-1].request_ts == NOW


@pytest.mark.parametrize(
    ("given_ts", "expected"),
    [
        (0, 0),
        (123, 123),
        ("1970-01-01T00:00:01Z", 1_000_000),
        ("1970-01-01T02:00:01.5+02:00", 1_500_000),
        ("1970-01-01t00:00:00.123456999z", 123_456),
    ],
)
def test_time_is_microseconds_or_rfc3339(client, scorer, given_ts, expected):
    assert post(client, request_ts=given_ts).status_code == 200
    assert scorer.queries[-1].request_ts == expected


@pytest.mark.parametrize(
    "bad_ts",
    [
        -1, 1.0, 1.5, True, 10**30, "", "now", "2026-01-01", "2026-01-01T00:00:00", "2026-13-01T00:00:00Z",
        "2026-01-01T00:00:60Z", "1969-12-31T23:59:59Z", "0001-01-01T00:00:00+23:59", "9999-12-31T23:59:59-01:00",
        "２０26-01-01T00:00:00Z", [], {},
    ],
)  # fmt: skip
def test_bad_time_is_refused(client, bad_ts):
    problem = assert_problem(post(client, request_ts=bad_ts), 422)
    assert [error["field"] for error in problem["errors"]] == ["request_ts"]


def test_item_limits(client):
    assert_problem(post(client, items=[]), 422)
    assert post(client, items=["1"] * MAX_ITEMS).status_code == 200
    assert_problem(post(client, items=["1"] * (MAX_ITEMS + 1)), 422)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"user": ""}, "user"),
        ({"user": "x" * 257}, "user"),
        ({"user": 7}, "user"),
        ({"items": [7]}, "items.0"),
        ({"items": ["1", ""]}, "items.1"),
        ({"items": "1"}, "items"),
        ({"extra": 1}, "extra"),
        ({"context": {"x": None}}, "context.x"),
        ({"context": {"x": True}}, "context.x"),
        ({"context": {"x": {"y": 1}}}, "context.x"),
        ({"context": {"x": "v" * 257}}, "context.x"),
        ({"context": {f"x{n}": 1 for n in range(257)}}, "context"),
        ({"context": []}, "context"),
    ],
)
def test_what_the_contract_does_not_allow_is_named(client, changes, field):
    problem = assert_problem(post(client, **changes), 422)
    assert field in {error["field"] for error in problem["errors"]}


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_numbers_that_are_not_finite_are_refused(client, number):
    body = f'{{"user": "u", "items": ["1"], "context": {{"x": {number}}}}}'
    assert client.post(SCORE, content=body).status_code in (400, 422)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"user": "\\ud800"}'])
def test_what_is_not_json_is_refused(client, body):
    assert_problem(client.post(SCORE, content=body), 400)


def test_a_value_sent_is_never_sent_back(client):
    response = post(client, user=["private"], items=[{"private": 1}])
    assert "private" not in assert_problem(response, 422)["detail"] + response.text


def test_body_over_the_limit_is_refused(client):
    assert_problem(client.post(SCORE, content=b" " * (MAX_BODY_BYTES + 1)), 413)


def test_other_media_types_are_refused(client):
    headers = {"content-type": "text/plain"}
    assert_problem(client.post(SCORE, content="{}", headers=headers), 415)


def test_what_the_model_refuses_is_the_callers_mistake(client):
    assert "refused" in assert_problem(post(client, context={"refused": 1}), 422)["detail"]


def test_own_failure_tells_nothing_of_the_inside(client):
    problem = assert_problem(post(client, context={"broken": 1}), 500)
    assert "secret" not in json.dumps(problem)


def test_unknown_path_and_method_are_problems(client):
    assert_problem(client.get("/nowhere"), 404)
    assert_problem(client.delete(SCORE), 405)
    for path in ("/v1/models/other:score", "/v1/models/other:batch"):
        body = {"user": "u", "items": ["1"]}
        sent = {"requests": [body]} if path.endswith("batch") else body
        assert "there are ['vm']" in assert_problem(client.post(path, json=sent), 404)["detail"]
    assert_problem(client.get("/v1/models/other"), 404)


def test_request_id_of_the_caller_is_kept_when_plain(client):
    body = {"user": "u", "items": ["1"]}
    kept = client.post(SCORE, json=body, headers={"x-request-id": "a-1"})
    assert kept.json()["request_id"] == kept.headers["x-request-id"] == "a-1"
    made = client.post(SCORE, json=body, headers={"x-request-id": "a b\t"})
    assert len(made.json()["request_id"]) == 32


def test_not_ready_until_a_predictor_is_there():
    app = create_api()
    client = TestClient(app)
    assert client.get("/healthz").status_code == 200
    for response in (
        client.get("/readyz"),
        client.get("/v1/models"),
        client.get("/v1/models/vm"),
        post(client),
    ):
        assert_problem(response, 503)
        assert response.headers["retry-after"]
    app.state.scorer = FakeScorer()
    assert client.get("/readyz").json() == {"status": "ready"}
    assert client.get("/v1/models").json()["models"][0]["name"] == "vm"
    assert client.get("/v1/models/vm").json() == {"name": "vm"}


def test_openapi_page_describes_the_request(client):
    page = client.get("/openapi.json").json()
    body = page["paths"]["/v1/models/{vm}:score"]["post"]["requestBody"]["content"][
        "application/json"
    ]
    assert body["schema"] == {"$ref": "#/components/schemas/ScoreRequest"}
    kinds = page["components"]["schemas"]
    assert set(kinds["ScoreRequest"]["properties"]) == {"user", "items", "request_ts", "context"}
    assert kinds["BatchRequest"]["properties"]["requests"]["items"]["$ref"].endswith("ScoreRequest")
    refused = page["paths"]["/v1/models/{vm}:score"]["post"]["responses"]["422"]["content"]
    assert list(refused) == ["application/problem+json"]


def one(user="u", items=("1",), **more):
    return {"user": user, "items": list(items), **more}


def test_a_batch_is_answered_request_by_request(client, scorer):
    response = client.post(BATCH, json={"requests": [one(items=["1", "3"]), one("v", ["0"])]})
    assert response.status_code == 200
    body = response.json()
    assert [result["scores"] for result in body["results"]] == [[0.5, 0.25], [1.0]]
    assert body["request_id"] == response.headers["x-request-id"]
    assert [query.user for query in scorer.queries[-2:]] == ["u", "v"]
    assert {query.request_ts for query in scorer.queries[-2:]} == {NOW}


@pytest.mark.parametrize(
    ("requests", "field"),
    [
        ([], "requests"),
        ([one()] * 257, "requests"),
        ([one(items=["1"] * 1000)] * 33, "requests"),
        ([one(), one(user="")], "requests.1.user"),
        ([one(), one(items=["1", ""])], "requests.1.items.1"),
        ([one(context={"x": None})], "requests.0.context.x"),
        ([one(), one(), one(context={"refused": 1})], "requests.2"),
        ([one(), 7], "requests.1"),
    ],
)
def test_what_is_wrong_in_a_batch_is_named_by_its_place(client, requests, field):
    problem = assert_problem(client.post(BATCH, json={"requests": requests}), 422)
    assert field in {error["field"] for error in problem["errors"]}


FUZZED = TestClient(create_api(FakeScorer(), clock=lambda: NOW))
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)  # fmt: skip
REQUEST = st.fixed_dictionaries(
    {},
    optional={
        "user": st.text(max_size=300) | JSON,
        "items": st.lists(st.text(max_size=10), max_size=5) | JSON,
        "request_ts": st.integers() | st.datetimes().map(lambda t: t.isoformat() + "Z") | JSON,
        "context": st.dictionaries(st.text(max_size=10), JSON, max_size=4) | JSON,
        "more": JSON,
    },
)


@settings(max_examples=150, deadline=None)
@given(body=REQUEST | JSON)
def test_no_body_makes_the_service_fail(body):
    response = FUZZED.post(SCORE, content=json.dumps(body), headers={"content-type": "application/json"})  # fmt: skip
    assert response.status_code in (200, 400, 422)
    if response.status_code == 200:
        assert len(response.json()["scores"]) == len(body["items"])
        assert all(math.isfinite(score) for score in response.json()["scores"])
    else:
        assert_problem(response, response.status_code)


@settings(max_examples=100, deadline=None)
@given(body=st.lists(REQUEST | JSON, max_size=3).map(lambda found: {"requests": found}) | JSON)
def test_no_batch_makes_the_service_fail(body):
    response = FUZZED.post(BATCH, content=json.dumps(body), headers={"content-type": "application/json"})  # fmt: skip
    assert response.status_code in (200, 400, 422)
    if response.status_code == 200:
        assert len(response.json()["results"]) == len(body["requests"])


@settings(max_examples=100, deadline=None)
@given(body=st.binary(max_size=60))
def test_no_bytes_make_the_service_fail(body):
    assert FUZZED.post(SCORE, content=body).status_code in (400, 422)
