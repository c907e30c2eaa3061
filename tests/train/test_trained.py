import pytest
import torch

from loopfm_ray.errors import StoreError
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.registry import build_vm
from loopfm_ray.train.trained import TrainedVm, load_trained_vm, save_trained_vm
from tests.model_inputs import ITEM_FIELDS, LATENT_DIM, SCHEMA, histories, make_batch


def trained():
    torch.manual_seed(0)
    config = DnnConfig(embed_dim=3, hidden=(5,), history=histories("both"))
    model = build_vm(config, SCHEMA, ITEM_FIELDS, LATENT_DIM).eval()
    scaling, record = PlattScaling(0.9, 0.1), {"seconds": 1.5}
    return TrainedVm(model, config, SCHEMA, ITEM_FIELDS, LATENT_DIM, scaling, record)


def save(directory):
    vm = trained()
    save_trained_vm(directory, vm, config_hash="c" * 16, inputs={"joined": "1" * 16}, num_rows=5)
    return vm


def test_round_trip_gives_the_same_bits(tmp_path):
    vm, loaded = save(tmp_path / "vm"), load_trained_vm(tmp_path / "vm")
    assert torch.equal(loaded.model(make_batch()), vm.model(make_batch()))
    assert (loaded.config, loaded.schema, loaded.item_fields) == (vm.config, SCHEMA, ITEM_FIELDS)
    assert (loaded.calibration, loaded.record) == (vm.calibration, vm.record)
    assert not loaded.model.training


def test_damage_and_other_kinds_are_errors(tmp_path):
    with pytest.raises(StoreError):
        load_trained_vm(tmp_path / "none")
    save(tmp_path / "vm")
    weights = tmp_path / "vm" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match="damaged"):
        load_trained_vm(tmp_path / "vm")
