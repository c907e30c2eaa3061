import asyncio
import inspect
import json
import os
import ssl
import sys
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import grpc
import pytest
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc
from ray import cloudpickle, serve
from ray.serve._private import replica
from ray.serve._private.grpc_util import start_grpc_server
from ray.serve.config import gRPCOptions
from ray.serve.grpc_util import RayServegRPCContext
from ray.serve.schema import ServeDeploySchema

from loopfm_ray.config import dump_yaml, load_config
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, ConfigError
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.listening import listeners
from loopfm_ray.jobs.replica_port import keep_on_loopback
from loopfm_ray.jobs.serving import (
    APP_NAME,
    DEPLOYMENT_NAME,
    ServeConfig,
    build_app,
    follow,
    grpc_options,
    start,
    stop,
)
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.serving import scoring_pb2 as wire
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.contract import ScoreQuery, UnknownModelError
from loopfm_ray.serving.keys import ApiKeys, add_key, write_keys
from loopfm_ray.serving.parity import ask_service, check_parity, load_offline
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.serving.rollout import (
    Rollout,
    Rollouts,
    Served,
    promote,
    rollback,
    write_rollouts,
)
from loopfm_ray.serving.rpc import ScoringServicer
from loopfm_ray.serving.scoring_pb2_grpc import ScoringStub
from loopfm_ray.store.publish import load_memory, publish
from loopfm_ray.types import MICROS_PER_DAY
from serve.app import build_app as app_of_args
from tests.conftest import free_ports
from tests.serving.world import STOP, make_world, write_latents
from tests.tls import make_certificate

NAME = "vm_loopfm"
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def cluster():
    with connect(RayConfig()):
        yield


@pytest.fixture(scope="module")
def grpc_port():
    return free_ports(1)[0]


@pytest.fixture(scope="module")
def url(cluster, world, grpc_port):
    # Serve's gRPC proxy starts with Serve or never; it listens on every interface, which a test of it may
    config = ServeConfig(
        bundle=str(world.bundle), online=str(world.online), port=0, reload_s=0.2, grpc_port=grpc_port, trusted_network=True,
    )  # fmt: skip
    yield start(config)
    stop()


@pytest.fixture(scope="module")
def channel(url, grpc_port):
    with grpc.insecure_channel(f"127.0.0.1:{grpc_port}") as found:
        yield found


