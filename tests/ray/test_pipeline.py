"""The whole loop on a small synthetic log, and what happens when it is killed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from loopfm_ray.config import load_config
from loopfm_ray.errors import LeakError, StoreError
from loopfm_ray.experiments import PipelineConfig, RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.pipeline import run_pipeline, run_stages
from loopfm_ray.store.manifest import read_manifest, verify

SYNTHETIC = Path(__file__).parents[2] / "configs/pipeline/synthetic.yaml"
SMALL = [
    "data.num_rows=6000",
    "data.num_users=60",
    "data.period_s=86400",  # a shard for each bucket and day: many
    "fm.learning.num_workers=2",
    "fm.learning.checkpoint_steps=8",
    "fm.learning.batch_rows=64",
]


def settings(folder, *more):
    return load_config(PipelineConfig, SYNTHETIC, [f"run_dir={folder}", *SMALL, *more])


@pytest.fixture(scope="module")
def cluster():
    with connect(RayConfig()):
        yield


@pytest.fixture(scope="module")
def finished(cluster, tmp_path_factory):
    """The config as it ships: large enough for the FM to learn what it is there for."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(PipelineConfig, SYNTHETIC, [f"run_dir={folder}"])
    return config, run_pipeline(config)


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_loop_closes(finished):
    config, summary = finished
    assert list(summary["models"]) == ["fm", *config.vms]
    for model in summary["models"].values():
        assert {"ne", "auc", "gauc", "logloss", "calibration"} <= set(model["test"])
        assert 0.4 < model["test"]["auc"] < 1
    assert set(summary["transfer_ratio"]) == set(config.vms) - {"vm"}
    assert summary["parity"]["max_abs_diff"] <= 1e-5
    assert summary["parity"]["num_requests"] == config.online.parity_requests
    assert summary["audit"]["num_leaks"] == 0
    assert summary["audit"]["num_checked"] > 0
    assert set(summary["seconds"]) >= {
        "prepare",
        "train-fm",
        "materialize",
        "join",
        "train-vm",
        "evaluate",
    }
    scored = summary["scored_request"]
    assert len(scored["response"]["scores"]) == len(scored["request"]["items"])
    assert scored["response"]["model"]["name"] == "vm_kd_loopfm"
    assert json.loads(config.paths.summary.read_text())["models"] == summary["models"]
    assert config.paths.report.stat().st_size > 100_000


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_the_fm_sees_what_the_vm_can_not(finished):
    _, summary = finished
    models = summary["models"]
    assert models["fm"]["test"]["auc"] > models["vm"]["test"]["auc"] + 0.02


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_every_version_is_whole_and_a_run_says_what_it_was_made_of(finished):
    config, _ = finished
    manifest = json.loads((config.paths.root / "manifest.json").read_text())
    paths = {"prepared": config.paths.prepared, "bundle": config.paths.bundle}
    paths |= {"seed=0/fm": config.paths.fm(0), "seed=0/snapshot": config.paths.snapshot(0)}
    paths |= {"seed=0/latents": config.paths.latents(0)}
    for name, path in paths.items():
        verify(path)
        assert manifest["versions"][name] == read_manifest(path).version
    assert manifest["machine"]["num_cpus"] >= 1
    assert load_config(PipelineConfig, config.paths.config) == config


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_second_run_finds_its_work_done_and_keeps_the_figures(finished):
    config, summary = finished
    before = {path: path.stat().st_mtime_ns for path in config.paths.root.rglob("*.safetensors")}
    again = run_pipeline(config)
    after = {path: path.stat().st_mtime_ns for path in config.paths.root.rglob("*.safetensors")}
    kept = {path for path in before if "bundle" not in path.parts}
    assert kept
    assert {path: before[path] for path in kept} == {path: after[path] for path in kept}
    assert again["models"] == summary["models"]
    assert again["seconds"]["train-fm"] == summary["seconds"]["train-fm"]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_changed_vm_retrains_that_vm_alone(finished):
    config, _ = finished
    changed = load_config(
        PipelineConfig, SYNTHETIC, [f"run_dir={config.run_dir}", "vms.vm_kd.kd_weight=0.5"]
    )
    before = {name: read_manifest(config.paths.vm(0, name)).version for name in config.vms}
    run_stages(changed, "train-vm")
    after = {name: read_manifest(config.paths.vm(0, name)).version for name in config.vms}
    assert {name for name in before if before[name] != after[name]} == {"vm_kd"}


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_whoever_reads_its_rows_the_fm_is_the_same(cluster, tmp_path):
    """Files of the workers themselves, and Ray Data: the same weights to the bit, with several files in a block and two epochs."""
    weights = {}
    for reader in ("files", "ray_data"):
        chosen = [f"name={reader}", f"ray.fm_reader={reader}", "fm.learning.epochs=2"]
        config = settings(tmp_path, *chosen)
        for stage in ("prepare", "train-fm"):
            run_stages(config, stage)
        weights[reader] = load_file(config.paths.fm(0) / "fm.safetensors")
    assert weights["files"].keys() == weights["ray_data"].keys()
    for name, value in weights["files"].items():
        assert torch.equal(value, weights["ray_data"][name]), name


