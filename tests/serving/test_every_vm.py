"""Every VM that can be served gives the same scores from its bundle; one that can not is refused, with the reason."""

from dataclasses import replace

import pytest
import torch

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError
from loopfm_ray.experiments import PipelineConfig, VmStageConfig
from loopfm_ray.models.dnn import DnnConfig
from loopfm_ray.models.history_inputs import (
    HistoryInputs,
    LatentHistoryConfig,
    RawHistoryConfig,
    SideConfig,
)
from loopfm_ray.models.registry import ENCODERS, VMS
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.parity import check_parity, load_offline
from loopfm_ray.serving.predictor import load_predictor
from loopfm_ray.serving.spec import why_not_servable
from loopfm_ray.types import TimeRange
from tests.contract.test_models import ENCODER_ROWS, VM_ROWS
from tests.serving.world import CODE, STOP, VM_STOP, make_model

# each architecture once, and each encoder once, with all that a served history may have
PAIRS = [(kind, "attention") for kind in VMS] + [("dnn", name) for name in ENCODERS]


def servable(kind, encoder):
    history = HistoryInputs.of(
        user=LatentHistoryConfig(
            encoder=ENCODER_ROWS[encoder], max_len=7, latent_dim=6, side=SideConfig(age=True)
        ),
        mean=LatentHistoryConfig(encoder=ENCODER_ROWS["mean"], in_query=True),
    )
    return VM_ROWS[kind].model_copy(update={"history": history})


@pytest.mark.parametrize(("kind", "encoder"), dict.fromkeys(PAIRS))
def test_served_scores_equal_offline_scores(world, tmp_path, kind, encoder):
    config = servable(kind, encoder)
    spec = replace(world.spec, vm=config)
    model = make_model(config, spec.schema, CODE.dim).eval()
    prepared = PreparedData.open(world.prepared)
    save_bundle(tmp_path / "bundle", spec, model, prepared, {})
    loaded = load_bundle(tmp_path / "bundle")
    assert loaded.spec == spec
    saved = model.state_dict()
    assert all(torch.equal(v, saved[k]) for k, v in loaded.model.state_dict().items())
    predictor = load_predictor(tmp_path / "bundle", world.online)
    offline = load_offline(predictor.bundle, prepared, world.joined, TimeRange(VM_STOP, STOP), 40)
    report = check_parity(predictor, offline, tolerance=1e-5)
    assert report.is_ok
    assert report.num_rows > 40


REFUSED = {
    "raw": (HistoryInputs.of(own=RawHistoryConfig()), "raw history 'own'"),
    "item": (HistoryInputs.of(it=LatentHistoryConfig(key=("item",))), r"'it' by \['item'\]"),
    "label": (
        HistoryInputs.of(user=LatentHistoryConfig(side=SideConfig(label=True))),
        r"\['label'\] of the events of history 'user'",
    ),
    "event_type": (
        HistoryInputs.of(user=LatentHistoryConfig(side=SideConfig(num_event_types=3))),
        r"\['event_type'\] of the events",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_the_online_store_does_not_give_is_refused(world, name):
    history, message = REFUSED[name]
    config = DnnConfig(history=history)
    with pytest.raises(BundleError, match=message):
        replace(world.spec, vm=config)
    with pytest.raises(ValueError, match=message):
        PipelineConfig.model_validate(
            {"vms": {**PipelineConfig().vms, "vm_kd_loopfm": VmStageConfig(model=config)}}
        )


def test_the_rows_own_latent_is_never_served(world):
    config = DnnConfig(reads_teacher_latent=True, history=world.spec.vm.history)
    assert "live FM" in (why_not_servable(config) or "")
    with pytest.raises(BundleError, match="live FM"):
        replace(world.spec, vm=config)


def test_a_vm_without_histories_is_served_without_a_store(world):
    assert why_not_servable(DnnConfig()) is None
    with pytest.raises(BundleError, match="pin"):
        replace(world.spec, vm=DnnConfig())
