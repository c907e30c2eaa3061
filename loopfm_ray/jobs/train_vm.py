"""Train vertical models with Ray Train: several runs side by side, each with some VMs that it trains one after another.

A VM's rows come from the joined set through a reader in the worker itself: the files are within its reach, and starting a
Ray Data pipeline for each epoch would cost more than the epoch.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

from loopfm_ray.data.examples import ExampleSet
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.windows import (
    StepPlan,
    assign_buckets,
    count_learnable,
    keep_learnable,
    plan_steps,
)
from loopfm_ray.distill.heads import AuxiliaryVm
from loopfm_ray.distill.hints import HintedVm
from loopfm_ray.errors import LoopFMError
from loopfm_ray.experiments import VmStageConfig
from loopfm_ray.jobs.checkpoints import Checkpoints
from loopfm_ray.jobs.mapping import Progress, anywhere, unwrap
from loopfm_ray.jobs.programs import Waiting, plan_programs
from loopfm_ray.jobs.training import (
    OnEvaluation,
    Task,
    Worker,
    file_blocks,
    finished_trainings,
    gather_predictions,
    report_finished,
    run_config,
    scaling_config,
    score_rows,
    train,
)
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.metrics.calibration import fit_platt
from loopfm_ray.models.registry import build_vm
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.store.filesystem import Location, join
from loopfm_ray.store.manifest import find_manifest
from loopfm_ray.train.evaluate import binary_metrics, task_metrics
from loopfm_ray.train.trained import TrainedVm, save_trained_vm

__all__ = ["train_one", "train_vms", "trained_form"]

_LOOK_S = 5.0
"""Seconds between two looks at how many VMs are finished."""


def train_vms(
    jobs: Sequence[VmJob], work: Location, plan_file: Path, parallel: int, progress: Progress
) -> None:
    """Train VMs in Ray Train runs, `parallel` at a time; what was killed goes on from its checkpoint when run again.

    Args:
        jobs: the VMs that are not trained yet.
        work: where the runs keep their checkpoints.
        plan_file: where it is kept which run trains what.
        parallel: runs side by side.
        progress: told the VMs that are finished.

    Raises:
        LoopFMError: what a worker raised; it names the VM.
        JobError: the workers of a run failed otherwise.
    """
    by_key = {job.key: job for job in jobs}
    sizes = {key: Waiting(_cost(job), _workers(job)) for key, job in by_key.items()}
    waiting = [
        (program, [by_key[key] for key in program.keys])
        for program in plan_programs(sizes, parallel, plan_file)
    ]
    old = {key: find_manifest(job.out_dir) for key, job in by_key.items()}
    finished: set[str] = set()
    run_one = ray.remote(num_cpus=0, max_retries=0, **anywhere())(_fit)
    running: dict[Any, list[VmJob]] = {}  # by Ray reference, which has no type
    while waiting or running:
        while waiting and len(running) < parallel:
            program, members = waiting.pop(0)
            running[run_one.remote(members, join(work, program.name))] = members
        ended, _ = ray.wait(list(running), num_returns=1, timeout=_LOOK_S)
        for job in (job for members in running.values() for job in members):
            if job.key not in finished and find_manifest(job.out_dir) != old[job.key]:
                finished.add(job.key)
        progress("train-vm", len(finished), len(jobs))
        for reference in ended:
            names = ", ".join(job.name for job in running.pop(reference))
            try:
                ray.get(reference)
            except Exception as error:  # the edge to Ray: every failure becomes one of ours
                raise unwrap(error, f"train-vm {names}") from error
    progress("train-vm", len(jobs), len(jobs))


def _workers(job: VmJob) -> tuple[int, bool]:
    return job.config.learning.num_workers, job.config.learning.use_gpu


def _cost(job: VmJob) -> float:
    """Return about how long a step of a VM takes, that of a plain one being 1; measured on the VMs of the headline."""
    cost = 1.0
    for config in job.config.model.history.root.values():
        is_by_pair = config.encoder.kind in ("din", "augru")
        cost += (2.0 if config.kind == "latent" else 4.0) * (3.0 if is_by_pair else 1.0)
    return cost * job.config.learning.epochs


def _fit(jobs: Sequence[VmJob], checkpoints: Location) -> None:
    learning = jobs[0].config.learning
    TorchTrainer(
        _worker,
        train_loop_config={"jobs": tuple(jobs)},
        scaling_config=scaling_config(
            "learning.num_workers", learning.num_workers, use_gpu=learning.use_gpu
        ),
        run_config=run_config(checkpoints, "train"),
    ).fit()


def _plan(job: VmJob) -> tuple[StepPlan, list[list[int]]]:
    """Return the steps of a training, and the buckets of each worker."""
    requests = ExampleSet.open(job.joined, "requests")
    data, window = PreparedData.open(job.prepared), job.splits.vm_train
    learnable = data.learnable(window, job.splits.vm.stop_ts)
    counts = count_learnable(requests.files(window), learnable)
    sizes = [counts.get(bucket, 0) for bucket in range(data.num_buckets)]
    shares = assign_buckets(sizes, job.config.learning.num_workers)
    rows = [sum(sizes[bucket] for bucket in share) for share in shares]
    return plan_steps(rows, job.config.learning.batch_rows), shares


def trained_form(model: VerticalModel, config: VmStageConfig, data: VmData) -> nn.Module:
    """Return what is trained: the VM, and with `fitnets` or `auxiliary` what is thrown away afterwards."""
    if config.auxiliary is not None:
        return AuxiliaryVm(model, config.auxiliary, len(data.teacher_columns))
    if config.fitnets is None:
        return model
    return HintedVm(model, config.fitnets.layer, data.spec.dim)


def _worker(config: dict[str, Any]) -> None:
    worker = Worker.current()
    finished = finished_trainings()
    for job in config["jobs"]:
        if job.key in finished:
            continue
        try:
            train_one(job, worker, finished=finished)
        except LoopFMError as error:
            raise type(error)(f"VM {job.name!r}, seed {job.seed}: {error}") from error
        finished.append(job.key)
        report_finished(finished, worker)


def train_one(
    job: VmJob,
    worker: Worker,
    *,
    finished: Sequence[str] = (),
    checkpoints: Checkpoints | None = None,
    on_evaluation: OnEvaluation | None = None,
) -> None:
    """Train one VM and write its version, going on from its last checkpoint if there is one.

    Args:
        job: the VM.
        worker: this process among those that train it.
        finished: trainings of the same run that came before, by key.
        checkpoints: where they are kept; None keeps them in the run of Ray Train.
        on_evaluation: told of its validations.
    """
    plan, shares = _plan(job)
    buckets = shares[worker.rank]
    data = VmData.open(job)
    collate = data.collator(buckets)
    files = data.requests.files(job.splits.vm, buckets)
    learnable = data.prepared.learnable(job.splits.vm_train, job.splits.vm.stop_ts)
    torch.manual_seed(job.seed)
    model = build_vm(job.config.model, data.schema, data.item_fields, data.latent_dim)
    columns = list(
        dict.fromkeys([*collate.columns, "example_id", "label_ts", *data.teacher_columns])
    )
    fitnets = job.config.fitnets
    task = Task(
        model=trained_form(model, job.config, data),
        learning=job.config.learning,
        plan=plan,
        blocks=lambda _: keep_learnable(
            file_blocks(files, job.splits.vm_train, columns), learnable
        ),
        collate=collate,
        validate=lambda: score_rows(model, collate, files, job.splits.vm_valid),
        seed=job.seed,
        key=job.key,
        finished=tuple(finished),
        kd_weight=job.config.kd_weight,
        hint_weight=fitnets.weight if fitnets is not None else 0.0,
        on_evaluation=on_evaluation,
    )
    report, curves = train(task, worker, checkpoints)
    valid = gather_predictions(score_rows(model, collate, files, job.splits.vm_valid))
    if worker.is_first:
        record = {
            "valid": binary_metrics(valid),
            "valid_tasks": task_metrics(valid, data.schema.tasks),
            "rows_per_s": report.rows_per_s * worker.world_size,
            "train_s": report.seconds,
        }
        trained = TrainedVm(
            model,
            job.config.model,
            data.schema,
            data.item_fields,
            data.latent_dim,
            fit_platt(valid.label, valid.logit),
            record,
        )
        save_trained_vm(
            job.out_dir,
            trained,
            config_hash=job.config_hash,
            inputs=job.inputs,
            num_rows=sum(plan.num_rows),
            curves=curves,
        )
