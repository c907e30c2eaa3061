"""Export the bundle of the served VM and publish the histories of its space."""

import logging
from dataclasses import replace
from typing import Any

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import BundleError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import Context, needed, splits_of
from loopfm_ray.metrics.binary import normalized_entropy
from loopfm_ray.serving.baseline import measure_reference
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.parity import load_offline
from loopfm_ray.serving.spec import BundleSpec, HistoryPin
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.publish import publish
from loopfm_ray.store.space import Space
from loopfm_ray.train.trained import load_trained_vm

__all__ = ["export_bundle", "run_publish"]

_LOGGER = logging.getLogger(__name__)
_INT8_REQUESTS = 5000
"""Validation requests that the loss of 8-bit weights is measured on."""


def run_publish(context: Context) -> dict[str, Any]:
    """Export the served VM's bundle and publish the histories of its space."""
    config = context.config
    seed = config.seeds[0]
    context.progress("publish", 0, 2)
    latents = needed(config.paths.latents(seed), "materialize")
    bundle = export_bundle(config, Space.of_meta(latents.meta))
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
    if "onnx_int8" in config.online.backends:
        found["int8_ne_loss"] = _int8_ne_loss(config)
    return found


def _int8_ne_loss(config: PipelineConfig) -> float:
    """Return what 8-bit weights add to the NE on a sample of the validation requests.

    Raises:
        BundleError: more than the config allows.
    """
    data = PreparedData.open(config.paths.prepared)
    joined, ne = config.paths.joined(config.seeds[0]), {}
    for backend in ("torch", "onnx_int8"):
        bundle = load_bundle(config.paths.bundle, backend)
        sample = load_offline(bundle, data, joined, splits_of(config).vm_valid, _INT8_REQUESTS)
        label = sample.rows[bundle.spec.schema.tasks[0]]
        ne[backend] = normalized_entropy(label, sample.probs)
    loss = ne["onnx_int8"] - ne["torch"]
    limit = config.online.int8_max_ne_loss
    if not loss <= limit:
        raise BundleError(
            f"8-bit weights add {loss:.5f} to the validation NE ({ne['torch']:.5f}), at most {limit:g} may be"
            " (online.int8_max_ne_loss): serve with onnx, or raise the limit"
        )
    return loss


def export_bundle(config: PipelineConfig, space: Space) -> Manifest:
    """Write the bundle of the VM that is served, from the first seed; its histories have to be of `space`."""
    seed, name = config.seeds[0], config.online.model
    data = PreparedData.open(config.paths.prepared)
    trained_manifest = needed(config.paths.vm(seed, name), "train-vm")
    trained = load_trained_vm(config.paths.vm(seed, name))
    names = {field.name for field in trained.schema.fields}
    spec = BundleSpec(
        name=name,
        vm=trained.config,
        schema=trained.schema,
        calibration=trained.calibration,
        history=_pin(config, trained_manifest, space) if trained.config.history.sources else None,
        derive=tuple(item for item in config.data.derive if item in names),
        sequence_len=config.data.sequence_len,
    )
    inputs = {"vm": trained_manifest.version, **trained_manifest.inputs}
    reference = measure_reference(
        spec, trained.model.eval(), data, config.paths.joined(seed), splits_of(config).vm_valid
    )
    if reference is None:
        _LOGGER.warning(
            "the joined set has no rows of the validation window: the bundle of %s has no reference to measure drift against",
            name,
        )
    backends = config.online.backends
    return save_bundle(config.paths.bundle, spec, trained.model, data, inputs, reference, backends)


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