@pytest.mark.ray
@pytest.mark.timeout(120)
def test_a_stage_before_its_turn_says_which_to_run(cluster, tmp_path):
    with pytest.raises(StoreError, match="loopfm prepare"):
        run_stages(settings(tmp_path), "train-fm")


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_a_planted_leak_stops_the_run(finished):
    """Some requests are given one event more than was visible; the audit names them and the run stops."""
    config, _ = finished
    files = sorted(config.paths.joined(0).glob("requests/*/*.parquet"))
    path = files[len(files) // 2]
    honest = path.read_bytes()
    table = pq.read_table(path, partitioning=None)
    column = table.schema.get_field_index("latent_len")
    longer = pc.add(table.column("latent_len"), pa.scalar(1, pa.int32()))
    pq.write_table(table.set_column(column, "latent_len", longer), path)
    try:
        with pytest.raises(LeakError, match="do not train on this version"):
            run_stages(config, "audit")
    finally:
        path.write_bytes(honest)
    assert run_stages(config, "audit")["num_leaks"] == 0


def start(config_folder, verb, *more):
    arguments = [f"run_dir={config_folder}", *more]
    command = [sys.executable, "-m", "loopfm_ray.cli", verb, str(SYNTHETIC)]
    for argument in arguments:
        command += ["--set", argument]
    return subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:] + out[-2000:]


def kill_when(process, condition, timeout_s=240):
    """Kill the driver and its cluster as soon as `condition` holds; return whether it was still at work."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@pytest.fixture(scope="module")
def calm(cluster, tmp_path_factory):
    """A run up to the latents that nobody disturbed, with many small shards: there is time to kill what writes them."""
    folder = tmp_path_factory.mktemp("calm")
    for stage in ("prepare", "train-fm", "compress", "materialize"):
        run_stages(settings(folder), stage)
    return folder


def copy_of(calm, folder, *parts):
    for part in parts:
        shutil.copytree(calm / "synthetic" / part, folder / "synthetic" / part)
    return folder / "synthetic"


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_fm_training_goes_on_to_the_same_weights(calm, tmp_path):
    """The driver and all workers die at once after a checkpoint; the same command ends in the same bits."""
    root = copy_of(calm, tmp_path, "prepared")
    process = start(tmp_path, "train-fm", *SMALL)
    kill_when(process, lambda: len(list(root.glob("work/fms-*/train/checkpoint_*"))) >= 2)
    assert not (root / "seed=0/fm").exists()
    finish(start(tmp_path, "train-fm", *SMALL))
    found, expected = (
        {entry.path: entry.sha256 for entry in read_manifest(folder / "seed=0/fm").files}
        for folder in (root, calm / "synthetic")
    )
    # the learning curves hold speeds, which no two runs share
    assert found["fm.safetensors"] == expected["fm.safetensors"]


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_killed_materialize_leaves_nothing_half_visible_and_goes_on(calm, tmp_path):
    root = copy_of(calm, tmp_path, "prepared", "seed=0/snapshot")
    process = start(tmp_path, "materialize", *SMALL)
    kill_when(process, lambda: len(list(root.glob("seed=0/.latents.work-*/markers/*/[0-9]*"))) >= 3)
    assert not (root / "seed=0/latents").exists()
    finish(start(tmp_path, "materialize", *SMALL))
    found, expected = (
        read_manifest(folder / "seed=0/latents") for folder in (root, calm / "synthetic")
    )
    assert {entry.path: entry.sha256 for entry in found.files} == {
        entry.path: entry.sha256 for entry in expected.files
    }
    assert found.version == expected.version


VMS = ["vm", "vm_kd", "vm_loopfm", "vm_kd_loopfm", "vm_raw"]
ONE_RUN = [*SMALL, "ray.parallel_tasks=1", *(f"vms.{vm}.learning.checkpoint_steps=4" for vm in VMS)]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_training_of_vms_keeps_the_finished_and_goes_on_with_the_next(calm, tmp_path):
    """All VMs share one Ray Train run, which dies inside its second VM: each VM ends in the same bits, the first untouched."""
    for stage in ("materialize", "join"):
        finish(start(calm, stage, *SMALL))
    root = copy_of(calm, tmp_path, "prepared", "seed=0")
    shutil.copytree(calm / "synthetic/records", root / "records")
    finish(start(calm, "train-vm", *ONE_RUN))

    def is_in_the_second():
        files = list(root.glob("work/vms/*/train/checkpoint_*/.metadata.json"))
        found = [json.loads(text) for file in files if (text := read_if_there(file))]
        return any(one["finished"] and "training" in one for one in found)

    kill_when(start(tmp_path, "train-vm", *ONE_RUN), is_in_the_second)
    trained = {folder.name: written(folder) for folder in (root / "seed=0/vm").iterdir()}
    assert set(trained) == {"vm_raw"}
    finish(start(tmp_path, "train-vm", *ONE_RUN))
    assert written(root / "seed=0/vm/vm_raw") == trained["vm_raw"]
    for vm in VMS:
        found, expected = (
            {file.path: file.sha256 for file in read_manifest(folder / "seed=0/vm" / vm).files}
            for folder in (root, calm / "synthetic")
        )
        assert found["model.safetensors"] == expected["model.safetensors"]
        # no step is missing from the learning curve, and none is there twice
        steps, all_steps = (
            [(line["step"], line["split"], line["name"]) for line in curve(folder, vm)]
            for folder in (root, calm / "synthetic")
        )
        assert steps == all_steps
    assert not (root / "work/vms").exists()


def read_if_there(file):
    try:
        return file.read_text()
    except FileNotFoundError:  # the oldest checkpoint is being removed
        return ""


def written(folder):
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def curve(folder, vm):
    lines = (folder / "seed=0/vm" / vm / "curves.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]
