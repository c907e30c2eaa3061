"""Bring the histories of a new FM snapshot online beside those of the old one, without touching the VMs that serve.

Only what serving can still read is embedded first: the retention before the last event. `loopfm materialize` extends the
same version later, for training, and takes these shards over.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopfm_ray.config import dump_yaml
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import read_run
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.jobs.materialize import Scope, materialize
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.spec import HistoryPin
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.coverage import Coverage, compare_coverage
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, find_manifest, read_manifest
from loopfm_ray.store.publish import publish
from loopfm_ray.store.space import Space
from loopfm_ray.store.tables import write_text
from loopfm_ray.store.target import open_current

__all__ = ["publish_beside", "share_target", "upgrade"]


def upgrade(config: PipelineConfig, beside: Path, *, progress: Progress = silent) -> dict[str, Any]:
    """Embed the window that serving needs with the snapshot of `config`, and publish it beside the space of `beside`.

    Both spaces are live afterwards: the bundle of `beside` reads its own as before. The config of the new run is written
    with the shared target, so that its later stages publish there.

    Args:
        config: the new run; prepared, with a trained FM and its snapshot.
        beside: folder of the run that is served.
        progress: told of each shard.

    Returns:
        spaces, versions and the coverage that is lost until time passes.

    Raises:
        ConfigError: the run names another target, or there is nothing to upgrade.
        StoreError: an input is missing, or a store can not be read or written.
    """
    if config.fm.refresh is not None:
        raise ConfigError(
            f"run {config.name!r} has fm.refresh: its latents are of several snapshots; run `loopfm materialize`, or upgrade"
            " to one snapshot with fm.refresh null"
        )
    config, old_pin = share_target(config, beside)
    seed = config.seeds[0]
    prepared = _needed(config.paths.prepared, "prepare")
    snapshot = _needed(config.paths.snapshot(seed), "compress")
    space = Space(
        snapshot.meta["snapshot_id"],
        CodeSpec.from_tree(snapshot.meta["code_spec"]),
        config.history.delay_us,
        prepared.meta["history_events"] == "positives",
    )
    if space == old_pin.space:
        raise ConfigError(
            f"run {config.name!r} has the snapshot and the delay of the run it would stand beside (space {space.id});"
            " to publish newer events of it run `loopfm publish`"
        )
    paths = config.paths
    paths.records.mkdir(parents=True, exist_ok=True)
    write_text(paths.config, dump_yaml(config))
    latents = materialize(
        paths.prepared,
        paths.snapshot(seed),
        paths.latents(seed),
        delay_us=config.history.delay_us,
        num_workers=config.ray.parallel_tasks,
        progress=progress,
        scope=_scope(config, seed, space),
    )
    progress("publish", 0, 1)
    coverage = publish_beside(config, old_pin)
    progress("publish", 1, 1)
    result = {
        "space": space.id,
        "snapshot_id": space.snapshot_id,
        "version": latents.content,
        "rows": latents.num_rows,
        "beside": old_pin.space.id,
        "online": config.online_target,
        **asdict(coverage),
    }
    write_text(paths.records / "upgrade.json", json.dumps(result, indent=1))
    return result


def share_target(config: PipelineConfig, beside: Path) -> tuple[PipelineConfig, HistoryPin]:
    """Return `config` with the online target of the run in `beside`, and the history that the run's bundle reads.

    Raises:
        ConfigError: `config` names another target.
        StoreError: `beside` is no run, or its bundle's space is not live.
        BundleError: the bundle of `beside` can not be loaded.
    """
    served = read_run(beside)
    target = served.online_target
    if config.online.target is not None and config.online_target != target:
        raise ConfigError(
            f"online.target is {config.online_target}, the run in {beside} is served from {target}; leave it out or give"
            " the same"
        )
    pin = load_bundle(served.paths.bundle).spec.history
    if pin is None:
        raise ConfigError(
            f"the VM of the run in {beside} reads no history: nothing of it hangs on a snapshot; publish the new run alone"
        )
    open_current(target, pin.space.id, timeout_s=60.0).close()
    online = config.online.model_copy(update={"target": target})
    return config.model_copy(update={"online": online}), pin


def publish_beside(config: PipelineConfig, served: HistoryPin) -> Coverage:
    """Publish the latents of the new run into the shared target and compare its histories with the served ones.

    Raises:
        StoreError: a store can not be read or written.
    """
    latents, target = config.paths.latents(config.seeds[0]), config.online_target
    keys = PreparedData.open(config.paths.prepared).users.keys
    publish(latents, keys, target, config.online.max_events_per_user)
    space = Space.of_meta(read_manifest(latents).meta)
    stores = [open_current(target, item.id, timeout_s=60.0) for item in (served.space, space)]
    try:
        history = config.history
        return compare_coverage(
            stores[0], stores[1], keys[1:], history.max_len, history.retention_us
        )
    finally:
        for store in stores:
            store.close()


def _scope(config: PipelineConfig, seed: int, space: Space) -> Scope:
    """Return what to embed: the window of serving, or all of it where training has put more there already."""
    found = find_manifest(config.paths.latents(seed))
    is_there = found is not None and Space.of_meta(found.meta) == space
    return Scope(
        keep_us=None if is_there else config.history.retention_us,
        scratch=config.scratch(seed),
        is_scratch_shared=config.scratch_dir is not None,
    )


def _needed(location: Location, stage: str) -> Manifest:
    manifest = find_manifest(location)
    if manifest is None:
        raise StoreError(
            f"{location} is not there; run `loopfm {stage}` with the new run's config first"
        )
    return manifest
