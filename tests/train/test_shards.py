import json

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import FmStageConfig
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.sharded.config import ShardedConfig, table_factory
from loopfm_ray.models.sharded.group import current_group
from loopfm_ray.models.sharded.optim import RowAdagradConfig, RowAdamConfig
from loopfm_ray.train.loop import LoopConfig, fit
from loopfm_ray.train.optim import OptimConfig, build_optimizer
from loopfm_ray.train.shards import gather_tables, load_tables, save_tables, sharded_tables
from loopfm_ray.train.state import TrainState
from loopfm_ray.train.step import StepLoss, Workers, make_objective
from tests.model_inputs import ITEM_FIELDS, SCHEMA, make_batch, take_rows
from tests.ranks import run_ranks
from tests.sharded_inputs import make, make_dynamic, train, train_dynamic, weights

CONFIG = RowAdamConfig(lr=0.1)


def fixed_part(rank, folder, steps, is_resumed):
    """Train from the checkpoint, or from the start, and write one; return what all rows are."""
    tables = make(CONFIG, current_group())
    if is_resumed:
        load_tables(tables, folder)
    train(tables, rank, steps)
    save_tables(tables, folder)
    return weights(tables), tables.num_steps


def dynamic_part(rank, folder, steps, is_resumed):
    tables = make_dynamic(current_group())
    if is_resumed:
        load_tables(tables, folder)
    return train_dynamic(tables, rank, steps), save_tables(tables, folder), tables.ids.size


@pytest.mark.parametrize("size", [1, 3])
def test_two_ranks_save_and_others_go_on_as_one_process_would(size, tmp_path):
    whole, _ = fixed_part(0, tmp_path / "whole", [0, 2, 3, 4], False)
    folder = tmp_path / "cut"
    run_ranks(2, fixed_part, tmp_path, folder, [0, 2], False)
    assert sorted(path.name for path in folder.iterdir()) == [
        f"shard-0000{rank}-of-00002.{end}" for rank in (0, 1) for end in ("json", "safetensors")
    ]
    args = (folder, [3, 4], True)
    parts = run_ranks(size, fixed_part, tmp_path, *args) if size > 1 else [fixed_part(0, *args)]
    for found, num_steps in parts:
        torch.testing.assert_close(found, whole, atol=1e-6, rtol=0)
        assert num_steps == 4
    assert len(list(folder.iterdir())) == 2 * size
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("size", [1, 3])
def test_ids_that_were_admitted_move_to_their_new_ranks(size, tmp_path):
    expected, _, num_ids = dynamic_part(0, tmp_path / "whole", [0, 2, 3, 4], False)
    run_ranks(2, dynamic_part, tmp_path, tmp_path / "cut", [0, 2], False)
    args = (tmp_path / "cut", [3, 4], True)
    parts = run_ranks(size, dynamic_part, tmp_path, *args) if size > 1 else [dynamic_part(0, *args)]
    assert sum(num for _, _, num in parts) == num_ids
    for step in range(2):
        found = torch.cat([seen[step] for seen, _, _ in parts])
        torch.testing.assert_close(found, expected[2 + step], atol=1e-6, rtol=0)


def test_2n_steps_are_n_steps_saved_and_loaded_and_n_more(tmp_path):
    whole, _ = fixed_part(0, tmp_path / "whole", [0, 1, 2, 3], False)
    fixed_part(0, tmp_path / "cut", [0, 1], False)
    resumed, _ = fixed_part(0, tmp_path / "cut", [2, 3], True)
    assert torch.equal(resumed, whole)
    name = "shard-00000-of-00001.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.fixture
def saved(tmp_path):
    fixed_part(0, tmp_path / "cut", [0], False)
    return tmp_path / "cut"


def edit(folder, **changes):
    path = folder / "shard-00000-of-00001.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refusal(folder, config=CONFIG):
    with pytest.raises(StoreError) as caught:
        load_tables(make(config), folder)
    return str(caught.value)


