"""Counted costs equal those by hand."""

from itertools import pairwise

import pytest
import torch

from loopfm_ray.models.costs import RequestShape, fm_cost, vm_cost
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.models.histories import (
    AttentionConfig,
    DinUnitConfig,
    GruConfig,
    HstuConfig,
    PoolConfig,
    TransformerConfig,
)
from loopfm_ray.models.registry import VMS, build_vm
from tests.contract.test_models import VM_ROWS
from tests.model_inputs import ITEM_FIELDS, LATENT_DIM, SCHEMA, histories

SHAPE = RequestShape(num_candidates=10, history_len=20, sequence_len=3)
FLAT = 5 * 3 + 1
"""Width of all fields: 4 ids and 1 sequence of 3 numbers each, and 1 number."""


def cost(config, shape=SHAPE):
    torch.manual_seed(0)
    model = build_vm(config, SCHEMA, ITEM_FIELDS, LATENT_DIM)
    return vm_cost(model, SCHEMA, config.history, ITEM_FIELDS, LATENT_DIM, shape)


def mlp(*widths):
    return sum(2 * a * b for a, b in pairwise(widths))


def plain(history_dim=0):
    return mlp(FLAT + history_dim, 6, 2) + 2 * 3 * 3  # and the mean of the sequence


def test_parameters_are_counted_by_kind():
    found = cost(DnnConfig(embed_dim=3, hidden=(6,)))
    assert found.num_table_parameters == (7 + 11 + 4 + 5 + 6) * 3
    assert found.num_dense_parameters == FLAT * 6 + 6 + 6 * 2 + 2


def test_a_plain_vm_costs_its_mlp():
    assert cost(DnnConfig(embed_dim=3, hidden=(6,))).flops_per_row == plain()


@pytest.mark.parametrize("num_candidates", [1, 10])
def test_what_does_not_depend_on_the_candidate_is_counted_once_a_request(num_candidates):
    shape = RequestShape(num_candidates, 20, 3)
    encoders = {
        PoolConfig(): (LATENT_DIM, 2 * 20 * LATENT_DIM),
        GruConfig(kind="gru", hidden=4): (4, 20 * 2 * 3 * 4 * (LATENT_DIM + 4)),
    }
    for encoder, (width, once) in encoders.items():
        config = DnnConfig(embed_dim=3, hidden=(6,), history=histories("latent", encoder=encoder))
        expected = plain(width + 1) + once / num_candidates
        assert cost(config, shape).flops_per_row == pytest.approx(expected)


def test_the_din_unit_costs_its_pairs():
    unit = DinUnitConfig(hidden=(8,))
    config = DnnConfig(embed_dim=3, hidden=(6,), history=histories("latent", encoder=unit))
    width, length = LATENT_DIM, 20
    once = length * mlp(width, 8)
    each = mlp(FLAT, width, 8) + length * (mlp(width, 8) + 2 * 8) + 2 * length * width
    expected = plain(width + 1) + each + once / 10
    assert cost(config).flops_per_row == pytest.approx(expected)


def test_self_attention_is_counted():
    config = DnnConfig(history=histories("latent", encoder=TransformerConfig(width=8)))
    first, second, third = (
        cost(config, RequestShape(1, length)).flops_per_row for length in (50, 100, 150)
    )
    # all but the two products of [L, 8] and [8, L] is linear in L
    assert third - 2 * second + first == 4 * 8 * (150**2 - 2 * 100**2 + 50**2)


@pytest.mark.parametrize("kind", VMS)
def test_every_vm_has_a_cost(kind):
    found = cost(VM_ROWS[kind])
    assert found.flops_per_row > 0
    assert found.num_dense_parameters > 0


@pytest.mark.parametrize("encoder", [AttentionConfig(), HstuConfig(width=8), GruConfig()])
def test_the_cost_of_an_fm_is_that_of_the_built_one(encoder):
    config = FmConfig(embed_dim=3, hidden=(6,), history_dim=4, encoder=encoder)
    found = fm_cost(config, SCHEMA, ITEM_FIELDS, SHAPE)
    built = build_fm(config, SCHEMA, ITEM_FIELDS)
    assert found.num_parameters == sum(value.numel() for value in built.parameters())
    assert found.num_table_parameters == built.features.embeddings.weight.numel()
    longer = fm_cost(config, SCHEMA, ITEM_FIELDS, RequestShape(10, 40, 3))
    assert longer.flops_per_row > found.flops_per_row


def test_an_fm_without_history_costs_its_mlp_and_its_cross_layers():
    config = FmConfig(embed_dim=3, hidden=(6,), has_history=False, cross_layers=1, cross_rank=2)
    found = fm_cost(config, SCHEMA, ITEM_FIELDS, SHAPE)
    cross = mlp(FLAT, 2, FLAT)
    assert found.flops_per_row == mlp(FLAT, 6) + cross + mlp(6 + FLAT, 2) + 2 * 3 * 3


def test_a_large_fm_takes_no_memory_to_measure():
    config = FmConfig(embed_dim=1024, hidden=(1 << 20,), history_dim=64)
    assert fm_cost(config, SCHEMA, ITEM_FIELDS).num_dense_parameters > 4e9
