"""What the FM's and the VMs' training programs have in common: workers, data, checkpoints, progress.

The rows of a bucket belong to one worker. All workers take the same number of steps, and the loss of a step is divided by the
rows of all of them, so that uneven workers train exactly as one would with all rows.
"""

import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import torch.distributed
from ray.train import CheckpointConfig, FailureConfig, RunConfig, ScalingConfig
from torch import Tensor, nn

from loopfm_ray import log
from loopfm_ray.data.collate import Batch, Collator
from loopfm_ray.data.examples import ExampleFile, Rows, iterate_rows
from loopfm_ray.data.windows import StepPlan, rechunk, shuffle_windows
from loopfm_ray.distill.heads import AuxiliaryVm
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import LearningConfig
from loopfm_ray.jobs.checkpoints import KEY, Checkpoints, RayCheckpoints
from loopfm_ray.store.filesystem import Location, absolute
from loopfm_ray.train.curves import load_curves, write_curves
from loopfm_ray.train.evaluate import (
    Predictions,
    binary_metrics,
    concat_predictions,
    predict,
)
from loopfm_ray.train.loop import (
    Evaluation,
    FitReport,
    Hooks,
    LoopConfig,
    Progress,
    fit,
    progress_records,
)
from loopfm_ray.train.optim import build_adapter_optimizer, build_optimizer
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.shards import load_tables, save_shard, sharded_tables
from loopfm_ray.train.state import TrainState, load_state, save_state
from loopfm_ray.train.step import Workers, make_adapter_step, make_objective
from loopfm_ray.types import TimeRange

__all__ = [
    "BlockSource",
    "OnEvaluation",
    "Task",
    "Worker",
    "adapter_step",
    "file_blocks",
    "finished_trainings",
    "gather_predictions",
    "report_finished",
    "run_config",
    "scaling_config",
    "score_rows",
    "train",
]

_STATE, _TABLES = "state", "tables"
_FINISHED = "finished"
_BLOCK_ROWS = 65_536
_EVAL_ROWS = 4096
_LOOPBACK = "127.0.0.1"

OnEvaluation = Callable[[int, dict[str, float]], None]
"""Told the number of each validation but the last, from 1, and what it found."""
BlockSource = Callable[[int], Iterator[Rows]]
"""Epoch -> the rows of this worker in time order."""


@dataclass(frozen=True)
class Worker:
    """This process among those that train one model."""

    rank: int
    world_size: int

    @classmethod
    def current(cls) -> "Worker":
        """Return the worker that Ray Train runs this in; sets it up for one thread."""
        log.setup("WARNING")
        set_up_process()
        context = ray.train.get_context()
        return cls(context.get_world_rank(), context.get_world_size())

    @property
    def is_first(self) -> bool:
        """Whether this worker writes what there is one of."""
        return self.rank == 0


@dataclass(frozen=True)
class Task:
    """One model to train in a worker."""

    model: nn.Module
    learning: LearningConfig
    plan: StepPlan
    blocks: BlockSource
    collate: Collator
    validate: Callable[[], Predictions]
    seed: int
    key: str
    """Names this training: a checkpoint of another one is not taken for its own."""
    finished: tuple[str, ...] = ()
    """Trainings of the same run that came before, by key."""
    metrics_file: Path | None = None
    """Where it is shown how far the training is, if anywhere."""
    kd_weight: float = 0.0
    hint_weight: float = 0.0
    on_evaluation: OnEvaluation | None = None


def scaling_config(setting: str, num_workers: int, *, use_gpu: bool = False) -> ScalingConfig:
    """Return the workers that a training asks for, each with a CPU, or a CPU and a GPU.

    Args:
        setting: what `num_workers` is called in the config.
        num_workers: how many.
        use_gpu: whether each gets a GPU.

    Raises:
        ConfigError: the cluster is of this machine alone and has not as many: Ray would wait for ever. Others may grow.
    """
    resources = {"CPU": 1.0, **({"GPU": 1.0} if use_gpu else {})}
    there = ray.cluster_resources()
    is_of_one_machine = all(node["NodeManagerAddress"] == _LOOPBACK for node in ray.nodes())
    for name, each in resources.items():
        if is_of_one_machine and num_workers * each > there.get(name, 0.0):
            remedy = " raise ray.num_cpus, which are logical, or" if name == "CPU" else ""
            raise ConfigError(
                f"{setting} is {num_workers} and the cluster has {there.get(name, 0.0):g} {name}s, one of which each worker"
                f" needs;{remedy} take fewer workers"
            )
    return ScalingConfig(num_workers=num_workers, use_gpu=use_gpu, resources_per_worker=resources)


