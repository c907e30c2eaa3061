"""Train vertical models with Ray Train: each a program of its own, several side by side.

A VM's rows come from the joined set through a reader in the worker itself: the files are within its reach, and starting a
Ray Data pipeline for each epoch would cost more than the epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer

from loopfm_ray.data.collate import Collator, HistorySource, LatentHistorySource, RawHistorySource
from loopfm_ray.data.examples import ExampleSet
from loopfm_ray.data.prepared import PreparedData, read_history
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.data.split import Splits
from loopfm_ray.data.windows import StepPlan, assign_buckets, count_known, keep_known, plan_steps
from loopfm_ray.experiments import VmStageConfig
from loopfm_ray.jobs.mapping import Progress, unwrap
from loopfm_ray.jobs.training import (
    Task,
    Worker,
    file_blocks,
    gather_predictions,
    run_config,
    scaling_config,
    score_rows,
    train,
)
from loopfm_ray.metrics.calibration import fit_platt
from loopfm_ray.models.vertical import build_vm
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.manifest import read_manifest
from loopfm_ray.train.evaluate import binary_metrics
from loopfm_ray.train.trained import TrainedVm, save_trained_vm

__all__ = ["VmData", "VmJob", "train_vms"]


@dataclass(frozen=True)
class VmData:
    """The joined set as one kind of VM reads it."""

    prepared: PreparedData
    joined: Path
    schema: FeatureSchema
    history_kind: str
    raw_max_len: int

    @classmethod
    def open(cls, job: "VmJob") -> "VmData":
        """Open the data of `job`."""
        data = PreparedData.open(job.prepared)
        schema = data.schema_as_of(job.splits.vm.stop_ts).select(job.fields)
        return cls(data, job.joined, schema, job.config.model.history.kind, job.raw_max_len)

    @property
    def requests(self) -> ExampleSet:
        """The requests of the joined set."""
        return ExampleSet.open(self.joined, "requests")

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Columns of the raw history, if it is read."""
        if self.history_kind not in ("raw", "both"):
            return ()
        return tuple(field.name for field in self.schema.of(Kind.CATEGORICAL, Side.ITEM))

    @property
    def latent_dim(self) -> int | None:
        """Width of the stored latents, if they are read."""
        return self._spec.dim if self.history_kind in ("latent", "both") else None

    @property
    def _spec(self) -> CodeSpec:
        return CodeSpec.from_tree(read_manifest(self.joined).meta["code_spec"])

    def collator(self, buckets: Sequence[int]) -> Collator:
        """Return what turns rows of `buckets` into batches."""
        sources: dict[str, HistorySource] = {}
        if self.history_kind in ("latent", "both"):
            max_len = int(read_manifest(self.joined).meta["max_len"])
            folder = self.joined / "history"
            tables = {
                bucket: read_history(folder / f"bucket={bucket:03d}.arrow") for bucket in buckets
            }
            sources["latent"] = LatentHistorySource(tables, self._spec, max_len)
        if self.item_fields:
            events = {bucket: self.prepared.events(bucket) for bucket in buckets}
            sources["raw"] = RawHistorySource(
                events, self.prepared.items, self.item_fields, self.raw_max_len
            )
        return Collator(self.schema, self.prepared.items, self.prepared.users, sources)


@dataclass(frozen=True)
class VmJob:
    """One VM training, as its workers get it."""

    name: str
    prepared: Path
    joined: Path
    out_dir: Path
    work_dir: Path
    config: VmStageConfig
    splits: Splits
    fields: tuple[str, ...]
    raw_max_len: int
    seed: int
    config_hash: str
    inputs: Mapping[str, str]
    """Versions that it depends on, by name."""

    @property
    def metrics_file(self) -> Path:
        """Where the learning curves are written."""
        return self.work_dir / "metrics.jsonl"


def train_vms(jobs: Sequence[VmJob], parallel: int, progress: Progress) -> None:
    """Train VMs, `parallel` at a time; each killed one goes on from its checkpoint when run again.

    Raises:
        LoopFMError: what a worker raised.
        JobError: the workers of a VM failed otherwise.
    """
    run_one = ray.remote(num_cpus=0, max_retries=0)(_fit)
    waiting, done = list(jobs), 0
    running: dict[Any, VmJob] = {}  # by Ray reference, which has no type
    while waiting or running:
        while waiting and len(running) < parallel:
            job = waiting.pop(0)
            running[run_one.remote(job)] = job
        progress("train-vm", done, len(jobs))
        (finished,), _ = ray.wait(list(running), num_returns=1)
        job = running.pop(finished)
        try:
            ray.get(finished)
        except Exception as error:  # the edge to Ray: every failure becomes one of ours
            raise unwrap(error, f"train-vm {job.name}") from error
        done += 1
    progress("train-vm", done, len(jobs))


def _fit(job: VmJob) -> None:
    requests = ExampleSet.open(job.joined, "requests")
    num_buckets = PreparedData.open(job.prepared).num_buckets
    window = job.splits.vm_train
    counts = count_known(requests.files(window), window, job.splits.vm.stop_ts)
    sizes = [counts.get(bucket, 0) for bucket in range(num_buckets)]
    shares = assign_buckets(sizes, job.config.learning.num_workers)
    plan = plan_steps(
        [sum(sizes[bucket] for bucket in share) for share in shares], job.config.learning.batch_rows
    )
    job.work_dir.mkdir(parents=True, exist_ok=True)
    TorchTrainer(
        _worker,
        train_loop_config={"job": job, "plan": plan, "buckets": shares},
        scaling_config=scaling_config(job.config.learning),
        run_config=run_config(job.work_dir, "train"),
    ).fit()


def _worker(config: dict[str, Any]) -> None:
    job: VmJob = config["job"]
    plan: StepPlan = config["plan"]
    worker = Worker.current()
    buckets: list[int] = config["buckets"][worker.rank]
    data = VmData.open(job)
    collate = data.collator(buckets)
    files = data.requests.files(job.splits.vm, buckets)
    torch.manual_seed(job.seed)
    model = build_vm(job.config.model, data.schema, data.item_fields, data.latent_dim)
    columns = list(dict.fromkeys([*collate.columns, "example_id", "label_ts", "teacher_prob"]))
    task = Task(
        model=model,
        learning=job.config.learning,
        plan=plan,
        blocks=lambda _: keep_known(
            file_blocks(files, job.splits.vm_train, columns),
            job.splits.vm_train,
            job.splits.vm.stop_ts,
        ),
        collate=collate,
        validate=lambda: score_rows(model, collate, files, job.splits.vm_valid),
        seed=job.seed,
        metrics_file=job.metrics_file,
        kd_weight=job.config.kd_weight,
    )
    report = train(task, worker)
    valid = gather_predictions(score_rows(model, collate, files, job.splits.vm_valid))
    if worker.is_first:
        record = {
            "valid": binary_metrics(valid),
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
        )
    ray.train.report({"done": 1})
