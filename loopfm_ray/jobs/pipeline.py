"""The whole loop: run the stages in order, keep a record of each, and put the records together."""

import json
import logging
import os
import platform
import shutil
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from loopfm_ray.config import config_hash, dump_yaml
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.experiments import MODEL_FM, PipelineConfig
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.context import Context
from loopfm_ray.jobs.freshness import joined_freshness
from loopfm_ray.jobs.mapping import Progress, silent
from loopfm_ray.jobs.scoring import run_parity
from loopfm_ray.jobs.stages import STAGES, evaluation_path
from loopfm_ray.jobs.streaming import run_stream_stage
from loopfm_ray.report.assemble import assemble_models
from loopfm_ray.report.page import build_report
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location, is_remote
from loopfm_ray.store.manifest import code_version, read_manifest
from loopfm_ray.store.s3 import check_access
from loopfm_ray.store.sizes import measure_sizes, online_event_bytes
from loopfm_ray.store.space import Space
from loopfm_ray.store.tables import write_text
from loopfm_ray.store.target import is_redis
from loopfm_ray.train.curves import read_curves
from loopfm_ray.types import TimeRange

__all__ = ["STAGE_NAMES", "run_pipeline", "run_stages"]

_LOGGER = logging.getLogger(__name__)
_ALL = {**STAGES, "parity": run_parity}
_BESIDE = {"stream": run_stream_stage}
"""Stages of runs whose config asks for them."""
STAGE_NAMES = (*_ALL, *_BESIDE, "report")
"""Every stage in the order in which they depend on each other."""


def run_pipeline(
    config: PipelineConfig, *, fresh: bool = False, progress: Progress = silent
) -> dict[str, Any]:
    """Run every stage that is not up to date and return the summary.

    Raises:
        LoopFMError: a stage failed; running the same config again goes on there.
    """
    context = _begin(config, progress, fresh)
    with connect(config.ray):
        for name in _ALL:
            _run(context, name)
        if config.stream is not None:
            _run(context, "stream")
    return _finish(context)


def run_stages(
    config: PipelineConfig,
    name: str,
    *,
    fresh: bool = False,
    progress: Progress = silent,
    redo: TimeRange | None = None,
) -> dict[str, Any]:
    """Run one stage and return what it did; what it needs must be there.

    `redo` is for materialize: the time that is made again, while all other must be as before.

    Raises:
        LoopFMError: the stage failed, or an earlier one has not run.
    """
    if name not in STAGE_NAMES:
        raise ConfigError(f"there is no stage {name!r}, expected one of {STAGE_NAMES}")
    context = replace(_begin(config, progress, fresh), redo=redo)
    if name == "report":
        _finish(context)
        return {"report": str(config.paths.report), "summary": str(config.paths.summary)}
    with connect(config.ray):
        return _run(context, name)


def _begin(config: PipelineConfig, progress: Progress, fresh: bool) -> Context:
    """Make sure that the store is there, make the run folder and write the resolved config into it."""
    paths = config.paths
    if is_remote(paths.versions):
        check_access(str(paths.versions))
    try:
        paths.records.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StoreError(
            f"run folder {paths.root} can not be made: {error.strerror}; set run_dir to a folder you can write to"
        ) from error
    write_text(paths.config, dump_yaml(config))
    return Context(config, progress, fresh)


def _run(context: Context, name: str) -> dict[str, Any]:
    started = time.perf_counter()
    context.progress(name, 0, 1)
    result = {**_ALL, **_BESIDE}[name](context)
    seconds = time.perf_counter() - started
    context.progress(name, 1, 1)
    _LOGGER.info("stage %s took %.1f s", name, seconds)
    path = context.config.paths.records / f"{name}.json"
    key = config_hash(context.config, code_version())
    before = _record(path)
    worked = before is None or before["key"] != key or before["result"] != result
    if worked or context.fresh or name == "parity":
        # a stage that found its work done keeps the time that the work took
        write_text(path, json.dumps({"key": key, "seconds": seconds, "result": result}, indent=1))
    return result


def _record(path: Path) -> dict[str, Any] | None:
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return tree


def _need(context: Context, name: str) -> dict[str, Any]:
    record = _record(context.config.paths.records / f"{name}.json")
    if record is None:
        raise StoreError(
            f"stage {name} has not run in {context.config.paths.root}; run `loopfm {name}` first"
        )
    return record


def _finish(context: Context) -> dict[str, Any]:
    """Write manifest, learning curves, summary and report from the records of all stages."""
    config, paths = context.config, context.config.paths
    context.progress("report", 0, 1)
    started = time.perf_counter()
    names = (*_ALL, *(_BESIDE if config.stream is not None else ()))
    records = {name: _need(context, name) for name in names}
    curves = _curves(config)
    lines = [
        json.dumps({key: curve[key] for key in ("run", "seed", "step", "split", "name", "value")})
        for curve in curves
    ]
    write_text(paths.metrics, "\n".join(lines) + "\n")
    summary = _summary(config, records, curves)
    build_report(summary, paths.report)
    summary["seconds"]["report"] = time.perf_counter() - started
    write_text(paths.summary, json.dumps(summary, indent=1))
    write_text(paths.root / "manifest.json", json.dumps(_manifest(config, summary), indent=1))
    shutil.rmtree(paths.work, ignore_errors=True)
    context.progress("report", 1, 1)
    return summary


