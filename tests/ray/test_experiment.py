"""A small experiment on the synthetic log: cells, shared versions, and going on after a kill."""

import json

import pytest

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError, JobError, MetricError
from loopfm_ray.experiment_grid import ExperimentConfig
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs import experiment as job
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.evaluate import read_predictions
from loopfm_ray.jobs.experiment import run_experiment
from loopfm_ray.jobs.stages import predictions_path

TREE = {
    "name": "small",
    "seeds": [0, 1],
    "data": {"kind": "synthetic", "num_rows": 6000, "num_users": 60},
    "fm": {
        "model": {"embed_dim": 8, "hidden": [32], "history_dim": 8},
        "learning": {"batch_rows": 128, "num_workers": 1, "optim": {"lr": 0.01}},
        "bottleneck": {"latent_dim": 8, "prefixes": [4, 8]},
    },
    "models": {"deep": {"model": {"hidden": [16]}, "learning": {"epochs": 1, "batch_rows": 128}}},
    "arms": {
        "none": {},
        "kd": {"kd_weight": 1.0},
        "kd_loopfm": {"kd_weight": 1.0, "model": {"history": {"user": {"kind": "latent"}}}},
    },
    "variants": {"main": {}, "half": {"fm": {"bits": 16}}},
}


@pytest.fixture(scope="module")
def cluster():
    with connect(RayConfig()):
        yield


def config_in(folder, **changes):
    return validate(ExperimentConfig, {**TREE, "run_dir": str(folder), **changes}, "test")


def mtimes(folder, pattern):
    return {path: path.stat().st_mtime_ns for path in folder.rglob(pattern)}


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_every_cell_is_measured_once_and_a_killed_experiment_goes_on(
    cluster, tmp_path, monkeypatch
):
    config = config_in(tmp_path)
    stages = dict(job.STAGES)

    def die(context):
        raise JobError("the machine went down; run again")

    monkeypatch.setattr(job, "STAGES", {**stages, "evaluate": die})
    with pytest.raises(JobError, match="went down"):
        run_experiment(config)
    monkeypatch.setattr(job, "STAGES", stages)
    trained = mtimes(tmp_path / "small/pool", "*.safetensors")
    assert trained
    summary = run_experiment(config)
    after = mtimes(tmp_path / "small/pool", "*.safetensors")
    assert {path: after[path] for path in trained} == trained

    cells = {(c["variant"], c["arm"]): c for c in summary["cells"]}
    assert set(cells) == {(v, a) for v in TREE["variants"] for a in TREE["arms"]}
    assert json.loads((tmp_path / "small/summary.json").read_text()) == summary
    assert cells["main", "kd_loopfm"]["seeds"] == [0, 1]
    assert set(cells["main", "kd_loopfm"]["slices"]) >= {"first", "short"}
    # one FM a seed serves both variants, and so do the VMs that read no history of it
    pool = [path.name for path in (tmp_path / "small/pool").iterdir()]
    assert sum(name.startswith("fm-") for name in pool) == 2
    assert sum(name.startswith("snapshot-") for name in pool) == 4
    for arm in ("none", "kd"):
        assert sum(name.startswith(f"deep.{arm}-") for name in pool) == 2
        assert cells["main", arm]["mean"] == cells["half", arm]["mean"]
    assert cells["main", "kd_loopfm"]["mean"] != cells["half", "kd_loopfm"]["mean"]
    assert summary["num_unfinished_variants"] == 0

    rows = [
        read_predictions(predictions_path(config.pipeline("main"), 0, name))
        for name in ("fm", "deep.none", "deep.kd_loopfm")
    ]
    assert all((r["example_id"] == rows[0]["example_id"]).all() for r in rows)
    assert all((r["label"] == rows[0]["label"]).all() for r in rows)
    # a second run finds everything done, without a cluster of its own
    monkeypatch.setattr(job, "connect", None)
    assert run_experiment(config)["cells"] == summary["cells"]

    # seeds that another machine has measured come in by its summary
    elsewhere = tmp_path / "elsewhere.json"
    elsewhere.write_text(json.dumps(with_seeds(summary, {"0": 7, "1": 8})))
    merged = run_experiment(config, merge=[elsewhere])
    assert merged["seeds"] == merged["config"]["seeds"] == [0, 1, 7, 8]
    for cell, alone in zip(merged["cells"], summary["cells"], strict=True):
        assert cell["mean"] == pytest.approx(alone["mean"])
        assert cell["per_seed"]["8"] == alone["per_seed"]["1"]
    assert set(merged["fm"]["main"]["per_seed"]) == {"0", "1", "7", "8"}
    assert json.loads((tmp_path / "small/summary.json").read_text()) == merged
    with pytest.raises(MetricError, match="expected each in one summary alone"):
        run_experiment(config, merge=[elsewhere, elsewhere])


def with_seeds(summary, names):
    """The same figures under other seeds."""
    return {
        **summary,
        "cells": [
            {
                **cell,
                "seeds": [names[str(seed)] for seed in cell["seeds"]],
                "per_seed": {str(names[seed]): test for seed, test in cell["per_seed"].items()},
            }
            for cell in summary["cells"]
        ],
        "fm": {
            variant: {
                **record,
                "per_seed": {str(names[seed]): test for seed, test in record["per_seed"].items()},
            }
            for variant, record in summary["fm"].items()
        },
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"config": {}}, "is not a summary of an experiment|the config in"),
        ({"num_unfinished_variants": 1}, "lacks 1 variants"),
        ({"fm": {"model": {"embed_dim": 4}}}, "is of another experiment: fm differ"),
    ],
)
def test_a_summary_of_something_else_is_refused_before_anything_runs(tmp_path, change, message):
    config = config_in(tmp_path / "mine")
    theirs = dict(TREE, **{name: part for name, part in change.items() if name == "fm"})
    summary = {"config": theirs, "num_unfinished_variants": 0, **change}
    path = tmp_path / "summary.json"
    path.write_text(json.dumps(summary))
    with pytest.raises(ConfigError, match=message):
        run_experiment(config, merge=[path])
    assert not (tmp_path / "mine").exists()


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_experiments_that_share_a_pool_train_nothing_twice(cluster, tmp_path):
    half = {"half": TREE["variants"]["half"]}
    first = config_in(tmp_path, variants=half)
    cells = {cell["arm"]: cell for cell in run_experiment(first)["cells"]}
    assert first.pool_dir == tmp_path / "small/pool"
    trained = mtimes(first.pool_dir, "*.safetensors")
    other = config_in(
        tmp_path, name="other", pool=str(first.pool_dir), variants={"wide": half["half"]}
    )
    again = {cell["arm"]: cell for cell in run_experiment(other)["cells"]}
    assert {arm: cell["mean"] for arm, cell in again.items()} == {
        arm: cell["mean"] for arm, cell in cells.items()
    }
    assert mtimes(first.pool_dir, "*.safetensors") == trained
    assert not (tmp_path / "other/pool").exists()
