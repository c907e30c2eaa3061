"""Two workers of Ray Train with a bottleneck along: the FM does not notice, and compress takes what they trained."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from loopfm_ray.config import load_config
from loopfm_ray.experiments import PipelineConfig, RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.pipeline import run_stages

SYNTHETIC = Path(__file__).parents[2] / "configs/pipeline/synthetic.yaml"
SMALL = [
    "data.num_rows=4000",
    "data.num_users=60",
    "fm.learning.num_workers=2",
    "fm.learning.batch_rows=64",
    "fm.bottleneck.metric=spread",
]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_two_workers_train_the_same_fm_with_a_bottleneck_along(tmp_path):
    run = [f"run_dir={tmp_path}", *SMALL]
    after = load_config(PipelineConfig, SYNTHETIC, [*run, "name=after"])
    jointly = load_config(
        PipelineConfig, SYNTHETIC, [*run, "name=jointly", "fm.bottleneck.fitted=jointly"]
    )
    with connect(RayConfig()):
        for config in (after, jointly):
            for stage in ("prepare", "train-fm"):
                run_stages(config, stage)
        result = run_stages(jointly, "compress")["seed=0"]
    alone = load_file(after.paths.fm(0) / "fm.safetensors")
    along = load_file(jointly.paths.fm(0) / "fm.safetensors")
    assert alone.keys() == along.keys()
    assert all(torch.equal(alone[name], along[name]) for name in alone)
    trained = load_file(jointly.paths.fm(0) / "bottleneck.safetensors")
    taken = load_file(jointly.paths.snapshot(0) / "bottleneck.safetensors")
    assert all(torch.equal(trained[name], taken[name]) for name in trained)
    assert result["latent_dim"] == 8
    assert set(result["variance_explained"]) == {"latent", "code", "prefix_4", "prefix_8"}
