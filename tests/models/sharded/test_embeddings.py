import pytest
import torch

from loopfm_ray.errors import ConfigError, DataError
from loopfm_ray.models.embeddings import FieldEmbeddings
from loopfm_ray.models.sharded.embeddings import ShardedEmbeddings
from loopfm_ray.models.sharded.group import SoloGroup, TorchGroup, current_group
from loopfm_ray.models.sharded.optim import RowAdagradConfig, RowAdamConfig, build_row_optimizer
from tests.oracles.rows import DenseTables
from tests.ranks import run_ranks
from tests.sharded_inputs import DIM, FIELDS, batches, loss_of, make, train, weights

NUM_STEPS = 4
CONFIGS = (RowAdagradConfig(lr=0.3), RowAdamConfig(lr=0.1))


def on_rank(rank, config):
    tables = make(config, current_group())
    seen = train(tables, rank, range(NUM_STEPS))
    return seen, weights(tables), len(tables.shard.table)


def twin_of(config, size):
    tables = make(config)
    twin = DenseTables(weights(tables), config)
    seen = []
    for step in range(NUM_STEPS):
        rows = batches(size, step)
        ids = torch.cat([part for part, _ in rows]) + tables.offsets(list(FIELDS))
        past = torch.cat([part for _, part in rows])
        embedded = twin.table(ids).flatten(1)
        loss_of(embedded, twin.table(past)).backward()
        twin.step({*ids.flatten().tolist(), *past.flatten().tolist()}, 1.0 - 0.1 * step)
        seen.append(embedded.detach())
    return seen, twin.table.weight.detach()


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.kind)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_any_number_of_ranks_trains_as_one_dense_table(size, config, tmp_path):
    seen, weight = twin_of(config, size)
    results = run_ranks(size, on_rank, tmp_path, config) if size > 1 else [on_rank(0, config)]
    assert sum(num for _, _, num in results) == 13
    for step in range(NUM_STEPS):
        whole = torch.cat([outputs[step] for outputs, _, _ in results])
        torch.testing.assert_close(whole, seen[step], atol=1e-6, rtol=0)
    for _, found, _ in results:
        torch.testing.assert_close(found, weight, atol=1e-6, rtol=0)


def test_the_face_is_that_of_local_tables():
    local = FieldEmbeddings(FIELDS, DIM)
    tables = make(CONFIGS[0])
    assert tables.adopt(local)
    assert tables.names == local.names
    ids = batches(1, 0)[0][0]
    for names in (["a", "b", "c"], ["c", "a", "b"]):
        offsets = local.offsets(names)
        assert torch.equal(tables.offsets(names), offsets)
        picked = ids[:, [list(FIELDS).index(name) for name in names]]
        assert torch.equal(tables(picked, offsets), local(picked, offsets))
    assert all(torch.equal(tables.table(name), local.table(name)) for name in FIELDS)
    assert not list(tables.parameters())
    assert not tables.state_dict()
    with pytest.raises(ConfigError, match="'d'"):
        tables.offsets(["d"])
    assert not make(CONFIGS[0]).adopt(FieldEmbeddings({"a": 8, "b": 5, "c": 1}, DIM))
    assert not make(CONFIGS[0]).adopt(FieldEmbeddings(FIELDS, DIM + 1))


def test_unknown_ids_begin_at_zero_and_all_others_with_noise_of_a_small_spread():
    tables = ShardedEmbeddings({"a": 2000, "b": 3}, 5, build_row_optimizer(CONFIGS[0]))
    a, b = tables.table("a"), tables.table("b")
    assert not bool(a[0].any() or b[0].any())
    assert float(a[1:].std()) == pytest.approx(0.05, rel=0.05)
    assert float(a.mean()) == pytest.approx(0.0, abs=0.002)
    assert len({tuple(row) for row in a.tolist()}) == 2000