def run_config(checkpoints: Location, name: str) -> RunConfig:
    """Return where a training keeps its checkpoints; one of the same name in the same folder goes on from there."""
    return RunConfig(
        name=name,
        storage_path=str(absolute(checkpoints)),
        failure_config=FailureConfig(max_failures=2),
        checkpoint_config=CheckpointConfig(num_to_keep=2),
    )


def file_blocks(
    files: Sequence[ExampleFile], time_range: TimeRange, columns: Sequence[str]
) -> Iterator[Rows]:
    """Yield the rows of `files` in time order, in blocks."""
    return iterate_rows(
        files, time_range, columns=columns, window_rows=_BLOCK_ROWS, batch_rows=_BLOCK_ROWS
    )


def train(
    task: Task, worker: Worker, checkpoints: Checkpoints | None = None
) -> tuple[FitReport, str]:
    """Train the model of `task` in this worker, going on from the last checkpoint if there is one.

    Args:
        task: what is trained.
        worker: this process.
        checkpoints: where they are kept; None keeps them in the run of Ray Train that this is a worker of.

    Returns:
        what the training was like, and its learning curves, which are empty but in the first worker.
    """
    tables = sharded_tables(task.model)
    kept = checkpoints or RayCheckpoints(is_first=worker.is_first, all_write=bool(tables))
    wrapped = ray.train.torch.prepare_model(task.model) if worker.world_size > 1 else task.model
    loop = task.learning.loop(task.plan.num_steps)
    state = TrainState(
        task.model,
        build_optimizer(loop.optim, task.model),
        adapter_optimizer=build_adapter_optimizer(task.model),
    )
    recorder = _Recorder(task, worker, kept, loop)
    with kept.latest(task.key) as folder:
        if folder is not None:
            load_state(state, folder / _STATE)
            for index, one in enumerate(tables):
                load_tables(one, folder / _TABLES / str(index))
            recorder.restore(folder)
    global_rows = iter(
        np.tile(task.plan.global_sizes(), task.learning.epochs)[state.counters.step :]
    )
    workers = Workers(worker.world_size, lambda _: float(next(global_rows)))
    objective = make_objective(
        wrapped,
        kd_weight=task.kd_weight,
        hint_weight=task.hint_weight,
        auxiliary=task.model if isinstance(task.model, AuxiliaryVm) else None,
        workers=workers,
    )
    batches = islice(_batches(task, worker), state.counters.step, None)
    hooks = Hooks(
        on_progress=recorder.progress,
        on_checkpoint=recorder.checkpoint,
        evaluate=lambda: _valid_metrics(task),
        on_evaluation=recorder.evaluation,
        before_step=adapter_step(state, _sum_over_workers if worker.world_size > 1 else None),
    )
    total_steps = task.plan.num_steps * task.learning.epochs
    collated = (task.collate(rows) for rows in batches)
    report = fit(state, collated, objective, loop, total_steps, hooks)
    return report, recorder.curves


def adapter_step(
    state: TrainState, reduce: Callable[[list[Tensor]], None] | None = None
) -> Callable[[Batch], None]:
    """Return what trains the student adapter on a batch before the VM's step; nothing where there is no adapter.

    `reduce` sums tensors over all workers; none is a single worker.
    """
    if state.adapter_optimizer is None or not isinstance(state.model, AuxiliaryVm):
        return lambda _: None
    return make_adapter_step(state.model, state.adapter_optimizer, reduce)


def _sum_over_workers(tensors: list[Tensor]) -> None:
    for tensor in tensors:
        torch.distributed.all_reduce(tensor)


def finished_trainings() -> list[str]:
    """Return the keys of the trainings that this run had finished by its last checkpoint."""
    checkpoint = ray.train.get_checkpoint()
    if checkpoint is None:
        return []
    keys: list[str] = checkpoint.get_metadata().get(_FINISHED, [])
    return list(keys)


