"""Train vertical models with Ray Train: several runs side by side, each with some VMs that it trains one after another.

A VM's rows come from the joined set through a reader in the worker itself: the files are within its reach, and starting a
Ray Data pipeline for each epoch would cost more than the epoch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow.parquet as pq
import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer
from torch import nn

from loopfm_ray.config import config_hash
from loopfm_ray.data.collate import (
    Collator,
    HistorySource,
    LatentHistorySource,
    RawHistorySource,
)
from loopfm_ray.data.examples import ExampleSet
from loopfm_ray.data.joined import TEACHER_CODE, USER_SOURCE, teacher_prob_of
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.data.split import Splits
from loopfm_ray.data.windows import StepPlan, assign_buckets, count_known, keep_known, plan_steps
from loopfm_ray.distill.heads import AuxiliaryVm
from loopfm_ray.distill.hints import HintedVm
from loopfm_ray.errors import ConfigError, LoopFMError
from loopfm_ray.experiments import VmStageConfig
from loopfm_ray.jobs.mapping import Progress, unwrap
from loopfm_ray.jobs.programs import Waiting, plan_programs
from loopfm_ray.jobs.training import (
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
from loopfm_ray.metrics.calibration import fit_platt
from loopfm_ray.models.history_inputs import HistoryInputs
from loopfm_ray.models.registry import build_vm
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.store.cache import Version, open_version
from loopfm_ray.store.codes import CodeSpec
from loopfm_ray.store.filesystem import Location, join
from loopfm_ray.store.manifest import code_version, find_manifest
from loopfm_ray.train.evaluate import binary_metrics
from loopfm_ray.train.trained import TrainedVm, save_trained_vm

__all__ = ["Recode", "VmData", "VmJob", "train_vms", "trained_form"]

_LOOK_S = 5.0
"""Seconds between two looks at how many VMs are finished."""


class Recode(Protocol):
    """Maps the codes of history tables into another space."""

    @property
    def spec(self) -> CodeSpec:
        """How the codes that it gives are made."""
        ...

    def __call__(self, table: Any) -> Any:  # Any: pyarrow ships no types
        """Return a history table with its codes mapped."""
        ...


@dataclass(frozen=True)
class VmData:
    """The joined set as one kind of VM reads it."""

    prepared: PreparedData
    joined: Version
    schema: FeatureSchema
    history: HistoryInputs
    needs_teacher_latent: bool
    raw_max_len: int
    recode: Recode | None = None
    """How codes of the histories are turned into codes of another space; None reads them as they are."""

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
    def teacher_columns(self) -> tuple[str, ...]:
        """The columns of the FM's predictions: of the first task, and of the others if it has them of all."""
        told, further = self.joined.manifest.meta.get("tasks", ()), self.schema.tasks[1:]
        more = further if set(further) <= set(told) else ()
        return ("teacher_prob", *map(teacher_prob_of, more))

    @property
    def spec(self) -> CodeSpec:
        """How the latents were stored."""
        return CodeSpec.from_tree(self.joined.manifest.meta["code_spec"])

    def collator(self, buckets: Sequence[int]) -> Collator:
        """Return what turns rows of `buckets` into batches.

        Raises:
            ConfigError: the joined set lacks a history, or the rows' own latents.
        """
        return self.collator_of(self.sources(buckets), self.schema)

    def sources(self, buckets: Sequence[int]) -> dict[str, HistorySource]:
        """Return what the histories of rows of `buckets` are read from.

        Raises:
            ConfigError: the joined set lacks a history, or the rows' own latents.
        """
        if self.needs_teacher_latent:
            self._check_teacher_code()
        return {
            name: self._source(name, side, buckets) for name, side in self.history.sources.items()
        }

    def collator_of(self, sources: Mapping[str, HistorySource], schema: FeatureSchema) -> Collator:
        """Return what makes batches from `sources`, with ids that `schema` does not know as unknown."""
        teacher = self.spec if self.needs_teacher_latent else None
        return Collator(schema, self.prepared.items, self.prepared.users, sources, teacher)

    def _source(self, name: str, side: Sequence[str], buckets: Sequence[int]) -> HistorySource:
        if name == "raw":
            events = {bucket: self.prepared.events(bucket) for bucket in buckets}
            return RawHistorySource(
                events, self.prepared.items, self.item_fields, self.raw_max_len, side
            )
        meta = self.joined.manifest.meta
        if name == USER_SOURCE:
            return self._latents("history", buckets, int(meta["max_len"]), side)
        others = meta.get("histories", {})
        if name not in others:
            raise ConfigError(
                f"a VM reads the history {name!r}, the joined set {self.joined.location} has"
                f" {[USER_SOURCE, *sorted(others)]}; join with that key in history.keys, or take the history out of the VM's config"
            )
        # the candidates of a user may lie in any bucket of their own key
        max_len = int(others[name]["max_len"])
        return self._latents(f"history/{name}", self._buckets_of(name), max_len, side)

    def _latents(
        self, folder: str, buckets: Sequence[int], max_len: int, side: Sequence[str]
    ) -> LatentHistorySource:
        tables, spec = read_histories(self.joined, folder, buckets), self.spec
        if self.recode is not None:
            spec = self.recode.spec
            tables = {bucket: self.recode(table) for bucket, table in tables.items()}
        return LatentHistorySource(tables, spec, max_len, side)

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
    config: VmStageConfig
    splits: Splits
    fields: tuple[str, ...]
    raw_max_len: int
    seed: int
    config_hash: str
    inputs: Mapping[str, str]
    """Versions that it depends on, by name."""

    @property
    def key(self) -> str:
        """What names this training and no other: VM, seed, settings, inputs and code."""
        made_of = config_hash(self.config_hash, dict(self.inputs), code_version())
        return f"{self.name}-{self.seed}-{made_of}"


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
    run_one = ray.remote(num_cpus=0, max_retries=0)(_fit)
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
        scaling_config=scaling_config(learning),
        run_config=run_config(checkpoints, "train"),
    ).fit()


def _plan(job: VmJob) -> tuple[StepPlan, list[list[int]]]:
    """Return the steps of a training, and the buckets of each worker."""
    requests = ExampleSet.open(job.joined, "requests")
    num_buckets = PreparedData.open(job.prepared).num_buckets
    window = job.splits.vm_train
    counts = count_known(requests.files(window), window, job.splits.vm.stop_ts)
    sizes = [counts.get(bucket, 0) for bucket in range(num_buckets)]
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
            _train_one(job, finished, worker)
        except LoopFMError as error:
            raise type(error)(f"VM {job.name!r}, seed {job.seed}: {error}") from error
        finished.append(job.key)
        report_finished(finished, worker)


def _train_one(job: VmJob, finished: Sequence[str], worker: Worker) -> None:
    plan, shares = _plan(job)
    buckets = shares[worker.rank]
    data = VmData.open(job)
    collate = data.collator(buckets)
    files = data.requests.files(job.splits.vm, buckets)
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
        blocks=lambda _: keep_known(
            file_blocks(files, job.splits.vm_train, columns),
            job.splits.vm_train,
            job.splits.vm.stop_ts,
        ),
        collate=collate,
        validate=lambda: score_rows(model, collate, files, job.splits.vm_valid),
        seed=job.seed,
        key=job.key,
        finished=tuple(finished),
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
