"""A log grows between two runs on a cluster: only what changed is embedded again, and the result is that of a fresh run."""

import numpy as np
import pyarrow.parquet as pq
import pytest

from loopfm_ray.experiments import FmStageConfig, LearningConfig, PipelineConfig, RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.pipeline import run_stages
from loopfm_ray.models.bottleneck import BottleneckConfig
from loopfm_ray.models.foundation import FmConfig
from loopfm_ray.store.manifest import read_manifest, verify
from loopfm_ray.types import MICROS_PER_DAY, TimeRange
from tests.oracles.worlds import tree_bytes
from tests.serving import world


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_late_and_new_events_are_embedded_and_the_rest_is_taken_over(tmp_path):
    data = world.write_log(tmp_path, num_rows=1200)
    log = pq.read_table(tmp_path / "log.parquet")
    ts, label = log.column("ts").to_numpy(), log.column("label").to_numpy()
    config = PipelineConfig(
        name="r",
        run_dir=str(tmp_path),
        data=data,
        fm=FmStageConfig(
            model=FmConfig(embed_dim=3, history_dim=4, hidden=(6, 5)),
            learning=LearningConfig(batch_rows=64, num_workers=1, evals_per_epoch=1),
            bottleneck=BottleneckConfig(latent_dim=4, prefixes=(2, 4)),
        ),
    )
    moment = ts[(ts > world.START + 44 * MICROS_PER_DAY) & (label > 0)][0]
    first = (ts < world.START + 50 * MICROS_PER_DAY) & (ts != moment)
    pq.write_table(log.filter(first), tmp_path / "log.parquet")
    latents = config.paths.latents(0)
    with connect(RayConfig()):
        for name in ("prepare", "train-fm", "compress"):
            run_stages(config, name)
        begun = run_stages(config, "materialize")["seed=0"]
        pq.write_table(log.filter(ts < world.START + 58 * MICROS_PER_DAY), tmp_path / "log.parquet")
        run_stages(config, "prepare")
        grown = run_stages(config, "materialize")["seed=0"]
        before = tree_bytes(latents)
        fresh = run_stages(config, "materialize", fresh=True)["seed=0"]
        assert tree_bytes(latents) == before
        span = TimeRange(world.START + 50 * MICROS_PER_DAY, world.STOP)
        part = run_stages(config, "materialize", redo=span)["seed=0"]
        run_stages(config, "join")
        assert run_stages(config, "audit")["num_leaks"] == 0
    verify(latents)
    assert (begun["reused"], begun["late_events"]) == (0, 0)
    assert grown["late_events"] == np.count_nonzero((ts == moment) & (label > 0)) > 0
    assert min(grown["reused"], grown["redone"]) > 0
    assert (fresh["reused"], fresh["redone"]) == (0, grown["reused"] + grown["redone"])
    assert min(part["reused"], part["redone"]) > 0
    assert (
        {fresh["version"], part["version"]}
        == {grown["version"]}
        == {read_manifest(latents).version}
    )
