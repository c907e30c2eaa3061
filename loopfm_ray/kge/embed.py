"""One run: read a graph, embed it, export the vectors and, where its entities are linked to items, the items' features."""

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, model_validator

from loopfm_ray.config import Config
from loopfm_ray.errors import ConfigError
from loopfm_ray.experiments import RayConfig
from loopfm_ray.kge.bilinear import ComplexConfig
from loopfm_ray.kge.export import export_kge, load_kge
from loopfm_ray.kge.filters import index_facts
from loopfm_ray.kge.item_features import ITEMS_FILE, Unlinked, write_item_features
from loopfm_ray.kge.linked import read_item_keys, read_linked_graph, read_links
from loopfm_ray.kge.models import KgeConfig
from loopfm_ray.kge.ranking import summarize_ranks
from loopfm_ray.kge.runner import KgeRunner, LocalRunner
from loopfm_ray.kge.training import KgeTrainConfig
from loopfm_ray.kge.triples import TripleSet, read_triples

__all__ = ["KgeRunConfig", "embed_graph", "read_graph"]


class SplitGraphConfig(Config):
    """A graph that is published in three splits."""

    kind: Literal["splits"] = "splits"
    path: str
    """Directory with one file a split."""


class LinkedGraphConfig(Config):
    """A graph in one file, linked to items: NAME.kg, NAME.link and NAME.item of RecBole."""

    kind: Literal["linked"] = "linked"
    path: str
    """A directory, or the .zip or .whl that holds the files."""
    name: str
    """What the names of the files begin with."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.02
    """Share of the triples for validation, and for test."""
    seed: NonNegativeInt = 0
    """Of the choice of these."""


class ItemFeaturesConfig(Config):
    """The table of the items' features."""

    unlinked: Unlinked = "mean"
    """What items without an entity take: the mean of those that have one, or zeros."""


class KgeRunConfig(Config):
    """A graph, how it is embedded, and what is written."""

    kind: Literal["kge"] = "kge"
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=100)
    """Name of the run's folder."""
    run_dir: str = "runs"
    """Folder of all runs."""
    graph: Annotated[SplitGraphConfig | LinkedGraphConfig, Field(discriminator="kind")]
    """What is embedded."""
    backbone: KgeConfig = Field(default=ComplexConfig())
    """The model."""
    train: KgeTrainConfig = KgeTrainConfig()
    """How it is trained."""
    items: ItemFeaturesConfig | None = None
    """Features of the items of a linked graph; null writes none."""
    ray: RayConfig = RayConfig()
    """Where workers run, if `train` asks for some."""

    @model_validator(mode="after")
    def _can_link(self) -> Self:
        if self.items is not None and self.graph.kind != "linked":
            raise ConfigError(
                f"items needs a graph of kind linked, found {self.graph.kind}; set items=null, or give the links"
            )
        return self

    @property
    def root(self) -> Path:
        """The run's folder."""
        return Path(self.run_dir) / self.name


def embed_graph(
    config: KgeRunConfig,
    *,
    fresh: bool = False,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
    runner: KgeRunner | None = None,
) -> dict[str, Any]:  # Any: JSON
    """Embed a graph and export it; a training that was stopped goes on from its checkpoint.

    Args:
        config: of the run.
        fresh: whether the checkpoint is removed first.
        device: where to train.
        on_epoch: called after every epoch with its number and mean loss.
        runner: who trains and ranks; None is this process, on `device`.

    Returns:
        Sizes, metrics and the paths of what was written.

    Raises:
        ConfigError: there is no such device, or workers are asked for that `runner` has not.
        ConfigError, DataError, SchemaError: the graph, its links or its items can not be read.
        MetricError: the training diverges.
        StoreError: the checkpoint is of another training, or the disk is full.
    """
    _check_device(device)
    runner = LocalRunner(device) if runner is None else runner
    checkpoint = config.root / "checkpoint.pt"
    if fresh:
        runner.forget(checkpoint)
    graph = read_graph(config)
    linked = _read_items(config)
    trained = runner.train(graph, config.backbone, config.train, checkpoint, on_epoch=on_epoch)
    known = index_facts(graph.all_triples(), graph.num_entities, graph.num_relations)
    ranks = runner.rank(trained.model, graph.test, known, config.train)
    test = asdict(summarize_ranks(ranks, graph.has_unseen("test")))
    path = config.root / "embeddings"
    named = {f"test_{name}": value for name, value in test.items()}
    manifest = export_kge(trained, graph, config.backbone, config.train, path, named)
    result = {
        "num_entities": graph.num_entities,
        "num_relations": graph.num_relations,
        "num_triples": [len(graph.train), len(graph.valid), len(graph.test)],
        "epochs": trained.num_epochs,
        "valid_mrr": trained.best_mrr,
        "test_mrr": test["mrr"],
        "embeddings": str(path),
        "version": manifest.version,
    }
    if config.items is None or linked is None:
        return result
    items = config.root / "items"
    written = write_item_features(load_kge(path), *linked, items, config.items.unlinked)
    return {**result, "items": str(items / ITEMS_FILE), "item_counts": written.meta}


def _check_device(device: torch.device | str) -> None:
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"device {device} can not be used: {reason}; take cpu") from error


def read_graph(config: KgeRunConfig) -> TripleSet:
    """Return the graph of a run.

    Raises:
        DataError, SchemaError: it can not be read.
    """
    graph = config.graph
    if isinstance(graph, SplitGraphConfig):
        return read_triples(Path(graph.path))
    return read_linked_graph(Path(graph.path), graph.name, graph.held_out, graph.seed)


def _read_items(config: KgeRunConfig) -> tuple[dict[str, str], list[str]] | None:
    """Return item -> entity and all items, None where no features are wanted."""
    if config.items is None or not isinstance(config.graph, LinkedGraphConfig):
        return None
    root, name = Path(config.graph.path), config.graph.name
    return read_links(root, name), read_item_keys(root, name)
