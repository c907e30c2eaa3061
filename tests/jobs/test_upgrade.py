"""A new snapshot goes online beside the old one: nothing changes for the old VM, and what the new one lacks is told."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from loopfm_ray.config import dump_yaml, load_config
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, ConfigError, StoreError
from loopfm_ray.experiments import HistoryStageConfig, OnlineConfig, PipelineConfig
from loopfm_ray.jobs import materialize as job
from loopfm_ray.jobs.materialize import materialize
from loopfm_ray.jobs.publishing import export_bundle
from loopfm_ray.jobs.upgrade import share_target, upgrade
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.bottleneck import BottleneckConfig, build_bottleneck
from loopfm_ray.models.fitting import calibrate
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.store.coverage import compare_coverage
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.publish import load_memory
from loopfm_ray.store.space import Space
from loopfm_ray.store.target import live_spaces, open_current, retire
from loopfm_ray.train.snapshot import Snapshot, SnapshotSpec, save_snapshot
from loopfm_ray.train.trained import TrainedVm, save_trained_vm
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S
from tests.serial import embed_here
from tests.serving import world as worlds

RETENTION_DAYS = 25
QUERIES = [
    ScoreQuery(
        f"u{n}", worlds.STOP, ("i1", "i2"), {"past_count_item": 0.0, "past_recency_item": 0.5}
    )
    for n in range(12)
]
NEW_UNTIL = worlds.FM_STOP + 22 * MICROS_PER_DAY
"""The new snapshot's training reaches 7 days into the retention before the last event."""


@pytest.fixture(autouse=True)
def serial(monkeypatch):
    """Run the shards in this process, without Ray."""
    monkeypatch.setattr(job, "_run", embed_here)


def pipeline(folder, name, **online):
    history = HistoryStageConfig(
        max_len=worlds.MAX_LEN, retention_s=RETENTION_DAYS * 86_400.0, delay_s=3600.0
    )
    data = worlds.write_log(folder)
    return PipelineConfig(
        name=name, run_dir=str(folder), data=data, history=history, online=OnlineConfig(**online)
    )


def write_snapshot(prepared, path, trained_until_ts, seed=0):
    schema = prepared.schema_as_of(trained_until_ts + 1)
    torch.manual_seed(seed)
    shape = BottleneckConfig(latent_dim=4, prefixes=(2, 4))
    config = FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5))
    fm = build_fm(config, schema, ("item", "category"))
    bottleneck = build_bottleneck(shape, fm.embedding_dim(["hidden_0"]))
    code_spec = calibrate(bottleneck, torch.randn(50, fm.embedding_dim(["hidden_0"])), 4)
    spec = SnapshotSpec(
        trained_until_ts, schema, ("item", "category"), 5, config, shape, ("hidden_0",), code_spec
    )  # fmt: skip
    save_snapshot(Snapshot(fm.eval(), bottleneck.eval(), spec), path, inputs={})


@pytest.fixture
def runs(tmp_path):
    """A served run, and a prepared new run whose FM was trained later."""
    old = pipeline(tmp_path, "old")
    old.paths.root.mkdir()
    worlds.make_world(old.paths.root)
    old.paths.config.write_text(dump_yaml(old))
    new = pipeline(tmp_path, "new")
    shutil.copytree(old.paths.prepared, new.paths.prepared)
    write_snapshot(PreparedData.open(new.paths.prepared), new.paths.snapshot(0), NEW_UNTIL)
    return old, new


def scores(predictor):
    return [scored.probs.tolist() for scored in map(predictor.score, QUERIES)]


def histories(store, keys):
    found = store.get_many(keys)
    return {k: h.codes.tobytes() for k, h in zip(keys, found, strict=True) if h is not None}


def test_the_old_vm_scores_the_same_bits_before_during_and_after(runs):
    old, new = runs
    server = load_predictor(old.paths.bundle, old.online_target)
    before = scores(server)
    assert len({tuple(row) for row in before}) == len(before)
    result = upgrade(new, old.paths.root)
    assert not server.reload()
    assert scores(server) == before
    again = load_predictor(old.paths.bundle, old.online_target)
    assert scores(again) == before
    live = {item.space: item for item in live_spaces(old.online_target)}
    assert set(live) == {result["space"], result["beside"]}
    assert result["beside"] == again.bundle.spec.history.space.id
    assert live[result["space"]].version == result["version"]
    assert live[result["space"]].snapshot_id == result["snapshot_id"]
    # the new run says where its later stages publish
    kept = load_config(PipelineConfig, new.paths.config)
    assert kept.online_target == old.online_target == result["online"]