def report_finished(keys: Sequence[str], worker: Worker) -> None:
    """Keep in a checkpoint that these trainings of the run are finished; every worker has to call it."""
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = None
        if worker.is_first:
            checkpoint = ray.train.Checkpoint.from_directory(folder)
            checkpoint.set_metadata({_FINISHED: list(keys)})
        ray.train.report({"finished": len(keys)}, checkpoint=checkpoint)


def _valid_metrics(task: Task) -> dict[str, float]:
    own = task.validate()
    for tables in sharded_tables(task.model):
        tables.drain()  # the others may have more batches
    metrics = binary_metrics(gather_predictions(own))
    return {name: metrics[name] for name in ("ne", "auc", "logloss")}


def gather_predictions(own: Predictions) -> Predictions:
    """Return the predictions of all workers; every worker has to call it."""
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return own
    everyone: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyone, own)
    return concat_predictions(everyone)


def score_rows(
    model: nn.Module, collate: Collator, files: Sequence[ExampleFile], time_range: TimeRange
) -> Predictions:
    """Score all rows of `files` in a time range with an FM or a VM."""
    columns = list(dict.fromkeys([*collate.columns, "user"]))

    def batches() -> Iterator[tuple[Any, Batch]]:
        for rows in iterate_rows(files, time_range, columns=columns, batch_rows=_EVAL_ROWS):
            yield rows["user"], collate(rows)

    return predict(model, batches())


def _batches(task: Task, worker: Worker) -> Iterator[Rows]:
    for epoch in range(task.learning.epochs):
        windows = shuffle_windows(task.blocks(epoch), task.learning.window_rows, (task.seed, epoch))
        yield from rechunk(windows, task.plan.sizes(worker.rank).tolist())


class _Recorder:
    """Keeps curves and writes checkpoints, in the first worker; the others only take part.

    The curves go with the checkpoints, so a resumed training has each step once. `metrics_file` only shows the driver how
    far the training is; a worker on another machine does not have its folder.
    """

    def __init__(
        self, task: Task, worker: Worker, checkpoints: Checkpoints, loop: LoopConfig
    ) -> None:
        self._lines: list[str] = []
        self._path, self._worker, self._checkpoints = task.metrics_file, worker, checkpoints
        self._key, self._finished = task.key, list(task.finished)
        self._total = task.plan.num_steps * task.learning.epochs
        self._eval_every, self._told = loop.eval_every, task.on_evaluation

        self._show("", "w")

    @property
    def curves(self) -> str:
        return "".join(self._lines)

    def restore(self, checkpoint: Path) -> None:
        if self._worker.is_first:
            self._lines = load_curves(checkpoint).splitlines(keepends=True)

    def progress(self, progress: Progress) -> None:
        self._write(progress_records(progress))

    def evaluation(self, evaluation: Evaluation) -> None:
        self._write(
            [(evaluation.step, "valid", name, value) for name, value in evaluation.metrics.items()]
        )
        if evaluation.step < self._total and self._told is not None:
            self._told(evaluation.step // self._eval_every, evaluation.metrics)

    def checkpoint(self, state: TrainState) -> None:
        def fill(folder: Path) -> None:
            for index, tables in enumerate(sharded_tables(state.model)):
                (folder / _TABLES / str(index)).mkdir(parents=True, exist_ok=True)
                save_shard(tables, folder / _TABLES / str(index))
            if self._worker.is_first:
                save_state(state, folder / _STATE)
                write_curves(folder, self.curves)

        labels = {KEY: self._key, _FINISHED: self._finished}
        self._checkpoints.keep(fill, labels, state.counters.step)

    def _write(self, records: Sequence[tuple[int, str, str, float]]) -> None:
        if not self._worker.is_first:
            return
        lines = []
        for step, split, name, value in records:
            record = {"step": step, "split": split, "name": name, "value": value}
            lines.append(json.dumps({**record, "total": self._total}) + "\n")
        self._lines += lines
        self._show("".join(lines), "a")

    def _show(self, text: str, mode: str) -> None:
        if self._worker.is_first and self._path is not None and self._path.parent.is_dir():
            with self._path.open(mode, encoding="utf-8") as stream:
                stream.write(text)
