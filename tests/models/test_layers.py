import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from loopfm_ray.models.layers import (
    CrossNet,
    Mlp,
    TargetAttention,
    group_rows,
    masked_mean,
    masked_sum,
)
from tests.oracles.attention import target_attention


def attention_case(row, num_histories, seed=0):
    torch.manual_seed(seed)
    module = TargetAttention(query_dim=3, value_dim=4, side_dim=2, num_heads=2, query_hidden=5)
    module.gain.data.uniform_(0.5, 1.5)
    lengths = torch.randint(1, 6, (num_histories,))
    mask = torch.arange(6) < lengths[:, None]
    values = torch.randn(num_histories, 6, 4)
    side = torch.randn(num_histories, 6, 2)
    return module, torch.randn(len(row), 3), values, side, mask, torch.tensor(row)


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=40))
def test_attention_equals_its_slow_twin(row):
    case = attention_case(row, 5)
    torch.testing.assert_close(case[0](*case[1:]), target_attention(*case), rtol=1e-4, atol=1e-5)


@given(st.lists(st.integers(0, 6), min_size=1, max_size=300))
def test_grouping_gives_each_row_its_own_place_on_its_own_history(row):
    rows = torch.tensor(row)
    groups = group_rows(rows, 7)
    assert len(set(groups.slot.tolist())) == len(row)
    assert int(groups.slot.max()) < groups.num_blocks * groups.width
    block = groups.slot // groups.width
    history = groups.history if groups.history is not None else torch.arange(7)
    assert len(history) == groups.num_blocks
    assert torch.equal(history[block], rows)


def test_one_crowded_history_does_not_widen_all():
    rows = torch.cat([torch.zeros(1000, dtype=torch.int64), torch.arange(1, 500)])
    groups = group_rows(rows, 500)
    assert groups.num_blocks * groups.width < 4 * len(rows)


def test_attention_keeps_intensity():
    torch.manual_seed(0)
    module = TargetAttention(2, 3, 1, 2, 4)
    query, row = torch.randn(1, 2), torch.zeros(1, dtype=torch.int64)
    value, side = torch.randn(1, 1, 3), torch.randn(1, 1, 1)
    mask = torch.ones(1, 4, dtype=torch.bool)
    once = module(query, value, side, mask[:, :1], row)
    often = module(query, value.expand(1, 4, 3), side.expand(1, 4, 1), mask, row)
    torch.testing.assert_close(once[:, :6], often[:, :6])
    assert bool((often[:, 6:] > once[:, 6:]).all())


def test_padding_changes_nothing():
    module, query, values, side, mask, row = attention_case([0, 1, 1, 2], 3)
    wide = [torch.cat([part, torch.full_like(part[:, :3], 9.0)], 1) for part in (values, side)]
    wide_mask = torch.cat([mask, torch.zeros(3, 3, dtype=torch.bool)], 1)
    torch.testing.assert_close(
        module(query, *wide, wide_mask, row), module(query, values, side, mask, row)
    )


def test_order_of_histories_changes_nothing():
    module, query, values, side, mask, row = attention_case([0, 1, 1, 2, 4], 5)
    order = torch.tensor([3, 1, 4, 0, 2])
    place = torch.argsort(order)
    torch.testing.assert_close(
        module(query, values[order], side[order], mask[order], place[row]),
        module(query, values, side, mask, row),
    )


def test_a_history_without_events_gives_finite_output_and_gradient():
    module, query, values, side, mask, row = attention_case([0, 1], 2)
    mask[1] = False
    out = module(query, values, side, mask, row)
    out.square().sum().backward()
    assert bool(torch.isfinite(out).all())
    assert all(bool(torch.isfinite(p.grad).all()) for p in module.parameters())


def test_masked_pooling():
    values = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [9.0, 9.0]], [[5.0, 5.0]] * 3])
    mask = torch.tensor([[True, True, False], [False, False, False]])
    assert masked_sum(values, mask).tolist() == [[4.0, 6.0], [0.0, 0.0]]
    assert masked_mean(values, mask).tolist() == [[2.0, 3.0], [0.0, 0.0]]


def test_cross_net_equals_its_equation():
    torch.manual_seed(0)
    net = CrossNet(5, 2, 3)
    x = torch.randn(4, 5)
    expected = x
    for down, up in zip(net.down, net.up, strict=True):
        expected = x * (expected @ down.weight.T @ up.weight.T + up.bias) + expected
    torch.testing.assert_close(net(x), expected)


def test_mlp_gives_every_hidden_layer():
    mlp = Mlp(3, (4, 2), dropout=0.5).eval()
    x = torch.randn(5, 3)
    hidden = mlp.forward_all(x)
    assert [h.shape[1] for h in hidden] == [4, 2]
    assert torch.equal(hidden[-1], mlp(x))
    assert mlp.out_dim == 2
    assert torch.equal(Mlp(3, ())(x), x)
    assert not torch.equal(mlp.train()(x.repeat(50, 1)), mlp.eval()(x.repeat(50, 1)))


@pytest.mark.parametrize("num_rows", [1, 3])
def test_gradient_reaches_values_and_query(num_rows):
    module, query, values, side, mask, _ = attention_case([0], 4)
    row = torch.zeros(num_rows, dtype=torch.int64)
    values.requires_grad_()
    module(query.expand(num_rows, 3), values, side, mask, row).sum().backward()
    assert bool(values.grad[0][mask[0]].abs().sum() > 0)
    assert not bool(values.grad[0][~mask[0]].any())
    assert not bool(values.grad[1:].any())
