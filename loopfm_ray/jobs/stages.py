"""The stages of a run: each reads versions, writes versions, and does nothing when what it would write is there already."""

import json
import logging
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loopfm_ray.config import config_hash
from loopfm_ray.data.log import log_files
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import StoreError
from loopfm_ray.experiments import MODEL_FM, PipelineConfig
from loopfm_ray.history.audit import AuditReport, audit
from loopfm_ray.history.join import joined_hash, write_joined
from loopfm_ray.jobs.context import Context, needed, splits_of
from loopfm_ray.jobs.evaluate import (
    EvaluationRecord,
    evaluate_fm,
    evaluate_vm,
    read_record,
    write_record,
)
from loopfm_ray.jobs.freshness import joined_freshness
from loopfm_ray.jobs.materialize import Request, materialize_all
from loopfm_ray.jobs.publishing import run_publish
from loopfm_ray.jobs.refresh import refreshed_latents
from loopfm_ray.jobs.snapshots import Making, clear, ensure_fms, ensure_snapshots
from loopfm_ray.jobs.train_vm import train_vms
from loopfm_ray.jobs.vm_data import VmJob
from loopfm_ray.jobs.vm_inputs import vm_inputs
from loopfm_ray.store.filesystem import absolute, is_remote
from loopfm_ray.store.manifest import (
    Manifest,
    read_manifest,
)
from loopfm_ray.store.tables import write_text
from loopfm_ray.types import TimeRange

__all__ = ["STAGES", "evaluation_path", "predictions_path"]

_LOGGER = logging.getLogger(__name__)


def run_prepare(context: Context) -> dict[str, Any]:
    """Write the prepared version."""
    config, path = context.config, context.config.paths.prepared
    read, settings = config.paths.records / "log.json", config_hash(config.data)
    manifest = context.current(path, settings, {}) if _is_same_log(config, read) else None
    if manifest is None:
        context.progress("prepare", 0, 1)
        text = json.dumps(log_files(config.data), indent=1, sort_keys=True)
        made_of = {"log": text}
        manifest = context.take(path, settings, made_of)
        if manifest is None:
            mapper = context.mapper("prepare", writes=True)
            prepare(config.data, path, mapper=mapper, replace_other=True)
            manifest = context.share(path, made_of)
        write_text(read, text)
    return {"version": manifest.version, "rows": manifest.num_rows, **manifest.meta["counts"]}


def _is_same_log(config: PipelineConfig, read: Path) -> bool:
    """Return whether the files of the log are those that were prepared, by the note in `read`.

    What another machine put into a store on S3 stands: this one need not have the log at all.
    """
    if read.is_file():
        known: dict[str, Any] = json.loads(read.read_text(encoding="utf-8"))
        return log_files(config.data) == known
    return is_remote(config.paths.versions) or log_files(config.data) == {}


def run_train_fm(context: Context) -> dict[str, Any]:
    """Train the FM of each seed."""
    needed(context.config.paths.prepared, "prepare")
    makings = _makings(context.config)
    manifests = ensure_fms(context, makings)
    return {f"seed={one.seed}": made.version for one, made in zip(makings, manifests, strict=True)}


def run_compress(context: Context) -> dict[str, Any]:
    """Fit the bottleneck of each seed's FM, unless it was trained along with it, and write the snapshot."""
    config = context.config
    needed(config.paths.prepared, "prepare")
    makings = _makings(config)
    for one in makings:
        needed(one.fm, "train-fm")
    ensure_snapshots(context, makings)
    return {f"seed={seed}": _channel(config, seed) for seed in config.seeds}


def _makings(config: PipelineConfig) -> list[Making]:
    """Return the FM and the snapshot of each seed."""
    splits, paths = splits_of(config), config.paths
    return [Making(seed, paths.fm(seed), paths.snapshot(seed), splits) for seed in config.seeds]


def _channel(config: PipelineConfig, seed: int) -> dict[str, Any]:
    meta = read_manifest(config.paths.snapshot(seed)).meta
    return {"snapshot_id": meta["snapshot_id"], **meta["record"]["channel"]}


