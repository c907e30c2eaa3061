"""The training program with sharded tables on two ranks, without a cluster: checkpoints, a resume, and uneven validation."""

from contextlib import contextmanager
from types import SimpleNamespace

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from loopfm_ray.experiments import LearningConfig
from loopfm_ray.jobs import training
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.sharded.config import ShardedConfig, table_factory
from loopfm_ray.models.sharded.group import current_group
from loopfm_ray.train.evaluate import predict
from loopfm_ray.train.optim import OptimConfig
from loopfm_ray.train.shards import gather_tables
from tests.model_inputs import ITEM_FIELDS, SCHEMA, make_batch, take_rows
from tests.ranks import run_ranks

NUM_ROWS, NUM_STEPS = 12, 4


class SharedFolder:
    """Checkpoints of all ranks in one folder, as Ray Train puts them together; only the one of `step` is kept."""

    def __init__(self, folder, step):
        self.folder, self.step = folder, step

    @contextmanager
    def latest(self, key):
        yield self.folder if self.folder.exists() else None

    def keep(self, fill, labels, step):
        if step == self.step:
            self.folder.mkdir(exist_ok=True)
            fill(self.folder)


def train_on_rank(rank, folder):
    group = current_group()
    training._batches = lambda task, worker: range(NUM_STEPS)
    training.ray.train.torch = SimpleNamespace(prepare_model=DistributedDataParallel)
    torch.manual_seed(0)
    tables_of = table_factory(ShardedConfig(), group, 1)
    config = FmConfig(embed_dim=3, history_dim=4, hidden=(6,))
    model = build_fm(config, SCHEMA, ITEM_FIELDS, tables_of)
    own = slice(rank, None, group.size)
    batch = make_batch(NUM_ROWS)
    task = training.Task(
        model=model,
        learning=LearningConfig(
            checkpoint_steps=2, evals_per_epoch=2, optim=OptimConfig(warmup_steps=1)
        ),
        plan=SimpleNamespace(
            num_steps=NUM_STEPS, global_sizes=lambda: np.full(NUM_STEPS, NUM_ROWS)
        ),
        blocks=None,
        collate=lambda seed: take_rows(make_batch(NUM_ROWS, seed=seed), own),
        validate=lambda: predict(model, [(np.arange(NUM_ROWS), batch)] * (1 + rank)),
        seed=0,
        key="fm",
    )
    worker = training.Worker(rank, group.size)
    report, curves = training.train(task, worker, SharedFolder(folder, 2))
    gather_tables(model)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    return report.num_steps, curves, weights


def test_a_training_with_sharded_tables_goes_on_from_its_checkpoint_to_the_same_bits(tmp_path):
    folder = tmp_path / "checkpoint"
    whole = run_ranks(2, train_on_rank, tmp_path, folder)
    assert [num for num, _, _ in whole] == [4, 4]
    assert len(list((folder / "tables/0").glob("*.safetensors"))) == 2
    assert whole[0][1].count('"split": "valid", "name": "ne"') == 2
    resumed = run_ranks(2, train_on_rank, tmp_path, folder)
    assert [num for num, _, _ in resumed] == [2, 2]
    for (_, _, expected), (_, _, found) in zip(whole, resumed, strict=True):
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[name], found[name]) for name in expected)
