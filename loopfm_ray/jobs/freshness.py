"""Measure how fresh the histories of a run are: those its VMs were trained on and those that are published."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.history.freshness import (
    Published,
    decide,
    decide_published,
    freshness,
    published,
)
from loopfm_ray.store.manifest import find_manifest, read_manifest
from loopfm_ray.store.space import Space
from loopfm_ray.store.target import is_redis, live_spaces

__all__ = ["check_freshness", "joined_freshness"]


def joined_freshness(config: PipelineConfig, seed: int) -> dict[str, Any]:  # Any: JSON
    """Return the freshness of the joined version of one seed, with its alarms.

    Raises:
        StoreError: it is not there.
    """
    path = config.paths.joined(seed)
    if find_manifest(path) is None:
        raise StoreError(f"{path} is not there; run `loopfm join` with the same config first")
    found = freshness(path, config.freshness)
    return {**found.to_tree(), "alarms": list(decide(found, config.freshness))}


def check_freshness(config: PipelineConfig, now_ts: int) -> dict[str, Any]:  # Any: JSON
    """Return the freshness of what was joined and of what is published, as of `now_ts` in microseconds UTC.

    `alarms` lists what is beyond the limits of the config, in both.
    """
    joined = joined_freshness(config, config.seeds[0])
    online = _published(config, now_ts)
    alarms = [*joined.pop("alarms"), *decide_published(online, config.freshness)]
    return {
        **joined,
        "published": None if online is None else asdict(online),
        "alarms": alarms,
    }


def _published(config: PipelineConfig, now_ts: int) -> Published | None:
    """Return what is live of the space that the run was joined with; None where nothing is."""
    target = config.online_target
    if not is_redis(target) and not Path(target).is_dir():
        return None
    space = Space.of_meta(read_manifest(config.paths.joined(config.seeds[0])).meta).id
    for live in live_spaces(target):
        if live.space == space:
            return published(live.version, live.watermark_ts, now_ts)
    return None