def run_materialize(context: Context) -> dict[str, Any]:
    """Write the latents version of each seed; say how much of it was made for it and how much was taken over."""
    config, result = context.config, {}
    for seed in config.seeds:
        needed(config.paths.snapshot(seed), "compress")
    for seed, manifest in zip(config.seeds, _latents(context), strict=True):
        result[f"seed={seed}"] = {
            "version": manifest.version,
            "content": manifest.content,
            "rows": manifest.num_rows,
            "reused": manifest.record["num_reused"],
            "redone": manifest.record["num_redone"],
            "late_events": manifest.record.get("num_late_events", 0),
        }
    return result


def _latents(context: Context) -> list[Manifest]:
    config = context.config
    if config.fm.refresh is not None:
        return refreshed_latents(context)
    paths = config.paths
    return materialize_all(
        paths.prepared,
        [
            Request(
                paths.snapshot(seed), paths.latents(seed), context.scope(seed, redo=context.redo)
            )
            for seed in config.seeds
        ],
        delay_us=config.history.delay_us,
        num_workers=config.ray.parallel_tasks,
        progress=context.progress,
    )


def run_join(context: Context) -> dict[str, Any]:
    """Write the joined version of each seed."""
    config, result = context.config, {}
    splits = splits_of(config)
    window = TimeRange(splits.vm.start_ts, splits.test.stop_ts)
    settings = config.history.join
    for seed in config.seeds:
        latents = needed(config.paths.latents(seed), "materialize")
        prepared = read_manifest(config.paths.prepared)
        inputs = {"prepared": prepared.version, "latents": latents.content}
        hashed = joined_hash(settings, window)
        manifest = context.find(config.paths.joined(seed), hashed, inputs)
        if manifest is None:
            manifest = write_joined(
                absolute(config.paths.prepared),
                absolute(config.paths.latents(seed)),
                absolute(config.paths.joined(seed)),
                window,
                settings,
                mapper=context.mapper("join", writes=True),
                replace_other=True,
            )
            context.share(config.paths.joined(seed))
        shown = ("coverage", "mean_length", "staleness_s")
        fresh = joined_freshness(config, seed)
        for alarm in fresh["alarms"]:
            _LOGGER.warning("seed %d: %s", seed, alarm)
        result[f"seed={seed}"] = {name: manifest.meta[name] for name in shown}
        result[f"seed={seed}"] |= {name: fresh[name] for name in ("coverage_by_age", "alarms")}
    return result


def run_audit(context: Context) -> dict[str, Any]:
    """Recompute a sample of the joined version of the first seed; stop the run if it leaks."""
    config = context.config
    seed = config.seeds[0]
    needed(config.paths.joined(seed), "join")
    context.progress("audit", 0, 1)
    report = _audit(config, seed)
    context.progress("audit", 1, 1)
    report.raise_if_leaking()
    return {
        "num_checked": report.num_checked,
        "num_leaks": report.num_leaks,
        "num_entries": report.num_entries,
        "margin_s": report.margin_s,
    }


def _audit(config: PipelineConfig, seed: int) -> AuditReport:
    # latents of several snapshots name none of them
    is_of_one = config.fm.refresh is None
    return audit(
        config.paths.joined(seed),
        config.paths.latents(seed),
        config.paths.prepared,
        config.paths.snapshot(seed) if is_of_one else None,
        sample=config.audit.sample,
        seed=seed,
    )


def vm_jobs(config: PipelineConfig) -> list[VmJob]:
    """Return the training of every VM under every seed."""
    data = PreparedData.open(config.paths.prepared)
    splits = splits_of(config)
    fields = tuple(field.name for field in config.data.vm_schema(data.schema).fields)
    jobs = []
    for seed in config.seeds:
        joined = needed(config.paths.joined(seed), "join")
        for name, stage in config.vms.items():
            settings = config_hash(stage, asdict(splits), fields, config.data.past.max_len, seed)
            inputs = vm_inputs(config, stage, seed, data.manifest, joined)
            jobs.append(
                VmJob(
                    name=name,
                    prepared=absolute(config.paths.prepared),
                    joined=absolute(config.paths.joined(seed)),
                    out_dir=absolute(config.paths.vm(seed, name)),
                    config=stage,
                    splits=splits,
                    fields=fields,
                    raw_max_len=config.data.past.max_len,
                    seed=seed,
                    config_hash=settings,
                    inputs=inputs,
                )
            )
    return jobs


