"""FitNets: a hidden layer is pulled to the teacher's latent, and nothing of it stays in the VM."""

from dataclasses import replace

import pytest
import torch

from loopfm_ray.distill.hints import HintedVm
from loopfm_ray.distill.losses import hint_mse, weighted_mse_sum
from loopfm_ray.errors import ConfigError, DataError, ShapeError
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.train.step import first_logit, make_objective
from tests.model_inputs import LATENT_DIM, SCHEMA, make_batch


def hinted(layer="hidden_1"):
    torch.manual_seed(0)
    return HintedVm(build_vm(DnnConfig(embed_dim=3, hidden=(6, 5)), SCHEMA), layer, LATENT_DIM)


def test_the_square_error_by_hand():
    found = torch.tensor([[1.0, 3.0], [0.0, 0.0], [9.0, 9.0]], requires_grad=True)
    target = torch.tensor([[0.0, 1.0], [1.0, 0.0], [float("nan"), 0.0]], requires_grad=True)
    weight = torch.tensor([1.0, 3.0, 0.0])
    total, weights = weighted_mse_sum(found, target, weight)
    # (1 + 4) / 2 + 3 * (1 + 0) / 2
    assert (total.item(), weights.item()) == (4.0, 4.0)
    assert hint_mse(found, target, weight).item() == 1.0
    total.backward()
    assert target.grad is None
    assert found.grad.tolist() == [[1.0, 2.0], [-3.0, 0.0], [0.0, 0.0]]
    assert hint_mse(found, target, torch.zeros(3)).item() == 0
    with pytest.raises(ShapeError, match="one shape"):
        weighted_mse_sum(found, target[:, :1], weight)


def test_the_objective_adds_the_weighted_hint():
    model, batch = hinted(), make_batch()
    plain = make_objective(model)(batch).total
    out = model(batch)
    hint = hint_mse(out.hint, batch.teacher_latent, torch.ones(12))
    total = make_objective(model, hint_weight=3.0)(batch).total
    torch.testing.assert_close(total, plain + 3.0 * hint)
    assert torch.equal(first_logit(model, batch), model.vm(batch)[:, 0])


def test_training_brings_the_layer_near_the_latent():
    model, batch = hinted(), make_batch(num_rows=64)
    # a latent that the row's fields determine
    latent = torch.nn.functional.one_hot(batch.ids[:, 3], LATENT_DIM).float()
    batch = replace(batch, teacher_latent=latent)
    optimizer, losses = torch.optim.Adam(model.parameters(), lr=0.02), []
    for _ in range(60):
        optimizer.zero_grad()
        make_objective(model, hint_weight=5.0)(batch).total.backward()
        optimizer.step()
        losses.append(hint_mse(model(batch).hint, latent, torch.ones(64)).item())
    assert losses[-1] < 0.4 * losses[0]


def test_the_map_is_no_part_of_the_vm():
    model = hinted()
    assert not any("regressor" in name for name in model.vm.state_dict())
    model.eval()
    assert not model.vm.training


def test_what_is_missing_is_an_error():
    with pytest.raises(ConfigError, match="no layer 'hidden_7'"):
        hinted("hidden_7")
    objective = make_objective(hinted(), hint_weight=1.0)
    with pytest.raises(DataError, match="no latents"):
        objective(replace(make_batch(), teacher_latent=None))
    with pytest.raises(DataError, match="Tensor"):
        make_objective(hinted().vm, hint_weight=1.0)(make_batch())
