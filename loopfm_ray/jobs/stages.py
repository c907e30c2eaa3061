"""The stages of a run: each reads versions, writes versions, and does nothing when what it would write is there already."""

import shutil
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from loopfm_ray.config import config_hash
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import JobError, StoreError
from loopfm_ray.experiments import MODEL_FM, PipelineConfig, VmStageConfig
from loopfm_ray.history.audit import AuditReport, audit
from loopfm_ray.history.join import JoinSettings, write_joined
from loopfm_ray.jobs.compress import CompressTask, compress
from loopfm_ray.jobs.context import Context, needed, splits_of
from loopfm_ray.jobs.evaluate import (
    EvaluationRecord,
    evaluate_fm,
    evaluate_vm,
    read_record,
    write_record,
)
from loopfm_ray.jobs.materialize import materialize
from loopfm_ray.jobs.train_fm import FmSettings, train_fm
from loopfm_ray.jobs.train_vm import VmJob, train_vms
from loopfm_ray.serving.bundle import BundleSpec, HistoryPin, save_bundle
from loopfm_ray.store.manifest import Manifest, code_version, read_manifest
from loopfm_ray.store.publish import publish
from loopfm_ray.train.trained import load_trained_vm
from loopfm_ray.types import TimeRange

__all__ = ["STAGES", "evaluation_path", "export_bundle", "predictions_path"]


def run_prepare(context: Context) -> dict[str, Any]:
    """Write the prepared version."""
    config, path = context.config, context.config.paths.prepared
    manifest = context.find(path, config_hash(config.data), {})
    if manifest is None:
        context.progress("prepare", 0, 1)
        prepare(config.data, path, mapper=context.mapper("prepare"), replace_other=True)
        manifest = context.share(path)
    return {"version": manifest.version, "rows": manifest.num_rows, **manifest.meta["counts"]}


def run_train_fm(context: Context) -> dict[str, Any]:
    """Train the FM of each seed."""
    config, result = context.config, {}
    prepared = needed(config.paths.prepared, "prepare")
    splits = splits_of(config)
    for seed in config.seeds:
        path = config.paths.fm(seed)
        learnt = (config.fm.model, config.fm.learning)
        settings = config_hash(*learnt, asdict(splits), config.data.past.max_len, seed)
        inputs = {"prepared": prepared.version}
        if context.find(path, settings, inputs) is None:
            work = config.paths.work / f"fm-{seed}-{config_hash(settings, inputs, code_version())}"
            _clear(work, context.fresh)
            train_fm(
                config.paths.prepared,
                path,
                work,
                FmSettings(config.fm, splits, config.data.past.max_len, seed, settings),
                context.progress,
            )
            _keep_curves(work, config.paths.seed(seed) / "curves" / f"{MODEL_FM}.jsonl")
            context.share(path)
        result[f"seed={seed}"] = read_manifest(path).version
    return result


def run_compress(context: Context) -> dict[str, Any]:
    """Fit the bottleneck of each seed's FM and write the snapshot."""
    config = context.config
    prepared, splits = needed(config.paths.prepared, "prepare"), splits_of(config)
    todo = []
    for seed in config.seeds:
        fm = needed(config.paths.fm(seed), "train-fm")
        stage = config.fm
        kept = (stage.bottleneck, stage.embedding_layers, stage.bits, stage.bottleneck_rows)
        settings = config_hash(*kept, asdict(splits), seed)
        inputs = {"prepared": prepared.version, "fm": fm.version}
        path = config.paths.snapshot(seed)
        if context.find(path, settings, inputs) is None:
            source, target = config.paths.fm(seed).absolute(), path.absolute()
            folder = config.paths.prepared.absolute()
            todo.append(CompressTask(folder, source, target, stage, splits, seed, settings))
    list(context.mapper("compress")(compress, todo))
    for task in todo:
        context.share(task.out_dir)
    return {f"seed={seed}": _channel(config, seed) for seed in config.seeds}


def _channel(config: PipelineConfig, seed: int) -> dict[str, Any]:
    meta = read_manifest(config.paths.snapshot(seed)).meta
    return {"snapshot_id": meta["snapshot_id"], **meta["record"]["channel"]}


def run_materialize(context: Context) -> dict[str, Any]:
    """Write the latents version of each seed."""
    config, result = context.config, {}
    for seed in config.seeds:
        needed(config.paths.snapshot(seed), "compress")
        if context.fresh:
            shutil.rmtree(config.paths.latents(seed), ignore_errors=True)
        manifest = materialize(
            config.paths.prepared,
            config.paths.snapshot(seed),
            config.paths.latents(seed),
            delay_us=config.history.delay_us,
            num_workers=config.ray.parallel_tasks,
            progress=context.progress,
        )
        result[f"seed={seed}"] = {"version": manifest.version, "rows": manifest.num_rows}
    return result


