"""ConvE: a convolution over the head and the relation laid out as a picture."""

import math
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import BaseKgeConfig, GraphSize, KgeModel
from loopfm_ray.kge.comparisons import Dot
from loopfm_ray.models.embeddings import look_up

__all__ = ["ConveConfig", "build_conve"]

Share = Annotated[float, Field(ge=0, lt=1)]
_KERNEL = 3


class ConveConfig(BaseKgeConfig):
    """ConvE: 3 x 3 filters over a picture of head above relation, then a dense layer."""

    kind: Literal["conve"] = "conve"
    dimension: PositiveInt = 32
    """Real parameters of an entity's vector; a bias comes beside."""
    rows: PositiveInt | None = None
    """Rows of a vector's picture, a divisor of `dimension`; null takes the largest one up to its root: 4 of 32, 10 of 200."""
    num_filters: PositiveInt = 32
    """Filters of the convolution."""
    input_dropout: Share = 0.2
    """Dropout of the picture."""
    map_dropout: Share = 0.2
    """Dropout of whole feature maps."""
    output_dropout: Share = 0.3
    """Dropout of the dense layer's output."""


class _Convolution(nn.Module):
    is_complex, is_bilinear = False, False

    def __init__(self, config: ConveConfig, rows: int, num_maps: int) -> None:
        super().__init__()
        columns = config.dimension // rows
        self.rows = rows
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_maps, config.dimension)))
        self.norm_in = nn.BatchNorm2d(1)
        self.drop_in = nn.Dropout(config.input_dropout)
        self.filters = nn.Conv2d(1, config.num_filters, _KERNEL)
        self.norm_maps = nn.BatchNorm2d(config.num_filters)
        self.drop_maps = nn.Dropout2d(config.map_dropout)
        cells = config.num_filters * (2 * rows - _KERNEL + 1) * (columns - _KERNEL + 1)
        self.dense = nn.Linear(cells, config.dimension)
        self.drop_out = nn.Dropout(config.output_dropout)
        self.norm_out = nn.BatchNorm1d(config.dimension)

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        pictures = (x.view(len(x), self.rows, -1) for x in (head, self.vectors(relation)))
        stacked = torch.cat(list(pictures), 1)[:, None]
        maps = self.filters(self.drop_in(self.norm_in(stacked)))
        maps = self.drop_maps(functional.relu(self.norm_maps(maps)))
        dense = self.norm_out(self.drop_out(self.dense(maps.flatten(1))))
        return functional.relu(dense)

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:  # noqa: ARG002  of a protocol
        raise AssertionError("build_conve refuses a model that would ask for this")

    def vectors(self, relation: Tensor) -> Tensor:
        return look_up(self.weight, relation)


def build_conve(config: ConveConfig, size: GraphSize) -> KgeModel:
    """Build ConvE, `f(vec(f([h; r] * w)) W) t + b_t`.

    Order of layers, dropout and first values as in the authors' code: Xavier normal vectors, torch's defaults for the rest. Source:
    Dettmers et al. 2018, arXiv 1707.01476, equation 1 (code TimDettmers/ConvE).

    Raises:
        ConfigError: no reciprocal relations, `rows` does not divide `dimension`, or a picture narrower than a filter.
    """
    if not size.is_reciprocal:
        raise ConfigError("conve scores tails alone; set is_reciprocal to true")
    rows = config.rows or _largest_divisor(config.dimension)
    columns = config.dimension // rows
    if rows * columns != config.dimension or columns < _KERNEL or 2 * rows < _KERNEL:
        raise ConfigError(
            f"conve lays dimension {config.dimension} out in {rows} rows; rows must divide it, with at least 2 rows"
            f" and {_KERNEL} columns; set another dimension or rows"
        )
    entity = nn.init.xavier_normal_(torch.empty(size.num_entities, config.dimension))
    relations = _Convolution(config, rows, size.num_maps)
    return KgeModel(entity, relations, Dot(), size, biases=(False, True))


def _largest_divisor(number: int) -> int:
    return max(part for part in range(1, math.isqrt(number) + 1) if number % part == 0)
