"""What a watched service counts and tells: metrics by hand, logs without what was asked, drift of planted shifts."""

import asyncio
import json
import stat
import urllib.error
import urllib.request
from dataclasses import replace

import numpy as np
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import StoreError
from loopfm_ray.jobs.serving import ServeConfig
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.baseline import measure_reference
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.exporter import Exporter, MetricsConfig
from loopfm_ray.serving.keys import ApiKeys, Gate, add_key
from loopfm_ray.serving.lines import read_lines
from loopfm_ray.serving.logs import RequestLog, RequestLogConfig
from loopfm_ray.serving.parity import load_offline
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.serving.rollout import (
    Rollouts,
    Served,
    is_canary_user,
    promote,
    start_canary,
    start_shadow,
)
from loopfm_ray.serving.service import Service
from loopfm_ray.serving.watch import Watch
from loopfm_ray.serving.watching import Watching
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.serving.test_service import settled
from tests.serving.world import STOP, VM_STOP

TS = STOP - MICROS_PER_DAY
PAST = {"past_count_item": 0.0, "past_recency_item": 0.5}
SCORE, BATCH = "/v1/models/vm:score", "/v1/models/vm:batch"
WINDOW = TimeRange(VM_STOP, VM_STOP + 10 * MICROS_PER_DAY)


def body(user="u1", items=("i1", "i2", "i3"), **context):
    return {"user": user, "items": list(items), "request_ts": TS, "context": {**PAST, **context}}


@pytest.fixture(scope="module")
def prepared(world):
    return PreparedData.open(world.prepared)


@pytest.fixture(scope="module")
def bundles(world, prepared, tmp_path_factory):
    """The world's bundle with a reference, and another one without."""
    folder = tmp_path_factory.mktemp("bundles")
    loaded = load_bundle(world.bundle)
    reference = measure_reference(loaded.spec, loaded.model, prepared, world.joined, WINDOW)
    save_bundle(folder / "a", loaded.spec, loaded.model, prepared, {"of": "a"}, reference)
    spec = replace(loaded.spec, calibration=PlattScaling(0.4, 0.9))
    save_bundle(folder / "b", spec, loaded.model, prepared, {"of": "b"})
    return [Served(bundle=str(folder / name), online=str(world.online)) for name in "ab"]


class Watched:
    """A watched service and its client."""

    def __init__(self, rollouts, gate=None, **logs):
        self.watch = Watch(replica="me", **logs)
        self.service = Service(lambda one: load_predictor(one.bundle, one.online), watch=self.watch)
        assert self.service.apply(rollouts) == {}
        self.client = TestClient(
            create_api(self.service, gate=gate, watch=self.watch), raise_server_exceptions=False
        )

    def samples(self):
        """All samples, by name and the values of their labels: model, variant, version, then by name."""
        first = ("model", "variant", "version")
        text = self.client.get("/metrics").text
        return {
            (
                sample.name,
                *(sample.labels[name] for name in first if name in sample.labels),
                *(sample.labels[name] for name in sorted({*sample.labels} - {*first})),
            ): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }


@pytest.fixture
def stable(bundles):
    return promote(Rollouts(), "vm", bundles[0])


def version(one):
    return load_bundle(one.bundle).version


def test_requests_are_counted_by_model_version_route_and_status(bundles, stable):
    service = Watched(stable)
    found = version(bundles[0])
    for _ in range(3):
        assert service.client.post(SCORE, json=body()).status_code == 200
    service.client.post(BATCH, json={"requests": [body("u2"), body("u3", ["i1"])]})
    service.client.post(SCORE, json=body(colour="red"))
    service.client.post(SCORE, json={"user": ""})
    service.client.post(SCORE, content=b"{")
    service.client.post("/v1/models/mine%20own:score", json=body())
    service.client.get("/v1/models/vm")
    service.client.get("/healthz")
    service.client.get("/anything-a-caller-likes")
    samples = service.samples()
    counts = {key[1:]: v for key, v in samples.items() if key[0] == "loopfm_requests_total"}
    assert counts == {
        ("vm", "stable", found, "score", "200", "http"): 3,
        ("vm", "stable", found, "batch", "200", "http"): 1,
        ("vm", "", "", "score", "422", "http"): 1,
        ("", "", "", "score", "422", "http"): 1,
        ("", "", "", "score", "400", "http"): 1,
        ("", "", "", "score", "404", "http"): 1,
        ("vm", "", "", "models", "200", "http"): 1,
        ("", "", "", "other", "404", "http"): 1,
    }
    model = ("vm", "stable", found)
    assert samples["loopfm_rows_total", *model] == 3 * 3 + 3 + 1
    assert samples["loopfm_queries_total", *model] == 3 + 2
    assert samples["loopfm_scores_count", *model] == 13
    assert samples["loopfm_replica_info", "me"] == 1
    assert samples["loopfm_revision",] == stable.revision
    for stage in ("body", "decode", "features", "store", "model", "total"):
        assert samples["loopfm_stage_seconds_count", "vm", stage] == 4
        assert samples["loopfm_stage_seconds_sum", "vm", stage] > 0
    parts = [samples["loopfm_stage_seconds_sum", "vm", s] for s in ("features", "store", "model")]
    assert sum(parts) < samples["loopfm_stage_seconds_sum", "vm", "total"]


