"""Which embedding tables a model trains with, by config."""

from typing import Annotated, Literal

from pydantic import Field

from loopfm_ray.config import Config
from loopfm_ray.models.embeddings import FieldEmbeddings, TableFactory
from loopfm_ray.models.sharded.embeddings import RowNoise, ShardedEmbeddings
from loopfm_ray.models.sharded.group import Group
from loopfm_ray.models.sharded.optim import RowAdamConfig, RowOptimConfig, build_row_optimizer

__all__ = ["EmbeddingConfig", "LocalConfig", "ShardedConfig", "table_factory"]


class LocalConfig(Config):
    """Every worker has all rows, and trains them with the optimizer of the other weights."""

    kind: Literal["local"] = "local"


class ShardedConfig(Config):
    """Each worker has a part of the rows; a step sends rows and gradients of its own ids alone."""

    kind: Literal["sharded"] = "sharded"
    optim: RowOptimConfig = RowAdamConfig()
    """Optimizer of the rows; `optim.embed_lr` and `embed_weight_decay` of the learning do not count."""


EmbeddingConfig = Annotated[LocalConfig | ShardedConfig, Field(discriminator="kind")]


def table_factory(config: LocalConfig | ShardedConfig, group: Group, seed: int) -> TableFactory:
    """Return what makes the tables of a config.

    Args:
        config: which tables.
        group: the workers.
        seed: of the rows of sharded tables; local ones draw from torch's generator.
    """
    if isinstance(config, LocalConfig):
        return FieldEmbeddings
    optimizer = build_row_optimizer(config.optim)
    return lambda cardinalities, dim: ShardedEmbeddings(
        cardinalities, dim, optimizer, group, RowNoise(seed)
    )