def call(url, path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json"}
    request = urllib.request.Request(url + path, data=data, headers=headers)
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


def of_serve():
    """Return what the programs of this Serve listen on."""
    return [one for one in listeners() if one.command.startswith(("ray::ServeReplica", "ray::Proxy", "ray::ServeController"))]  # fmt: skip


# First: what Serve's proxies listen on is settled when they start, so this one has a Serve of its own.
@pytest.mark.ray
@pytest.mark.timeout(240)
def test_https_with_a_certificate_of_ones_own_and_nothing_beyond_loopback(cluster, world, tmp_path):
    before = set(of_serve())
    cert, key = make_certificate(tmp_path)
    config = ServeConfig(
        bundle=str(world.bundle), online=str(world.online), port=0, tls={"cert": str(cert), "key": str(key)},
    )  # fmt: skip
    address = start(config)
    try:
        assert address.startswith("https://127.0.0.1:")
        trusting = ssl.create_default_context(cafile=cert)
        with urllib.request.urlopen(f"{address}/readyz", context=trusting, timeout=30) as answer:
            assert json.loads(answer.read()) == {"status": "ready"}
        with urllib.request.urlopen(f"{address}/ui", context=trusting, timeout=30) as answer:
            assert "default-src 'none'" in answer.headers["content-security-policy"]
        with pytest.raises(urllib.error.URLError, match="CERTIFICATE_VERIFY_FAILED"):
            urllib.request.urlopen(f"{address}/readyz", timeout=30)
        with pytest.raises((urllib.error.URLError, ConnectionError)):
            urllib.request.urlopen(f"{address}/readyz".replace("https", "http"), timeout=30)
        mine = set(of_serve()) - before
        port = int(address.rpartition(":")[2])
        assert {one.port for one in mine} >= {port}
        assert any(one.command.startswith("ray::ServeReplica") for one in mine)
        # the port of the replica too, which Serve opens on every interface
        assert [one for one in mine if not one.is_loopback] == []
    finally:
        stop()


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_the_replicas_of_one_deployment_answer_grpc_as_http(url, channel, world, grpc_port):
    assert health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest()).status == 1
    stub = ScoringStub(channel)
    context = {"past_count_item": wire.Value(number=0.0), "past_recency_item": wire.Value(number=0.5)}  # fmt: skip
    query = wire.Query(user="u1", items=["i1", "i2"], micros=STOP, context=context)
    answer, done = stub.Score.with_call(
        wire.ScoreRequest(model=NAME, query=query), metadata=[("x-request-id", "a-1")]
    )
    body = {"user": "u1", "items": ["i1", "i2"], "request_ts": STOP}
    body["context"] = {"past_count_item": 0.0, "past_recency_item": 0.5}
    other = call(url, f"/v1/models/{NAME}:score", body)[1]
    assert list(answer.scores) == other["scores"]
    assert answer.features.age_s == other["features"]["age_s"]
    assert answer.request_id == dict(done.trailing_metadata())["x-request-id"] == "a-1"
    batch = stub.Batch(wire.BatchRequest(model=NAME, requests=[query, query]))
    for one in batch.results:  # two requests are another pass through the model than one
        assert list(one.scores) == pytest.approx(other["scores"], abs=1e-6)
    assert stub.ListModels(wire.ListModelsRequest()).models[0].name == NAME
    described = stub.GetModel(wire.GetModelRequest(model=NAME)).description
    assert described["variants"]["stable"]["model"]["name"] == NAME
    query.items[:] = []
    with pytest.raises(grpc.RpcError) as refused:
        stub.Score(wire.ScoreRequest(model=NAME, query=query))
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    problem = json.loads(dict(refused.value.trailing_metadata())["problem-bin"])
    body["items"] = []
    expected = call(url, f"/v1/models/{NAME}:score", body)[1]
    assert problem | {"request_id": ""} == expected | {"request_id": ""}
    # what the message of `grpc_port` says, and why it takes keys: it is not on loopback alone
    assert [one for one in of_serve() if one.port == grpc_port and not one.is_loopback]
    # a message that is too long is refused by the proxy, before a replica has to read it
    big = wire.Query(user="u" * (9 * 2**20), items=["i1"])
    with pytest.raises(grpc.RpcError) as refused:
        stub.Score(wire.ScoreRequest(model=NAME, query=big))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    with pytest.raises(grpc.RpcError) as refused:
        channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")(b"")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_grpc_asks_for_keys_and_answers_only_for_applications_that_offer_it(url, channel, grpc_port, world, tmp_path):  # fmt: skip
    keys, secret = add_key(ApiKeys(), "one")
    write_keys(tmp_path / "keys.json", keys)
    common = {"bundle": str(world.bundle), "online": str(world.online), "num_cpus": 0.5}
    keyed = ServeConfig(**common, api_keys=str(tmp_path / "keys.json"), grpc_port=grpc_port)
    serve.run(build_app(keyed), name="keyed", route_prefix="/keyed")
    serve.run(build_app(ServeConfig(**common)), name="closed", route_prefix="/closed")
    stub = ScoringStub(channel)

    def ask(application, *metadata):
        return stub.ListModels(
            wire.ListModelsRequest(), metadata=[("application", application), *metadata]
        )

    with pytest.raises(grpc.RpcError) as refused:
        ask("keyed")
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert ask("keyed", ("authorization", f"Bearer {secret}")).models[0].name == NAME
    assert call(f"{url}/keyed", "/v1/models")[0] == 401
    assert call(f"{url}/keyed", f"/v1/models/{NAME}/samples")[0] == 401
    with pytest.raises(grpc.RpcError) as refused:
        ask("closed")
    assert refused.value.code() == grpc.StatusCode.UNIMPLEMENTED
    assert "grpc_port" in refused.value.details()
    serve.delete("keyed")
    serve.delete("closed")


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_served_scores_over_http_equal_offline_scores(url, world):
    predictor = load_predictor(world.bundle, world.online)
    prepared = PreparedData.open(world.prepared)
    offline = load_offline(predictor.bundle, prepared, world.joined, num_requests=100)
    report = check_parity(predictor, offline, url=url)
    assert report.is_ok, report.mismatches
    assert report.num_requests >= 100
    assert report.max_abs_diff < 1e-6
    assert predictor.counters.requests == 0  # the service scored, not this process


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_service_is_ready_and_says_what_it_serves(url, world):
    assert call(url, "/healthz") == (200, {"status": "alive"})
    assert call(url, "/readyz") == (200, {"status": "ready"})
    status, body = call(url, f"/v1/models/{NAME}")
    assert status == 200
    found = body["variants"]["stable"]
    assert found["model"]["name"] == NAME
    assert found["features"]["version"] == world.spec.history.latents_version


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_bad_requests_are_problems_over_http_too(url):
    status, problem = call(url, f"/v1/models/{NAME}:score", {"user": "u1", "items": []})
    assert (status, problem["errors"][0]["field"]) == (422, "items")
    status, problem = call(
        url, f"/v1/models/{NAME}:score", {"user": "u1", "items": ["i1"], "context": {"x": 1}}
    )
    assert status == 422
    assert "'x'" in problem["detail"]
    assert call(url, "/nowhere")[0] == 404


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_another_bundle_behind_the_address_is_noticed(url, world):
    bundle = load_predictor(world.bundle, world.online).bundle
    prepared = PreparedData.open(world.prepared)
    offline = load_offline(bundle, prepared, world.joined, num_requests=1)
    with pytest.raises(BundleError, match="expected other"):
        list(ask_service(url, [offline.replays[0].query], NAME, "other"))


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_store_without_the_space_of_the_bundle_is_not_served(url, world, tmp_path):
    prepared = PreparedData.open(world.prepared)
    write_latents(prepared, tmp_path / "latents", snapshot="other")
    publish(tmp_path / "latents", prepared.users.keys, tmp_path / "online")
    config = ServeConfig(bundle=str(world.bundle), online=str(tmp_path / "online"))
    app = build_app(config)
    with pytest.raises(RuntimeError, match="deploy"):
        serve.run(app, name="other", route_prefix="/other")
    status = serve.status().applications["other"]
    text = status.message + status.deployments[DEPLOYMENT_NAME].message
    assert "StoreError" in text
    assert "holds no space" in text
    serve.delete("other")
    # the application that was there before still serves
    assert call(url, "/readyz")[0] == 200
    assert serve.status().applications[APP_NAME].status == "RUNNING"


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_a_running_service_reads_what_is_published_later(url, world, tmp_path):
    prepared = PreparedData.open(world.prepared)
    before = world.spec.history.latents_version
    described = call(url, f"/v1/models/{NAME}")[1]
    assert described["variants"]["stable"]["features"]["version"] == before
    write_latents(prepared, tmp_path / "latents", stop_ts=STOP - 5 * MICROS_PER_DAY)
    other = publish(tmp_path / "latents", prepared.users.keys, world.online)
    store = load_memory(tmp_path / "latents", prepared.users.keys)
    predictor = Predictor(load_predictor(world.bundle, world.online).bundle, store)
    offline = load_offline(predictor.bundle, prepared, world.joined, num_requests=1)
    query = offline.replays[0].query
    body = {"user": query.user, "items": list(query.items), "context": query.context}
    body["request_ts"] = STOP
    deadline = time.monotonic() + 60
    seen = before
    while seen == before:
        assert time.monotonic() < deadline, "the service never read the newer version"
        answer = call(url, f"/v1/models/{NAME}:score", body)[1]
        seen = answer["features"]["version"]
    assert seen == other
    want = predictor.score(ScoreQuery(query.user, STOP, query.items, query.context)).probs
    assert answer["scores"] == want.tolist()
    publish(world.latents, prepared.users.keys, world.online)  # and back, for the tests beside this


