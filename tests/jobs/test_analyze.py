import json
import re

import numpy as np
import pyarrow as pa
import pytest
import yaml
from typer.testing import CliRunner

from loopfm_ray.cli import app
from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError, MetricError, StoreError
from loopfm_ray.experiment_grid import ExperimentConfig
from loopfm_ray.jobs.stages import predictions_path
from loopfm_ray.store.tables import write_parquet

TREE = {
    "kind": "experiment",
    "name": "small",
    "seeds": [0],
    "data": {"kind": "synthetic"},
    "models": {"wide": {}, "deep": {}},
    "arms": {
        "none": {},
        "kd": {"kd_weight": 1.0},
        "raw": {"model": {"history": {"items": {"kind": "raw"}}}},
        "loopfm": {"model": {"history": {"user": {"kind": "latent"}}}},
        "both": {"model": {"history": {"user": {"kind": "latent"}, "items": {"kind": "raw"}}}},
    },
    "roles": {"baseline": "none", "kd": "kd", "best": "loopfm"},
}
SKILL = {"fm": 3.0, "none": 0.0, "raw": 1.0, "loopfm": 1.5, "both": 2.0}


@pytest.fixture
def config_file(tmp_path):
    tree = {**TREE, "run_dir": str(tmp_path / "runs")}
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = validate(ExperimentConfig, tree, "test").pipeline("main")
    rng = np.random.default_rng(0)
    label = rng.integers(0, 2, 4000)
    for arm, skill in SKILL.items():
        name = arm if arm == "fm" else f"deep.{arm}"
        logit = skill * (label - 0.5) + rng.normal(0, np.sqrt(skill + 1e-9), 4000) * 0.7
        table = {
            "example_id": np.arange(4000),
            "user": np.arange(4000) // 20,
            "label": label.astype(np.float32),
            "logit": logit,
        }
        target = predictions_path(config, 0, name)
        target.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(pa.table(table), target)
    return path


def run(*args):
    return CliRunner().invoke(app, ["analyze", *map(str, args)])


def test_the_verb_prints_the_terms_and_writes_them(config_file):
    done = run(config_file, "--model", "deep", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["models"]["xhs"] == "deep.both"
    mean = found["mean"]
    assert mean["loopfm"]["low"] < mean["loopfm"]["value"] < mean["loopfm"]["high"]
    assert 0 < mean["transfer_ratio"]["low"] < mean["transfer_ratio"]["value"] < 1
    written = config_file.parent / "runs/small/variants/main/analysis.json"
    assert json.loads(written.read_text()) == found
    shown = run(config_file, "--model", "deep").stdout
    assert "I_residual" in shown
    assert f"{mean['loopfm']['value']:+.5f}" in shown


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        (["--model", "wide"], StoreError, "is not there"),
        (["--model", "flat"], ConfigError, r"no model 'flat', it has \['deep', 'wide'\]"),
        (["--model", "deep", "--raw", "deep.loopfm"], MetricError, "'deep.loopfm' does not"),
    ],
)
def test_what_can_not_be_analyzed_is_told(config_file, args, error, message):
    done = run(config_file, *args)
    assert isinstance(done.exception, error)
    assert re.search(message, str(done.exception))


def test_options_of_an_experiment_are_refused_for_a_pipeline():
    done = run("synthetic", "--variant", "main")
    assert isinstance(done.exception, ConfigError)
    assert "--variant" in str(done.exception)


STEPS = {"embedding": 2.2, "latent": 1.8, "code": 1.5}


def write_ladder(folder, ladder=True):
    """An experiment whose variants tell the label better the less their channel loses."""
    tree = {**TREE, "run_dir": str(folder / "runs"), "variants": {step: {} for step in STEPS}}
    if ladder:
        tree["ladder"] = {step: step for step in STEPS}
    path = folder / "steps.yaml"
    path.write_text(yaml.safe_dump(tree))
    config = validate(ExperimentConfig, tree, "test")
    rng = np.random.default_rng(0)
    label, noise = rng.integers(0, 2, 4000), rng.normal(0, 1.0, 4000)
    for step, skill in STEPS.items():
        for arm, own in (("loopfm", skill), ("both", 2.5)):
            target = predictions_path(config.pipeline(step), 0, f"deep.{arm}")
            target.parent.mkdir(parents=True, exist_ok=True)
            table = {
                "example_id": np.arange(4000),
                "user": np.arange(4000) // 20,
                "label": label.astype(np.float32),
                "logit": own * (label - 0.5) + noise,
            }
            write_parquet(pa.table(table), target)
    return path


def test_the_ladder_of_an_experiment_tells_what_each_step_loses(tmp_path):
    path = write_ladder(tmp_path)
    done = run(path, "--ladder", "--json")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["models"]["embedding_raw"] == "embedding/deep.both"
    mean = found["mean"]
    for step in ("representation", "autoencoder", "quantisation"):
        assert 0 < mean[step]["low"] < mean[step]["value"] < mean[step]["high"]
    assert mean["total"]["value"] == pytest.approx(mean["residual"]["value"])
    assert json.loads((tmp_path / "runs/small/ladder.json").read_text()) == found
    shown = run(path, "--ladder").stdout
    assert f"{mean['autoencoder']['value']:+.5f}" in shown


def test_a_ladder_that_is_not_there_is_told(tmp_path):
    done = run(write_ladder(tmp_path, ladder=False), "--ladder")
    assert "has no part `ladder`" in str(done.exception)
    done = run("synthetic", "--ladder")
    assert "--ladder is of an experiment" in str(done.exception)
    tree = {**TREE, "ladder": {"code": "main", "latent": "fp16", "embedding": "main"}}
    with pytest.raises(ConfigError, match=r"ladder.latent is 'fp16', .* \['main'\]"):
        validate(ExperimentConfig, tree, "test")
