"""Noise, sums over equal keys, and row optimizers, worked out by hand."""

import numpy as np
import pytest
import torch

from loopfm_ray.models.sharded.distinct import find_distinct
from loopfm_ray.models.sharded.noise import fill_rows, initial_rows, mix
from loopfm_ray.models.sharded.optim import (
    RowAdagradConfig,
    RowAdamConfig,
    Touched,
    build_row_optimizer,
    write_rows,
)
from loopfm_ray.models.sharded.shard import Shard


def test_mix_is_the_finalizer_of_splitmix64():
    def slow(key):
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        return key ^ (key >> 31)

    keys = [0, 1, 2**40 + 7, -1, -(2**63), 2**63 - 1]
    expected = np.array([slow(key % 2**64) for key in keys], np.uint64).view(np.int64)
    assert mix(torch.tensor(keys)).tolist() == expected.tolist()


def test_noise_of_a_row_does_not_depend_on_its_neighbours():
    whole = initial_rows(np.arange(50_000), 3, 0.5, seed=4)
    assert float(whole.mean()) == pytest.approx(0, abs=0.01)
    assert float(whole.std()) == pytest.approx(0.5, rel=0.02)
    part = torch.empty(10, 3)
    fill_rows(part, 7, 3, 0.5, 4)
    assert torch.equal(part, whole[7:37:3])
    assert not torch.equal(part[0], initial_rows(np.array([7]), 3, 0.5, seed=5)[0])
    assert not bool(initial_rows(np.array([7]), 3, 0.0, seed=5).any())


@pytest.mark.parametrize("keys", [[4, -2, 4, 9, -2, 4], [3, 1], []])
def test_sums_over_equal_keys(keys):
    distinct = find_distinct(torch.tensor(keys, dtype=torch.int64))
    values = torch.arange(2.0 * len(keys)).view(-1, 2)
    assert distinct.keys.tolist() == sorted(set(keys))
    assert distinct.keys[distinct.place].tolist() == keys
    expected = [
        values[[i for i, k in enumerate(keys) if k == key]].sum(0) for key in sorted(set(keys))
    ]
    assert distinct.sum(values).tolist() == [row.tolist() for row in expected]


def shard_of(config):
    shard = Shard(3, 2, build_row_optimizer(config))
    rows, gradient = torch.tensor([2]), torch.tensor([[3.0, -4.0]])
    for _ in range(2):
        touched = Touched(rows, shard.read(rows), gradient)
        shard.optimizer.update(shard.table, shard.state, touched, 0.5)
    return shard


def test_row_wise_adagrad_by_hand():
    shard = shard_of(RowAdagradConfig(lr=0.2, initial=1.0))
    # mean square 12.5, so the sums are 13.5 and 26
    way = 0.1 * (13.5**-0.5 + 26**-0.5)
    torch.testing.assert_close(shard.table[2], torch.tensor([-3.0, 4.0]) * way)
    assert shard.state["square_sum"].tolist() == [1.0, 1.0, 26.0]
    assert not bool(shard.table[:2].any())


def test_adam_of_a_row_walks_the_rate_under_a_constant_gradient():
    shard = shard_of(RowAdamConfig(lr=0.2))
    torch.testing.assert_close(shard.table[2], torch.tensor([-0.2, 0.2]))
    assert shard.state["num_steps"].tolist() == [0.0, 0.0, 2.0]


def test_a_row_that_begins_anew_forgets_its_state():
    shard = shard_of(RowAdagradConfig(initial=1.0))
    shard.reset(torch.tensor([2]), torch.tensor([[5.0, 6.0]]))
    assert shard.table[2].tolist() == [5.0, 6.0]
    assert shard.state["square_sum"].tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("shape", [(5,), (5, 1), (5, 3), (0, 3)])
def test_written_rows_are_those_of_an_assignment(shape):
    table, rows = torch.zeros(shape), torch.tensor([3, 0][: shape[0]], dtype=torch.int64)
    values, expected = torch.randn(6, *shape[1:])[::3][: shape[0]], torch.zeros(shape)
    expected[rows] = values
    write_rows(table, rows, values)
    assert torch.equal(table, expected)
