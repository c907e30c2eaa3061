"""Graph embeddings with workers of Ray: a killed training ends in the same bits, ranks are those of one process."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from loopfm_ray.config import validate
from loopfm_ray.errors import ConfigError, DataError, ShapeError, StoreError
from loopfm_ray.experiments import RayConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.kge_experiment import run_kge_experiment
from loopfm_ray.jobs.kge_workers import KgeJob, rank_on_ray, train_on_ray
from loopfm_ray.kge.experiment import KgeExperimentConfig, plan_cells, run_cell
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.models import build_kge, read_kge_config
from loopfm_ray.kge.ranking import rank_triples
from tests.kge.graphs import random_triples
from tests.kge.test_training import config_of, ring

BACKBONE = {"kind": "complex", "dimension": 8}
TRAIN = {"batch_size": 32, "epochs": 40, "eval_every": 4, "distillation": {"begin_epoch": 1}}


@pytest.fixture(scope="module")
def cluster():
    with connect(RayConfig()):
        yield


def job_in(folder, **changes):
    config = config_of(**{**TRAIN, "num_workers": 2, **changes})
    return KgeJob(read_kge_config(BACKBONE), config, folder, "train")


def kill_a_worker(metrics_file, killed):
    """Kill one of the workers that this process's own cluster runs, after eight epochs and one more than its last checkpoint has.

    A stopped worker stops the others, which wait for it: so how far they are is looked at before it dies.
    """
    while not metrics_file.is_file() or num_epochs(metrics_file) < 8:
        time.sleep(0.02)
    for pid in descendants(os.getpid()):
        if b"RayTrainWorker" in Path("/proc", str(pid), "cmdline").read_bytes():
            while not killed:
                os.kill(pid, signal.SIGSTOP)
                # the next epoch ends without a checkpoint, and so did the last
                if num_epochs(metrics_file) % TRAIN["eval_every"] in (1, 2):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                else:
                    os.kill(pid, signal.SIGCONT)
                    time.sleep(0.02)
            return


def num_epochs(metrics_file):
    return len(metrics_file.read_text().splitlines())


def descendants(pid):
    """Give the processes that a process started, and theirs: those of other clusters on the machine are left alone."""
    for task in Path("/proc", str(pid), "task").iterdir():
        for child in (task / "children").read_text().split():
            yield int(child)
            yield from descendants(int(child))


@pytest.mark.ray
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.timeout(600)
def test_a_killed_training_ends_in_the_same_bits(cluster, tmp_path):
    undisturbed = train_on_ray(ring(), job_in(tmp_path / "whole"))
    job, killed = job_in(tmp_path / "killed"), []
    killer = threading.Thread(target=kill_a_worker, args=(job.metrics_file, killed), daemon=True)
    killer.start()
    found = train_on_ray(ring(), job)
    assert killed
    assert num_epochs(job.metrics_file) > 40  # some were trained twice
    weights = found.model.state_dict()
    for name, value in undisturbed.model.state_dict().items():
        assert torch.equal(value, weights[name])
    assert found.curve == undisturbed.curve
    assert (found.num_epochs, found.best_epoch) == (40, undisturbed.best_epoch)
    with pytest.raises(StoreError, match="holds checkpoints of training"):
        train_on_ray(ring(), job_in(tmp_path / "killed", seed=1))


@pytest.mark.ray
@pytest.mark.timeout(300)
def test_ranks_of_workers_are_those_of_one_process(cluster):
    graph = random_triples(0, 6000, 3000, 3)
    known = index_facts(graph, 3000, 3)
    torch.manual_seed(0)
    model = build_kge(read_kge_config(BACKBONE), 3000, 3)
    alone = rank_triples(model, graph[:2000], known)
    found = rank_on_ray(model, graph[:2000], known, num_workers=2)
    for name in ("tail", "head", "num_tails", "num_heads"):
        np.testing.assert_array_equal(getattr(found, name), getattr(alone, name))
    with pytest.raises(ConfigError, match="at least 1 worker, found 0"):
        rank_on_ray(model, graph, known, num_workers=0)
    with pytest.raises(DataError, match="found none"):
        rank_on_ray(model, graph[:0], known, num_workers=2)
    other = build_kge(read_kge_config(BACKBONE), 3001, 3)
    with pytest.raises(ShapeError, match="build it for this graph"):
        rank_on_ray(other, graph, known, num_workers=2)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_experiment_uses_the_workers_that_it_is_given(cluster, tmp_path):
    folder, graph = tmp_path / "ring", ring()
    folder.mkdir()
    for split in ("train", "valid", "test"):
        names = [
            f"{graph.entities[h]}\t{graph.relations[r]}\t{graph.entities[t]}\n"
            for h, r, t in graph.split(split)
        ]
        (folder / f"{split}.txt").write_text("".join(names))

    def config_in(name, **train):
        model = {
            "graph": str(folder),
            "seeds": [0],
            "backbone": BACKBONE,
            "train": {"batch_size": 32, "epochs": 4, "eval_every": 2, **train},
        }
        tree = {
            "name": name,
            "run_dir": str(tmp_path / "runs"),
            "models": {"ring": model},
            "arms": {"plain": {}, "csd": {"train": {"distillation": {"begin_epoch": 1}}}},
            "roles": {"plain": "plain", "best": "csd"},
        }
        return validate(KgeExperimentConfig, tree, "test")

    config = config_in("spread", num_workers=2, num_ranking_workers=2)
    spread = run_kge_experiment(config)
    cells = plan_cells(config_in("alone"))
    assert [cell.key for cell in plan_cells(config)] == [cell.key for cell in cells]
    for cell in cells:
        record, found = run_cell(cell), spread["records"][cell.key]
        assert found["test"]["mrr"] == pytest.approx(record["test"]["mrr"], abs=1e-3)
        losses = [[point["loss"] for point in one["curve"]] for one in (found, record)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert not list((config.root / "checkpoints").iterdir())
    # nothing waits for room that will never be there, and what can not be spread is told before it starts
    with pytest.raises(ConfigError, match=r"the cluster has 8 CPUs"):
        run_kge_experiment(config_in("many", num_workers=9))
