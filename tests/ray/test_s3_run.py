"""The whole loop with its versions on a real S3 server: run, run again, and run from a folder that has nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from loopfm_ray.config import load_config
from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.pipeline import run_stages
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.store.s3 import S3Folder
from tests.conftest import S3Server

pytestmark = [pytest.mark.ray, pytest.mark.s3]

SYNTHETIC = Path(__file__).parents[2] / "configs/pipeline/synthetic.yaml"
SMALL = [
    "data.num_rows=3000",
    "data.num_users=60",
    "fm.learning.num_workers=2",
    "fm.learning.checkpoint_steps=10",
    "fm.learning.batch_rows=64",
    "vms={vm: {}, vm_kd: {kd_weight: 1.0}, vm_kd_loopfm: {kd_weight: 1.0, model: {history: {user: {kind: latent}}}}}",
]


def overrides(server: S3Server, folder, name):
    return [
        f"run_dir={folder}/runs",
        f"store=s3://{server.bucket}/pipelines",
        f"name={name}",
        f"cache_dir={folder}/cache",
        *SMALL,
    ]


def loopfm(server, verb, settings, home):
    """Run a verb in a process of its own, on a cluster of its own, as on another machine."""
    command = [sys.executable, "-m", "loopfm_ray.cli", verb, str(SYNTHETIC), "--json"]
    for setting in settings:
        command += ["--set", setting]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=1500,
        env={**os.environ, **server.env, "HOME": str(home)},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout)


def versions(config):
    paths = config.paths
    places = {"prepared": paths.prepared, "bundle": paths.bundle, "fm": paths.fm(0)}
    places |= {"snapshot": paths.snapshot(0)}
    places |= {"latents": paths.latents(0), "joined": paths.joined(0)}
    places |= {name: paths.vm(0, name) for name in config.vms}
    return places


@pytest.mark.slow
@pytest.mark.timeout(4000)
def test_a_run_lives_on_s3_and_another_folder_finds_its_work_done(
    s3_server, s3, tmp_path, monkeypatch
):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = overrides(s3_server, one, f"r{os.getpid()}")
    summary = loopfm(s3_server, "demo", settings, tmp_path)
    config = load_config(PipelineConfig, SYNTHETIC, settings)
    before = {name: read_manifest(place) for name, place in versions(config).items()}
    for place in versions(config).values():
        verify(place)
    # nothing of a version is in the run's folder, only what was evaluated; nothing of the trainings is left in the store
    kept = {path.parent.name for path in config.paths.root.rglob("*.parquet")}
    assert kept == {"predictions"}
    # but for the names of folders, which Arrow's S3 client writes as empty objects
    left = S3Folder.of(str(config.paths.versions)).sizes("work/")
    assert [name for name in left if not name.endswith("/")] == []
    assert not list((one / "cache/staging").iterdir())
    assert summary["parity"]["num_mismatches"] == 0
    assert summary["audit"]["num_leaks"] == 0
    assert {curve["run"] for curve in summary["curves"]} == {"fm", *config.vms}

    # another folder, another cache: everything is read from the store, nothing is trained
    elsewhere = overrides(s3_server, two, config.name)
    again = loopfm(s3_server, "demo", elsewhere, tmp_path)
    after = {name: read_manifest(place) for name, place in versions(config).items()}
    assert after == before
    assert again["models"] == summary["models"]
    assert again["curves"] == summary["curves"]
    # one verb alone, from a third that holds nothing
    third = overrides(s3_server, tmp_path / "three", config.name)
    found = loopfm(s3_server, "evaluate", third, tmp_path)
    assert found["seed=0 vm"]["auc"] == summary["models"]["vm"]["test"]["auc"]


def test_a_store_that_is_not_there_is_told_before_any_work(s3_server, s3, tmp_path):
    settings = overrides(s3_server, tmp_path, "x")
    settings.append("store=s3://no-such-bucket/x")
    config = load_config(PipelineConfig, SYNTHETIC, settings)
    with pytest.raises(StoreError, match="no such bucket"):
        run_stages(config, "prepare")
    assert not config.paths.root.exists()
