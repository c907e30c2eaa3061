"""One FM, two verticals, a stream: as an experiment, and killed at three points with all its processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from loopfm_ray.config import validate
from loopfm_ray.data.examples import ExampleSet, read_rows
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.experiment_grid import ExperimentConfig
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.context import splits_of
from loopfm_ray.jobs.experiment import run_experiment, summarise
from loopfm_ray.jobs.streaming import predictions_file
from loopfm_ray.store.manifest import read_manifest

DAY_S = 86_400
ADAPTED = {"hidden": [8], "gradient_scale": 2.0, "adapter": {}}
TREE = {
    "name": "streamed",
    "seeds": [0],
    "data": {"kind": "synthetic", "num_rows": 6000, "num_users": 60},
    "fm": {
        "model": {"embed_dim": 8, "hidden": [32], "history_dim": 8},
        "learning": {"batch_rows": 128, "num_workers": 1, "optim": {"lr": 0.01}},
        "bottleneck": {"latent_dim": 8, "prefixes": [4, 8]},
        "refresh": {"every_s": 12 * DAY_S, "delay_s": DAY_S, "valid_s": DAY_S, "teacher": "newest"},
    },
    "stream": {
        "chunk_s": 2 * DAY_S,
        "verticals": {"feed": {"surface": ["feed"]}, "search": {"surface": ["search"]}},
        "checkpoint_steps": 3,
    },
    "models": {"deep": {"model": {"hidden": [16]}, "learning": {"batch_rows": 32}}},
    "arms": {
        "none": {},
        "kd": {"kd_weight": 1.0},
        "ah_sa": {"auxiliary": ADAPTED, "model": {"history": {"user": {"kind": "latent"}}}},
    },
    "roles": {"baseline": "none", "kd": "kd", "best": "ah_sa"},
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    config = validate(ExperimentConfig, {**TREE, "run_dir": str(folder), "keep_data": True}, "test")
    with connect(RayConfig()):
        yield config, run_experiment(config)


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_verticals_are_cells_of_an_experiment(finished):
    config, summary = finished
    cells = {(cell["model"], cell["arm"]): cell for cell in summary["cells"]}
    assert set(cells) == {(v, arm) for v in ("feed", "search") for arm in TREE["arms"]}
    assert set(summary["ne_gain_by_method"]) == set(TREE["arms"])
    assert set(summary["calibration_by_method"]) == {*TREE["arms"], "fm"}
    assert isinstance(summary["ne_gain_ah_sa_over_kd"], float)
    assert json.loads((config.root / "summary.json").read_text()) == summary
    # the summary needs nothing that an experiment throws away
    joined = config.pipeline("main").paths.joined(0)
    joined.rename(joined.with_name("away"))
    assert summarise(config) == summary
    joined.with_name("away").rename(joined)
    # the heads are not in what is served
    plain, adapted = (cells["feed", arm]["num_parameters"] for arm in ("none", "kd"))
    assert plain == adapted

    pipeline = config.pipeline("main")
    splits = splits_of(pipeline)
    prepared = PreparedData.open(pipeline.paths.prepared)
    rows = read_rows(prepared.examples.files(splits.test))
    surfaces = ["", *prepared.vocabulary("surface").keys]
    for vertical in ("feed", "search"):
        table = pq.read_table(predictions_file(pipeline, 0, vertical, "deep.none"))
        ids, ts = (table.column(name).to_numpy() for name in ("example_id", "event_ts"))
        own = np.asarray([surfaces[n] == vertical for n in rows["surface"]])
        assert sorted(ids[ts >= splits.test.start_ts]) == sorted(rows["example_id"][own])


@pytest.mark.ray
@pytest.mark.timeout(900)
def test_each_example_went_through_an_fm_once(finished):
    config, _ = finished
    pipeline = config.pipeline("main")
    told = json.loads((pipeline.paths.records / "refresh-0.json").read_text())
    latents = read_manifest(pipeline.paths.latents(0))
    assert len(told["num_scored"]) == 3
    splits = splits_of(pipeline)
    rows = read_rows(PreparedData.open(pipeline.paths.prepared).examples.files())
    unique = len(set(rows["example_id"][rows["event_ts"] >= splits.fm.stop_ts].tolist()))
    assert sum(told["num_scored"]) == latents.num_rows == unique
    teachers = latents.meta["teachers"]
    assert len({one["snapshot_id"] for one in teachers}) == 3
    for before, one in pairwise(teachers):
        assert one["from_ts"] - before["from_ts"] == 12 * DAY_S * 1_000_000
        assert one["trained_until_ts"] == one["from_ts"] - DAY_S * 1_000_000 - 1
    requests = read_rows(ExampleSet.open(pipeline.paths.joined(0), "requests").files())
    assert set(requests["teacher_snapshot"].tolist()) == {0, 1, 2}


def start(folder):
    command = [sys.executable, "-m", "loopfm_ray.cli", "stream", str(folder / "config.yaml")]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.timeout(900)
def test_a_stream_that_is_killed_three_times_ends_in_the_same_bits(finished, tmp_path):
    config, _ = finished
    origin = Path(config.root) / "variants/main"
    folder = tmp_path / "main"
    shutil.copytree(origin, folder)
    text = (
        (folder / "config.yaml")
        .read_text()
        .replace(f"run_dir: {origin.parent}", f"run_dir: {tmp_path}")
    )
    (folder / "config.yaml").write_text(text)
    shutil.rmtree(folder / "seed=0/stream")
    for wanted in (2, 9, 17):
        process = start(folder)
        deadline = time.monotonic() + 240
        while len(list(folder.glob("work/stream-*/predictions/*.parquet"))) < wanted:
            assert process.poll() is None, process.stderr.read()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    process = start(folder)
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    for path in origin.glob("seed=0/stream/*/*/model.safetensors"):
        assert (folder / path.relative_to(origin)).read_bytes() == path.read_bytes(), path
    for path in origin.glob("seed=0/stream/*/*.parquet"):
        assert pq.read_table(folder / path.relative_to(origin)).equals(pq.read_table(path)), path
