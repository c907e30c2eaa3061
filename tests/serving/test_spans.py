"""Requests as OpenTelemetry traces: their spans and stages, whose trace they join, and that a collector gets them."""

import gzip
import itertools
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from fastapi.testclient import TestClient
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from pydantic import ValidationError

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.serving import scoring_pb2 as wire
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.predictor import load_predictor
from loopfm_ray.serving.rollout import Rollout, Rollouts, Served, promote, start_canary
from loopfm_ray.serving.rpc import ScoringServicer
from loopfm_ray.serving.service import Service
from loopfm_ray.serving.spans import Spans, SpansConfig, make_provider
from loopfm_ray.serving.watch import Watch
from loopfm_ray.types import MICROS_PER_DAY
from tests.serving.world import STOP

TS = STOP - MICROS_PER_DAY
PAST = {"past_count_item": 0.0, "past_recency_item": 0.5}
SCORE, BATCH = "/v1/models/vm:score", "/v1/models/vm:batch"
TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
NOWHERE = "http://127.0.0.1:9/v1/traces"


def body(user="u1", items=("i1", "i2")):
    return {"user": user, "items": list(items), "request_ts": TS, "context": PAST}


class Traced:
    """A service whose spans are kept here."""

    def __init__(self, world, share):
        self.exporter = InMemorySpanExporter()
        config = SpansConfig(endpoint=NOWHERE, share=share)
        watch = Watch(replica="me", spans=Spans(make_provider(config, "me", self.exporter)))
        self.service = Service(lambda one: load_predictor(one.bundle, one.online), watch=watch)
        self.served = Served(bundle=str(world.bundle), online=str(world.online))
        assert self.service.apply(promote(Rollouts(), "vm", self.served)) == {}
        app = create_api(self.service, watch=watch)
        self.client = TestClient(app, raise_server_exceptions=False)
        self.rpc = ScoringServicer(self.service, lambda: TS, watch=watch)

    def spans(self):
        """The spans of what was asked since the last time, by name."""
        found = self.exporter.get_finished_spans()
        self.exporter.clear()
        return found


@pytest.fixture(scope="module")
def traced(world):
    return Traced(world, 1.0)


def test_a_request_is_a_span_with_its_stages_one_after_another(traced):
    sent = body("secret-user", ["secret-item", "i1"])
    answer = traced.client.post(SCORE, json=sent, headers={"x-request-id": "id-1"})
    *stages, root = traced.spans()
    assert root.name == "score"
    assert root.kind == SpanKind.SERVER
    assert root.resource.attributes["service.name"] == "loopfm"
    assert root.resource.attributes["service.instance.id"] == "me"
    assert dict(root.attributes) == {
        "loopfm.request_id": "id-1",
        "loopfm.transport": "http",
        "loopfm.status": 200,
        "loopfm.model": "vm",
        "loopfm.variant": "stable",
        "loopfm.version": answer.json()["model"]["version"],
        "loopfm.queries": 1,
        "loopfm.rows": 2,
        "loopfm.degraded.not_in_store": 1,
    }
    assert root.status.status_code == StatusCode.UNSET
    assert [one.name for one in stages] == ["body", "decode", "features", "store", "model"]
    assert {one.parent.span_id for one in stages} == {root.context.span_id}
    edges = [root.start_time]
    for one in stages:
        edges += [one.start_time, one.end_time]
    edges.append(root.end_time)
    microsecond = 1000  # of the rounding to nanoseconds
    assert all(b >= a - microsecond for a, b in itertools.pairwise(edges))
    assert "secret" not in "".join(one.to_json() for one in (root, *stages))


def test_a_span_joins_the_trace_of_its_caller(traced):
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    traced.client.post(SCORE, json=body(), headers=headers)
    root = traced.spans()[-1]
    assert f"{root.context.trace_id:032x}" == TRACE
    assert f"{root.parent.span_id:016x}" == PARENT
    assert root.context.trace_state["vendor"] == "1"
    traced.client.post(SCORE, json=body(), headers={"traceparent": "00-nonsense"})
    other = traced.spans()[-1]
    assert other.parent is None
    assert other.context.trace_id != root.context.trace_id


def test_a_caller_that_does_not_sample_is_followed_and_a_share_of_the_others_taken(world, traced):
    traced.client.post(SCORE, json=body(), headers={"traceparent": f"00-{TRACE}-{PARENT}-00"})
    assert traced.spans() == ()
    none = Traced(world, 0.0)
    none.client.post(SCORE, json=body())
    assert none.spans() == ()
    none.client.post(SCORE, json=body(), headers={"traceparent": f"00-{TRACE}-{PARENT}-01"})
    assert len(none.spans()) == 6
    some = Traced(world, 0.5)
    for _ in range(40):
        some.client.get("/v1/models")
    assert 5 < len(some.spans()) < 35  # 20 in the mean, sd 3.2


