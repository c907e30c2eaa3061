"""The page at `/ui`: what it reads, who may read it, and what a browser makes of it."""

import pytest
from fastapi.testclient import TestClient

from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.keys import ApiKeys, Gate, add_key
from loopfm_ray.serving.page import Page
from loopfm_ray.serving.predictor import load_predictor
from loopfm_ray.serving.rollout import Rollouts, Served, promote, start_canary
from loopfm_ray.serving.service import Service
from loopfm_ray.store.online import visible_slice
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S
from tests.serving.world import STOP, make_world

TS = STOP - MICROS_PER_DAY
PAST = {"past_count_item": 0.0, "past_recency_item": 1.5}
FILES = ("/ui", "/ui/page.js", "/ui/draw.js", "/ui/page.css")


@pytest.fixture(scope="module")
def plain_world(tmp_path_factory):
    """A world whose VM reads no history."""
    return make_world(tmp_path_factory.mktemp("plain"), kind="none")


@pytest.fixture(scope="module")
def service(world, plain_world):
    made = Service(ServeConfig(bundle="unused").open)
    with_history = Served(bundle=str(world.bundle), online=str(world.online))
    state = promote(Rollouts(), "vm", with_history)
    assert made.apply(promote(state, "plain", Served(bundle=str(plain_world.bundle)))) == {}
    yield made
    made.close()


def client_of(service, host="127.0.0.1", **more):
    app = create_api(service, clock=lambda: TS, page=Page(service, **more))
    return TestClient(app, base_url=f"http://{host}", raise_server_exceptions=False)


@pytest.fixture
def client(service):
    return client_of(service)


def body(user="u1", items=("i1", "i2", "i3"), **more):
    return {"user": user, "items": list(items), "context": PAST, **more}


def test_the_scores_with_history_are_those_of_the_contract(client):
    for user in ("u1", "u7", "nobody"):
        found = client.post("/v1/models/vm:explore", json=body(user)).json()
        scored = client.post("/v1/models/vm:score", json=body(user)).json()
        same = found["with_history"] | {"request_id": ""}
        assert same == scored | {"request_id": ""}
        assert found["request_ts"] == TS


def test_the_scores_without_history_are_those_of_a_user_whom_the_store_does_not_know(
    client, service, world
):
    """The oracle is a predictor whose store is empty."""

    class Empty:
        def __init__(self, like):
            self.version, self.meta = like.version, like.meta

        def get_many(self, keys):
            return [None] * len(keys)

    predictor = load_predictor(world.bundle, world.online)
    predictor._store = Empty(predictor.store)
    changed = 0
    for user in ("u1", "u7", "u12"):
        query = ScoreQuery(user, TS, ("i1", "i2", "i3"), PAST)
        found = client.post("/v1/models/vm:explore", json=body(user)).json()
        assert found["without_history"]["scores"] == predictor.score(query).probs.tolist()
        assert found["without_history"]["features"]["history_len"] == 0
        assert found["without_history"]["features"]["reason"] == "not_in_store"
        changed += found["without_history"]["scores"] != found["with_history"]["scores"]
    assert changed == 3


def test_the_events_are_those_that_the_model_reads(client, world):
    predictor = load_predictor(world.bundle, world.online)
    pin = world.spec.history
    for user in ("u1", "u7"):
        (history,) = predictor.store.get_many([user])
        rows = visible_slice(history, TS, pin.max_len, pin.retention_us)
        expected = [(TS - int(history.event_ts[row])) / MICROS_PER_S for row in rows[::-1]]
        found = client.post("/v1/models/vm:explore", json=body(user)).json()
        assert found["events_age_s"] == expected
        assert len(expected) == found["with_history"]["features"]["history_len"] > 1
        assert found["events_age_s"][0] == found["with_history"]["features"]["age_s"]
        assert found["watermark_ts"] == STOP


def test_a_model_without_history_is_scored_once(client):
    found = client.post("/v1/models/plain:explore", json=body()).json()
    scored = client.post("/v1/models/plain:score", json=body()).json()
    assert found["with_history"]["scores"] == scored["scores"]
    assert found["without_history"] is None
    assert found["events_age_s"] == []


def test_looking_is_not_counted(service, client):
    before = service.describe("vm")["variants"]["stable"]["counters"]
    client.post("/v1/models/vm:explore", json=body())
    client.get("/v1/models/vm/samples")
    assert service.describe("vm")["variants"]["stable"]["counters"] == before


def test_the_canary_answers_for_its_users(world):
    made = Service(ServeConfig(bundle="unused").open)
    served = Served(bundle=str(world.bundle), online=str(world.online))
    made.apply(start_canary(promote(Rollouts(), "vm", served), "vm", served, 0.5))
    client = client_of(made)
    seen = set()
    for number in range(12):
        found = client.post("/v1/models/vm:explore", json=body(f"u{number}")).json()
        scored = client.post("/v1/models/vm:score", json=body(f"u{number}")).json()
        assert found["with_history"]["model"] == scored["model"]
        seen.add(scored["model"]["variant"])
    assert seen == {"stable", "canary"}
    made.close()


