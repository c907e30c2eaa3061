"""The training loop: steps, progress, validation, early stopping and checkpoints, the same after every resume."""

import logging
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor

from loopfm_ray.config import Config
from loopfm_ray.data.collate import Batch
from loopfm_ray.errors import DataError
from loopfm_ray.metrics.binary import BinarySums
from loopfm_ray.train.optim import OptimConfig, rate_factor, set_rate
from loopfm_ray.train.shards import sharded_tables
from loopfm_ray.train.state import TrainState
from loopfm_ray.train.step import Objective, StepLoss

__all__ = ["Evaluation", "FitReport", "Hooks", "LoopConfig", "Progress", "fit", "progress_records"]

logger = logging.getLogger(__name__)


class LoopConfig(Config):
    """How long to train and how often to look."""

    batch_rows: PositiveInt = 512
    """Rows per step, over all workers."""
    epochs: PositiveInt = 1
    """Passes over the training rows; 1 is the rule for click data, more over-fit fast."""
    optim: OptimConfig = OptimConfig()
    """Optimizer and learning rate."""
    log_every: PositiveInt = 100
    """Steps between progress reports."""
    eval_every: NonNegativeInt = 0
    """Steps between validations; 0 validates at the end only."""
    checkpoint_every: NonNegativeInt = 0
    """Steps between checkpoints; 0 writes none."""
    patience: PositiveInt | None = None
    """Validations without a better NE before training stops and the best weights return; null never stops."""


@dataclass(frozen=True)
class Progress:
    """What was seen since the last report; `sums` are of predictions made before each row was trained on."""

    step: int
    num_rows: int
    sums: BinarySums
    loss: float
    """Loss of the last step, KD and a bottleneck that is trained along included."""
    rows_per_s: float


@dataclass(frozen=True)
class Evaluation:
    """Validation metrics after `step` steps."""

    step: int
    metrics: dict[str, float]


def _ignore(_: object) -> None:
    return


@dataclass(frozen=True)
class Hooks:
    """What the caller does at the loop's fixed points."""

    on_progress: Callable[[Progress], None] = _ignore
    on_checkpoint: Callable[[TrainState], None] = _ignore
    evaluate: Callable[[], dict[str, float]] | None = None
    """Validation metrics of the model as it is; must hold `ne` when `patience` is set."""
    on_evaluation: Callable[[Evaluation], None] = _ignore
    before_step: Callable[[Batch], None] = _ignore
    """Given each batch before the model's step on it."""


@dataclass(frozen=True)
class FitReport:
    """What `fit` did in this call."""

    num_steps: int
    num_rows: int
    seconds: float
    """Time in training steps, validation and checkpoints left out."""
    evaluations: tuple[Evaluation, ...]

    @property
    def rows_per_s(self) -> float:
        """Training speed; 0 when no time was measured."""
        return self.num_rows / self.seconds if self.seconds > 0 else 0.0


def fit(
    state: TrainState,
    batches: Iterable[Batch],
    objective: Objective,
    config: LoopConfig,
    total_steps: int,
    hooks: Hooks | None = None,
) -> FitReport:
    """Train until `total_steps`, the end of `batches`, or early stopping.

    To resume, load the state and pass the same batches without the first `state.counters.step`: the run then ends in
    the same bits, on the CPU, as one that was never interrupted.

    Args:
        state: changed in place.
        batches: one per step.
        objective: the loss of a batch.
        config: how often to log, evaluate and checkpoint.
        total_steps: steps of the whole run, from which the learning rate follows.
        hooks: what to do at the fixed points; none does nothing.

    Raises:
        DataError: a loss is not finite.
    """
    run = _Run(state, config, total_steps, hooks or Hooks())
    for batch in batches:
        if state.counters.is_stopped or state.counters.step >= total_steps:
            break
        run.step(objective, batch)
    return run.finish()


def progress_records(progress: Progress) -> list[tuple[int, str, str, float]]:
    """Return (step, split, name, value) rows of a progress report, NE only where both labels were met."""
    values = {"loss": progress.loss, "rows_per_s": progress.rows_per_s}
    if progress.sums.num_rows:
        values["logloss"] = progress.sums.logloss
    if progress.sums.has_both_labels:
        values["ne"] = progress.sums.normalized_entropy
    return [(progress.step, "train", name, value) for name, value in sorted(values.items())]


