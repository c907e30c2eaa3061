"""Logged requests are scored again offline: nothing differs, unless something was planted that does."""

import json
import stat
from dataclasses import replace

import pytest
import torch
from fastapi.testclient import TestClient

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import DataError, StoreError
from loopfm_ray.serving.api import create_api
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.logs import ParityLog, ParityLogConfig, is_sampled
from loopfm_ray.serving.parity import load_offline
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.serving.replay import Replayer, read_requests
from loopfm_ray.serving.rollout import Rollouts, Served, promote
from loopfm_ray.serving.service import Service
from loopfm_ray.serving.watch import Watch
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.publish import load_memory
from loopfm_ray.store.target import open_version
from loopfm_ray.types import MICROS_PER_DAY
from tests.serving.world import STOP, make_world, write_latents


@pytest.fixture(scope="module")
def prepared(world):
    return PreparedData.open(world.prepared)


@pytest.fixture(scope="module")
def bodies(world, prepared):
    """What callers send: every kind of field, known and unknown, at times of the test window."""
    offline = load_offline(load_bundle(world.bundle), prepared, world.joined, num_requests=60)
    found = []
    for replay in offline.replays:
        query = replay.query
        found.append(
            {
                "user": query.user,
                "items": list(query.items),
                "request_ts": query.request_ts,
                "context": query.context,
            }
        )
    found[0]["user"] = "stranger"
    found[1]["items"] = ["never seen"] * len(found[1]["items"])
    return found


def serve(predictor, bodies, folder, share=1.0):
    """Answer single requests and a batch over HTTP, with a parity log; return its file."""
    log = ParityLog(ParityLogConfig(path=str(folder), sample=share))
    watch = Watch(parity_log=log)
    service = Service(lambda _: predictor, watch=watch)
    service.apply(promote(Rollouts(), "vm", Served(bundle="b")))
    client = TestClient(create_api(service, watch=watch))
    for number, body in enumerate(bodies[:30]):
        answer = client.post(
            "/v1/models/vm:score", json=body, headers={"x-request-id": f"id-{number}"}
        )
        assert answer.status_code == 200, answer.text
    answer = client.post("/v1/models/vm:batch", json={"requests": bodies[30:]}, headers={"x-request-id": "many"})  # fmt: skip
    assert answer.status_code == 200, answer.text
    service.close()
    watch.close()
    return log.lines.path


def replayer(world, prepared, **changes):
    bundle = load_bundle(world.bundle)
    space = bundle.spec.history.space.id
    given = {
        "bundle": bundle,
        "prepared": prepared,
        "latents": LatentsReader(world.latents),
        "open_store": lambda version: open_version(world.online, space, version),
    }
    return Replayer(**{**given, **changes})


@pytest.fixture(scope="module")
def log(world, bodies, tmp_path_factory):
    predictor = load_predictor(world.bundle, world.online)
    return serve(predictor, bodies, tmp_path_factory.mktemp("log"))


def test_served_requests_are_scored_alike_offline(world, prepared, bodies, log):
    report = replayer(world, prepared).replay(read_requests(log))
    assert (report.num_mismatches, report.not_replayed) == (0, {})
    assert report.num_requests == len(bodies) >= 60
    assert report.num_rows == sum(len(body["items"]) for body in bodies)
    assert report.max_abs_diff < 1e-6
    assert report.histories == {"offline": len(bodies)}
    assert set(report.groups) == {"user", "item", "context", "past", "history", "history_len"}
    assert max(report.groups.values()) < 1e-6
    assert max(record.history_len for record in read_requests(log)) > 3


def test_a_log_names_everything_and_is_its_owners(world, bodies, log):
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    records = list(read_requests(log))
    assert [record.request_id for record in records[:30]] == [f"id-{n}" for n in range(30)]
    assert [(r.request_id, r.index) for r in records[30:]] == [
        ("many", n) for n in range(len(bodies) - 30)
    ]
    for record, body in zip(records, bodies, strict=True):
        assert record.query.user == body["user"]
        assert list(record.query.items) == body["items"]
        assert record.query.context == body["context"]
    assert {record.version for record in records} == {load_bundle(world.bundle).version}


def test_a_history_of_another_version_comes_from_the_store_it_was_read_from(
    world, prepared, bodies, log, tmp_path
):
    write_latents(prepared, tmp_path / "later", stop_ts=STOP - 6 * MICROS_PER_DAY)
    run = LatentsReader(tmp_path / "later")
    report = replayer(world, prepared, latents=run).replay(read_requests(log))
    assert (report.num_mismatches, report.not_replayed) == (0, {})
    assert report.histories == {"online": len(bodies)}


def test_changed_weights_are_found_and_the_features_are_cleared(world, prepared, bodies, tmp_path):
    predictor = load_predictor(world.bundle, world.online)
    with torch.no_grad():
        for weight in predictor.bundle.model.parameters():
            weight.mul_(1.01)
            break
    log = serve(predictor, bodies, tmp_path)
    report = replayer(world, prepared).replay(read_requests(log))
    assert report.share > 0.5
    assert report.max_abs_diff > 1e-4
    assert len(report.mismatches) == 20
    assert max(report.groups.values()) < 1e-6


