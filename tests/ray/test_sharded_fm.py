"""Two workers of Ray Train share the rows of the FM's tables, are killed, and go on."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from loopfm_ray.config import load_config
from loopfm_ray.experiments import PipelineConfig, RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.pipeline import run_stages
from loopfm_ray.store.manifest import read_manifest
from tests.ray.test_pipeline import copy_of, finish, kill_when, start

SYNTHETIC = Path(__file__).parents[2] / "configs/pipeline/synthetic.yaml"
SMALL = [
    "data.num_rows=6000",
    "data.num_users=60",
    "fm.learning.num_workers=2",
    "fm.learning.checkpoint_steps=8",
    "fm.learning.batch_rows=64",
    "fm.embedding.kind=sharded",
]


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_killed_training_with_sharded_tables_goes_on_to_the_same_weights(tmp_path):
    config = load_config(PipelineConfig, SYNTHETIC, [f"run_dir={tmp_path / 'calm'}", *SMALL])
    with connect(RayConfig()):
        for stage in ("prepare", "train-fm"):
            run_stages(config, stage)
    calm, folder = tmp_path / "calm/synthetic", tmp_path / "killed"
    assert "features.embeddings.weight" in load_file(calm / "seed=0/fm/fm.safetensors")
    checkpoints = sorted(calm.glob("work/fm-*/train/checkpoint_*/tables/0"))
    assert [path.name for path in sorted(checkpoints[-1].glob("*.safetensors"))] == [
        f"shard-0000{rank}-of-00002.safetensors" for rank in (0, 1)
    ]

    root = copy_of(tmp_path / "calm", folder, "prepared")
    process = start(folder, "train-fm", *SMALL)
    kill_when(process, lambda: len(list(root.glob("work/fm-*/train/checkpoint_*"))) >= 2)
    assert not (root / "seed=0/fm").exists()
    finish(start(folder, "train-fm", *SMALL))
    expected, found = (
        {entry.path: entry.sha256 for entry in read_manifest(run / "seed=0/fm").files}
        for run in (calm, root)
    )
    assert found["fm.safetensors"] == expected["fm.safetensors"]
