"""What training needs to go on: weights, optimizer, counters and random state, saved so that a resume is exact."""

import json
import shutil
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from loopfm_ray.errors import StoreError
from loopfm_ray.metrics.binary import BinarySums
from loopfm_ray.store.manifest import recover

__all__ = ["Counters", "TrainState", "load_state", "save_state"]

_FORMAT_VERSION = 1
_WEIGHTS, _BEST, _OPTIMIZER, _COUNTERS = (
    "model.safetensors",
    "best.safetensors",
    "optimizer.pt",
    "counters.json",
)


@dataclass
class Counters:
    """How far training is."""

    step: int = 0
    """Steps taken; also the batches consumed."""
    num_rows: int = 0
    """Rows trained on, by this worker."""
    best_value: float | None = None
    """Best validation NE so far."""
    best_step: int = 0
    """Step of the best validation NE."""
    num_worse: int = 0
    """Evaluations since the best one."""
    is_stopped: bool = False
    """Whether early stopping ended the run."""
    chunk: int = 0
    """Of a stream: the chunk that it is in."""
    chunk_first_step: int = 0
    """Of a stream: the steps taken before that chunk."""
    window: BinarySums = field(default_factory=BinarySums)
    """Sums over the rows since the last progress report."""


@dataclass
class TrainState:
    """A run in progress; `fit` changes it in place."""

    model: nn.Module
    optimizer: torch.optim.Optimizer
    counters: Counters = field(default_factory=Counters)
    best_weights: dict[str, Tensor] | None = None
    """Weights at the best validation NE; kept with early stopping."""
    adapter_optimizer: torch.optim.Optimizer | None = None
    """Of a VM's student adapter, which takes a step of its own before each of the VM."""


def save_state(state: TrainState, directory: Path) -> None:
    """Write the state as a directory that appears at once, in place of an earlier one of that name."""
    directory = Path(directory)
    directory.parent.mkdir(parents=True, exist_ok=True)
    recover(directory)
    staged = Path(tempfile.mkdtemp(prefix=f".{directory.name}.tmp-", dir=directory.parent))
    save_file(_plain(state.model.state_dict()), staged / _WEIGHTS)
    if state.best_weights is not None:
        save_file(_plain(state.best_weights), staged / _BEST)
    saved = {"optimizer": state.optimizer.state_dict(), "rng": torch.get_rng_state()}
    if state.adapter_optimizer is not None:
        saved["adapter_optimizer"] = state.adapter_optimizer.state_dict()
    torch.save(saved, staged / _OPTIMIZER)
    tree = {"format_version": _FORMAT_VERSION, **asdict(state.counters)}
    (staged / _COUNTERS).write_text(json.dumps(tree, sort_keys=True), encoding="utf-8")
    old = directory.parent / f".{directory.name}.old-0"
    if directory.exists():
        directory.rename(old)
    staged.rename(directory)
    shutil.rmtree(old, ignore_errors=True)


def load_state(state: TrainState, directory: Path) -> None:
    """Bring `state`, built from the same config, to what `save_state` wrote, random state included.

    Raises:
        StoreError: the directory is missing, damaged, of another format or of another model.
    """
    directory = Path(directory)
    if not directory.exists():
        recover(directory)
    try:
        tree = json.loads((directory / _COUNTERS).read_text(encoding="utf-8"))
        if tree.pop("format_version") != _FORMAT_VERSION:
            raise StoreError(
                f"checkpoint {directory} is not of format_version {_FORMAT_VERSION}; train again"
            )
        saved = torch.load(directory / _OPTIMIZER, weights_only=True)
        state.model.load_state_dict(load_file(directory / _WEIGHTS))
        state.optimizer.load_state_dict(saved["optimizer"])
        if state.adapter_optimizer is not None:
            state.adapter_optimizer.load_state_dict(saved["adapter_optimizer"])
        state.counters = _counters(tree)
        has_best = (directory / _BEST).exists()
        state.best_weights = load_file(directory / _BEST) if has_best else None
        torch.set_rng_state(saved["rng"])
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"checkpoint {directory} can not be loaded ({error}); check the path and that the"
            " config is the one it was trained with"
        ) from error


def _counters(tree: dict[str, Any]) -> Counters:  # Any: JSON
    return Counters(**{**tree, "window": BinarySums(**tree["window"])})


def _plain(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
