"""Train a backbone on a graph: epochs in seeded order, filtered validation MRR, early stopping, exact resume.

Every epoch begins from a seed made of the config's seed and its number, so an interrupted training that goes on from a
checkpoint ends in the same bits, on the same machine and numbers of threads and processes. Processes that train together (`processes`)
find what one finds, but for rounding.
"""

import math
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from loopfm_ray.config import Config, config_hash
from loopfm_ray.errors import ConfigError, MetricError
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.checkpoint import KgeCheckpoint, KgePoint, KgeState
from loopfm_ray.kge.filters import KnownFacts, index_facts
from loopfm_ray.kge.models import AnyKgeConfig, build_kge
from loopfm_ray.kge.objectives import (
    LossConfig,
    Objective,
    OneVsAllConfig,
    RegularizerConfig,
    make_objective,
)
from loopfm_ray.kge.processes import ALONE, Process, sum_gradients
from loopfm_ray.kge.ranking import Ranks, prepare_ranking, summarize_ranks
from loopfm_ray.kge.self_distillation import SelfDistillation, SelfDistillationConfig
from loopfm_ray.kge.triples import TripleSet

__all__ = [
    "KgeTrainConfig",
    "TrainedKge",
    "begin_training",
    "check_workers",
    "train_epoch",
    "train_kge",
    "training_key",
]


class KgeTrainConfig(Config):
    """How a backbone is trained; the defaults are those of ComplEx-N3."""

    loss: LossConfig = Field(default=OneVsAllConfig())
    """What is minimised."""
    regularizer: RegularizerConfig | None = Field(default=None)
    """Penalty beside the loss; null leaves it out."""
    distillation: SelfDistillationConfig | None = Field(default=None)
    """What the model learns from its own past, or from a teacher; null leaves it out."""
    optimizer: Literal["adagrad", "adam"] = "adagrad"
    """Adagrad is usual with 1-vs-all, Adam with the others."""
    lr: PositiveFloat = 0.1
    """Learning rate."""
    batch_size: PositiveInt = 1000
    """Rows of a step: questions with one answer, or with all of theirs in k-vs-all."""
    epochs: PositiveInt = 100
    """Passes over the training rows, at most."""
    eval_every: PositiveInt = 5
    """Epochs between evaluations on the validation triples."""
    patience: PositiveInt | None = None
    """Evaluations without a better MRR after which training stops; null never stops early."""
    seed: NonNegativeInt = 0
    """Of the first values, the order of rows, negatives and dropout."""
    num_workers: PositiveInt = 1
    """Data-parallel training processes, which share each batch; what is learnt does not depend on it but for rounding."""
    num_ranking_workers: NonNegativeInt = 0
    """Tasks side by side that rank the test triples; 0 and 1 rank them in one process. Those of validation are ranked by the
    processes that train."""

    @property
    def learnt(self) -> dict[str, Any]:  # Any: JSON
        """What shapes the result: all but how the work is spread."""
        return self.model_dump(mode="json", exclude={"num_workers", "num_ranking_workers"})


@dataclass(frozen=True)
class TrainedKge:
    """Result of `train_kge`."""

    model: KgeModel
    """With the weights of the best validation MRR, in evaluation."""
    best_mrr: float
    """Validation MRR of these weights, all triples ranked."""
    best_epoch: int
    """Epochs after which they were reached."""
    num_epochs: int
    """Epochs trained in all."""
    curve: tuple[KgePoint, ...]
    """Every evaluation."""


