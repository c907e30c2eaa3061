"""Who trains and ranks a graph embedding: this process, or workers of a cluster behind the same face."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import KgeModel
from loopfm_ray.kge.checkpoint import CheckpointFile
from loopfm_ray.kge.filters import KnownFacts
from loopfm_ray.kge.models import AnyKgeConfig
from loopfm_ray.kge.ranking import Ranks, rank_triples
from loopfm_ray.kge.training import KgeTrainConfig, TrainedKge, train_kge
from loopfm_ray.kge.triples import TripleSet

__all__ = ["KgeRunner", "LocalRunner", "needs_cluster"]


class KgeRunner(Protocol):
    """Trains and ranks, with as many workers as a config asks for."""

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
        """Train as `train_kge` does; what it keeps to go on from has the name `checkpoint`, perhaps with another ending."""
        ...

    def rank(
        self, model: KgeModel, triples: NDArray[np.int64], known: KnownFacts, config: KgeTrainConfig
    ) -> Ranks:
        """Rank triples as `rank_triples` does."""
        ...

    def forget(self, checkpoint: Path) -> None:
        """Remove what a training of that name kept."""
        ...


@dataclass(frozen=True)
class LocalRunner:
    """This process."""

    device: torch.device | str = "cpu"

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
        """Train here.

        Raises:
            ConfigError: the config asks for workers, be it for the ranking that comes after.
        """
        _check_alone(config)
        return train_kge(
            graph,
            backbone,
            config,
            CheckpointFile(checkpoint),
            device=self.device,
            on_epoch=on_epoch,
            teacher=teacher,
        )

    def rank(
        self, model: KgeModel, triples: NDArray[np.int64], known: KnownFacts, config: KgeTrainConfig
    ) -> Ranks:
        """Rank here.

        Raises:
            ConfigError: the config asks for workers.
        """
        _check_alone(config)
        return rank_triples(model, triples, known, device=model.entity.device)

    def forget(self, checkpoint: Path) -> None:
        """Remove the file."""
        checkpoint.unlink(missing_ok=True)


def needs_cluster(config: KgeTrainConfig) -> bool:
    """Return whether a training, or the ranking after it, asks for workers."""
    return config.num_workers > 1 or config.num_ranking_workers > 1


def _check_alone(config: KgeTrainConfig) -> None:
    if needs_cluster(config):
        raise ConfigError(
            f"train.num_workers is {config.num_workers} and train.num_ranking_workers {config.num_ranking_workers}, and this"
            " process works alone; set them to 1 and 0, or run `loopfm export-kge` or `loopfm experiment`, which start workers"
        )
