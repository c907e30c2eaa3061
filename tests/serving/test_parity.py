from dataclasses import replace

import numpy as np
import pytest

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, DataError, JobError
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.parity import ask_service, check_parity, load_offline
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.store.publish import load_memory, publish
from loopfm_ray.store.target import open_version
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.serving.world import MAX_LEN, STOP, VM_STOP, make_world, write_latents


@pytest.fixture(scope="module")
def prepared(world):
    return PreparedData.open(world.prepared)


def test_served_scores_equal_offline_scores_of_the_same_rows(world, prepared):
    predictor = load_predictor(world.bundle, world.online)
    offline = load_offline(predictor.bundle, prepared, world.joined, num_requests=10_000)
    report = check_parity(predictor, offline)
    assert report.is_ok, report.mismatches
    assert report.max_abs_diff < 1e-6
    assert report.num_rows == len(offline.probs) > 1000
    assert report.num_requests < report.num_rows
    # the rows exercise what they should: histories, unknown values, ids after training
    assert np.std(offline.probs) > 0.05
    assert predictor.counters.unknown_values > 0
    assert predictor.counters.history_misses < report.num_requests / 2


def test_parity_holds_for_a_vm_without_history_and_tables(tmp_path):
    other = make_world(tmp_path, kind="none", fields=("item", "user", "hour"))
    predictor = load_predictor(other.bundle)
    offline = load_offline(predictor.bundle, PreparedData.open(other.prepared), other.joined)
    report = check_parity(predictor, offline)
    assert report.is_ok
    assert report.num_requests >= 200
    assert predictor.counters.unknown_items > 0


def test_the_sample_is_seeded_and_inside_the_range(world, prepared):
    bundle = load_bundle(world.bundle)
    span = TimeRange(VM_STOP, VM_STOP + (STOP - VM_STOP) // 2)
    first = load_offline(bundle, prepared, world.joined, span, num_requests=5, seed=3)
    again = load_offline(bundle, prepared, world.joined, span, num_requests=5, seed=3)
    assert [replay.query for replay in first.replays] == [replay.query for replay in again.replays]
    assert all(span.contains(replay.query.request_ts) for replay in first.replays)
    assert len({(r.query.user, r.query.request_ts) for r in first.replays}) == 5


def test_a_range_without_requests_is_an_error(world, prepared):
    with pytest.raises(DataError, match="no requests"):
        load_offline(load_bundle(world.bundle), prepared, world.joined, TimeRange(0, 1))


def test_a_store_that_lacks_events_is_found(world, prepared):
    bundle = load_bundle(world.bundle)
    cut = load_memory(world.latents, prepared.users.keys, max_events_per_user=2)
    report = check_parity(Predictor(bundle, cut), load_offline(bundle, prepared, world.joined))
    assert not report.is_ok
    assert 0 < report.share <= 1
    assert report.max_abs_diff > 1e-3
    assert len(report.mismatches) == min(20, report.num_mismatches)


def test_a_joined_version_of_another_space_or_history_is_refused(world, prepared):
    bundle = load_bundle(world.bundle)
    pin = bundle.spec.history
    for other, message in (
        (replace(pin, space=replace(pin.space, snapshot_id="x")), "snapshot_id is snap"),
        (replace(pin, max_len=3), "max_len"),
        (replace(pin, retention_us=None), "retention_us"),
    ):
        changed = replace(bundle, spec=replace(bundle.spec, history=other))
        with pytest.raises(BundleError, match=message):
            load_offline(changed, prepared, world.joined)


def test_parity_reads_the_version_that_was_joined(world, prepared, tmp_path):
    """Late labels make histories of one request differ between versions, so another version is no comparison."""
    bundle = load_bundle(world.bundle)
    early = STOP - 8 * MICROS_PER_DAY
    write_latents(prepared, tmp_path / "younger", stop_ts=early)
    younger = load_memory(tmp_path / "younger", prepared.users.keys)
    offline = load_offline(bundle, prepared, world.joined, num_requests=30)
    with pytest.raises(BundleError, match="the joined version was made of"):
        check_parity(Predictor(bundle, younger), offline)
    # the bundle is not of the day: joined again, the younger version is compared with itself
    span = TimeRange(VM_STOP, early)
    joined = tmp_path / "joined"
    settings = JoinSettings(MAX_LEN, bundle.spec.history.retention_us)
    write_joined(world.prepared, tmp_path / "younger", joined, span, settings)
    report = check_parity(Predictor(bundle, younger), load_offline(bundle, prepared, joined))
    assert report.is_ok
    # a newer version goes live; the one that was joined is still there to compare with
    target = tmp_path / "online"
    publish(tmp_path / "younger", prepared.users.keys, target)
    publish(world.latents, prepared.users.keys, target)
    live = load_predictor(world.bundle, target)
    assert check_parity(live, offline).is_ok
    with pytest.raises(BundleError, match="open_version"):
        check_parity(live, load_offline(bundle, prepared, joined))
    before = open_version(target, bundle.spec.history.space.id, younger.version)
    report = check_parity(Predictor(bundle, before), load_offline(bundle, prepared, joined))
    assert report.is_ok


@pytest.mark.parametrize("url", ["https://x", "127.0.0.1:1", "http://127.0.0.1:9"])
def test_an_address_without_a_service_is_a_job_error(world, prepared, url):
    bundle = load_bundle(world.bundle)
    offline = load_offline(bundle, prepared, world.joined, num_requests=1)
    with pytest.raises(JobError):
        list(ask_service(url, [offline.replays[0].query], bundle.spec.name, bundle.version))


def test_publishing_the_same_version_twice_keeps_parity(world, prepared):
    publish(world.latents, prepared.users.keys, world.online)
    predictor = load_predictor(world.bundle, world.online)
    offline = load_offline(predictor.bundle, prepared, world.joined, num_requests=20)
    assert check_parity(predictor, offline).is_ok