def run_train_vm(context: Context) -> dict[str, Any]:
    """Train every VM under every seed, several side by side."""
    config = context.config
    jobs = vm_jobs(config)
    todo = [job for job in jobs if context.find(job.out_dir, job.config_hash, job.inputs) is None]
    work, checkpoints = config.paths.work / "vms", config.paths.checkpoints("vms")
    if context.fresh:
        clear(work, checkpoints)
    plan_file = work / "programs.json"
    if todo:
        parallel = config.ray.parallel_tasks
        train_vms(todo, absolute(checkpoints), plan_file, parallel, context.progress)
    clear(work, checkpoints)
    for job in todo:
        context.share(job.out_dir)
    return {f"seed={job.seed} {job.name}": read_manifest(job.out_dir).version for job in jobs}


def evaluation_path(config: PipelineConfig, seed: int, name: str) -> Path:
    """Return where the record of one model is kept."""
    return config.paths.seed(seed) / "evaluation" / f"{name}.json"


def predictions_path(config: PipelineConfig, seed: int, name: str) -> Path:
    """Return where the test predictions of one model are kept."""
    return config.paths.seed(seed) / "predictions" / f"{name}.parquet"


def run_evaluate(context: Context) -> dict[str, Any]:
    """Measure all models on the test window."""
    config = context.config
    splits = splits_of(config)
    todo: list[tuple[Path, str, Callable[[], EvaluationRecord]]] = []
    for seed in config.seeds:
        snapshot = absolute(config.paths.snapshot(seed))
        joined = absolute(config.paths.joined(seed))
        key = config_hash(needed(snapshot, "compress").version, needed(joined, "join").version)
        measure_fm = partial(
            evaluate_fm,
            snapshot,
            joined,
            absolute(config.paths.prepared),
            splits,
            seed,
            predictions_path(config, seed, MODEL_FM).absolute(),
        )
        todo.append((evaluation_path(config, seed, MODEL_FM), key, measure_fm))
    for job in vm_jobs(config):
        # a VM may outlive the joined set, but rows with a long history are told apart by the set
        joined_version = needed(job.joined, "join").version
        key = config_hash(needed(job.out_dir, "train-vm").version, joined_version)
        path = evaluation_path(config, job.seed, job.name)
        predictions = predictions_path(config, job.seed, job.name).absolute()
        todo.append((path, key, partial(evaluate_vm, job, predictions)))
    todo = [item for item in todo if context.fresh or not _is_measured(item[0], item[1])]
    measured = context.mapper("evaluate", writes=True)(
        _measure, [(key, call) for _, key, call in todo]
    )
    for (path, _, _), record in zip(todo, measured, strict=True):
        write_record(record, path)
    return {
        f"seed={seed} {name}": _read(evaluation_path(config, seed, name)).test
        for seed in config.seeds
        for name in (MODEL_FM, *config.vms)
    }


def _measure(task: tuple[str, Callable[[], EvaluationRecord]]) -> EvaluationRecord:
    key, call = task
    return EvaluationRecord(**{**asdict(call()), "inputs_hash": key})


def _is_measured(path: Path, key: str) -> bool:
    record = read_record(path)
    return record is not None and record.inputs_hash == key


def _read(path: Path) -> EvaluationRecord:
    record = read_record(path)
    if record is None:
        raise StoreError(f"{path} is not there; run `loopfm evaluate` with the same config first")
    return record


STAGES: dict[str, Callable[[Context], dict[str, Any]]] = {
    "prepare": run_prepare,
    "train-fm": run_train_fm,
    "compress": run_compress,
    "materialize": run_materialize,
    "join": run_join,
    "audit": run_audit,
    "train-vm": run_train_vm,
    "evaluate": run_evaluate,
    "publish": run_publish,
}
"""The stages in the order in which they depend on each other; parity and report follow (jobs/pipeline.py)."""