def test_no_fields_is_allowed():
    tables = ShardedEmbeddings({}, 4, build_row_optimizer(CONFIGS[0]))
    assert tables(torch.zeros(3, 0, dtype=torch.int64), tables.offsets([])).shape == (3, 0)


def adopt_on_rank(rank, weight):
    local = FieldEmbeddings({"a": 5, "b": 5, "c": 1}, DIM)
    local.weight.data = weight
    tables = make(CONFIGS[0], current_group())
    assert tables.adopt(local)
    return weights(tables)


def test_ranks_adopt_their_rows_of_local_tables(tmp_path):
    weight = torch.randn(11, DIM)
    one = adopt_on_rank(0, weight)
    assert torch.equal(one[:5], weight[:5])
    assert torch.equal(one[7:], weight[5:])
    for found in run_ranks(2, adopt_on_rank, tmp_path, weight):
        assert torch.equal(found, one)


def bad_id_on_rank(rank, value):
    tables = make(CONFIGS[0], current_group())
    ids = torch.tensor([[1, value if rank == 1 else 2]])
    try:
        tables(ids, tables.offsets(["a", "b"]))
    except DataError as error:
        message = str(error)
    train(tables, rank, [0])  # the group is in step after that
    return message


@pytest.mark.parametrize("value", [5, -1])
def test_an_id_out_of_range_is_the_same_error_on_all_ranks(value, tmp_path):
    messages = run_ranks(2, bad_id_on_rank, tmp_path, value)
    assert messages[0] == messages[1]
    assert f"rank 1 looked up id {value} of field 'b', which has ids 0 to 4" in messages[0]


def uneven_on_rank(rank):
    tables = make(CONFIGS[0], current_group())
    ids = batches(1, 0)[0][0]
    offsets = tables.offsets(list(FIELDS))
    with torch.no_grad():
        found = [tables(ids[turn : turn + 2], offsets) for turn in range(1 + 3 * rank)]
    tables.drain()
    if rank == 0:
        message = "none"
        try:
            tables.drain()
        except DataError as error:
            message = str(error)
    else:
        try:
            tables(ids, offsets)
        except DataError as error:
            message = str(error)
    return found, message


def test_ranks_read_unevenly_often_but_train_together(tmp_path):
    (_, first), (found, second) = run_ranks(2, uneven_on_rank, tmp_path)
    tables = make(CONFIGS[0])
    ids = batches(1, 0)[0][0]
    for turn, values in enumerate(found):
        expected = tables(ids[turn : turn + 2], tables.offsets(list(FIELDS)))
        assert torch.equal(values, expected.detach())
    assert len(found) == 4
    assert first == second
    assert "found ranks [1] of 2" in first


def one_sided_on_rank(rank):
    tables = make(CONFIGS[0], current_group())
    before = weights(tables)
    tables.shard.forget()
    found = tables(torch.tensor([[2 + rank]]), tables.offsets(["a"]))
    if rank == 0:  # the loss of rank 1 does not read its row
        found.sum().backward()
    tables.step()
    return [row for row, same in enumerate((before == weights(tables)).all(1)) if not same]


def test_a_look_up_without_gradient_on_one_rank_blocks_nobody(tmp_path):
    assert run_ranks(2, one_sided_on_rank, tmp_path) == [[2], [2]]


def test_a_step_touches_no_other_row():
    tables = make(CONFIGS[1])
    before = weights(tables)
    for _ in range(2):
        tables(torch.tensor([[3], [3]]), tables.offsets(["b"])).sum().backward()
    tables.step()
    assert torch.equal((before != weights(tables)).any(1).nonzero().flatten(), torch.tensor([10]))
    tables.step()  # nothing was looked up
    assert tables.num_steps == 2


def test_without_torch_distributed_a_group_is_one_process():
    assert isinstance(current_group(), SoloGroup)
    with pytest.raises(ConfigError, match="init_process_group"):
        TorchGroup()