def test_no_word_of_a_caller_becomes_a_label(bundles, stable):
    service = Watched(stable)
    service.client.post(SCORE, json=body("secret-user", ["secret-item"], device="secret-device"))
    service.client.post(
        "/v1/models/secret-model:score", json=body(), headers={"x-request-id": "secret-id"}
    )
    service.client.request("SECRET", "/secret-path")
    assert "secret" not in service.client.get("/metrics").text.lower()


def test_histories_and_unknown_things_are_counted_as_the_answers_say(bundles, stable):
    service = Watched(stable)
    model = ("vm", "stable", version(bundles[0]))
    queries = [
        body(),
        body("stranger"),
        body("u2", ["i1", "never", "seen"]),
        body("u3", device="no such"),
        {**body("u4"), "request_ts": VM_STOP - 30 * MICROS_PER_DAY},
    ]
    answers = [service.client.post(SCORE, json=one).json() for one in queries]
    features = [answer["features"] for answer in answers]
    reasons = [one["reason"] or "hit" for one in features]
    assert {"hit", "not_in_store", "nothing_visible"} <= set(reasons)
    samples = service.samples()
    for reason in set(reasons):
        assert samples["loopfm_histories_total", *model, reason] == reasons.count(reason)
    ages = [one["age_s"] for one in features if one["age_s"] is not None]
    assert samples["loopfm_history_age_seconds_count", "vm"] == len(ages)
    assert samples["loopfm_history_age_seconds_sum", "vm"] == pytest.approx(sum(ages))
    unknown = {
        key[4]: v for key, v in samples.items() if key[:4] == ("loopfm_unknown_total", *model)
    }
    assert unknown["item"] == sum(answer["unknown_items"] for answer in answers) == 2
    assert unknown["user"] == sum(one["unknown_user"] for one in features) == 1
    assert unknown["value"] == sum(len(one["unknown_fields"]) for one in features) == 1
    assert unknown["left_out"] == sum(len(one["default_fields"]) for one in features) > 0


def test_the_histogram_of_scores_holds_the_scores(bundles, stable):
    service = Watched(stable)
    scores = []
    for n in range(70):  # more than are counted at once
        scores += service.client.post(SCORE, json=body(f"u{n % 40}", [f"i{n}"])).json()["scores"]
    model = ("vm", "stable", version(bundles[0]))
    samples = service.samples()
    edges = [key[4] for key in samples if key[:4] == ("loopfm_scores_bucket", *model)]
    assert len(edges) == 17
    for edge in edges:
        want = sum(score <= float(edge) for score in scores)
        assert samples["loopfm_scores_bucket", *model, edge] == want
    assert samples["loopfm_scores_sum", *model] == pytest.approx(sum(scores))


