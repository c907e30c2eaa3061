"""Replay a parity log against the run that it was served from; needs no Ray."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import JobError, StoreError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.serving.bundle import load_bundle
from loopfm_ray.serving.replay import Replayer, read_requests
from loopfm_ray.store.filesystem import absolute
from loopfm_ray.store.manifest import find_manifest
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.online import OnlineStore
from loopfm_ray.store.target import open_version
from loopfm_ray.train.process import set_up_process

__all__ = ["replay_requests"]


def replay_requests(config: PipelineConfig, log: Path, threshold: float = 0.0) -> dict[str, Any]:
    """Score the requests of a parity log offline, and compare with what was answered.

    Args:
        config: of the run whose bundle answered.
        log: a file, or the folder of the log.
        threshold: share of the rows that may differ by more than `online.parity_tolerance`.

    Raises:
        StoreError: the run has no bundle, or the log can not be read.
        DataError: the log is damaged.
        JobError: more rows differ, or not one request could be replayed.
    """
    set_up_process()
    if find_manifest(config.paths.bundle) is None:
        raise StoreError(f"{config.paths.bundle} is not there; run `loopfm publish` first")
    bundle = load_bundle(absolute(config.paths.bundle))
    where, pin = config.paths.latents(config.seeds[0]), bundle.spec.history
    is_there = pin is not None and find_manifest(where) is not None

    def open_store(version: str) -> OnlineStore:
        if pin is None:
            raise StoreError("the VM reads no history")
        return open_version(config.online_target, pin.space.id, version)

    replayer = Replayer(
        bundle,
        PreparedData.open(config.paths.prepared),
        LatentsReader(where) if is_there else None,
        open_store,
    )
    report = replayer.replay(read_requests(log), config.online.parity_tolerance)
    result = {**asdict(report), "share": report.share, "threshold": threshold}
    if report.num_requests == 0:
        raise JobError(
            f"no request of {log} could be replayed: {report.not_replayed or 'it is empty'}; give a log of the bundle"
            f" {bundle.version}"
        )
    if report.share > threshold:
        shown = "\n  ".join(report.mismatches)
        raise JobError(
            f"{report.num_mismatches} of {report.num_rows} logged scores ({report.share:.2%}, allowed {threshold:.2%}) differ by"
            f" more than {report.tolerance} from the offline score, the most by {report.max_abs_diff}; largest differences of"
            f" features {report.groups}; not replayed {report.not_replayed}:\n  {shown}"
        )
    return result
