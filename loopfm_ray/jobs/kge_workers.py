"""Train a graph embedding with workers of Ray Train, and rank triples in tasks: `kge.runner` on a cluster.

The workers run `train_kge` as a single process does, each with its part of every batch. Graph, teacher, model and known facts are
put into the object store once.
"""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import ray
import ray.train
from numpy.typing import NDArray
from ray.train.torch import TorchTrainer

from loopfm_ray.errors import ConfigError, StoreError
from loopfm_ray.jobs.checkpoints import KEY, RayCheckpoints
from loopfm_ray.jobs.cluster import connect
from loopfm_ray.jobs.mapping import Progress, RayMapper, silent, unwrap, watch
from loopfm_ray.jobs.training import Worker, run_config, scaling_config
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.checkpoint import CheckpointFile, KgeState, load_kge_state, save_kge_state
from loopfm_ray.kge.embed import KgeRunConfig, embed_graph
from loopfm_ray.kge.filters import KnownFacts
from loopfm_ray.kge.models import AnyKgeConfig
from loopfm_ray.kge.processes import Peer
from loopfm_ray.kge.ranking import RankingPart, Ranks, prepare_ranking, rank_triples
from loopfm_ray.kge.training import (
    KgeTrainConfig,
    TrainedKge,
    check_workers,
    train_kge,
    training_key,
)
from loopfm_ray.kge.triples import TripleSet
from loopfm_ray.store.tables import write_text
from loopfm_ray.train.process import set_up_process

__all__ = ["RayRunner", "embed_on_ray", "rank_on_ray", "train_on_ray"]

_STATE = "state.pt"
_KEY_FILE = "training.txt"
_PARTS_PER_WORKER = 2
"""Of each side: the second ones even out what workers differ in."""

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class RayRunner:
    """A cluster that this process is connected to; what asks for no workers is done here."""

    stage: str
    progress: Progress = silent

    def train(
        self,
        graph: TripleSet,
        backbone: AnyKgeConfig,
        config: KgeTrainConfig,
        checkpoint: Path,
        *,
        teacher: KgeModel | None = None,
        on_epoch: Callable[[int, float], None] | None = None,
    ) -> TrainedKge:
        """Train with `num_workers`; of workers, `progress` hears the epochs, and `on_epoch` nothing."""
        if config.num_workers == 1:
            kept = CheckpointFile(checkpoint)
            return train_kge(graph, backbone, config, kept, on_epoch=on_epoch, teacher=teacher)
        job = KgeJob(backbone, config, _folder(checkpoint), self.stage)
        return train_on_ray(graph, job, teacher, self.progress)

    def rank(
        self, model: KgeModel, triples: Ids, known: KnownFacts, config: KgeTrainConfig
    ) -> Ranks:
        """Rank with `num_ranking_workers`."""
        if config.num_ranking_workers <= 1:
            return rank_triples(model, triples, known)
        return rank_on_ray(model, triples, known, config.num_ranking_workers, self.progress)

    def forget(self, checkpoint: Path) -> None:
        """Remove the checkpoints of the workers, and of one process."""
        checkpoint.unlink(missing_ok=True)
        shutil.rmtree(_folder(checkpoint), ignore_errors=True)


@dataclass(frozen=True)
class KgeJob:
    """A training, as its workers get it."""

    backbone: AnyKgeConfig
    config: KgeTrainConfig
    folder: Path
    """Of its checkpoints, absolute; workers on other machines have to see it."""
    stage: str

    @property
    def metrics_file(self) -> Path:
        """Where it is shown how far the training is."""
        return self.folder / "metrics.jsonl"


def embed_on_ray(
    config: KgeRunConfig, *, fresh: bool = False, progress: Progress = silent
) -> dict[str, Any]:  # Any: JSON
    """Embed a graph as `embed_graph` does, with the workers that the config asks for.

    Raises:
        LoopFMError: see `embed_graph`, and what a worker raised.
        JobError: workers failed otherwise; running the same again goes on.
    """
    check_workers(config.backbone, config.train)
    with connect(config.ray):
        runner = RayRunner("embed", progress)
        return embed_graph(
            config,
            fresh=fresh,
            on_epoch=lambda epoch, _: progress("embed", epoch, config.train.epochs),
            runner=runner,
        )