class _Run:
    """One call of `fit`: the clock and the fixed points."""

    def __init__(
        self, state: TrainState, config: LoopConfig, total_steps: int, hooks: Hooks
    ) -> None:
        self.state, self.config, self.total_steps, self.hooks = state, config, total_steps, hooks
        self.first_step, self.first_rows = state.counters.step, state.counters.num_rows
        self.tables = sharded_tables(state.model)
        self.evaluations: list[Evaluation] = []
        self.pending: list[StepLoss] = []
        self.seconds = self.reported_seconds = 0.0
        self.reported_rows = state.counters.num_rows

    def step(self, objective: Objective, batch: Batch) -> None:
        started = time.perf_counter()
        state, counters, config = self.state, self.state.counters, self.config
        state.model.train()
        factor = rate_factor(config.optim, counters.step, self.total_steps)
        set_rate(state.optimizer, factor)
        self.hooks.before_step(batch)
        state.optimizer.zero_grad(set_to_none=True)
        loss = objective(batch)
        loss.total.backward()  # type: ignore[no-untyped-call]  # torch leaves it untyped
        state.optimizer.step()
        for tables in self.tables:
            tables.step(factor)
        counters.step += 1
        counters.num_rows += len(loss.label)
        self.pending.append(StepLoss(loss.total.detach(), loss.logit, loss.label))
        is_checkpoint = _is_due(counters.step, config.checkpoint_every)
        if is_checkpoint or _is_due(counters.step, config.log_every):
            self._collect()
        self.seconds += time.perf_counter() - started
        if _is_due(counters.step, config.log_every):
            self._report()
        if _is_due(counters.step, config.eval_every):
            self._evaluate()
        if is_checkpoint:
            self.hooks.on_checkpoint(state)

    def finish(self) -> FitReport:
        self._collect()
        if self.state.counters.window.num_rows:
            self._report()
        steps = self.state.counters.step - self.first_step
        if steps and not _is_due(self.state.counters.step, self.config.eval_every):
            self._evaluate()
        if self.config.patience is not None and self.state.best_weights is not None:
            self.state.model.load_state_dict(self.state.best_weights)
        rows = self.state.counters.num_rows - self.first_rows
        return FitReport(steps, rows, self.seconds, tuple(self.evaluations))

    def _collect(self) -> None:
        """Move what the steps left behind into the window: one look at the device for many steps."""
        if not self.pending:
            return
        label = torch.cat([loss.label for loss in self.pending]).cpu().numpy()
        logit = torch.cat([loss.logit for loss in self.pending]).float().cpu().numpy()
        self.last_loss = float(self.pending[-1].total)
        total = torch.stack([loss.total for loss in self.pending]).sum()
        if not bool(torch.isfinite(total)):
            raise DataError(
                f"the training loss is not finite by step {self.state.counters.step}; lower optim.lr,"
                " or check the numeric fields"
            )
        self.state.counters.window += BinarySums.from_logits(label, logit)
        self.pending.clear()

    last_loss = 0.0

    def _report(self) -> None:
        counters = self.state.counters
        seconds = self.seconds - self.reported_seconds
        speed = (counters.num_rows - self.reported_rows) / seconds if seconds > 0 else 0.0
        self.hooks.on_progress(
            Progress(counters.step, counters.num_rows, counters.window, self.last_loss, speed)
        )
        counters.window = BinarySums()
        self.reported_seconds, self.reported_rows = self.seconds, counters.num_rows

    def _evaluate(self) -> None:
        if self.hooks.evaluate is None:
            return
        self.state.model.eval()
        with torch.no_grad():
            metrics = self.hooks.evaluate()
        evaluation = Evaluation(self.state.counters.step, metrics)
        self.evaluations.append(evaluation)
        self.hooks.on_evaluation(evaluation)
        if self.config.patience is not None:
            self._judge(metrics["ne"], self.config.patience)

    def _judge(self, value: float, patience: int) -> None:
        counters = self.state.counters
        if counters.best_value is None or value < counters.best_value:
            counters.best_value, counters.best_step, counters.num_worse = value, counters.step, 0
            self.state.best_weights = _copy(self.state.model.state_dict())
            return
        counters.num_worse += 1
        if counters.num_worse >= patience:
            counters.is_stopped = True
            logger.info(
                "stopped at step %d: validation NE was best at step %d",
                counters.step,
                counters.best_step,
            )


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _copy(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in weights.items()}
