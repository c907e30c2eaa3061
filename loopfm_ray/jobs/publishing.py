"""Export the bundle of the served VM and publish the histories of its space."""

import logging
from dataclasses import replace
from typing import Any

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import Context, needed, splits_of
from loopfm_ray.serving.baseline import measure_int8_loss, measure_reference
from loopfm_ray.serving.bundle import save_bundle
from loopfm_ray.serving.spec import BundleSpec, HistoryPin
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.publish import publish
from loopfm_ray.store.space import Space
from loopfm_ray.train.trained import TrainedVm, load_trained_vm

__all__ = ["bundle_spec", "export_bundle", "run_publish"]

_LOGGER = logging.getLogger(__name__)


def run_publish(context: Context) -> dict[str, Any]:
    """Export the served VM's bundle and publish the histories of its space."""
    config = context.config
    seed = config.seeds[0]
    context.progress("publish", 0, 2)
    latents = needed(config.paths.latents(seed), "materialize")
    bundle, int8_loss = export_bundle(config, Space.of_meta(latents.meta))
    context.progress("publish", 1, 2)
    users = PreparedData.open(config.paths.prepared).users.keys
    live = publish(
        config.paths.latents(seed),
        users,
        config.online_target,
        config.online.max_events_per_user,
    )
    context.progress("publish", 2, 2)
    space = Space.of_meta(latents.meta).id
    found: dict[str, Any] = {"bundle": bundle.version, "histories": live, "space": space}
    if int8_loss is not None:
        found["int8_ne_loss"] = int8_loss
    return found


def _check_int8(config: PipelineConfig, loss: float) -> None:
    """Check what 8-bit weights add to the NE of the validation window.

    Raises:
        BundleError: more than the config allows.
    """
    limit = config.online.int8_max_ne_loss
    if not loss <= limit:
        raise BundleError(
            f"8-bit weights add {loss:.5f} to the validation NE, at most {limit:g} may be (online.int8_max_ne_loss): leave"
            " onnx_int8 out of online.backends and serve with onnx, or raise the limit; nothing was published"
        )


def export_bundle(config: PipelineConfig, space: Space) -> tuple[Manifest, float | None]:
    """Write the bundle of the VM that is served, from the first seed; its histories have to be of `space`.

    Returns:
        The bundle's manifest, and what 8-bit weights add to the validation NE where the bundle holds them.

    Raises:
        BundleError: 8-bit weights cost more than the config allows, or the model can not be exported.
        StoreError: the VM was trained in another space.
    """
    seed, name = config.seeds[0], config.online.model
    data = PreparedData.open(config.paths.prepared)
    trained_manifest = needed(config.paths.vm(seed, name), "train-vm")
    trained = load_trained_vm(config.paths.vm(seed, name))
    spec = bundle_spec(config, trained, trained_manifest, space)
    inputs = {"vm": trained_manifest.version, **trained_manifest.inputs}
    measured_on = (
        trained.model.eval(),
        data,
        config.paths.joined(seed),
        splits_of(config).vm_valid,
    )
    backends, int8_loss = config.online.backends, None
    if "onnx_int8" in backends:
        int8_loss = measure_int8_loss(spec, *measured_on)
        _check_int8(config, int8_loss)
    reference = measure_reference(spec, *measured_on)
    if reference is None:
        _LOGGER.warning(
            "the joined set has no rows of the validation window: the bundle of %s has no reference to measure drift against",
            name,
        )
    manifest = save_bundle(
        config.paths.bundle, spec, trained.model, data, inputs, reference, backends
    )
    return manifest, int8_loss


def bundle_spec(
    config: PipelineConfig, trained: TrainedVm, manifest: Manifest, space: Space
) -> BundleSpec:
    """Return what a trained VM is to serving, under the name of the VM that is served.

    Raises:
        StoreError: the VM was trained in another space.
    """
    names = {field.name for field in trained.schema.fields}
    return BundleSpec(
        name=config.online.model,
        vm=trained.config,
        schema=trained.schema,
        calibration=trained.calibration,
        history=_pin(config, manifest, space) if trained.config.history.sources else None,
        derive=tuple(item for item in config.data.derive if item in names),
        sequence_len=config.data.sequence_len,
    )


def _pin(config: PipelineConfig, trained: Manifest, space: Space) -> HistoryPin:
    """Return the history that a VM was trained with: the lineage is its own, whatever was joined since."""
    found = trained.inputs.get("space", "(none, by older code)")
    if found != space.id:
        raise StoreError(
            f"the VM was trained in space {found}, the latents of the run are of {space.id}: another"
            " snapshot or delay made them; run `loopfm join` and `loopfm train-vm` first"
        )
    joined = HistoryPin.of_joined(read_manifest(config.paths.joined(config.seeds[0])))
    return replace(joined, space=space, latents_version=trained.inputs["latents"])
