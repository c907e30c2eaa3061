"""Two snapshots in one online store, end to end: train, upgrade beside, move the VM, retire the old space."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loopfm_ray.config import load_config
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, StoreError
from loopfm_ray.experiments import PipelineConfig, RayConfig, RefreshConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.context import splits_of
from loopfm_ray.jobs.pipeline import run_stages
from loopfm_ray.jobs.upgrade import upgrade
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.parity import check_parity, load_offline
from loopfm_ray.serving.predictor import Predictor, load_predictor
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.reader import LatentsReader
from loopfm_ray.store.target import live_spaces, open_current, retire

SYNTHETIC = Path(__file__).parents[2] / "configs/pipeline/synthetic.yaml"
RETENTION_S = 28 * 86_400.0
WEEK_S = 7 * 86_400.0


def settings(folder, name, fm_stop):
    """Return a small run that trains a plain VM and the one that is served."""
    overrides = [
        f"run_dir={folder}",
        f"name={name}",
        "kd=vm",
        "data.num_rows=6000",
        "data.num_users=60",
        f"data.split={{fm_stop: {fm_stop}, vm_stop: 2024-02-19, valid_s: 259200}}",
        "history.delay_s=600",
        f"history.retention_s={RETENTION_S}",
    ]
    config = load_config(PipelineConfig, SYNTHETIC, overrides)
    vms = {key: config.vms[key] for key in ("vm", "vm_kd_loopfm")}
    return config.model_copy(update={"vms": vms})


def run(config, *stages):
    for stage in stages:
        result = run_stages(config, stage)
    return result


def requests_of(config, bundle):
    """Return test requests of a run with their offline scores."""
    prepared = PreparedData.open(config.paths.prepared)
    return load_offline(bundle, prepared, config.paths.joined(0), splits_of(config).test, 60)


def scores(predictor, offline):
    queries = [replay.query for replay in offline.replays]
    return [scored.probs.tolist() for scored in map(predictor.score, queries)]


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_an_fm_is_upgraded_without_breaking_the_vm_that_serves(tmp_path):
    old, new = settings(tmp_path, "old", "2024-01-29"), settings(tmp_path, "new", "2024-02-05")
    with connect(RayConfig()):
        stages = ("prepare", "train-fm", "compress", "materialize", "join", "train-vm", "publish")
        published = run(old, *stages)
        server = load_predictor(old.paths.bundle, old.online_target)
        offline = requests_of(old, server.bundle)
        before = scores(server, offline)
        assert check_parity(server, offline).is_ok

        run(new, "prepare", "train-fm", "compress")
        result = upgrade(new, old.paths.root)
        assert result["beside"] == published["space"] != result["space"]
        assert result["lost_s"] == pytest.approx(WEEK_S, abs=86_400)
        assert 0 < result["mean_len_new"] < result["mean_len_old"]
        assert scores(server, offline) == before
        assert scores(load_predictor(old.paths.bundle, old.online_target), offline) == before

        moved = load_config(PipelineConfig, new.paths.config)
        assert run(moved, "materialize", "join", "train-vm", "publish")["space"] == result["space"]
        # the retention reaches back beyond the snapshot's training, so the window was all there is to embed
        assert read_manifest(moved.paths.latents(0)).content == result["version"]
        assert run(moved, "parity")["num_mismatches"] == 0

    live = {item.space: item for item in live_spaces(old.online_target)}
    assert set(live) == {result["space"], result["beside"]}
    assert not server.reload()
    assert scores(server, offline) == before
    follower = load_predictor(moved.paths.bundle, moved.online_target)
    assert follower.latents_version == live[result["space"]].version
    assert check_parity(follower, requests_of(moved, follower.bundle)).is_ok
    for bundle, other in (
        (load_bundle(old.paths.bundle), result["space"]),
        (load_bundle(moved.paths.bundle), result["beside"]),
    ):
        with pytest.raises(BundleError, match="snapshot_id is"):
            Predictor(bundle, open_current(old.online_target, other))

    retire(old.online_target, result["beside"])
    assert check_parity(
        load_predictor(moved.paths.bundle, moved.online_target), requests_of(moved, follower.bundle)
    ).is_ok
    with pytest.raises(StoreError, match="holds no space"):
        load_predictor(old.paths.bundle, old.online_target)
    with pytest.raises(StoreError, match="is the last live one"):
        retire(old.online_target, result["space"])


@pytest.mark.ray
@pytest.mark.timeout(600)
@pytest.mark.slow
def test_snapshots_that_take_over_one_after_another_make_one_history(tmp_path):
    """From each refresh on events are embedded by the newer FM; the run goes on to a trained VM, and is not done again."""
    config = settings(tmp_path, "refreshed", "2024-01-29")
    refresh = RefreshConfig(at=("2024-02-08", "2024-02-15"), align="linear")
    config = config.model_copy(update={"fm": config.fm.model_copy(update={"refresh": refresh})})
    with connect(RayConfig()):
        run(config, "prepare", "train-fm", "compress", "materialize", "join", "audit", "train-vm")
        parts = [config.paths.generation(0, number, "latents") for number in (0, 1, 2)]
        base, *newer = [rows_of(part) for part in parts]
        found = rows_of(config.paths.latents(0))
        moments = [0, *refresh.at_ts, 2**62]
        assert list(found["example_id"]) == list(base["example_id"])
        changed = found["code"] != base["code"]
        assert not changed[found["event_ts"] < moments[1]].any()
        for start, stop in pairwise(moments[1:]):
            assert changed[(found["event_ts"] >= start) & (found["event_ts"] < stop)].mean() > 0.5
        for start, rows in zip(moments[1:], newer, strict=False):
            assert rows["event_ts"].min() >= start
        told = json.loads((config.paths.records / "refresh-0.json").read_text())
        assert [item["from_ts"] for item in told["generations"]] == list(refresh.at_ts)
        for item in told["generations"]:
            # a warm start keeps the space near, and the map brings it nearer
            assert 0 < item["space"]["displacement"] < 1
            assert item["explained"]["linear"] > item["explained"]["none"] > 0
        before = [read_manifest(part).created_at for part in (*parts, config.paths.latents(0))]
        run(config, "materialize")
        assert before == [
            read_manifest(part).created_at for part in (*parts, config.paths.latents(0))
        ]


def rows_of(location):
    reader = LatentsReader(location)
    tables = [reader.read_bucket(bucket) for bucket in reader.buckets]
    names = ("example_id", "event_ts", "code")
    return {
        name: np.concatenate(
            [table.column(name).to_numpy(zero_copy_only=False) for table in tables]
        )
        for name in names
    }