def test_a_store_that_lost_events_is_found_in_the_histories(world, prepared, bodies, tmp_path):
    bundle = load_bundle(world.bundle)
    cut = load_memory(world.latents, prepared.users.keys, max_events_per_user=2)
    log = serve(Predictor(bundle, cut), bodies, tmp_path)
    report = replayer(world, prepared, open_store=lambda _: cut).replay(read_requests(log))
    assert report.share > 0.3
    assert report.groups["history"] >= 1
    assert report.groups["history_len"] > 3
    assert max(report.groups[name] for name in ("user", "item", "context", "past")) < 1e-6


def test_a_table_that_differs_is_found_in_its_group(world, prepared, bodies, tmp_path):
    bundle = load_bundle(world.bundle)
    prices = {name: values + 0.5 for name, values in bundle.items.numeric.items()}
    wrong = replace(bundle, items=replace(bundle.items, numeric=prices))
    store = load_memory(world.latents, prepared.users.keys)
    log = serve(Predictor(wrong, store), bodies, tmp_path)
    report = replayer(world, prepared, bundle=wrong).replay(read_requests(log))
    assert report.num_mismatches > 0
    assert report.groups["item"] == pytest.approx(0.5, abs=1e-5)
    assert report.groups["user"] == 0


def changed(log, path, **changes):
    """Write the records of `log` with these changes."""
    lines = [json.dumps({**json.loads(line), **changes}) for line in log.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    return path


def test_what_can_not_be_replayed_is_counted_by_why(world, prepared, bodies, log, tmp_path):
    def gone(version):
        raise StoreError(f"{version} is not there")

    size = len(bodies)
    other = changed(log, tmp_path / "a", model={"name": "vm", "version": "older"})
    report = replayer(world, prepared).replay(read_requests(other))
    assert (report.num_requests, list(report.not_replayed.values())) == (0, [size])
    assert "bundle older answered" in next(iter(report.not_replayed))
    lost = changed(log, tmp_path / "b", latents="abc")
    report = replayer(world, prepared, open_store=gone).replay(read_requests(lost))
    assert report.not_replayed == {"latents abc are gone": size}
    failed = changed(log, tmp_path / "c", reason="store_failed")
    report = replayer(world, prepared).replay(read_requests(failed))
    assert report.not_replayed == {"answered without its history: store_failed": size}
    # the offline latents are enough where the online version is gone
    report = replayer(world, prepared, open_store=gone).replay(read_requests(log))
    assert (report.num_requests, report.num_mismatches) == (size, 0)
    assert "history" not in report.groups


def test_a_torn_last_line_is_told_of_and_the_rest_counts(world, prepared, bodies, log, tmp_path):
    torn = tmp_path / "parity-0.jsonl"
    torn.write_bytes(log.read_bytes()[:-40])
    report = replayer(world, prepared).replay(read_requests(tmp_path))
    assert report.not_replayed == {"the line is not whole": 1}
    assert report.num_requests == len(bodies) - 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}\n", "has format None"),
        ('{"format": 1}\n', "no record of a parity log"),
        ("x\n", "no JSON"),
    ],
)
def test_what_is_no_parity_log_is_refused(tmp_path, text, message):
    path = tmp_path / "log"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        list(read_requests(path))
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match="holds no parity"):
        list(read_requests(tmp_path / "empty"))


def test_a_vm_without_history_is_replayed_too(tmp_path):
    other = make_world(tmp_path, kind="none", fields=("item", "user", "hour"))
    predictor = load_predictor(other.bundle)
    bodies = [{"user": f"u{n}", "items": ["i1", f"i{n}"], "request_ts": STOP} for n in range(40)]
    log = serve(predictor, bodies, tmp_path / "log")
    again = Replayer(
        load_bundle(other.bundle), PreparedData.open(other.prepared), None, lambda _: None
    )
    report = again.replay(read_requests(log))
    assert (report.num_requests, report.num_mismatches, report.not_replayed) == (40, 0, {})
    assert report.histories == {"none": 40}


def test_the_sample_is_a_share_that_hangs_on_the_request_id_alone(world, bodies, tmp_path):
    ids = [f"id-{n}" for n in range(20_000)]
    for share in (0.001, 0.1, 0.5):
        chosen = {one for one in ids if is_sampled(one, share)}
        assert len(chosen) == pytest.approx(share * len(ids), rel=0.35)
        assert chosen <= {one for one in ids if is_sampled(one, min(2 * share, 1.0))}
    assert all(is_sampled(one, 1.0) for one in ids)
    log = serve(load_predictor(world.bundle, world.online), bodies, tmp_path, share=0.3)
    found = {record.request_id for record in read_requests(log)}
    asked = [*(f"id-{n}" for n in range(30)), "many"]
    assert found == {one for one in asked if is_sampled(one, 0.3)}
    assert 2 < len(found) < 20
