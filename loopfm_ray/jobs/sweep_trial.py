"""One trial of a sweep: what comes before its VM is made once and shared, the VM is trained in this process, then it is measured.

Everything is kept by what it was made from: a trial that is tried again goes on where its driver was stopped, and one whose VM is there
already is only measured.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from loopfm_ray.config import config_hash, dump_yaml
from loopfm_ray.data.examples import ExampleSet, read_rows
from loopfm_ray.errors import MetricError
from loopfm_ray.experiments import PipelineConfig
from loopfm_ray.jobs.checkpoints import LocalCheckpoints
from loopfm_ray.jobs.context import Context, splits_of
from loopfm_ray.jobs.mapping import silent
from loopfm_ray.jobs.stages import STAGES, vm_jobs
from loopfm_ray.jobs.sweep_costs import measure_bytes_per_user, measure_scoring
from loopfm_ray.jobs.train_vm import train_one
from loopfm_ray.jobs.training import Worker
from loopfm_ray.jobs.vm_data import VmJob
from loopfm_ray.kge.checkpoint import CheckpointFile, KgePoint
from loopfm_ray.kge.embed import KgeRunConfig, read_graph
from loopfm_ray.kge.training import train_kge
from loopfm_ray.metrics.binary import BinarySums
from loopfm_ray.metrics.transfer import transfer_ratio_first_launch
from loopfm_ray.store.filesystem import absolute
from loopfm_ray.store.locks import locked
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.store.pool import Pool
from loopfm_ray.store.tables import write_text
from loopfm_ray.sweep.config import SweepConfig
from loopfm_ray.sweep.space import Params
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.trained import load_trained_vm

__all__ = ["Metrics", "ensure_upstream", "run_trial", "upstream_of"]

Metrics = dict[str, float | None]
Report = Callable[[int, float], None]
"""Told the number of a validation, from 1, and the first objective at that time."""

_LOCKS = "locks"
_OF_SCORING = ("score_ms_p50", "score_ms_p99")
_OF_BASELINE = ("baseline_ne", "transfer_ratio")


def run_trial(config: SweepConfig, params: Params, report: Report) -> Metrics:
    """Train and measure what `params` make of the base config, on the validation window alone.

    Args:
        config: of the sweep.
        params: of the trial.
        report: told of each validation but the last.

    Returns:
        the metrics, means over the seeds; None where one is not defined.

    Raises:
        LoopFMError: a stage failed.
    """
    set_up_process()
    if config.is_of_graphs:
        return _embed_graph(config, config.graph_run(params), report)
    pipeline = upstream_of(config.pipeline(params))
    ensure_upstream(pipeline, config.work, config.pool_dir)
    found = [
        _one_seed(config, pipeline, seed, report if seed == pipeline.seeds[0] else _ignore)
        for seed in pipeline.seeds
    ]
    return {name: _mean([one.get(name) for one in found]) for name in found[0]}


def _ignore(_number: int, _value: float) -> None:
    return


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if len(known) == len(values) else None


def upstream_of(pipeline: PipelineConfig) -> PipelineConfig:
    """Return a pipeline under the name of all that comes before its VMs, so that trials which share that share its folder."""
    key = config_hash(pipeline.data, pipeline.fm, pipeline.history, list(pipeline.seeds))
    return pipeline.model_copy(update={"name": key})


def ensure_upstream(pipeline: PipelineConfig, work: Path, pool: Path) -> None:
    """Run the stages up to the joined set, each once for all trials that share it; the others wait.

    Args:
        pipeline: under the name of `upstream_of`.
        work: of the sweep.
        pool: of versions that trials share.

    Raises:
        LoopFMError: a stage failed.
    """
    context = Context(pipeline, silent, pool=Pool(pool), any_code=True)
    data, fm, seeds = pipeline.data, pipeline.fm, list(pipeline.seeds)
    shared = {
        "prepare": (data,),
        "train-fm": (data, *fm.learnt, seeds),
        "compress": (data, fm, seeds),
    }
    locks = work / _LOCKS
    with locked(locks / pipeline.name):
        pipeline.paths.records.mkdir(parents=True, exist_ok=True)
        write_text(pipeline.paths.config, dump_yaml(pipeline))
        for stage, made_of in shared.items():
            with locked(locks / f"{stage}-{config_hash(*made_of)}"):
                STAGES[stage](context)
        for stage in ("materialize", "join"):
            STAGES[stage](context)


def _one_seed(config: SweepConfig, pipeline: PipelineConfig, seed: int, report: Report) -> Metrics:
    jobs = {job.name: job for job in vm_jobs(pipeline) if job.seed == seed}
    tuned = _train(config, jobs[config.vm], report)
    trained, manifest = load_trained_vm(tuned.out_dir), read_manifest(tuned.out_dir)
    found: Metrics = {
        **{name: float(value) for name, value in trained.record["valid"].items()},
        "num_parameters": float(manifest.meta["num_parameters"]),
        "train_s": float(trained.record["train_s"]),
        **_of_fm(pipeline, seed),
    }
    asked = set(config.metrics)
    if asked.intersection(_OF_BASELINE):
        found |= _transfer(config, jobs[pipeline.baseline], found)
    if "bytes_per_user" in asked:
        found["bytes_per_user"] = measure_bytes_per_user(pipeline, tuned)
    if asked.intersection(_OF_SCORING):
        found |= measure_scoring(pipeline, tuned, config.work / "bundles" / tuned.key)
    return found


def _train(config: SweepConfig, job: VmJob, report: Report) -> VmJob:
    """Train a VM unless it is there, and return its job with the place of its version."""
    key = config_hash(job.config_hash, dict(job.inputs))
    placed = replace(job, out_dir=absolute(config.work / "vms" / key))
    metric = config.objectives[0].metric

    def on_evaluation(number: int, metrics: dict[str, float]) -> None:
        if metric in metrics:
            report(number, metrics[metric])

    with locked(config.work / _LOCKS / f"vm-{key}"):
        if Context(PipelineConfig(), silent, any_code=True).current(
            placed.out_dir, job.config_hash, job.inputs
        ):
            return placed
        checkpoints = LocalCheckpoints(config.work / "checkpoints" / key)
        train_one(placed, Worker(0, 1), checkpoints=checkpoints, on_evaluation=on_evaluation)
        checkpoints.clear()
    return placed


def _of_fm(pipeline: PipelineConfig, seed: int) -> Metrics:
    """Return the FM's size, and its NE on the VM's validation rows, by its predictions in the joined set."""
    window = splits_of(pipeline).vm_valid
    requests = ExampleSet.open(pipeline.paths.joined(seed), "requests")
    rows = read_rows(requests.files(window), window, columns=["label", "teacher_prob"])
    sums = BinarySums.from_probs(rows["label"], rows["teacher_prob"].astype(np.float64))
    record = read_manifest(pipeline.paths.snapshot(seed)).meta["record"]
    return {
        "fm_ne": sums.normalized_entropy,
        "fm_num_parameters": float(record["num_parameters"]),
    }


def _transfer(config: SweepConfig, baseline: VmJob, found: Metrics) -> Metrics:
    placed = _train(config, baseline, _ignore)
    plain = float(load_trained_vm(placed.out_dir).record["valid"]["ne"])
    ne, fm_ne = found["ne"], found["fm_ne"]
    assert ne is not None
    assert fm_ne is not None
    try:
        ratio = transfer_ratio_first_launch(ne_vm=plain, ne_vm_transfer=ne, ne_fm=fm_ne)
    except MetricError:
        ratio = None
    return {"baseline_ne": plain, "transfer_ratio": ratio}


def _embed_graph(config: SweepConfig, run: KgeRunConfig, report: Report) -> Metrics:
    graph = read_graph(run)
    key = config_hash(run.graph, run.backbone, run.train.learnt)
    checkpoint = config.work / "checkpoints" / f"{key}.pt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    number = -(-run.train.epochs // run.train.eval_every)

    def on_point(point: KgePoint) -> None:
        done = -(-point.epoch // run.train.eval_every)
        if done < number:
            report(done, point.valid_mrr)

    with locked(config.work / _LOCKS / f"kge-{key}"):
        trained = train_kge(
            graph, run.backbone, run.train, CheckpointFile(checkpoint), on_point=on_point
        )
    return {
        "mrr": trained.best_mrr,
        "num_parameters": float(sum(item.numel() for item in trained.model.parameters())),
        "train_s": trained.curve[-1].train_s,
    }