def test_canaries_and_shadows_are_told_apart(bundles):
    state = start_canary(promote(Rollouts(), "vm", bundles[0]), "vm", bundles[1], 0.5)
    service = Watched(state)
    users = [f"u{n}" for n in range(40)]
    mine = [user for user in users if is_canary_user("vm", user, 0.5)]
    service.client.post(BATCH, json={"requests": [body(user) for user in users]})
    samples = service.samples()
    versions = [version(one) for one in bundles]
    assert samples["loopfm_queries_total", "vm", "canary", versions[1]] == len(mine) > 5
    assert samples["loopfm_queries_total", "vm", "stable", versions[0]] == 40 - len(mine) > 5
    assert samples["loopfm_requests_total", "vm", "mixed", "mixed", "batch", "200", "http"] == 1
    assert samples["loopfm_drift_reference", "vm", "stable", versions[0]] == 1
    assert samples["loopfm_drift_reference", "vm", "canary", versions[1]] == 0
    info = [key for key in samples if key[0] == "loopfm_model_info"]
    assert {key[3] for key in info} == set(versions)

    service = Watched(start_shadow(promote(Rollouts(), "vm", bundles[0]), "vm", bundles[1]))
    service.client.post(SCORE, json=body())
    report = settled(service.service, 1)
    samples = service.samples()
    assert samples["loopfm_shadow_rows_total", "vm", versions[1]] == 3
    assert (
        samples["loopfm_shadow_abs_difference_total", "vm", versions[1]] == report["sum_abs_diff"]
    )
    assert samples["loopfm_shadow_abs_difference_max", "vm", versions[1]] > 0.01
    assert not [key for key in samples if key[0] == "loopfm_queries_total" and versions[1] in key]


def test_series_of_a_bundle_that_is_gone_are_gone(bundles, stable):
    service = Watched(stable)
    versions = [version(one) for one in bundles]
    service.client.post(SCORE, json=body())
    service.service.apply(promote(stable, "vm", bundles[1]))
    service.client.post(SCORE, json=body())
    text = service.client.get("/metrics").text
    assert versions[0] not in text
    assert versions[1] in text
    service.service.apply(promote(promote(stable, "vm", bundles[1]), "vm", bundles[0]))
    service.client.post(SCORE, json=body())
    samples = service.samples()
    assert samples["loopfm_queries_total", "vm", "stable", versions[0]] == 1  # counted anew


def test_reloads_that_fail_are_told(bundles, stable):
    service = Watched(stable)
    predictor = service.service._slots["vm"].predictors["stable"]

    class Gone:
        def poll(self):
            raise StoreError("gone")

    predictor._source = Gone()
    service.service.reload()
    model = ("vm", "stable", version(bundles[0]))
    samples = service.samples()
    assert samples["loopfm_reload_failures_total", *model] == 1
    assert samples["loopfm_latents_watermark_seconds", *model] == STOP / 1e6
    assert samples["loopfm_rollout_refused", "vm"] == 0


def test_metrics_ask_for_a_key_where_the_rest_does(bundles, stable):
    keys, secret = add_key(ApiKeys(), "prometheus")
    service = Watched(stable, gate=Gate(keys.keys, lambda: 0.0))
    assert service.client.get("/metrics").status_code == 401
    assert service.client.post(SCORE, json=body()).status_code == 401
    answer = service.client.get("/metrics", headers={"authorization": f"Bearer {secret}"})
    assert answer.status_code == 200
    assert 'route="score",status="401"' in answer.text
    assert TestClient(create_api(service.service)).get("/metrics").status_code == 404


def test_an_own_failure_is_counted(bundles, stable, monkeypatch):
    service = Watched(stable)
    predictor = service.service._slots["vm"].predictors["stable"]

    def fail(*_):
        raise RuntimeError("inside")

    monkeypatch.setattr(predictor, "_score_part", fail)
    assert service.client.post(SCORE, json=body()).status_code == 500
    assert service.samples()["loopfm_requests_total", "vm", "", "", "score", "500", "http"] == 1


def test_a_caller_that_is_gone_is_counted():
    async def gone(scope, receive, send):
        raise asyncio.CancelledError

    watch = Watch()
    with pytest.raises(asyncio.CancelledError):
        asyncio.run(
            Watching(gone, watch)({"type": "http", "path": SCORE, "headers": []}, None, None)
        )
    want = 'loopfm_requests_total{model="",route="score",status="499",transport="http",variant="",version=""} 1.0'
    assert want in watch.exposition().decode()