def test_refusals_are_no_errors_of_the_service_and_failures_are(traced, monkeypatch):
    traced.client.post(SCORE, json={"user": ""})
    (refused,) = [one for one in traced.spans() if one.name == "score"]
    assert refused.attributes["loopfm.status"] == 422
    assert refused.status.status_code == StatusCode.UNSET

    def fail(*_):
        raise RuntimeError("inside")

    monkeypatch.setattr(traced.service._slots["vm"].predictors["stable"], "_score_part", fail)
    traced.client.post(SCORE, json=body())
    (failed,) = [one for one in traced.spans() if one.name == "score"]
    assert failed.status.status_code == StatusCode.ERROR


class Call:
    """What grpc gives a method of a servicer."""

    def __init__(self, **metadata):
        self.metadata, self.code, self.trailing = metadata, None, {}

    def invocation_metadata(self):
        return tuple(self.metadata.items())

    def set_code(self, code):
        self.code = code

    def set_details(self, details):
        pass

    def set_trailing_metadata(self, trailing):
        self.trailing = dict(trailing)


def test_grpc_is_traced_and_counted_like_http(traced):
    before = traced.service.watch.exposition().decode()
    assert 'transport="grpc"' not in before
    query = wire.Query(user="u1", items=["i1", "i2"], micros=TS)
    for name, value in PAST.items():
        query.context[name].number = value
    call = Call(traceparent=f"00-{TRACE}-{PARENT}-01")
    answer = traced.rpc.Score(wire.ScoreRequest(model="vm", query=query), call)
    assert len(answer.scores) == 2
    *stages, root = traced.spans()
    assert f"{root.context.trace_id:032x}" == TRACE
    assert root.attributes["loopfm.transport"] == "grpc"
    assert root.attributes["loopfm.request_id"] == call.trailing["x-request-id"]
    assert [one.name for one in stages] == ["decode", "features", "store", "model"]
    traced.rpc.Score(wire.ScoreRequest(model="vm"), Call())
    traced.rpc.GetModel(wire.GetModelRequest(model="none"), Call())
    text = traced.service.watch.exposition().decode()
    version = answer.model.version
    for route, status, variant, found in (
        ("score", 200, "stable", version),
        ("score", 422, "", ""),
    ):
        model = "vm" if found else ""
        assert (
            f'loopfm_requests_total{{model="{model}",route="{route}",status="{status}",transport="grpc",'
            f'variant="{variant}",version="{found}"}} 1.0'
        ) in text
    assert 'route="models",status="404",transport="grpc"' in text


def test_a_batch_of_two_variants_has_the_stages_of_both(world, tmp_path):
    traced = Traced(world, 1.0)
    loaded = load_bundle(world.bundle)
    spec = replace(loaded.spec, calibration=PlattScaling(0.4, 0.9))
    save_bundle(tmp_path / "b", spec, loaded.model, PreparedData.open(world.prepared), {})
    other = Served(bundle=str(tmp_path / "b"), online=str(world.online))
    stable = Rollouts(models={"vm": Rollout(stable=traced.served)}, revision=2)
    assert traced.service.apply(start_canary(stable, "vm", other, 0.5)) == {}
    traced.client.post(BATCH, json={"requests": [body(f"u{n}") for n in range(20)]})
    *stages, root = traced.spans()
    once = ["features", "store", "model"]
    assert [one.name for one in stages] == ["body", "decode", *once, *once]
    assert root.attributes["loopfm.variant"] == "mixed"
    assert root.attributes["loopfm.queries"] == 20


def test_a_collector_gets_the_spans(world):
    """The real exporter, in the background, to a server that reads what OTLP says."""
    received, arrived = [], threading.Event()

    class Collector(BaseHTTPRequestHandler):
        def do_POST(self):
            data = self.rfile.read(int(self.headers["content-length"]))
            if self.headers.get("content-encoding") == "gzip":
                data = gzip.decompress(data)
            received.append((self.path, ExportTraceServiceRequest.FromString(data)))
            self.send_response(200)
            self.end_headers()
            arrived.set()

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Collector)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    spans = {"endpoint": f"http://127.0.0.1:{server.server_port}/v1/traces", "share": 1.0}
    config = ServeConfig(bundle=str(world.bundle), online=str(world.online), spans=spans)
    watch = config.watch()
    service = Service(config.open, watch=watch)
    service.apply(promote(Rollouts(), "vm", Served(bundle=config.bundle, online=config.online)))
    client = TestClient(create_api(service, watch=watch))
    assert client.post(SCORE, json=body()).status_code == 200
    watch.close()  # what waits is sent before a replica ends
    assert arrived.wait(10)
    server.shutdown()
    ((path, sent),) = received
    assert path == "/v1/traces"
    (resource,) = sent.resource_spans
    names = [span.name for scope in resource.scope_spans for span in scope.spans]
    assert sorted(names) == ["body", "decode", "features", "model", "score", "store"]


def test_what_is_wrong_is_said():
    with pytest.raises(ValidationError, match="endpoint"):
        ServeConfig(bundle="b", spans={"endpoint": "localhost:4318"})
    with pytest.raises(ValidationError, match="share"):
        SpansConfig(endpoint=NOWHERE, share=1.5)
