"""What a new snapshot does to a VM, on spaces whose difference is planted."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

import tests.serving.world as worlds
from loopfm_ray.cli import app
from loopfm_ray.config import dump_yaml
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, DataError, StoreError
from loopfm_ray.experiments import HistoryStageConfig, PipelineConfig, VmStageConfig
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.jobs.context import read_run
from loopfm_ray.jobs.drift import measure_run_drift
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.train.trained import TrainedVm, save_trained_vm
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.model_inputs import histories

HALF = CodeSpec(16, worlds.CODE.dim)
LATER = worlds.FM_STOP + 12 * MICROS_PER_DAY
TURN = np.linalg.qr(np.random.default_rng(3).normal(size=(HALF.dim, HALF.dim)))[0]


def turned(latents):
    return latents @ TURN + 0.2


def make_run(folder, name, *, joined=True, **latents):
    """A run whose snapshot is random numbers; its VM is untrained, with weights so large that every input shows."""
    history = HistoryStageConfig(max_len=worlds.MAX_LEN, retention_s=25 * 86_400.0, delay_s=3600.0)
    vms = {
        **dict.fromkeys(("vm", "vm_kd"), VmStageConfig(model=DnnConfig(hidden=(16, 8)))),
        "vm_kd_loopfm": VmStageConfig(model=DnnConfig(hidden=(16, 8), history=histories("latent"))),
    }
    config = PipelineConfig(
        name=name, run_dir=str(folder), data=worlds.write_log(folder), history=history, vms=vms
    )
    paths = config.paths
    paths.root.mkdir()
    paths.config.write_text(dump_yaml(config))
    prepare(config.data, paths.prepared)
    prepared = PreparedData.open(paths.prepared)
    paths.latents(0).parent.mkdir()
    worlds.write_latents(prepared, paths.latents(0), snapshot=name, **latents)
    if joined:
        span = TimeRange(worlds.VM_STOP, worlds.STOP)
        settings = JoinSettings(worlds.MAX_LEN, 25 * MICROS_PER_DAY)
        write_joined(paths.prepared, paths.latents(0), paths.joined(0), span, settings)
    return config, prepared


def save_vm(config, prepared):
    schema = prepared.schema_as_of(worlds.VM_STOP).select(worlds.FIELDS)
    stage = config.vms["vm_kd_loopfm"]
    model = worlds.make_model(stage.model, schema, HALF.dim)
    trained = TrainedVm(model, stage.model, schema, (), HALF.dim, PlattScaling(0.9, 0.1), {})
    target = config.paths.vm(0, "vm_kd_loopfm")
    target.parent.mkdir()
    save_trained_vm(target, trained, config_hash="c", inputs={}, num_rows=1)


@pytest.fixture
def served(tmp_path):
    config, prepared = make_run(tmp_path, "old", spec=HALF)
    save_vm(config, prepared)
    return config


def test_a_turned_space_breaks_the_vm_and_the_procrustes_map_mends_it(served, tmp_path):
    new, _ = make_run(tmp_path, "new", spec=HALF, change=turned)
    found = measure_run_drift(new, served)
    assert found["space"]["cka"] == pytest.approx(1, abs=1e-3)
    assert found["space"]["displacement"] > 0.5
    assert found["over_time"]["centroid"] < 0.1
    assert found["explained"]["none"] < 0.2
    assert found["explained"]["orthogonal"] > 0.999
    assert list(found["vms"]) == ["vm_kd_loopfm"]
    ways = found["vms"]["vm_kd_loopfm"]
    assert "retrained" not in ways
    own = ways["own"]
    assert own["loss_against_own"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert ways["own_later_events"] == own
    for kind in ("orthogonal", "linear"):
        assert ways[kind]["logloss"] == pytest.approx(own["logloss"], abs=2e-4)
        assert ways[kind]["mean_history_len"] == own["mean_history_len"] > 1
    assert abs(ways["none"]["logloss"] - own["logloss"]) > 4e-3
    gap = ways["none"]["loss_against_own"]
    assert gap["low"] < gap["value"] < gap["high"]
    assert gap["value"] == pytest.approx(ways["none"]["logloss"] - own["logloss"])
    assert json.loads((new.paths.root / "drift.json").read_text()) == found


def test_what_later_training_costs_is_told_apart_from_the_space(served, tmp_path):
    """The new snapshot says the same of each event but began later: only missing events make a difference."""
    new, prepared = make_run(tmp_path, "new", spec=HALF, trained_until_ts=LATER)
    save_vm(new, prepared)
    found = measure_run_drift(new, read_run(served.paths.root))
    ways = found["vms"]["vm_kd_loopfm"]
    assert found["explained"]["none"] == 1.0
    assert found["space"]["displacement"] == 0
    short = ways["own_later_events"]
    assert 0 < short["mean_history_len"] < ways["own"]["mean_history_len"]
    assert short["logloss"] != ways["own"]["logloss"]
    for way in ("none", "retrained"):
        assert ways[way] == short


def test_a_run_without_a_joined_set_compares_the_spaces_alone(served, tmp_path):
    new, _ = make_run(tmp_path, "new", joined=False, change=turned)
    found = measure_run_drift(new, served)
    assert found["vms"] == {}
    # 4 bits on one side
    assert 0.9 < found["explained"]["linear"] < 1


def test_the_verb_prints_what_it_writes(served, tmp_path):
    new, _ = make_run(tmp_path, "new", spec=HALF, change=turned)
    args = ["drift", str(new.paths.config), "--beside", str(served.paths.root)]
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0, shown.output
    found = json.loads((new.paths.root / "drift.json").read_text())
    for text in ("its own histories", "the new, turned (Procrustes)", "centroid cosine"):
        assert text in shown.output
    assert f"{found['vms']['vm_kd_loopfm']['none']['ne']:.4f}" in shown.output
    as_json = CliRunner().invoke(app, [*args, "--json"])
    assert json.loads(as_json.stdout) == found


def test_what_can_not_be_compared_is_named(served, tmp_path):
    with pytest.raises(ConfigError, match="both runs have the snapshot old"):
        measure_run_drift(served, served)
    with pytest.raises(StoreError, match="is no run"):
        read_run(tmp_path / "nowhere")
    late, _ = make_run(tmp_path, "late", joined=False, spec=HALF, trained_until_ts=worlds.VM_STOP)
    with pytest.raises(DataError, match="0 events before the test window in common"):
        measure_run_drift(late, served)


def test_runs_over_different_logs_are_refused(served, tmp_path, monkeypatch):
    write_log = worlds.write_log
    monkeypatch.setattr(worlds, "write_log", lambda folder: write_log(folder, seed=1))
    other = tmp_path / "elsewhere"
    other.mkdir()
    new, _ = make_run(other, "new", joined=False, spec=HALF)
    with pytest.raises(ConfigError, match="not over one log"):
        measure_run_drift(new, served)