def train_kge(  # noqa: PLR0913 - what is trained, on what and how; the others are hooks
    graph: TripleSet,
    backbone: AnyKgeConfig,
    config: KgeTrainConfig,
    checkpoint: KgeCheckpoint | None = None,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
    teacher: KgeModel | None = None,
    on_point: Callable[[KgePoint], None] | None = None,
    process: Process = ALONE,
) -> TrainedKge:
    """Train a backbone on the training triples, from a checkpoint where there is one.

    Torch's random state is left as it was, but for that of an accelerator.

    Args:
        graph: train and validation triples are used; those of test only as facts that ranks leave out.
        backbone: what is trained.
        config: how.
        checkpoint: saved at every evaluation and gone on from; a larger `epochs` trains on.
        device: where to train.
        on_epoch: called after every epoch with its number and mean loss.
        teacher: a trained model of the same graph, with `distillation.memory.kind: teacher` alone.
        on_point: called after every evaluation with what it found.
        process: this one of `num_workers`, which all call this alike and end with the same.

    Raises:
        MetricError: the loss or a score is not finite.
        StoreError: the checkpoint is damaged or of another training.
        ConfigError: the backbone, regulariser, loss and number of processes do not go together, or the distillation with the loss
            or the teacher.
        DataError: negatives are to be filtered, and a question has every entity as an answer.
    """
    if config.num_workers != process.world_size:
        raise ConfigError(
            f"train.num_workers is {config.num_workers} and {process.world_size} process trains here; set it to"
            f" {process.world_size}, or train with `loopfm export-kge` or `loopfm experiment`, which start workers"
        )
    check_workers(backbone, config)
    with torch.random.fork_rng(devices=[]):
        state, objective = begin_training(graph, backbone, config, device, teacher, process)
        if checkpoint is not None:
            checkpoint.load(state)
        known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
        progress = state.progress
        while progress.epoch < config.epochs and not progress.is_stopped:
            loss = train_epoch(state, objective, config, process)
            if progress.epoch % config.eval_every == 0 or progress.epoch == config.epochs:
                _evaluate(state, graph, known, loss, process)
                is_late = config.patience is not None and progress.num_worse >= config.patience
                progress.is_stopped = is_late
                if checkpoint is not None:
                    checkpoint.save(state)
                if on_point is not None:
                    on_point(progress.curve[-1])
            if on_epoch is not None:
                on_epoch(progress.epoch, loss)
    if state.best_weights is not None:
        state.model.load_state_dict(state.best_weights)
    return TrainedKge(
        state.model.eval(),
        progress.best_mrr,
        progress.best_epoch,
        progress.epoch,
        tuple(progress.curve),
    )


def begin_training(
    graph: TripleSet,
    backbone: AnyKgeConfig,
    config: KgeTrainConfig,
    device: torch.device | str = "cpu",
    teacher: KgeModel | None = None,
    process: Process = ALONE,
) -> tuple[KgeState, Objective]:
    """Return the state of a training before its first epoch, and what it minimises; torch's random state is seeded.

    Raises:
        ConfigError, DataError: see `train_kge`.
    """
    torch.manual_seed(config.seed)
    model = build_kge(backbone, graph.num_entities, graph.num_relations).to(device)
    objective = make_objective(graph, config.loss, config.regularizer)
    distillation = _distillation(config, model, objective, teacher, process)
    key = training_key(graph, backbone, config, teacher)
    return KgeState(model, _optimizer(config, model), key, distillation), objective


def check_workers(backbone: AnyKgeConfig, config: KgeTrainConfig) -> None:
    """Check that a backbone can be trained by as many processes.

    Raises:
        ConfigError: it has batch norm or dropout, whose values in a part of a batch are not those in the whole.
    """
    if config.num_workers == 1:
        return
    with torch.device("meta"):
        model = build_kge(backbone, 4, 1)
    for module in model.modules():
        is_norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)
        if is_norm or (isinstance(module, nn.Dropout | nn.Dropout2d) and module.p > 0):
            raise ConfigError(
                f"train.num_workers is {config.num_workers} and the backbone {backbone.kind} has {type(module).__name__}, which"
                " would see a part of each batch; set num_workers to 1, or another backbone, or turn batch norm and dropout off"
            )