def test_the_request_log_tells_how_it_went_and_nothing_of_what_was_in_it(bundles, stable, tmp_path):
    log = RequestLog(RequestLogConfig(path=str(tmp_path)))
    service = Watched(stable, request_log=log)
    sent = [body("private-user", ["private-item", "i1"], device="private-device"), body("u1")]
    for number, one in enumerate([*sent, sent[1]]):
        service.client.post(SCORE, json=one, headers={"x-request-id": f"id-{number}"})
    service.client.post(BATCH, json={"requests": [body("u1"), body("stranger")]})
    service.client.post(SCORE, json={"user": "private-user"})
    service.watch.close()
    text = log.lines.path.read_text()
    assert "private" not in text
    assert stat.S_IMODE(log.lines.path.stat().st_mode) == 0o600
    first, second, third, batch, refused = read_lines(log.lines.path)
    assert (first["request_id"], first["status"], first["rows"]) == ("id-0", 200, 2)
    assert (first["model"], first["variant"]) == ("vm", "stable")
    assert first["version"] == version(bundles[0])
    assert first["degraded"] == {"not_in_store": 1}
    assert second["degraded"] == {}
    assert second["user"] == third["user"] != first["user"]
    assert len(first["user"]) == 16
    assert set(first["ms"]) == {"body", "decode", "features", "store", "model", "total"}
    assert 0 < first["ms"]["model"] < first["ms"]["total"]
    assert (batch["route"], batch["queries"], batch["user"]) == ("batch", 2, None)
    assert batch["degraded"] == {"not_in_store": 1}
    assert (refused["status"], refused["model"], refused["rows"]) == (422, None, 0)
    assert len(refused["request_id"]) == 32


def test_users_have_one_hash_under_one_salt_and_others_under_another(tmp_path):
    salt = tmp_path / "salt"
    salt.write_bytes(b"s" * 32)
    salt.chmod(0o600)
    logs = [
        RequestLog(RequestLogConfig(path=str(tmp_path / "logs"), salt_file=file))
        for file in (str(salt), str(salt), None, None)
    ]
    hashes = [log.hash_user("u1") for log in logs]
    for log in logs:
        log.lines.close()
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3
    salt.write_bytes(b"short")
    for mode, message in ((0o600, "at least 16"), (0o644, "chmod 600")):
        salt.chmod(mode)
        with pytest.raises(StoreError, match=message):
            RequestLog(RequestLogConfig(path=str(tmp_path), salt_file=str(salt)))
    with pytest.raises(StoreError, match="can not be read"):
        RequestLog(RequestLogConfig(path=str(tmp_path), salt_file=str(tmp_path / "none")))


def get(address, key=None):
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(f"http://{address}/metrics", headers=headers), timeout=10
        ) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, ""


def test_each_replica_answers_scrapes_and_says_where(tmp_path):
    config = MetricsConfig(targets=str(tmp_path))
    exporters = [Exporter(Watch(replica=name), config) for name in ("one", "two")]
    files = sorted(tmp_path.glob("*.json"))
    addresses = [json.loads(file.read_text())[0]["targets"][0] for file in files]
    assert sorted(addresses) == sorted(one.address for one in exporters)
    found = [get(one.address) for one in exporters]
    for name, (status, text) in zip(("one", "two"), found, strict=True):
        assert status == 200
        assert f'loopfm_replica_info{{replica="{name}"}} 1.0' in text
    exporters[0].close()
    assert len(list(tmp_path.glob("*.json"))) == 1
    # one that was killed is forgotten by the next that starts
    (tmp_path / "replica-7.json").write_text("[]")
    third = Exporter(Watch(), config)
    assert not (tmp_path / "replica-7.json").exists()
    assert len(list(tmp_path.glob("*.json"))) == 2
    for one in (exporters[1], third):
        one.close()
    assert list(tmp_path.glob("*.json")) == []


def test_scrapes_of_a_replica_take_a_key_where_one_is_asked_for():
    keys, secret = add_key(ApiKeys(), "prometheus")
    exporter = Exporter(Watch(), MetricsConfig(), Gate(keys.keys, lambda: 0.0))
    assert [get(exporter.address, key)[0] for key in (None, "wrong", secret)] == [401, 401, 200]
    port = int(exporter.address.rpartition(":")[2])
    with pytest.raises(StoreError, match="take another port"):
        Exporter(Watch(), MetricsConfig(port=port))
    exporter.close()
    with pytest.raises(ValueError, match=r"metrics\.host"):
        ServeConfig(bundle="b", metrics=MetricsConfig(host="0.0.0.0"))
    ServeConfig(bundle="b", metrics=MetricsConfig(host="0.0.0.0"), api_keys="keys.json")


