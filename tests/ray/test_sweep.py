"""Sweeps on the synthetic log and on a small graph: shared stages, failures, kills, confirmation."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from loopfm_ray.config import load_config, validate
from loopfm_ray.errors import JobError
from loopfm_ray.experiments import PipelineConfig, RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.sweep import run_sweep
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.study import open_study
from tests.small_graph import GRAPH, graph_base

BASE = {
    "name": "base",
    "data": {"kind": "synthetic", "num_rows": 6000, "num_users": 60},
    "fm": {
        "model": {"embed_dim": 8, "hidden": [32], "history_dim": 8},
        "learning": {"batch_rows": 128, "num_workers": 1, "optim": {"lr": 0.01}},
        "bottleneck": {"latent_dim": 8, "prefixes": [4, 8]},
    },
    "vms": {
        "vm": {"model": {"hidden": [16]}, "learning": {"epochs": 1, "batch_rows": 128}},
        "vm_kd": {"kd_weight": 1.0},
        "vm_kd_loopfm": {
            "model": {"hidden": [16], "history": {"user": {"kind": "latent"}}},
            "learning": {"epochs": 1, "batch_rows": 128},
            "kd_weight": 1.0,
        },
    },
}
TREE = {
    "name": "small",
    "base": BASE,
    "space": {
        "vm.learning.optim.lr": {"kind": "float", "low": 1e-4, "high": 1e-1, "log": True},
        "vm.model.history.user.max_len": {"kind": "int", "low": 2, "high": 20, "log": True},
    },
    "budget": {"num_trials": 4, "cores": 2},
}


@pytest.fixture(scope="module")
def cluster():
    with connect(RayConfig()):
        yield


def config_in(folder, **changes):
    return validate(SweepConfig, {**TREE, "run_dir": str(folder), **changes}, "test")


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_sweep_measures_every_metric_and_shares_what_comes_before(cluster, tmp_path):
    config = config_in(
        tmp_path,
        objectives=[{"metric": "ne"}, {"metric": "bytes_per_user"}],
        record=["auc", "score_ms_p50", "transfer_ratio", "num_parameters"],
        keep_data=True,
    )

    summary = run_sweep(config)

    assert summary["num_trials"] == {"complete": 4, "pruned": 0, "failed": 0}
    for trial in summary["trials"]:
        assert 0 < trial["metrics"]["ne"] < 2
        assert trial["metrics"]["bytes_per_user"] > 0
        assert trial["metrics"]["score_ms_p50"] > 0
        assert trial["metrics"]["transfer_ratio"] is not None
        assert trial["curve"]
    upstream = list((config.work / "upstream").iterdir())
    assert len(upstream) == 1  # one FM, one joined set for all trials
    shorter, longer = sorted(
        summary["trials"], key=lambda trial: trial["params"]["vm.model.history.user.max_len"]
    )[:: len(summary["trials"]) - 1]
    assert shorter["metrics"]["bytes_per_user"] < longer["metrics"]["bytes_per_user"]
    best = summary["best"][0]
    runs = load_config(PipelineConfig, config.root / "best" / f"trial-{best}.yaml")
    lr = summary["trials"][best]["params"]["vm.learning.optim.lr"]
    assert runs.vms["vm_kd_loopfm"].learning.optim.lr == lr
    assert (config.root / "report.html").is_file()

    again = run_sweep(config.model_copy(update={"keep_data": False}))

    assert again["trials"] == summary["trials"]
    assert not list((config.work / "upstream").glob("*/seed=*/joined"))


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_the_best_is_trained_anew_and_looked_at_once(cluster, tmp_path):
    config = config_in(tmp_path, confirm={"top": 1, "seeds": [7, 8]})

    summary = run_sweep(config)

    base, best = summary["confirmed"]["configs"]
    assert base["name"] == "base"
    assert best["trial"] in summary["best"]
    assert 0 <= best["p"] <= 1
    confirmed = (config.root / "confirmed.json").stat().st_mtime_ns
    assert run_sweep(config)["confirmed"] == summary["confirmed"]
    assert (config.root / "confirmed.json").stat().st_mtime_ns == confirmed


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_each_fm_is_trained_once_for_all_trials_that_share_it(cluster, tmp_path):
    config = config_in(
        tmp_path,
        space={
            "fm.model.embed_dim": {"kind": "choice", "values": [4, 8]},
            "history.max_len": {"kind": "choice", "values": [5, 10]},
        },
        sampler={"kind": "grid"},
        record=["fm_ne", "fm_num_parameters", "transfer_ratio"],
        scaling=[{"x": "fm_num_parameters", "y": "ne"}],
        budget={"num_trials": 9, "cores": 2},
    )

    summary = run_sweep(config)

    assert summary["num_trials"]["complete"] == 4
    assert len(list(config.pool_dir.glob("fm-*"))) == 2
    assert len(list(config.pool_dir.glob("prepared-*"))) == 1
    by_fm = {}
    for trial in summary["trials"]:
        by_fm.setdefault(trial["params"]["fm.model.embed_dim"], set()).add(
            (trial["metrics"]["fm_ne"], trial["metrics"]["fm_num_parameters"])
        )
    assert all(len(found) == 1 for found in by_fm.values())
    assert by_fm[4] != by_fm[8]
    assert summary["scaling"][0]["fit"] is None
    assert "found 2 at 2" in summary["scaling"][0]["reason"]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_trial_without_memory_fails_with_its_reason_and_the_sweep_goes_on(cluster, tmp_path):
    config = config_in(
        tmp_path,
        base=graph_base(tmp_path),
        space={"backbone.dimension": {"kind": "choice", "values": [8, 4_000_000_000]}},
        objectives=[{"metric": "mrr"}],
        sampler={"kind": "grid"},
        budget={"num_trials": 2, "cores": 2},
    )

    summary = run_sweep(config)

    by_size = {trial["params"]["backbone.dimension"]: trial for trial in summary["trials"]}
    assert by_size[8]["state"] == "complete"
    assert by_size[4_000_000_000]["state"] == "failed"
    assert "memory" in by_size[4_000_000_000]["reason"]
    assert summary["best"] == [by_size[8]["number"]]


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_sweep_of_which_every_trial_fails_ends_with_the_reason(cluster, tmp_path):
    config = config_in(
        tmp_path,
        base=graph_base(tmp_path),
        space={"train.lr": {"kind": "float", "low": 1e29, "high": 1e30}},
        objectives=[{"metric": "mrr"}],
        budget={"num_trials": 50, "cores": 2},
    )

    with pytest.raises(JobError, match=r"has no finished trial.*lower lr"):
        run_sweep(config)

    rows = open_study(config).rows()
    assert 5 <= len(rows) <= 8


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_halving_ends_bad_trials_early_and_a_graph_is_swept(cluster, tmp_path):
    base = graph_base(tmp_path)
    config = config_in(
        tmp_path,
        base=base,
        space={"train.lr": {"kind": "float", "low": 1e-6, "high": 0.5, "log": True}},
        objectives=[{"metric": "mrr"}],
        scheduler={"grace": 1, "reduction_factor": 2},
        budget={"num_trials": 12, "cores": 2},
    )

    summary = run_sweep(config)

    pruned = [trial for trial in summary["trials"] if trial["state"] == "pruned"]
    complete = [trial for trial in summary["trials"] if trial["state"] == "complete"]
    assert len(pruned) + len(complete) == 12
    assert pruned
    assert all(len(trial["curve"]) < 7 for trial in pruned)
    assert all(len(trial["curve"]) == 7 for trial in complete)  # the eighth is its end
    (best,) = summary["best"]
    assert summary["trials"][best]["values"][0] == max(trial["values"][0] for trial in complete)
    assert (config.root / "best" / f"trial-{best}.yaml").is_file()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_a_driver_that_is_killed_goes_on_without_repeating_or_losing_a_trial(tmp_path):
    base = graph_base(tmp_path)
    base["train"] = {**GRAPH["train"], "epochs": 60}
    tree = {
        **TREE,
        "run_dir": str(tmp_path),
        "base": base,
        "space": {"train.lr": {"kind": "float", "low": 1e-4, "high": 0.5, "log": True}},
        "objectives": [{"metric": "mrr"}],
        "budget": {"num_trials": 10, "cores": 2},
    }
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(tree))
    command = [sys.executable, "-m", "loopfm_ray.cli", "sweep", str(path)]
    driver = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    study_log = tmp_path / "small" / "study.log"
    deadline = time.monotonic() + 300
    while _num_told(study_log) < 3:
        assert driver.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(driver.pid, signal.SIGKILL)
    driver.wait()
    config = validate(SweepConfig, tree, "test")
    study = open_study(config)
    before = {row.number: row for row in study.rows()}
    study.close()

    done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=True)

    summary = json.loads(done.stdout)
    assert sum(summary["num_trials"].values()) == 10
    after = {trial["number"]: trial for trial in summary["trials"]}
    for number, row in before.items():
        assert after[number]["values"] == list(row.values)
        assert after[number]["seconds"] == row.seconds  # told once, not run again
    rates = [trial["params"]["train.lr"] for trial in summary["trials"]]
    assert len(set(rates)) == 10


def _num_told(study_log: Path) -> int:
    if not study_log.is_file():
        return 0
    return study_log.read_text().count('"ended_at"')