def _summary(
    config: PipelineConfig, records: dict[str, dict[str, Any]], curves: list[dict[str, Any]]
) -> dict[str, Any]:
    paths, seed = config.paths, config.seeds[0]
    data = PreparedData.open(paths.prepared)
    measured = {
        seed: [
            json.loads(evaluation_path(config, seed, name).read_text(encoding="utf-8"))
            for name in (MODEL_FM, *config.vms)
        ]
        for seed in config.seeds
    }
    parity = dict(records["parity"]["result"])
    scored = parity.pop("scored_request")
    latents, joined = read_manifest(paths.latents(seed)), read_manifest(paths.joined(seed))
    meta, fresh = data.manifest.meta, joined_freshness(config, seed)
    return {
        "name": config.name,
        "code_version": code_version(),
        "data": {
            "kind": config.data.kind,
            **{
                name: meta[name]
                for name in ("num_events", "num_examples", "num_users", "num_items")
            },
        },
        "seeds": list(config.seeds),
        **assemble_models(measured, config.baseline, config.kd, config.online.model),
        "curves": curves,
        "calibration_bins": {item["name"]: item["calibration_bins"] for item in measured[seed]},
        "channel": read_manifest(paths.snapshot(seed)).meta["record"]["channel"],
        "history": {
            "coverage": joined.meta["coverage"],
            "mean_length": joined.meta["mean_length"],
            "staleness_s": joined.meta["staleness_s"],
            "coverage_by_age": fresh["coverage_by_age"],
            "alarms": fresh["alarms"],
        },
        "audit": records["audit"]["result"],
        "parity": parity,
        **({"stream": records["stream"]["result"]} if "stream" in records else {}),
        "scored_request": scored,
        "sizes": {
            "latents_bytes": latents.num_bytes,
            "bytes_per_event": latents.num_bytes / max(latents.num_rows, 1),
            "online_bytes": _online_bytes(config.online_target, Space.of_meta(latents.meta).id),
            "encoded_bytes_per_event": measure_sizes(paths.latents(seed)).encoded_bytes_per_event,
            "online_bytes_per_event": online_event_bytes(
                CodeSpec.from_tree(latents.meta["code_spec"])
            ),
            "joined_bytes": joined.num_bytes,
        },
        "seconds": {name: record["seconds"] for name, record in records.items()},
        "config": config.model_dump(mode="json"),
    }


def _curves(config: PipelineConfig) -> list[dict[str, Any]]:
    """Return the learning curves of all models."""
    curves = []
    for seed in config.seeds:
        models = {name: config.paths.vm(seed, name) for name in config.vms}
        for run, location in {MODEL_FM: config.paths.fm(seed), **models}.items():
            curves += [{"run": run, "seed": seed, **point} for point in read_curves(location)]
    return sorted(
        curves,
        key=lambda item: (item["run"], item["seed"], item["split"], item["name"], item["step"]),
    )


def _manifest(config: PipelineConfig, summary: dict[str, Any]) -> dict[str, Any]:
    """Return what was run, on which machine, from and to which versions."""
    paths = config.paths
    versions: dict[str, Location] = {"prepared": paths.prepared, "bundle": paths.bundle}
    for seed in config.seeds:
        versions |= {
            f"seed={seed}/{name}": path for name, path in _seed_versions(config, seed).items()
        }
    return {
        "format_version": 1,
        "kind": "run",
        "code_version": code_version(),
        "config_hash": config_hash(config),
        "seeds": list(config.seeds),
        "versions": {name: read_manifest(path).version for name, path in versions.items()},
        "created_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": summary["seconds"],
        "machine": {
            "system": platform.platform(),
            "python": platform.python_version(),
            "num_cpus": os.cpu_count(),
        },
    }


def _seed_versions(config: PipelineConfig, seed: int) -> dict[str, Location]:
    paths = config.paths
    vms = {f"vm/{name}": paths.vm(seed, name) for name in config.vms}
    return {
        "fm": paths.fm(seed),
        "snapshot": paths.snapshot(seed),
        "latents": paths.latents(seed),
        "joined": paths.joined(seed),
        **vms,
    }


def _online_bytes(target: str, space: str) -> int | None:
    """Return what a space takes on disk, None for Redis; sparse files count what they hold."""
    if is_redis(target):
        return None
    folder = Path(target) / "spaces" / space
    return sum(item.stat().st_blocks * 512 for item in folder.rglob("*") if item.is_file())