def other_bundle(world, folder):
    loaded = load_bundle(world.bundle)
    spec = replace(loaded.spec, calibration=PlattScaling(0.4, 0.9))
    save_bundle(folder, spec, loaded.model, PreparedData.open(world.prepared), {"of": "other"})
    return Served(bundle=str(folder), online=str(world.online))


def ask_until(url, version, seen):
    """Ask until this version answers; every answer on the way has to be whole."""
    body = {
        "user": "u1",
        "items": ["i1"],
        "context": {"past_count_item": 0, "past_recency_item": 0},
    }
    deadline = time.monotonic() + 60
    while seen[-1:] != [version]:
        assert time.monotonic() < deadline, f"{version} never answered, {set(seen)} did"
        status, answer = call(url, "/v1/models/vm:score", body)
        assert status == 200, answer
        seen.append(answer["model"]["version"])


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_running_replicas_follow_the_rollout_file_and_the_deployment_file(url, world, tmp_path):
    """A bundle is promoted, rolled back, and one that can not be loaded is refused; no request fails."""
    one, two = (
        Served(bundle=str(world.bundle), online=str(world.online)),
        other_bundle(world, tmp_path / "b"),
    )
    versions = [load_bundle(Path(served.bundle)).version for served in (one, two)]
    file, seen = tmp_path / "rollouts.json", []
    state = promote(Rollouts(), "vm", one)
    write_rollouts(file, state)
    config = ServeConfig(rollouts=str(file), reload_s=0.2)
    serve.run(build_app(config), name="rolled", route_prefix="/rolled")
    ask_until(f"{url}/rolled", versions[0], seen)
    state = promote(state, "vm", two)
    write_rollouts(file, state)
    ask_until(f"{url}/rolled", versions[1], seen)
    state = promote(state, "vm", Served(bundle=str(tmp_path / "nowhere")))
    write_rollouts(file, state)
    deadline = time.monotonic() + 60
    while not (problem := call(f"{url}/rolled", "/v1/models/vm")[1]["problem"]):
        assert time.monotonic() < deadline
    assert "nowhere" in problem
    ask_until(f"{url}/rolled", versions[1], seen)
    write_rollouts(file, rollback(rollback(state, "vm"), "vm"))
    ask_until(f"{url}/rolled", versions[0], seen)
    serve.delete("rolled")

    def deploy(served):
        models = {"vm": Rollout(stable=served)}
        serve.run(build_app(ServeConfig(models=models)), name="filed", route_prefix="/filed")

    deploy(one)
    ask_until(f"{url}/filed", versions[0], seen)
    (state,) = (
        serve.status().applications["filed"].deployments[DEPLOYMENT_NAME].replica_states.items()
    )
    deploy(two)
    ask_until(f"{url}/filed", versions[1], seen)
    assert state == ("RUNNING", 1)
    serve.delete("filed")