def run_join(context: Context) -> dict[str, Any]:
    """Write the joined version of each seed."""
    config, result = context.config, {}
    splits = splits_of(config)
    window = TimeRange(splits.vm.start_ts, splits.test.stop_ts)
    settings = JoinSettings(config.history.max_len, config.history.retention_us)
    for seed in config.seeds:
        latents = needed(config.paths.latents(seed), "materialize")
        prepared = read_manifest(config.paths.prepared)
        inputs = {"prepared": prepared.version, "latents": latents.version}
        hashed = config_hash(
            settings.max_len, settings.retention_us, window.start_ts, window.stop_ts
        )
        manifest = context.find(config.paths.joined(seed), hashed, inputs)
        if manifest is None:
            manifest = write_joined(
                config.paths.prepared.absolute(),
                str(config.paths.latents(seed).absolute()),
                config.paths.joined(seed).absolute(),
                window,
                settings,
                mapper=context.mapper("join"),
                replace_other=True,
            )
            context.share(config.paths.joined(seed))
        shown = ("coverage", "mean_length", "staleness_s")
        result[f"seed={seed}"] = {name: manifest.meta[name] for name in shown}
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
        "margin_s": report.margin_s,
    }


def _audit(config: PipelineConfig, seed: int) -> AuditReport:
    return audit(
        config.paths.joined(seed),
        str(config.paths.latents(seed)),
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
            inputs = _vm_inputs(config, stage, seed, data.manifest, joined)
            key = config_hash(settings, inputs, code_version())
            jobs.append(
                VmJob(
                    name=name,
                    prepared=config.paths.prepared.absolute(),
                    joined=config.paths.joined(seed).absolute(),
                    out_dir=config.paths.vm(seed, name).absolute(),
                    work_dir=(config.paths.work / f"{name}-{seed}-{key}").absolute(),
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


def _vm_inputs(
    config: PipelineConfig, stage: VmStageConfig, seed: int, prepared: Manifest, joined: Manifest
) -> dict[str, str]:
    """Return the versions that a VM depends on: one without the FM's history outlives a change of that history."""
    inputs = {"prepared": prepared.version}
    if stage.model.history.kind in ("latent", "both"):
        inputs["joined"] = joined.version
    elif stage.kd_weight:
        inputs["fm"] = read_manifest(config.paths.fm(seed)).version
    return inputs


def run_train_vm(context: Context) -> dict[str, Any]:
    """Train every VM under every seed, several side by side."""
    config = context.config
    jobs = vm_jobs(config)
    todo = [job for job in jobs if context.find(job.out_dir, job.config_hash, job.inputs) is None]
    # the slow ones first, so that the last one does not run alone for long
    todo.sort(key=lambda job: job.config.model.history.kind == "none")
    for job in todo:
        _clear(job.work_dir, context.fresh)
    train_vms(todo, config.ray.parallel_tasks, context.progress)
    for job in todo:
        _keep_curves(job.work_dir, config.paths.seed(job.seed) / "curves" / f"{job.name}.jsonl")
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
        snapshot = config.paths.snapshot(seed).absolute()
        joined = config.paths.joined(seed).absolute()
        key = config_hash(needed(snapshot, "compress").version, needed(joined, "join").version)

        measure_fm = partial(
            evaluate_fm,
            snapshot,
            joined,
            config.paths.prepared.absolute(),
            splits,
            seed,
            predictions_path(config, seed, MODEL_FM).absolute(),
        )
        todo.append((evaluation_path(config, seed, MODEL_FM), key, measure_fm))
    for job in vm_jobs(config):
        key = config_hash(needed(job.out_dir, "train-vm").version)
        path = evaluation_path(config, job.seed, job.name)
        predictions = predictions_path(config, job.seed, job.name).absolute()
        todo.append((path, key, partial(evaluate_vm, job, predictions)))
    todo = [item for item in todo if context.fresh or not _is_measured(item[0], item[1])]
    measured = context.mapper("evaluate")(_measure, [(key, call) for _, key, call in todo])
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


def run_publish(context: Context) -> dict[str, Any]:
    """Export the served VM's bundle and publish its histories."""
    config = context.config
    seed = config.seeds[0]
    context.progress("publish", 0, 2)
    bundle = export_bundle(config)
    context.progress("publish", 1, 2)
    users = PreparedData.open(config.paths.prepared).users.keys
    live = publish(
        str(config.paths.latents(seed)),
        users,
        config.paths.online,
        config.online.max_events_per_user,
    )
    context.progress("publish", 2, 2)
    return {"bundle": bundle.version, "histories": live}


def export_bundle(config: PipelineConfig) -> Manifest:
    """Write the bundle of the VM that is served, from the first seed."""
    seed, name = config.seeds[0], config.online.model
    data = PreparedData.open(config.paths.prepared)
    trained_manifest = needed(config.paths.vm(seed, name), "train-vm")
    trained = load_trained_vm(config.paths.vm(seed, name))
    joined = read_manifest(config.paths.joined(seed))
    names = {field.name for field in trained.schema.fields}
    spec = BundleSpec(
        name=name,
        vm=trained.config,
        schema=trained.schema,
        calibration=trained.calibration,
        history=HistoryPin.of_joined(joined) if trained.latent_dim is not None else None,
        derive=tuple(item for item in config.data.derive if item in names),
        sequence_len=config.data.sequence_len,
    )
    inputs = {"vm": trained_manifest.version, **trained_manifest.inputs}
    return save_bundle(config.paths.bundle, spec, trained.model, data, inputs)


def _clear(work: Path, fresh: bool) -> None:
    if fresh:
        shutil.rmtree(work, ignore_errors=True)


def _keep_curves(work: Path, path: Path) -> None:
    """Move the learning curves to where the report finds them and drop the checkpoints."""
    source = work / "metrics.jsonl"
    if not source.is_file():
        raise JobError(f"the training wrote no {source}; look at the log of its workers")
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, path)
    shutil.rmtree(work)


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
