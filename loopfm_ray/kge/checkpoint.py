"""The state of a training of a knowledge graph embedding: one file that appears at once, and a resume to the same bits."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from loopfm_ray.errors import StoreError
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.self_distillation import SelfDistillation

__all__ = [
    "CheckpointFile",
    "KgeCheckpoint",
    "KgePoint",
    "KgeProgress",
    "KgeState",
    "load_kge_state",
    "save_kge_state",
]

_FORMAT_VERSION = 2


@dataclass(frozen=True)
class KgePoint:
    """One point of the learning curve."""

    epoch: int
    """Epochs trained."""
    loss: float
    """Mean training loss over the batches of the last epoch."""
    valid_mrr: float
    """Filtered MRR on the validation triples, all ranked."""
    train_s: float = field(default=0.0, compare=False)
    """Seconds of training up to here, without evaluation."""


@dataclass
class KgeProgress:
    """How far a training is."""

    epoch: int = 0
    """Epochs trained."""
    best_mrr: float = -1.0
    """Best validation MRR so far; -1 before the first."""
    best_epoch: int = 0
    """When it was."""
    num_worse: int = 0
    """Evaluations since."""
    train_s: float = field(default=0.0, compare=False)
    """Seconds of training, without evaluation."""
    is_stopped: bool = False
    """Whether early stopping ended the training."""
    curve: list[KgePoint] = field(default_factory=list)
    """All evaluations."""


@dataclass
class KgeState:
    """A training in progress, changed in place."""

    model: KgeModel
    optimizer: torch.optim.Optimizer
    key: str
    """Hash of what the training is of; a checkpoint of another key is not read."""
    distillation: SelfDistillation | None = None
    """What it remembers of its past."""
    progress: KgeProgress = field(default_factory=KgeProgress)
    best_weights: dict[str, Tensor] | None = None
    """Weights at the best validation MRR."""


class KgeCheckpoint(Protocol):
    """Where a training keeps its state; every process of it calls both."""

    def load(self, state: KgeState) -> None:
        """Bring `state` to what was saved last, and leave it where nothing was."""
        ...

    def save(self, state: KgeState) -> None:
        """Save `state` in place of an earlier one."""
        ...


@dataclass(frozen=True)
class CheckpointFile:
    """One file, which the first process writes and all read."""

    path: Path
    is_writer: bool = True
    """Whether this is the first process."""

    def load(self, state: KgeState) -> None:
        """Load the file, if it is there."""
        if self.path.exists():
            load_kge_state(state, self.path)

    def save(self, state: KgeState) -> None:
        """Write the file."""
        if self.is_writer:
            save_kge_state(state, self.path)


def save_kge_state(state: KgeState, path: Path) -> None:
    """Write the state as one file, in place of an earlier one at once."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.tmp")
    tree = {
        "format_version": _FORMAT_VERSION,
        "key": state.key,
        "model": state.model.state_dict(),
        "optimizer": state.optimizer.state_dict(),
        "distillation": None if state.distillation is None else state.distillation.state_dict(),
        "progress": asdict(state.progress),
        "best_weights": state.best_weights,
    }
    torch.save(tree, staged)
    staged.replace(path)


def load_kge_state(state: KgeState, path: Path) -> None:
    """Bring `state`, built from the same config, to what `save_kge_state` wrote.

    Raises:
        StoreError: the file is missing, damaged, of another format or of another training.
    """
    try:
        tree = torch.load(path, weights_only=True, map_location="cpu")
        found = tree["format_version"], tree["key"]
        if found != (_FORMAT_VERSION, state.key):
            raise StoreError(
                f"checkpoint {path} is of format {found[0]} and training {found[1]}, expected {_FORMAT_VERSION} and"
                f" {state.key}: the config or the graph changed; give another path, or remove it to begin anew"
            )
        state.model.load_state_dict(tree["model"])
        state.optimizer.load_state_dict(tree["optimizer"])
        if state.distillation is not None:
            state.distillation.load_state_dict(tree["distillation"])
        points = [KgePoint(**point) for point in tree["progress"].pop("curve")]
        state.progress = KgeProgress(**tree["progress"], curve=points)
        state.best_weights = tree["best_weights"]
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, EOFError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"checkpoint {path} can not be loaded ({error}); remove it to begin anew"
        ) from error
