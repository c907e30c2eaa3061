"""What a trial's VM costs where it serves: time to score a request, and bytes of a user's history."""

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.context import splits_of
from loopfm_ray.jobs.publishing import bundle_spec
from loopfm_ray.jobs.vm_data import VmJob
from loopfm_ray.models.history_inputs import LatentHistoryConfig
from loopfm_ray.serving.bundle import load_bundle, save_bundle
from loopfm_ray.serving.contract import ScoreQuery
from loopfm_ray.serving.parity import load_offline
from loopfm_ray.serving.predictor import Predictor
from loopfm_ray.serving.spec import why_not_servable
from loopfm_ray.store.filesystem import remove_tree
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.offline import LatentsReader
from loopfm_ray.store.publish import iterate_histories, load_memory
from loopfm_ray.store.sizes import online_event_bytes
from loopfm_ray.store.space import Space
from loopfm_ray.train.trained import load_trained_vm

__all__ = ["measure_bytes_per_user", "measure_scoring"]

_REQUESTS, _WARM_UP, _CANDIDATES = 200, 20, 50


def measure_scoring(pipeline: PipelineConfig, job: VmJob, folder: Path) -> dict[str, float | None]:
    """Return `score_ms_p50` and `score_ms_p99` of a request with 50 candidates: its features, its history from memory, one pass of the VM.

    It is scored by a bundle in this process, on one thread, without network. None for a VM that is not served.

    Args:
        pipeline: of the trial.
        job: its VM, trained.
        folder: for the bundle, which is removed again.
    """
    if why_not_servable(job.config.model) is not None:
        return {"score_ms_p50": None, "score_ms_p99": None}
    data, trained = PreparedData.open(job.prepared), load_trained_vm(job.out_dir)
    latents = pipeline.paths.latents(job.seed)
    space = Space.of_meta(read_manifest(latents).meta)
    spec = bundle_spec(pipeline, trained, read_manifest(job.out_dir), space)
    save_bundle(folder, spec, trained.model, data, {"vm": read_manifest(job.out_dir).version})
    try:
        bundle = load_bundle(folder)
        store = load_memory(latents, data.users.keys) if spec.history is not None else None
        predictor = Predictor(bundle, store)
        found = load_offline(
            bundle, data, job.joined, splits_of(pipeline).vm_valid, _REQUESTS, seed=job.seed
        )
        queries = [
            _widened(replay.query, data.items.keys[1:], number)
            for number, replay in enumerate(found.replays)
        ]
        taken = []
        for query in [*queries[:_WARM_UP], *queries]:
            began = time.perf_counter()
            predictor.score(query)
            taken.append(1000 * (time.perf_counter() - began))
    finally:
        remove_tree(folder)
    p50, p99 = np.percentile(taken[_WARM_UP:], (50, 99))
    return {"score_ms_p50": float(p50), "score_ms_p99": float(p99)}


def _widened(query: ScoreQuery, items: Sequence[str], number: int) -> ScoreQuery:
    """Return a request for as many candidates as all others have."""
    start = number * _CANDIDATES % len(items)
    chosen = tuple(items[(start + place) % len(items)] for place in range(_CANDIDATES))
    context = {
        name: np.resize(value, _CANDIDATES).tolist()
        if isinstance(value, list) and len(value) == len(query.items)
        else value
        for name, value in query.context.items()
    }
    return replace(query, items=chosen, context=context)


def measure_bytes_per_user(pipeline: PipelineConfig, job: VmJob) -> float:
    """Return the mean bytes of a user's history online, cut to what the VM reads; 0 for one without latents."""
    read = [
        one.max_len or pipeline.history.max_len
        for one in job.config.model.history.root.values()
        if isinstance(one, LatentHistoryConfig)
    ]
    if not read:
        return 0.0
    reader = LatentsReader(pipeline.paths.latents(job.seed))
    users = PreparedData.open(job.prepared).users.keys
    events = [len(history.event_ts) for _, history in iterate_histories(reader, users, max(read))]
    return float(np.mean(events)) * online_event_bytes(reader.spec)
