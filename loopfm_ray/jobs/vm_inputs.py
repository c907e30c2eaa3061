"""What a vertical model depends on."""

from loopfm_ray.experiments import PipelineConfig, VmStageConfig
from loopfm_ray.jobs.context import needed
from loopfm_ray.store.manifest import Manifest

__all__ = ["vm_inputs"]


def vm_inputs(
    config: PipelineConfig, stage: VmStageConfig, seed: int, prepared: Manifest, joined: Manifest
) -> dict[str, str]:
    """Return the versions that a VM depends on, and the space of its latents.

    A VM without the FM's latents outlives a change of theirs.
    """
    inputs = {"prepared": prepared.version}
    if stage.model.history.kind in ("latent", "both") or stage.needs_teacher_latent:
        inputs["joined"] = joined.version
        inputs |= {"latents": joined.meta["latents_version"], "space": joined.meta["space"]}
    elif stage.follows_fm:
        inputs["fm"] = needed(config.paths.fm(seed), "train-fm").version
    return inputs