def test_only_the_window_is_embedded_and_nothing_the_snapshot_learned_from(runs):
    old, new = runs
    short = new.model_copy(
        update={"history": new.history.model_copy(update={"retention_s": 10 * 86_400.0})}
    )
    upgrade(short, old.paths.root)
    data = PreparedData.open(new.paths.prepared)
    last, period_us = data.log_range[1], data.manifest.meta["period_us"]
    reader = LatentsReader(new.paths.latents(0))
    times = np.concatenate(
        [reader.read_bucket(b, columns=["event_ts"]).column(0).to_numpy() for b in reader.buckets]
    )
    assert last - 10 * MICROS_PER_DAY - period_us < times.min() <= last - 10 * MICROS_PER_DAY
    assert times.max() == last
    assert times.min() > NEW_UNTIL


def test_the_coverage_that_is_lost_is_told_and_equals_a_count_by_hand(runs):
    old, new = runs
    result = upgrade(new, old.paths.root)
    keys = PreparedData.open(new.paths.prepared).users.keys
    last = min(
        read_manifest(run.paths.latents(0) if run is new else run.paths.root / "latents").meta[
            "watermark_ts"
        ]
        for run in runs
    )
    request_ts = last + 1
    begin = request_ts - RETENTION_DAYS * MICROS_PER_DAY
    lengths = {}
    for name, path in (("old", old.paths.root / "latents"), ("new", new.paths.latents(0))):
        reader = LatentsReader(path)
        count = dict.fromkeys(range(1, len(keys)), 0)
        for bucket in reader.buckets:
            for row in reader.read_bucket(bucket, events_only=True).to_pylist():
                is_seen = row["available_ts"] <= request_ts and begin <= row["event_ts"] <= last
                if row["user"] and is_seen:
                    count[row["user"]] += 1
        lengths[name] = {user: min(n, worlds.MAX_LEN) for user, n in count.items()}
    seen = [user for user, n in lengths["old"].items() if n]
    assert result["request_ts"] == request_ts
    assert result["num_users"] == len(seen) > 20
    assert result["num_covered"] == sum(lengths["new"][user] > 0 for user in seen)
    assert result["mean_len_old"] == sum(lengths["old"][user] for user in seen) / len(seen)
    assert result["mean_len_new"] == sum(lengths["new"][user] for user in seen) / len(seen)
    assert result["mean_len_new"] < result["mean_len_old"]
    assert result["lost_s"] == (NEW_UNTIL + 1 - begin) / MICROS_PER_S
    assert 6.9 * 86_400 < result["lost_s"] < 7.1 * 86_400
    # from then on all that a history reaches back to is later than the training
    assert result["full_at_ts"] - RETENTION_DAYS * MICROS_PER_DAY == NEW_UNTIL + 1


def test_training_extends_the_window_and_takes_its_shards_over(runs):
    old, new = runs
    short = new.model_copy(
        update={"history": new.history.model_copy(update={"retention_s": 10 * 86_400.0})}
    )
    upgrade(short, old.paths.root)
    window = read_manifest(new.paths.latents(0))
    whole = materialize(
        new.paths.prepared, new.paths.snapshot(0), new.paths.latents(0),
        delay_us=new.history.delay_us, num_workers=1,
    )  # fmt: skip
    assert whole.record["num_reused"] == len(window.files) - 1
    assert whole.record["num_redone"] > 0
    # asked again, the upgrade does not throw away what training has added
    assert upgrade(short, old.paths.root)["version"] == whole.content
    assert upgrade(short, old.paths.root)["version"] == whole.content


