import pytest
import torch

from loopfm_ray.models.foundation import FmConfig, build_fm
from loopfm_ray.train.optim import OptimConfig, build_optimizer, rate_factor, set_rate
from tests.model_inputs import ITEM_FIELDS, SCHEMA


def test_the_rate_rises_holds_and_falls():
    config = OptimConfig(warmup_steps=10, decay_share=0.5, final_share=0.1)
    assert rate_factor(config, 0, 100) == pytest.approx(0.1)
    assert rate_factor(config, 9, 100) == rate_factor(config, 50, 100) == 1.0
    assert rate_factor(config, 75, 100) == pytest.approx(0.5)
    assert rate_factor(config, 99, 100) == pytest.approx(0.1)
    flat = OptimConfig(warmup_steps=0, decay_share=0)
    assert {rate_factor(flat, step, 100) for step in range(100)} == {1.0}


def test_embeddings_have_their_own_rate_and_decay():
    model = build_fm(FmConfig(embed_dim=3), SCHEMA, ITEM_FIELDS)
    config = OptimConfig(lr=0.1, embed_lr=0.5, weight_decay=0.2, embed_weight_decay=0.3)
    optimizer = build_optimizer(config, model)
    dense, tables = optimizer.param_groups
    assert (dense["lr"], dense["weight_decay"]) == (0.1, 0.2)
    assert (tables["lr"], tables["weight_decay"]) == (0.5, 0.3)
    assert [p is model.features.embeddings.weight for p in tables["params"]] == [True]
    assert len(dense["params"]) + 1 == len(list(model.parameters()))
    set_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.25]


def test_one_step_is_adam():
    layer = torch.nn.Linear(2, 1)
    expected = [p.detach().clone() for p in layer.parameters()]
    optimizer = build_optimizer(OptimConfig(lr=0.1), layer)
    layer(torch.tensor([[1.0, -2.0]])).sum().backward()
    optimizer.step()
    # The first Adam step is lr * sign(gradient).
    for parameter, before in zip(layer.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.data, before - 0.1 * parameter.grad.sign())
