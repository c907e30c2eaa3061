import pytest
import torch

from loopfm_ray.errors import ConfigError
from loopfm_ray.models.sharded.group import current_group
from loopfm_ray.models.sharded.noise import initial_rows, mix
from tests.ranks import run_ranks
from tests.sharded_inputs import DIM, RAW_FIELDS, ids_of, make_dynamic, train_dynamic


def on_rank(rank):
    tables = make_dynamic(current_group())
    return train_dynamic(tables, rank, range(5)), tables.ids.size


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_admit_and_train_what_one_process_does(size, tmp_path):
    (expected, num_ids), results = on_rank(0), run_ranks(size, on_rank, tmp_path)
    assert sum(num for _, num in results) == num_ids
    assert 5 < num_ids <= 24
    for step in range(5):
        whole = torch.cat([seen[step] for seen, _ in results])
        torch.testing.assert_close(whole, expected[step], atol=1e-6, rtol=0)


def test_an_id_reads_the_default_row_of_its_field_until_it_is_admitted():
    tables = make_dynamic()
    with torch.no_grad():
        tables.default.copy_(torch.tensor([[1.0] * DIM, [2.0] * DIM]))
    ids = torch.tensor([[-5, -5]])
    offsets = tables.offsets(["item", "user"])
    found = tables(ids, offsets)
    assert found.tolist() == [[2.0] * DIM + [1.0] * DIM]
    found.sum().backward()
    assert tables.default.grad.tolist() == [[1.0] * DIM, [1.0] * DIM]
    tables.step()
    with torch.no_grad():  # looking alone admits nobody
        assert tables(ids, offsets).tolist() == found.tolist()
    admitted = tables(ids, offsets)
    keys = mix(ids[0] ^ tables.salts[offsets])
    torch.testing.assert_close(admitted.view(2, DIM), initial_rows(keys.numpy(), DIM, 0.05, 0))
    tables.default.grad = None
    admitted.sum().backward()
    assert not bool(tables.default.grad.any())


def test_a_row_of_an_evicted_id_begins_anew():
    tables = make_dynamic(capacity=1, min_sightings=1)
    offsets = tables.offsets(["user"])

    def first_step(user):
        found = tables(torch.tensor([[user]]), offsets)
        found.sum().backward()
        tables.step()
        return found.detach()

    begin = first_step(1)
    assert not torch.equal(first_step(1), begin)
    first_step(2)
    assert torch.equal(first_step(1), begin)
    assert tables.shard.state["square_sum"].tolist() == [1.0]  # one step with gradient 1


def test_a_field_that_is_not_there_is_an_error():
    with pytest.raises(ConfigError, match="'x'"):
        make_dynamic().offsets(["x"])


def uneven_on_rank(rank):
    tables = make_dynamic(current_group(), min_sightings=1)
    train_dynamic(tables, rank, [0])
    with torch.no_grad():
        found = [tables(ids_of(0, 1, 0), tables.offsets(RAW_FIELDS)) for _ in range(1 + 2 * rank)]
    tables.drain()
    return found


def test_a_rank_that_reads_more_often_is_answered(tmp_path):
    first, second = run_ranks(2, uneven_on_rank, tmp_path)
    assert (len(first), len(second)) == (1, 3)
    assert all(torch.equal(found, first[0]) for found in second)
