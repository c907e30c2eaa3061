"""Train FMs with Ray Train and write their weights.

The FMs of several seeds, and those that begin with the weights of one before, share one run, one after another: to start a
run takes as long as to train a small FM (`programs`).

Each worker reads the files of its own buckets, in an order that the driver fixed, itself or through a Ray Data set of its own: so the same
seed gives the same rows in the same order however Ray schedules, and a resumed run sees exactly the rows that the undisturbed one
would have seen.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray.data
import ray.train
import torch
from ray.train import DataConfig
from ray.train.torch import TorchTrainer

from loopfm_ray.data.collate import Collator, RawHistorySource
from loopfm_ray.data.examples import ExampleFile, Rows, iterate_files, rows_of
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema, Kind, Side
from loopfm_ray.data.split import Splits, format_ts
from loopfm_ray.data.windows import (
    StepPlan,
    assign_buckets,
    count_learnable,
    keep_learnable,
    plan_steps,
)
from loopfm_ray.errors import LoopFMError
from loopfm_ray.experiments import FmStageConfig
from loopfm_ray.jobs.mapping import Progress, silent, unwrap, watch
from loopfm_ray.jobs.training import (
    Task,
    Worker,
    finished_trainings,
    report_finished,
    run_config,
    scaling_config,
    score_rows,
    train,
)
from loopfm_ray.models.costs import RequestShape, fm_cost
from loopfm_ray.models.foundation import build_fm
from loopfm_ray.models.joint import build_joint
from loopfm_ray.models.sharded.config import table_factory
from loopfm_ray.models.sharded.group import current_group
from loopfm_ray.store.filesystem import Location, absolute
from loopfm_ray.store.manifest import find_manifest, read_manifest
from loopfm_ray.train.shards import gather_tables
from loopfm_ray.train.weights import (
    FmSpec,
    JointBottleneck,
    TrainedFm,
    adopt_weights,
    load_fm,
    save_fm,
)

__all__ = ["FmJob", "FmSettings", "FmTraining", "fm_inputs", "train_fms"]

_BLOCK_ROWS = 65_536


@dataclass(frozen=True)
class FmSettings:
    """What shapes one FM training."""

    config: FmStageConfig
    splits: Splits
    raw_max_len: int
    seed: int
    config_hash: str
    """Of all that is above."""
    parent: Location | None = None
    """The FM whose weights this one begins with; None begins anew."""


@dataclass(frozen=True)
class FmTraining:
    """One FM to train, and where to."""

    out_dir: Location
    settings: FmSettings

    @property
    def key(self) -> str:
        """What names this training among those of a run."""
        return f"fm-{self.settings.seed}-{self.settings.config_hash}"

    @property
    def name(self) -> str:
        """What people call it."""
        return f"seed {self.settings.seed} until {format_ts(self.settings.splits.fm.stop_ts)}"


@dataclass(frozen=True)
class FmJob:
    """One FM training, as its workers get it."""

    prepared: Location
    training: FmTraining
    metrics_file: Path
    buckets: tuple[tuple[int, ...], ...]
    plan: StepPlan
    reads_files: bool
    """Whether a worker reads its files itself; else Ray Data reads them."""

    @property
    def settings(self) -> FmSettings:
        """What shapes the FM."""
        return self.training.settings

    @property
    def config(self) -> FmStageConfig:
        """The model and how it learns."""
        return self.settings.config

    @property
    def splits(self) -> Splits:
        """The windows in time."""
        return self.settings.splits


def train_fms(
    prepared: Location,
    trainings: Sequence[FmTraining],
    work_dir: Path,
    checkpoints: Location,
    progress: Progress = silent,
    *,
    reads_files: bool = True,
) -> None:
    """Train FMs in one run of Ray Train, in this order, and write each at its place; a killed run goes on where it was.

    All have the same workers. They read `prepared` and write the FMs and `checkpoints`, wherever they run; `work_dir` is of
    this machine. The parent of an FM is there, or comes before it. With `reads_files` each worker reads its files itself, else Ray Data
    reads them; the batches are the same.

    Raises:
        ConfigError: the cluster has not as many CPUs or GPUs as workers are asked for.
        LoopFMError: what a worker raised; it names the FM.
        JobError: the workers failed otherwise.
    """
    prepared, learning = absolute(prepared), trainings[0].settings.config.learning
    data = PreparedData.open(prepared)
    work_dir.mkdir(parents=True, exist_ok=True)
    jobs = [_job(data, prepared, one, work_dir, reads_files) for one in trainings]
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"jobs": tuple(jobs)},
        scaling_config=scaling_config(
            "fm.learning.num_workers", learning.num_workers, use_gpu=learning.use_gpu
        ),
        run_config=run_config(checkpoints, "train"),
        datasets={}
        if reads_files
        else {
            _name(job, rank): _dataset(data, job, rank)
            for job in jobs
            for rank in range(learning.num_workers)
        },
        dataset_config=DataConfig(
            datasets_to_split=[], execution_options=ray.data.ExecutionOptions(preserve_order=True)
        ),
    )
    stages = {job.metrics_file: f"train-fm {job.training.name}" for job in jobs}
    try:
        with watch(stages, progress):
            trainer.fit()
    except Exception as error:
        raise unwrap(error, "train-fm") from error


def fm_inputs(prepared: Location, parent: Location | None) -> dict[str, str]:
    """Return the versions that an FM depends on."""
    inputs = {"prepared": read_manifest(prepared).version}
    return inputs if parent is None else {**inputs, "parent": read_manifest(parent).version}


def _job(
    data: PreparedData,
    prepared: Location,
    training: FmTraining,
    work_dir: Path,
    reads_files: bool,
) -> FmJob:
    """Return the training with the rows that its workers share out among them."""
    splits, learning = training.settings.splits, training.settings.config.learning
    learnable = data.learnable(splits.fm_train, splits.fm.stop_ts)
    counts = count_learnable(data.examples.files(splits.fm_train), learnable)
    sizes = [counts.get(bucket, 0) for bucket in range(data.num_buckets)]
    shares = assign_buckets(sizes, learning.num_workers)
    rows = [sum(sizes[bucket] for bucket in share) for share in shares]
    return FmJob(
        prepared=prepared,
        training=FmTraining(absolute(training.out_dir), training.settings),
        metrics_file=(work_dir / f"{training.key}.jsonl").absolute(),
        buckets=tuple(tuple(share) for share in shares),
        plan=plan_steps(rows, learning.batch_rows),
        reads_files=reads_files,
    )


def _name(job: FmJob, rank: int) -> str:
    return f"{job.training.key}_{rank}"


def _files(data: PreparedData, job: FmJob, rank: int) -> list[ExampleFile]:
    return data.examples.files(job.splits.fm_train, job.buckets[rank])


def _columns(collate: Collator) -> list[str]:
    return list(dict.fromkeys([*collate.columns, "example_id", "label_ts", "user"]))


def _dataset(data: PreparedData, job: FmJob, rank: int) -> Any:  # Any: Ray ships no types
    files = _files(data, job, rank)
    num_blocks = max(2, min(len(files), 1 + job.plan.num_rows[rank] // _BLOCK_ROWS))
    return ray.data.read_parquet(
        [str(file.source) for file in files],
        columns=_columns(_collator(data, job, rank)),
        override_num_blocks=num_blocks,
        partitioning=None,  # else `bucket=000` in a path replaces the column of that name
    )


def _collator(data: PreparedData, job: FmJob, rank: int) -> Collator:
    schema = data.schema_as_of(job.splits.fm.stop_ts)
    sources = {}
    if job.config.model.has_history:
        events = {bucket: data.events(bucket) for bucket in job.buckets[rank]}
        sources["raw"] = RawHistorySource(
            events, data.items, _item_fields(data), job.settings.raw_max_len
        )
    return Collator(schema, data.items, data.users, sources)


def _item_fields(data: PreparedData) -> tuple[str, ...]:
    return tuple(field.name for field in data.schema.of(Kind.CATEGORICAL, Side.ITEM))


def _worker(config: dict[str, Any]) -> None:
    worker = Worker.current()
    finished = finished_trainings()
    for job in config["jobs"]:
        if job.training.key in finished and _is_written(job):
            continue
        try:
            _train_one(job, worker, finished)
        except LoopFMError as error:
            raise type(error)(f"FM, {job.training.name}: {error}") from error
        finished.append(job.training.key)
        report_finished(
            finished, worker
        )  # the others wait for the first here, whose FM the next may begin with


def _is_written(job: FmJob) -> bool:
    """Return whether the FM lies at its place: it could have been removed since a killed run noted it as finished."""
    manifest, settings = find_manifest(job.training.out_dir), job.settings
    return (
        manifest is not None
        and manifest.config_hash == settings.config_hash
        and manifest.inputs == fm_inputs(job.prepared, settings.parent)
    )


def _train_one(job: FmJob, worker: Worker, finished: Sequence[str]) -> None:
    data = PreparedData.open(job.prepared)
    collate = _collator(data, job, worker.rank)
    files = data.examples.files(job.splits.fm, job.buckets[worker.rank])
    learnable = data.learnable(job.splits.fm_train, job.splits.fm.stop_ts)
    torch.manual_seed(job.settings.seed)
    item_fields = _item_fields(data) if job.config.model.has_history else ()
    schema = data.schema_as_of(job.splits.fm.stop_ts)
    tables_of = table_factory(job.config.embedding, current_group(), job.settings.seed)
    model = build_fm(job.config.model, schema, item_fields, tables_of)
    bottleneck, layers = job.config.bottleneck, job.config.embedding_layers
    joint = build_joint(model, bottleneck, layers) if job.config.is_joint else None
    if job.settings.parent is not None:
        parent = load_fm(job.settings.parent)
        adopt_weights(model, parent.model)
        if joint is not None:
            old = parent.bottleneck(bottleneck, layers)
            joint.bottleneck.load_state_dict(old.state_dict())
    task = Task(
        model=model if joint is None else joint,
        learning=job.config.learning,
        plan=job.plan,
        blocks=lambda _: keep_learnable(
            _blocks(data, job, worker.rank, _columns(collate)), learnable
        ),
        collate=collate,
        validate=lambda: score_rows(model, collate, files, job.splits.fm_valid),
        seed=job.settings.seed,
        key=job.training.key,
        finished=tuple(finished),
        metrics_file=job.metrics_file,
    )
    report, curves = train(task, worker)
    gather_tables(model)
    if worker.is_first:
        record = {
            "rows_per_s": report.rows_per_s * worker.world_size,
            "train_s": report.seconds,
            "num_parameters": sum(value.numel() for value in model.parameters()),
            **_cost(job, schema, item_fields),
        }
        spec = FmSpec(
            trained_until_ts=job.splits.fm.stop_ts - 1,
            schema=schema,
            item_fields=item_fields,
            max_len=job.settings.raw_max_len,
            fm=job.config.model,
        )
        save_fm(
            TrainedFm(
                model,
                spec,
                record,
                joint=None if joint is None else JointBottleneck(joint.bottleneck, layers),
            ),
            job.training.out_dir,
            settings_hash=job.settings.config_hash,
            inputs=fm_inputs(job.prepared, job.settings.parent),
            num_rows=sum(job.plan.num_rows),
            curves=curves,
        )


def _cost(job: FmJob, schema: FeatureSchema, item_fields: Sequence[str]) -> dict[str, float]:
    """Return what the FM costs on one example with a full history."""
    shape = RequestShape(num_candidates=1, history_len=job.settings.raw_max_len)
    cost = fm_cost(job.config.model, schema, item_fields, shape)
    return {
        "num_table_parameters": cost.num_table_parameters,
        "flops_per_row": cost.flops_per_row,
    }


def _blocks(data: PreparedData, job: FmJob, rank: int, columns: Sequence[str]) -> Iterator[Rows]:
    """Yield the rows of this worker, block by block: the same blocks whoever reads them."""
    if job.reads_files:
        yield from iterate_files(_files(data, job, rank), columns=columns, block_rows=_BLOCK_ROWS)
        return
    shard = ray.train.get_dataset_shard(_name(job, rank))
    for table in shard.iter_batches(
        batch_size=_BLOCK_ROWS, batch_format="pyarrow", prefetch_batches=1
    ):
        yield rows_of(table)
