"""The stages of a run whose VM reads all that the join can write: histories of items, labels, the rows' own latents."""

import pytest

from loopfm_ray.config import validate
from loopfm_ray.experiments import PipelineConfig, RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.pipeline import run_stages
from loopfm_ray.store.manifest import read_manifest

LEARNING = {"epochs": 1, "batch_rows": 256}
TREE = {
    "name": "rich",
    "data": {"kind": "synthetic", "num_rows": 4000, "num_users": 40},
    "fm": {
        "model": {"embed_dim": 8, "hidden": [16], "history_dim": 8},
        "learning": {**LEARNING, "num_workers": 1},
        "bottleneck": {"latent_dim": 8, "prefixes": [4, 8]},
    },
    "history": {
        "max_len": 10,
        "with_own_latent": True,
        "side": {"label": "label"},
        "keys": [["item"]],
    },
    "vms": {
        "vm": {"model": {"hidden": [8]}, "learning": LEARNING},
        "vm_kd": {"model": {"hidden": [8]}, "learning": LEARNING, "kd_weight": 1.0},
        "vm_all": {
            "model": {
                "hidden": [8],
                "history": {
                    "user": {"kind": "latent", "side": {"label": True}},
                    "item": {"kind": "latent", "key": ["item"], "encoder": {"kind": "mean"}},
                },
            },
            "learning": LEARNING,
            "fitnets": {"weight": 0.5},
        },
    },
    "online": {"model": "vm"},
    "audit": {"sample": 300},
}


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_vm_reads_all_that_the_join_writes(tmp_path):
    config = validate(PipelineConfig, {**TREE, "run_dir": str(tmp_path)}, "test")
    stages = ["prepare", "train-fm", "compress", "materialize", "join", "audit", "train-vm"]
    with connect(RayConfig()):
        found = {name: run_stages(config, name) for name in [*stages, "evaluate"]}
        assert run_stages(config, "join") == found["join"]
    meta = read_manifest(config.paths.joined(0)).meta
    assert meta["histories"]["latent_by_item"]["coverage"] > 0.5
    assert (meta["with_own_latent"], meta["side"]) == (True, {"label": "label"})
    assert found["audit"]["num_leaks"] == 0
    assert found["audit"]["num_checked"] == 300
    assert 0.4 < found["evaluate"]["seed=0 vm_all"]["auc"] < 1
