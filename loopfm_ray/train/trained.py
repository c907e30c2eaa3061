"""A trained vertical model on disk: weights, what they mean, and how its outputs are calibrated.

Every VM is kept like this, also one that the online store can not serve; `serving/bundle.py` makes the form that is served.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from safetensors.torch import load_file, save_file

from loopfm_ray.data.schema import FeatureSchema
from loopfm_ray.errors import LoopFMError, StoreError
from loopfm_ray.metrics.calibration import PlattScaling
from loopfm_ray.models.registry import AnyVmConfig, build_vm, read_vm_config
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, commit, stage, verify
from loopfm_ray.train.curves import write_curves

__all__ = ["TrainedVm", "load_trained_vm", "save_trained_vm"]

_WEIGHTS, _SPEC = "model.safetensors", "vm.json"


@dataclass(frozen=True)
class TrainedVm:
    """A VM with its calibration and the record of its training."""

    model: VerticalModel
    config: AnyVmConfig
    schema: FeatureSchema
    item_fields: tuple[str, ...]
    """Columns of the raw history that it reads; empty when it reads none."""
    latent_dim: int | None
    """Width of the stored latents that it reads; None when it reads none."""
    calibration: PlattScaling
    record: Mapping[str, Any]
    """Validation metrics, speed and seconds of its training."""


def save_trained_vm(
    location: Location,
    trained: TrainedVm,
    *,
    config_hash: str,
    inputs: Mapping[str, str],
    num_rows: int,
    curves: str = "",
) -> Manifest:
    """Write a VM and its learning curves as a version of kind `vm`, in place of another one there."""
    tree = {
        "vm": trained.config.model_dump(mode="json"),
        "schema": json.loads(trained.schema.to_json()),
        "item_fields": list(trained.item_fields),
        "latent_dim": trained.latent_dim,
        "calibration": asdict(trained.calibration),
        "record": dict(trained.record),
    }
    with stage(location) as staged:
        weights = trained.model.state_dict()
        save_file(
            {name: value.detach().cpu().contiguous() for name, value in weights.items()},
            staged / _WEIGHTS,
        )
        (staged / _SPEC).write_text(json.dumps(tree, indent=1, sort_keys=True), encoding="utf-8")
        write_curves(staged, curves)
        return commit(
            staged,
            kind="vm",
            config_hash=config_hash,
            inputs=inputs,
            meta={"num_parameters": sum(value.numel() for value in trained.model.parameters())},
            num_rows=num_rows,
            replace_other=True,
        )


def load_trained_vm(location: Location) -> TrainedVm:
    """Read a VM, checksums checked, in evaluation mode on the CPU.

    Raises:
        StoreError: it is missing, damaged, or its weights do not fit.
    """
    version = open_version(location, "vm")
    directory = version.fetch()
    verify(directory)
    try:
        tree = json.loads((directory / _SPEC).read_text(encoding="utf-8"))
        config = read_vm_config(tree["vm"])
        schema = FeatureSchema.from_json(json.dumps(tree["schema"]))
        item_fields = tuple(tree["item_fields"])
        model = build_vm(config, schema, item_fields, tree["latent_dim"])
        model.load_state_dict(load_file(directory / _WEIGHTS))
        calibration = PlattScaling(**tree["calibration"])
    except (KeyError, TypeError, ValueError, RuntimeError, LoopFMError) as error:
        raise StoreError(f"{location} can not be loaded: {error}; train the VM again") from error
    model.eval()
    return TrainedVm(
        model, config, schema, item_fields, tree["latent_dim"], calibration, tree["record"]
    )