def test_bundles_read_their_own_space_and_never_the_other(runs, tmp_path):
    old, new = runs
    upgrade(new, old.paths.root)
    target, prepared = old.online_target, PreparedData.open(new.paths.prepared)
    space = Space.of_meta(read_manifest(new.paths.latents(0)).meta)
    spec = load_bundle(old.paths.bundle).spec
    pin = replace(spec.history, space=space, latents_version="trained on")
    spec = replace(spec, history=pin)
    model = worlds.make_model(spec.vm, spec.schema, space.code_spec.dim)
    save_bundle(new.paths.bundle, spec, model, prepared, {})

    served = load_predictor(new.paths.bundle, target)
    bundle = served.bundle
    offline = Predictor(bundle, load_memory(new.paths.latents(0), prepared.users.keys))
    assert scores(served) == scores(offline)
    assert served.respond(QUERIES[0], "r").features.snapshot_id == space.snapshot_id
    old_bundle = load_bundle(old.paths.bundle)
    old_space = old_bundle.spec.history.space
    for swapped, wrong in ((bundle, old_space), (old_bundle, space)):
        with pytest.raises(BundleError, match="snapshot_id is"):
            Predictor(swapped, open_current(target, wrong.id))

    # every VM has moved: the old space goes, the new one stays
    before = scores(served)
    retire(target, old_space.id)
    assert scores(load_predictor(new.paths.bundle, target)) == before
    with pytest.raises(StoreError, match=f"holds no space {old_space.id}"):
        load_predictor(old.paths.bundle, target)


def test_what_can_not_be_upgraded_is_refused_before_anything_is_written(runs, tmp_path):
    old, new = runs
    with pytest.raises(StoreError, match="is no run"):
        upgrade(new, tmp_path / "nowhere")
    online = OnlineConfig(target=str(tmp_path / "elsewhere"))
    elsewhere = new.model_copy(update={"online": online})
    with pytest.raises(ConfigError, match="is served from"):
        upgrade(elsewhere, old.paths.root)
    shared, _ = share_target(new, old.paths.root)
    assert share_target(shared, old.paths.root)[0] == shared
    shutil.rmtree(new.paths.snapshot(0))
    with pytest.raises(StoreError, match="loopfm compress"):
        upgrade(new, old.paths.root)
    assert not new.paths.latents(0).exists()
    assert len(live_spaces(old.online_target)) == 1
    retire(old.online_target, live_spaces(old.online_target)[0].space, force=True)
    with pytest.raises(StoreError, match="nothing is published"):
        upgrade(new, old.paths.root)


def test_the_same_snapshot_is_no_upgrade(runs):
    old, new = runs
    upgrade(new, old.paths.root)
    spec = load_bundle(old.paths.bundle).spec
    space = Space.of_meta(read_manifest(new.paths.latents(0)).meta)
    spec = replace(spec, history=replace(spec.history, space=space))
    model = worlds.make_model(spec.vm, spec.schema, space.code_spec.dim)
    save_bundle(new.paths.bundle, spec, model, PreparedData.open(new.paths.prepared), {})
    with pytest.raises(ConfigError, match="loopfm publish"):
        upgrade(new, new.paths.root)


def test_spaces_without_a_common_time_can_not_be_compared(runs):
    old, _ = runs
    store = load_memory(
        old.paths.root / "latents", PreparedData.open(old.paths.prepared).users.keys
    )
    late = load_memory(old.paths.root / "latents", PreparedData.open(old.paths.prepared).users.keys)
    late.meta["trained_until_ts"] = store.meta["watermark_ts"]
    with pytest.raises(StoreError, match="nothing to compare"):
        compare_coverage(store, late, ["u1"], 5, None)
    found = compare_coverage(store, store, ["u1", "nobody"], 5, None)
    assert (found.num_users, found.num_covered, found.lost_s, found.full_at_ts) == (1, 1, 0, None)
    assert found.mean_len_old == found.mean_len_new == 5


def test_a_bundle_names_the_latents_its_vm_was_trained_on_whatever_was_joined_since(runs):
    old, _ = runs
    bundle = load_bundle(old.paths.bundle)
    pin = bundle.spec.history
    shutil.copytree(old.paths.root / "joined", old.paths.joined(0))
    trained = TrainedVm(
        bundle.model, bundle.spec.vm, bundle.spec.schema, (), worlds.CODE.dim, PlattScaling(), {}
    )
    inputs = {"prepared": "p", "joined": "of another day", "latents": "of that day"}
    path = old.paths.vm(0, old.online.model)
    save_trained_vm(
        path, trained, config_hash="0", inputs={**inputs, "space": pin.space.id}, num_rows=1
    )
    export_bundle(old, pin.space)
    written = load_bundle(old.paths.bundle).spec.history
    assert written == replace(pin, latents_version="of that day")
    with pytest.raises(StoreError, match="loopfm train-vm"):
        export_bundle(old, replace(pin.space, snapshot_id="newer"))
