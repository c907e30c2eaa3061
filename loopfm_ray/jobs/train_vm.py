"""Train vertical models with Ray Train: each a program of its own, several side by side.

A VM's rows come from the joined set through a reader in the worker itself: the files are within its reach, and starting a
Ray Data pipeline for each epoch would cost more than the epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

from loopfm_ray.data.collate import (
    Collator,
    HistorySource,
    LatentHistorySource,
    RawHistorySource,
)
from loopfm_ray.data.examples import ExampleSet
from loopfm_ray.data.joined import TEACHER_CODE, USER_SOURCE
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.data.split import Splits
from loopfm_ray.data.windows import StepPlan, assign_buckets, count_known, keep_known, plan_steps
from loopfm_ray.distill.hints import HintedVm
from loopfm_ray.errors import ConfigError
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
from loopfm_ray.models.history_inputs import HistoryInputs
from loopfm_ray.models.registry import build_vm
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location
from loopfm_ray.train.evaluate import binary_metrics
from loopfm_ray.train.trained import TrainedVm, save_trained_vm

__all__ = ["VmData", "VmJob", "train_vms"]


@dataclass(frozen=True)
class VmData:
    """The joined set as one kind of VM reads it."""

    prepared: PreparedData
    joined: Version
    schema: FeatureSchema
    history: HistoryInputs
    needs_teacher_latent: bool
    raw_max_len: int

    @classmethod
    def open(cls, job: "VmJob") -> "VmData":
        """Open the data of `job`."""
        data = PreparedData.open(job.prepared)
        schema = data.schema_as_of(job.splits.vm.stop_ts).select(job.fields)
        joined, config = open_version(job.joined, "joined"), job.config
        return cls(
            data,
            joined,
            schema,
            config.model.history,
            config.needs_teacher_latent,
            job.raw_max_len,
        )

    @property
    def requests(self) -> ExampleSet:
        """The requests of the joined set."""
        return ExampleSet.of(self.joined, "requests")

    @property
    def item_fields(self) -> tuple[str, ...]:
        """Columns of the raw history, if it is read."""
        if "raw" not in self.history.sources:
            return ()
        return tuple(field.name for field in self.schema.of(Kind.CATEGORICAL, Side.ITEM))

    @property
    def latent_dim(self) -> int | None:
        """Width of the stored latents, if they are read."""
        is_read = self.history.kind in ("latent", "both") or self.needs_teacher_latent
        return self.spec.dim if is_read else None

    @property
    def spec(self) -> CodeSpec:
        """How the latents were stored."""
        return CodeSpec.from_tree(self.joined.manifest.meta["code_spec"])

    def collator(self, buckets: Sequence[int]) -> Collator:
        """Return what turns rows of `buckets` into batches.

        Raises:
            ConfigError: the joined set lacks a history, or the rows' own latents.
        """
        sources = {
            name: self._source(name, side, buckets) for name, side in self.history.sources.items()
        }
        if self.needs_teacher_latent:
            self._check_teacher_code()
        teacher = self.spec if self.needs_teacher_latent else None
        return Collator(self.schema, self.prepared.items, self.prepared.users, sources, teacher)

    def _source(self, name: str, side: Sequence[str], buckets: Sequence[int]) -> HistorySource:
        if name == "raw":
            events = {bucket: self.prepared.events(bucket) for bucket in buckets}
            return RawHistorySource(
                events, self.prepared.items, self.item_fields, self.raw_max_len, side
            )
        meta = self.joined.manifest.meta
        if name == USER_SOURCE:
            tables = read_histories(self.joined, "history", buckets)
            return LatentHistorySource(tables, self.spec, int(meta["max_len"]), side)
        others = meta.get("histories", {})
        if name not in others:
            raise ConfigError(
                f"a VM reads the history {name!r}, the joined set {self.joined.location} has"
                f" {[USER_SOURCE, *sorted(others)]}; join with that key in history.keys, or take the history out of the VM's config"
            )
        # the candidates of a user may lie in any bucket of their own key
        tables = read_histories(self.joined, f"history/{name}", self._buckets_of(name))
        return LatentHistorySource(tables, self.spec, int(others[name]["max_len"]), side)

    def _buckets_of(self, name: str) -> list[int]:
        start, end = f"history/{name}/bucket=", ".arrow"
        paths = [entry.path for entry in self.joined.manifest.files]
        return [
            int(path.removeprefix(start).removesuffix(end))
            for path in paths
            if path.startswith(start) and path.endswith(end)
        ]

    def _check_teacher_code(self) -> None:
        names = pq.read_schema(self.requests.files()[0].path).names
        if TEACHER_CODE not in names:
            raise ConfigError(
                f"fitnets and reads_teacher_latent need the column {TEACHER_CODE!r} in {self.joined.location}, found {names};"
                " join with history.with_own_latent, or leave them out of the VM's config"
            )


@dataclass(frozen=True)
class VmJob:
    """One VM training, as its workers get it."""

    name: str
    prepared: Location
    joined: Location
    out_dir: Location
    work_dir: Path
    checkpoints: Location
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
        """Where it is shown how far the training is."""
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
    TorchTrainer(
        _worker,
        train_loop_config={"job": job, "plan": plan, "buckets": shares},
        scaling_config=scaling_config(job.config.learning),
        run_config=run_config(job.checkpoints, "train"),
    ).fit()


def _trained_form(model: VerticalModel, config: VmStageConfig, data: VmData) -> nn.Module:
    """Return what is trained: the VM, or with `fitnets` the VM and the map that is thrown away."""
    if config.fitnets is None:
        return model
    return HintedVm(model, config.fitnets.layer, data.spec.dim)


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
    fitnets = job.config.fitnets
    task = Task(
        model=_trained_form(model, job.config, data),
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
        hint_weight=fitnets.weight if fitnets is not None else 0.0,
    )
    report, curves = train(task, worker)
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
            curves=curves,
        )
    ray.train.report({"done": 1})