class FailsOnce:
    """A scorer whose first look for newer histories fails."""

    def __init__(self):
        self.looks = 0

    def reload(self):
        self.looks += 1
        if self.looks == 1:
            raise RuntimeError("unexpected")
        return True


def test_looking_for_newer_histories_survives_a_failure_and_ends_when_told(caplog):
    scorer, waits = FailsOnce(), []

    def stopped(seconds):
        waits.append(seconds)
        return len(waits) > 3

    follow(scorer, 2.5, stopped)
    assert scorer.looks == 3
    assert waits == [2.5] * 4
    assert [record.levelname for record in caplog.records] == ["ERROR"]


def test_building_the_app_loads_nothing_and_starts_nothing():
    app = app_of_args(ServeConfig(bundle="/nowhere", num_replicas=2, max_queued_requests=5))
    deployment = app._bound_deployment
    assert deployment.name == DEPLOYMENT_NAME
    assert deployment.num_replicas == 2
    assert deployment.max_queued_requests == 5


def test_serve_checks_arguments_against_the_config():
    # Serve converts a mapping when the only parameter is annotated with a pydantic model
    (parameter,) = inspect.signature(app_of_args).parameters.values()
    assert parameter.annotation is ServeConfig


def test_the_service_listens_on_loopback_by_default():
    assert ServeConfig(bundle="b").host == "127.0.0.1"


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"bundle": "b", "rollouts": "r"},
        {"rollouts": "r", "models": {"vm": {"stable": {"bundle": "b"}}}},
    ],
)
def test_what_is_served_is_named_once(given):
    with pytest.raises(ValueError, match="give one of bundle, rollouts and models"):
        ServeConfig.model_validate(given)


@pytest.mark.parametrize("change", ["port=-1", "num_replicas=0", "max_ongoing_requests=0", "x=1"])
def test_a_wrong_setting_is_refused(change):
    with pytest.raises(ConfigError):
        load_config(ServeConfig, None, ["bundle=b", change])


def test_deployment_files_hold_valid_arguments():
    files = sorted((ROOT / "serve").glob("*.yaml"))
    assert files
    for file in files:
        tree = yaml.safe_load(file.read_text())
        ServeDeploySchema.model_validate(tree)
        assert tree["http_options"]["host"] == "127.0.0.1"
        for app in tree["applications"]:
            assert app["import_path"] == "serve.app:build_app"
            config = ServeConfig.model_validate(app["args"])
            assert ServeConfig.model_validate(yaml.safe_load(dump_yaml(config))) == config