def train_epoch(
    state: KgeState, objective: Objective, config: KgeTrainConfig, process: Process = ALONE
) -> float:
    """Take one pass over the rows; return the mean loss of its batches.

    Raises:
        MetricError: it is not finite.
    """
    started = time.perf_counter()
    epoch, model, past = state.progress.epoch, state.model, state.distillation
    generator = np.random.default_rng([config.seed, epoch])
    torch.manual_seed(int(generator.integers(2**62)))
    order = generator.permutation(objective.num_rows)
    model.train()
    losses = []
    for batch in _batches(order, config.batch_size):
        asked, loss = objective.ask(model, batch, generator, process)
        if past is not None:
            loss = loss + past.penalty(asked, epoch)
        state.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch does not type it
        sum_gradients(model, process)
        state.optimizer.step()
        if past is not None:
            past.after_step(model, asked)
        losses.append(loss.detach())
    if past is not None:
        past.after_epoch(model, epoch + 1)
    state.progress.epoch += 1
    state.progress.train_s += time.perf_counter() - started
    of_batches = torch.stack(losses)
    process.sum([of_batches])
    mean = float(of_batches.mean())
    if not math.isfinite(mean):
        raise MetricError(
            f"the training loss is {mean} in epoch {epoch + 1}; lower lr or the weight of the regulariser"
        )
    return mean


def _batches(order: NDArray[np.int64], size: int) -> list[NDArray[np.int64]]:
    """Cut rows into batches; one that is left over goes with the batch before it, as batch norm needs two."""
    stops = list(range(size, len(order), size))
    if stops and len(order) - stops[-1] == 1:
        stops.pop()
    return np.split(order, stops)


def _evaluate(
    state: KgeState, graph: TripleSet, known: KnownFacts, loss: float, process: Process
) -> None:
    """Rank the validation triples, note the point, and keep the weights if they are the best."""
    progress = state.progress
    model = state.model if state.distillation is None else state.distillation.served(state.model)
    ranks = _rank_together(model, graph, known, process)
    mrr = summarize_ranks(ranks).mrr
    progress.curve.append(KgePoint(progress.epoch, loss, mrr, progress.train_s))
    progress.num_worse += 1
    if mrr > progress.best_mrr:
        progress.best_mrr, progress.best_epoch, progress.num_worse = mrr, progress.epoch, 0
        state.best_weights = {
            name: value.detach().cpu().clone() for name, value in model.state_dict().items()
        }


def _rank_together(model: KgeModel, graph: TripleSet, known: KnownFacts, process: Process) -> Ranks:
    """Rank the validation triples, each process a part of the questions of each side."""
    device = model.entity.device
    ranking = prepare_ranking(graph.valid, known, device=device)
    found = []
    for parts in ranking.parts(process.world_size):
        own = torch.from_numpy(ranking.rank(model, parts[process.rank])).to(device)
        found.append(process.gather(own).cpu().numpy())
    return ranking.join(found)


def _distillation(
    config: KgeTrainConfig,
    model: KgeModel,
    objective: Objective,
    teacher: KgeModel | None,
    process: Process,
) -> SelfDistillation | None:
    if config.distillation is not None:
        return SelfDistillation(config.distillation, model, objective, teacher, process)
    if teacher is not None:
        raise ConfigError(
            "a teacher was given and train.distillation is null; set it, with memory.kind teacher"
        )
    return None


def _optimizer(config: KgeTrainConfig, model: KgeModel) -> torch.optim.Optimizer:
    if config.optimizer == "adam":
        return torch.optim.Adam(model.parameters(), lr=config.lr, fused=True)
    return torch.optim.Adagrad(model.parameters(), lr=config.lr, fused=True)


def training_key(
    graph: TripleSet, backbone: AnyKgeConfig, config: KgeTrainConfig, teacher: KgeModel | None
) -> str:
    """Return a hash of all that the training depends on but its length; a checkpoint of another key is not read."""
    how = {name: value for name, value in config.learnt.items() if name != "epochs"}
    data = [zlib.crc32(graph.split(name).tobytes()) for name in ("train", "valid")]
    if teacher is not None:
        weights = teacher.state_dict().values()
        data += [zlib.crc32(value.detach().cpu().numpy().tobytes()) for value in weights]
    return config_hash(backbone, how, [graph.num_entities, graph.num_relations, *data])
