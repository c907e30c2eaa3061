import json

import pytest
import torch

from loopfm_ray.errors import StoreError
from loopfm_ray.models.sharded.group import current_group
from loopfm_ray.models.sharded.optim import RowAdagradConfig, RowAdamConfig
from loopfm_ray.train.shards import load_tables, save_tables, sharded_tables, step_tables
from tests.models.sharded import test_dynamic as dynamic
from tests.models.sharded import test_embeddings as fixed
from tests.ranks import run_ranks

CONFIG = RowAdamConfig(lr=0.1)


def fixed_part(rank, folder, steps, is_resumed):
    """Train from the checkpoint, or from the start, and write one; return what all rows are."""
    tables = fixed.make(CONFIG, current_group())
    if is_resumed:
        load_tables(tables, folder)
    fixed.train(tables, rank, steps)
    save_tables(tables, folder)
    return fixed.weights(tables), tables.num_steps


def dynamic_part(rank, folder, steps, is_resumed):
    tables = dynamic.make(current_group())
    if is_resumed:
        load_tables(tables, folder)
    return dynamic.train(tables, rank, steps), save_tables(tables, folder), tables.ids.size


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
    for weights, num_steps in parts:
        torch.testing.assert_close(weights, whole, atol=1e-6, rtol=0)
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
        load_tables(fixed.make(config), folder)
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
        load_tables(fixed.make(CONFIG, current_group()), folder)
    except StoreError as error:
        return str(error)


def test_a_shard_that_one_rank_can_not_read_is_an_error_on_all(tmp_path):
    run_ranks(2, fixed_part, tmp_path, tmp_path / "cut", [0], False)
    (tmp_path / "cut" / "shard-00001-of-00002.safetensors").write_bytes(b"x")
    first, second = run_ranks(2, damaged_on_rank, tmp_path, tmp_path / "cut")
    assert "ranks [1] of 2 failed" in first
    assert "checksum" in second


def test_a_model_steps_all_of_its_tables():
    model = torch.nn.ModuleDict({"a": fixed.make(CONFIG), "b": dynamic.make()})
    assert len(sharded_tables(model)) == 2
    step_tables(model, 0.5)
    assert [tables.num_steps for tables in sharded_tables(model)] == [1, 1]