def test_damage_is_refused(saved):
    edit(saved, format_version=9)
    assert "format" in refusal(saved)
    edit(saved, format_version=1, world_size=2)
    assert "has the shards [0], expected 0 to 1" in refusal(saved)
    edit(saved, world_size=1)
    (saved / "shard-00000-of-00001.safetensors").write_bytes(b"x")
    assert "checksum" in refusal(saved)
    (saved / "shard-00000-of-00001.safetensors").unlink()
    assert "check the path" in refusal(saved)
    (saved / "shard-00000-of-00001.json").write_text("{}")
    assert "no manifest of a shard" in refusal(saved)
    assert "has the shards []" in refusal(saved / "none")


def test_other_tables_are_refused(saved):
    assert "is of other tables" in refusal(saved, RowAdagradConfig())


def damaged_on_rank(rank, folder):
    try:
        load_tables(make(CONFIG, current_group()), folder)
    except StoreError as error:
        return str(error)


def test_a_shard_that_one_rank_can_not_read_is_an_error_on_all(tmp_path):
    run_ranks(2, fixed_part, tmp_path, tmp_path / "cut", [0], False)
    (tmp_path / "cut" / "shard-00001-of-00002.safetensors").write_bytes(b"x")
    first, second = run_ranks(2, damaged_on_rank, tmp_path, tmp_path / "cut")
    assert "ranks [1] of 2 failed" in first
    assert "checksum" in second


def test_a_model_steps_all_of_its_tables():
    model = torch.nn.ModuleDict({"a": make(CONFIG), "b": make_dynamic()})
    assert len(sharded_tables(model)) == 2
    optimizer = build_optimizer(OptimConfig(), model)

    def objective(batch):
        return StepLoss(model["b"].default.sum(), torch.zeros(1), torch.ones(1))

    loop = LoopConfig(optim=OptimConfig())
    fit(TrainState(model, optimizer), [make_batch()] * 2, objective, loop, 2)
    assert [tables.num_steps for tables in sharded_tables(model)] == [2, 2]


def train_fm_on_rank(rank, num_rows):
    """Train three steps, rank 0 with a third of the rows; return the weights of the FM with local tables."""
    torch.manual_seed(0)
    group = current_group()
    tables_of = table_factory(ShardedConfig(optim=CONFIG), group, 3)
    model = build_fm(
        FmConfig(embed_dim=3, history_dim=4, hidden=(6,)), SCHEMA, ITEM_FIELDS, tables_of
    )
    optim = OptimConfig(lr=0.01, warmup_steps=2)
    state = TrainState(model, build_optimizer(optim, model))
    wrapped = DistributedDataParallel(model) if group.size > 1 else model
    workers = Workers(group.size, lambda _: float(num_rows))
    objective = make_objective(wrapped, workers=workers)
    thirds = {1: [slice(None)], 2: [slice(num_rows // 3), slice(num_rows // 3, None)]}
    own = thirds[group.size][rank]
    batches = [take_rows(make_batch(num_rows, seed=seed), own) for seed in range(3)]
    fit(state, batches, objective, LoopConfig(optim=optim), 3)
    gather_tables(model)
    assert not sharded_tables(model)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_an_fm_with_sharded_tables_beside_data_parallel_weights_trains_as_one_process(tmp_path):
    expected = train_fm_on_rank(0, 12)
    assert "features.embeddings.weight" in expected
    for found in run_ranks(2, train_fm_on_rank, tmp_path, 12):
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, atol=2e-6, rtol=0)


def test_the_kind_of_table_is_a_choice_of_the_config():
    local = FmStageConfig()
    sharded = FmStageConfig.model_validate(
        {"embedding": {"kind": "sharded", "optim": {"kind": "row_adagrad", "lr": 0.1}}}
    )
    assert local.learnt == (local.model, local.learning)
    assert sharded.learnt[2] == sharded.embedding
    assert table_factory(local.embedding, current_group(), 0) is FieldEmbeddings
    tables = table_factory(sharded.embedding, current_group(), 0)({"a": 3}, 2)
    assert tables.shard.optimizer.config.lr == 0.1
    with pytest.raises(ValueError, match="patience"):
        FmStageConfig.model_validate(
            {"embedding": {"kind": "sharded"}, "learning": {"patience": 2}}
        )