def test_the_reference_is_of_the_rows_that_a_loop_scores(world, prepared, bundles):
    """The offline rows, one by one, against the counts; and the served twin of the same rows has no drift."""
    predictor = load_predictor(bundles[0].bundle, bundles[0].online)
    reference = predictor.bundle.reference
    offline = load_offline(predictor.bundle, prepared, world.joined, WINDOW, num_requests=10_000)
    assert reference.num_rows == sum(reference.scores.counts) == len(offline.probs) > 300
    for edges, counts, values in (
        (reference.scores.edges, reference.scores.counts, offline.probs),
        (reference.history_len.edges, reference.history_len.counts, offline.rows["latent_len"]),
    ):
        slow = [0] * len(counts)
        for value in values:
            slow[sum(value >= edge for edge in edges)] += 1
        assert tuple(slow) == counts
    unknown = sum(predictor.score(r.query).features.num_unknown_items for r in offline.replays)
    assert reference.unknown_items == pytest.approx(unknown / len(offline.probs))
    assert reference.coverage == np.mean(offline.rows["latent_len"] > 0)

    service = Watched(promote(Rollouts(), "vm", bundles[0]))
    described = service.client.get("/v1/models/vm").json()["variants"]["stable"]
    assert described["drift"] is None
    assert described["reference"]["num_rows"] == reference.num_rows
    for replay in offline.replays:
        service.service.respond("vm", replay.query, "r")
    found = service.client.get("/v1/models/vm").json()["variants"]["stable"]["drift"]
    assert found["num_rows"] == reference.num_rows
    assert found["psi_scores"] == pytest.approx(0, abs=1e-12)
    assert found["psi_history_len"] == pytest.approx(0, abs=1e-12)
    assert found["coverage_difference"] == pytest.approx(0)
    assert found["unknown_items_difference"] == pytest.approx(0)
    assert found["unknown_users_difference"] == pytest.approx(0)
    model = ("vm", "stable", predictor.bundle.version)
    assert service.samples()["loopfm_drift_rows", *model] == reference.num_rows
    # the same requests half a year later find no history: the scores and the lengths move
    for replay in offline.replays:
        later = replace(replay.query, request_ts=replay.query.request_ts + 180 * MICROS_PER_DAY)
        service.service.respond("vm", later, "r")
    samples = service.samples()
    assert samples["loopfm_drift_psi_history_len", *model] > 0.25
    assert samples["loopfm_drift_coverage", *model] < -0.2
    assert samples["loopfm_drift_psi_scores", *model] > 2 * samples["loopfm_drift_expected_psi", *model]  # fmt: skip


def test_many_rows_are_thinned_out_evenly(world, prepared, monkeypatch):
    loaded = load_bundle(world.bundle)
    whole = measure_reference(loaded.spec, loaded.model, prepared, world.joined, WINDOW)
    monkeypatch.setattr("loopfm_ray.serving.baseline.MAX_ROWS", 100)
    monkeypatch.setattr("loopfm_ray.serving.baseline._BATCH_ROWS", 7)
    thin = measure_reference(loaded.spec, loaded.model, prepared, world.joined, WINDOW)
    every = -(-whole.num_rows // 100)
    assert thin.num_rows == -(-whole.num_rows // every)
    assert thin.coverage == pytest.approx(whole.coverage, abs=0.15)
    nowhere = TimeRange(0, 1)
    assert measure_reference(loaded.spec, loaded.model, prepared, world.joined, nowhere) is None


def test_a_bundle_without_a_reference_is_served_and_says_so(bundles):
    service = Watched(promote(Rollouts(), "vm", bundles[1]))
    service.client.post(SCORE, json=body())
    found = service.client.get("/v1/models/vm").json()["variants"]["stable"]
    assert (found["reference"], found["drift"]) == (None, None)
    samples = service.samples()
    assert samples["loopfm_drift_reference", "vm", "stable", version(bundles[1])] == 0
    assert not [key for key in samples if key[0] == "loopfm_drift_psi_scores"]


def test_what_watches_changes_no_answer(bundles, stable):
    plain = Service(lambda one: load_predictor(one.bundle, one.online))
    plain.apply(stable)
    bare, watched = TestClient(create_api(plain)), Watched(stable)
    headers = {"x-request-id": "same"}
    for path, sent in ((SCORE, body()), (BATCH, {"requests": [body(), body("stranger")]})):
        answers = [c.post(path, json=sent, headers=headers) for c in (bare, watched.client)]
        assert answers[0].content == answers[1].content
    assert isinstance(plain._slots["vm"].predictors["stable"], Predictor)