class SlowScorer:
    """Takes half a second for each answer."""

    def __init__(self, config):
        del config

    def respond(self, name, query, request_id):
        time.sleep(0.5)
        raise UnknownModelError("scored")

    def summary(self):
        return {"models": ["slow"]}

    def reload(self):
        return False


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_too_many_are_told_when_to_come_back_and_a_stopped_replica_ends_what_it_began(url):
    config = ServeConfig(
        bundle="none", max_ongoing_requests=1, max_queued_requests=1, retry_after_s=3, drain_s=20,
    )  # fmt: skip
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        serve.run(build_app(config, SlowScorer), name="slow", route_prefix="/slow")
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])

    def ask(_):
        body = json.dumps({"user": "u", "items": ["i"]}).encode()
        headers = {"content-type": "application/json"}
        path = f"{url}/slow/v1/models/vm:score"
        request = urllib.request.Request(path, data=body, headers=headers)
        with pytest.raises(urllib.error.HTTPError) as caught:
            urllib.request.urlopen(request, timeout=30)
        return caught.value.code, caught.value.headers.get("retry-after")

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(12)))
        # 404 is the scorer's answer
        assert {code for code, _ in found} == {404, 503}
        assert {wait for code, wait in found if code == 503} == {"3"}
        late = pool.submit(ask, 0)
        time.sleep(0.3)  # it is in the replica now
        serve.delete("slow")
        assert late.result()[0] == 404


def is_mine_on_loopback(port):
    """Return whether what this process has at a port is on loopback alone."""
    mine = [one for one in listeners() if one.pid == os.getpid() and one.port == port]
    assert mine
    return all(one.is_loopback for one in mine)


def test_the_port_that_serve_opens_in_a_replica_stays_on_loopback_where_the_node_does(monkeypatch):
    original = replica.add_port_to_grpc_server
    monkeypatch.setattr(replica, "add_port_to_grpc_server", original)  # put back at the end
    assert not keep_on_loopback("10.2.0.10")
    assert replica.add_port_to_grpc_server is original
    before, after = (grpc.server(ThreadPoolExecutor(1)) for _ in range(2))
    # as `ReplicaBase` calls it
    open_port = replica.add_port_to_grpc_server(before, "[::]:0")
    assert keep_on_loopback("127.0.0.1")
    closed_port = replica.add_port_to_grpc_server(after, "[::]:0")
    before.start()
    after.start()
    try:
        assert not is_mine_on_loopback(open_port)  # else there is nothing to close any more
        assert is_mine_on_loopback(closed_port)
    finally:
        before.stop(None)
        after.stop(None)
    assert '"[::]:0"' in inspect.getsource(replica)


class Summary:
    """A scorer of which nothing but its summary is asked."""

    def summary(self):
        return {"revision": 7, "models": [{"name": "vm", "version": "abc"}]}


def test_serves_own_grpc_server_takes_our_methods_and_listens_everywhere():
    """What Serve's proxy does with a call, without its actors."""
    servicer = ScoringServicer(Summary(), lambda: 0)
    (port,) = free_ports(1)

    def factory(service_method, streaming_type):
        async def handler(request, context):
            mine = RayServegRPCContext(context)
            made = getattr(servicer, service_method.split("/")[-1])(request, mine)
            mine._set_on_grpc_context(context)
            return made.SerializeToString()

        return handler

    async def ask():
        options = gRPCOptions(**grpc_options(port))
        loop = asyncio.get_running_loop()
        task, server = await start_grpc_server(factory, options, event_loop=loop)
        async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
            stub = ScoringStub(channel)
            models = await stub.ListModels(wire.ListModelsRequest())
            request = health_pb2.HealthCheckRequest()
            health = await health_pb2_grpc.HealthStub(channel).Check(request)
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await stub.Score(wire.ScoreRequest(model="vm"))
            reflection = channel.unary_unary("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo")  # fmt: skip
            with pytest.raises(grpc.aio.AioRpcError) as hidden:
                await reflection(b"")
        is_loopback = is_mine_on_loopback(port)
        await server.stop(None)
        await task
        return models, health, refused.value, hidden.value, is_loopback

    models, health, refused, hidden, is_loopback = asyncio.run(ask())
    assert (models.revision, models.models[0].name, health.status) == (7, "vm", 1)
    assert refused.code() == grpc.StatusCode.INVALID_ARGUMENT
    problem = json.loads(dict(refused.trailing_metadata())["problem-bin"])
    assert {error["field"] for error in problem["errors"]} == {"user", "items"}
    assert hidden.code() == grpc.StatusCode.UNIMPLEMENTED
    assert not is_loopback  # why `grpc_port` takes keys