def test_samples_are_known_keys_and_bounded(client, service):
    found = client.get("/v1/models/vm/samples").json()
    assert found == client.get("/v1/models/vm/samples").json()
    predictor, _ = service.pick("vm", "")
    users = predictor.bundle.vocabularies["user"].keys
    assert 0 < len(found["users"]) <= 12
    assert {one["user"] for one in found["users"]} <= set(users)
    for one in found["users"]:
        (history,) = predictor.store.get_many([one["user"]])
        assert one["history_len"] == (0 if history is None else len(history))
    lengths = [one["history_len"] for one in found["users"]]
    assert lengths == sorted(lengths, reverse=True)
    assert 0 < len(found["items"]) <= 60
    assert set(found["items"]) <= set(predictor.bundle.vocabularies["item"].keys)
    assert found["context"] == PAST
    scored = client.post("/v1/models/vm:score", json=body(items=found["items"])).json()
    assert scored["unknown_items"] == 0


@pytest.mark.parametrize("sent", [{"user": ""}, {"items": []}, {"context": {"x": 1}}, {"more": 1}])
def test_explore_checks_as_score_does(client, sent):
    one = client.post("/v1/models/vm:explore", json=body(**sent) if "user" not in sent else sent)
    other = client.post("/v1/models/vm:score", json=body(**sent) if "user" not in sent else sent)
    assert one.status_code == other.status_code == 422
    assert one.json() | {"request_id": ""} == other.json() | {"request_id": ""}


def test_unknown_models_are_told(client):
    assert client.post("/v1/models/no:explore", json=body()).status_code == 404
    assert client.get("/v1/models/no/samples").status_code == 404


def test_the_files_allow_nothing_from_elsewhere_and_nothing_inline(client):
    for path in FILES:
        response = client.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        text = response.text
        assert "innerHTML" not in text
        assert "insertAdjacentHTML" not in text
        assert " onclick=" not in text
        assert " style=" not in text
        assert "localStorage" not in text
        assert "sessionStorage" not in text
        assert "document.cookie" not in text
        assert text.replace("http://www.w3.org/2000/svg", "").count("http") == text.count("httpX")


def test_without_the_page_there_is_neither_page_nor_what_it_reads(service):
    client = TestClient(create_api(service), base_url="http://127.0.0.1")
    for path in (*FILES, "/v1/models/vm/samples"):
        assert client.get(path).status_code == 404
    assert client.post("/v1/models/vm:explore", json=body()).status_code in (404, 405)


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "10.0.0.3"])
def test_a_foreign_name_that_points_at_loopback_reads_nothing(service, host):
    client = client_of(service, host)
    assert client.get("/ui").status_code == 403
    assert client.get("/v1/models/vm/samples").status_code == 403
    assert client.post("/v1/models/vm:explore", json=body()).status_code == 403
    assert client_of(service, host, asks_loopback=False).get("/ui").status_code == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_loopback_names_are_answered(service, host):
    assert client_of(service, host).get("/v1/models/vm/samples").status_code == 200


def test_with_keys_the_files_are_open_and_the_data_is_not(service):
    keys, secret = add_key(ApiKeys(), "one")
    gate = Gate(keys.keys, lambda: 0.0)
    page = Page(service, asks_loopback=False)
    client = TestClient(create_api(service, gate=gate, page=page))
    for path in FILES:
        assert client.get(path).status_code == 200
    for path in ("/v1/models/vm/samples", "/v1/models", "/ui/../v1/models"):
        assert client.get(path).status_code == 401
    assert client.post("/v1/models/vm:explore", json=body()).status_code == 401
    headers = {"authorization": f"Bearer {secret}"}
    assert client.get("/v1/models/vm/samples", headers=headers).status_code == 200


def test_behind_a_prefix_the_same_paths_are_open(service):
    keys, _ = add_key(ApiKeys(), "one")
    page = Page(service, asks_loopback=False)
    app = create_api(service, gate=Gate(keys.keys, lambda: 0.0), page=page)
    client = TestClient(app, root_path="/keyed", base_url="http://ranker.example")
    for path in (*FILES, "/healthz", "/readyz"):
        assert client.get(f"/keyed{path}").status_code == 200, path
    for path in ("/keyed/v1/models", "/keyed/keyed/ui", "/keyed/v1/models/vm/samples"):
        assert client.get(path).status_code == 401


def test_the_page_is_on_where_http_is_on_loopback_alone(monkeypatch):
    assert ServeConfig(bundle="b").has_ui
    assert not ServeConfig(bundle="b", ui=False).has_ui
    assert not ServeConfig(bundle="b", host="0.0.0.0", api_keys="k").has_ui
    assert ServeConfig(bundle="b", host="0.0.0.0", api_keys="k", ui=True).has_ui
    monkeypatch.setenv("RAY_SERVE_ENABLE_HA_PROXY", "1")
    assert not ServeConfig(bundle="b", api_keys="k").has_ui