def train_on_ray(
    graph: TripleSet, job: KgeJob, teacher: KgeModel | None = None, progress: Progress = silent
) -> TrainedKge:
    """Train with workers of Ray Train; a killed run goes on from its last checkpoint.

    Raises:
        ConfigError: the backbone needs the whole batch, or there are more workers than CPUs.
        StoreError: the folder holds another training.
        LoopFMError: what a worker raised.
        JobError: the workers failed otherwise.
    """
    check_workers(job.backbone, job.config)
    scaling = scaling_config("train.num_workers", job.config.num_workers)
    _take_folder(job, training_key(graph, job.backbone, job.config, teacher))
    trainer = TorchTrainer(
        _worker,
        train_loop_config={"job": job, "data": ray.put((graph, teacher))},
        scaling_config=scaling,
        run_config=run_config(job.folder, "train"),
    )
    try:
        with watch({job.metrics_file: job.stage}, progress):
            result = trainer.fit()
    except Exception as error:  # the edge to Ray: every failure becomes one of ours
        raise unwrap(error, job.stage) from error
    # the state is finished, so one process finds nothing left to train and takes the best weights
    alone = job.config.model_copy(update={"num_workers": 1})
    with result.checkpoint.as_directory() as folder:
        kept = CheckpointFile(Path(folder) / _STATE, is_writer=False)
        return train_kge(graph, job.backbone, alone, kept, teacher=teacher)


def rank_on_ray(
    model: KgeModel,
    triples: Ids,
    known: KnownFacts,
    num_workers: int,
    progress: Progress = silent,
) -> Ranks:
    """Rank triples as `rank_triples` does, in `num_workers` tasks at a time; the ranks are the same.

    Raises:
        ConfigError: `num_workers` is not at least 1.
        DataError, MetricError, ShapeError: see `rank_triples`.
        JobError: tasks failed otherwise.
    """
    if num_workers < 1:
        raise ConfigError(
            f"ranking needs at least 1 worker, found {num_workers}; set train.num_ranking_workers to 0 to rank in one process"
        )
    ranking = prepare_ranking(triples, known)
    shared = ray.put((model, ranking))
    sides = ranking.parts(_PARTS_PER_WORKER * num_workers)
    tasks = [_RankTask(shared, part) for parts in sides for part in parts]
    found = list(RayMapper(num_workers, "rank", progress)(_rank_part, tasks))
    half = len(sides[0])
    return ranking.join([np.concatenate(found[:half]), np.concatenate(found[half:])])


@dataclass(frozen=True)
class _RankTask:
    shared: Any  # Ray's references carry no type
    """A reference to the model and the prepared ranking."""
    part: RankingPart


def _rank_part(task: _RankTask) -> NDArray[np.float64]:
    set_up_process()
    model, ranking = ray.get(task.shared)
    found: NDArray[np.float64] = ranking.rank(model, task.part)
    return found


class _RunCheckpoint:
    """The state of a training in the checkpoints of a run of Ray Train."""

    def __init__(self, kept: RayCheckpoints) -> None:
        self._kept = kept

    def load(self, state: KgeState) -> None:
        with self._kept.latest(state.key) as folder:
            if folder is not None:
                load_kge_state(state, folder / _STATE)

    def save(self, state: KgeState) -> None:
        def fill(folder: Path) -> None:
            save_kge_state(state, folder / _STATE)

        self._kept.keep(fill, {KEY: state.key}, state.progress.epoch)


def _worker(config: dict[str, Any]) -> None:
    job: KgeJob = config["job"]
    worker = Worker.current()
    graph, teacher = ray.get(config["data"])

    def show(epoch: int, loss: float) -> None:
        if worker.is_first and job.metrics_file.parent.is_dir():
            line = {"step": epoch, "total": job.config.epochs, "loss": loss}
            with job.metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    train_kge(
        graph,
        job.backbone,
        job.config,
        _RunCheckpoint(RayCheckpoints(is_first=worker.is_first)),
        on_epoch=show,
        teacher=teacher,
        process=Peer(worker.rank, worker.world_size),
    )
    # a run without a final report counts as unfinished, and the others wait for the first here
    ray.train.report({"done": 1})


def _folder(checkpoint: Path) -> Path:
    return checkpoint.absolute().with_suffix(".workers")  # workers run in other folders


def _take_folder(job: KgeJob, key: str) -> None:
    """Make the folder of a training, or find that it is this training's."""
    job.folder.mkdir(parents=True, exist_ok=True)
    file = job.folder / _KEY_FILE
    found = file.read_text(encoding="utf-8") if file.is_file() else key
    if found != key:
        raise StoreError(
            f"{job.folder} holds checkpoints of training {found}, expected {key}: the config or the graph changed; give another"
            " name, or remove it to begin anew"
        )
    write_text(file, key)
