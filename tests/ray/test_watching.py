"""Several replicas of a watched service: each answers scrapes, and what they tell adds up to what was asked."""

import json
import time
import urllib.request

import pytest
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.serving import ServeConfig, start, stop
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.exporter import MetricsConfig
from loopfm_ray.serving.lines import read_lines
from loopfm_ray.serving.logs import ParityLogConfig, RequestLogConfig
from loopfm_ray.serving.replay import Replayer, read_requests
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.target import open_version
from tests.serving.world import STOP, make_world

NUM_REQUESTS = 60
SCORE = "/v1/models/vm_loopfm:score"


def scrape(address):
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    return {
        (sample.name, sample.labels.get("status", sample.labels.get("replica", ""))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def ask(url, number):
    body = {
        "user": f"u{number % 40}",
        "items": ["i1", f"i{number}"],
        "request_ts": STOP - number,
        "context": {"past_count_item": 0.0, "past_recency_item": 0.5},
    }
    headers = {"content-type": "application/json", "connection": "close"}
    request = urllib.request.Request(url + SCORE, json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_what_the_replicas_tell_adds_up_and_their_logs_can_be_replayed(tmp_path):
    world = make_world(tmp_path)
    config = ServeConfig(
        bundle=str(world.bundle),
        online=str(world.online),
        port=0,
        num_replicas=2,
        metrics=MetricsConfig(targets=str(tmp_path / "targets")),
        request_log=RequestLogConfig(path=str(tmp_path / "requests")),
        parity_log=ParityLogConfig(path=str(tmp_path / "parity"), sample=1.0),
    )
    with connect(RayConfig()):
        url = start(config)
        for number in range(NUM_REQUESTS):
            ask(url, number)
        files = sorted((tmp_path / "targets").glob("replica-*.json"))
        addresses = [json.loads(file.read_text())[0]["targets"][0] for file in files]
        assert len(set(addresses)) == 2
        told = [scrape(address) for address in addresses]
        counts = [one.get(("loopfm_requests_total", "200"), 0.0) for one in told]
        assert sum(counts) == NUM_REQUESTS
        assert min(counts) > 0
        assert len({key[1] for one in told for key in one if key[0] == "loopfm_replica_info"}) == 2
        assert sum(one[("loopfm_stage_seconds_count", "")] for one in told) == NUM_REQUESTS
        assert scrape(url.removeprefix("http://"))[("loopfm_revision", "")] == 0
        serve.delete("loopfm")
        deadline = time.monotonic() + 60
        while list((tmp_path / "targets").glob("*.json")):  # a replica that stops takes it back
            assert time.monotonic() < deadline
            time.sleep(0.1)
        stop()
    lines = [line for file in (tmp_path / "requests").glob("*.jsonl") for line in read_lines(file)]
    assert len(lines) == NUM_REQUESTS
    assert {line["status"] for line in lines} == {200}
    bundle = load_bundle(world.bundle)
    space = bundle.spec.history.space.id
    replayer = Replayer(
        bundle,
        PreparedData.open(world.prepared),
        LatentsReader(world.latents),
        lambda version: open_version(world.online, space, version),
    )
    report = replayer.replay(read_requests(tmp_path / "parity"))
    assert (report.num_requests, report.num_mismatches, report.not_replayed) == (
        NUM_REQUESTS,
        0,
        {},
    )
