"""Backbones whose score is `h M_r t`: DistMult, ComplEx, SimplE and TuckER. All tails are one matrix product."""

from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import BaseKgeConfig, Even, GraphSize, KgeModel, uniform
from loopfm_ray.kge.comparisons import Dot
from loopfm_ray.models.embeddings import look_up

__all__ = [
    "ComplexConfig",
    "DistMultConfig",
    "SimpleConfig",
    "TuckerConfig",
    "build_complex",
    "build_distmult",
    "build_simple",
    "build_tucker",
    "complex_product",
]

Share = Annotated[float, Field(ge=0, lt=1)]


class DistMultConfig(BaseKgeConfig):
    """DistMult: a diagonal matrix for each relation."""

    kind: Literal["distmult"] = "distmult"
    init_scale: PositiveFloat = 1e-3
    """Standard deviation of all first values."""


class ComplexConfig(BaseKgeConfig):
    """ComplEx: a diagonal complex matrix for each relation."""

    kind: Literal["complex"] = "complex"
    dimension: Even = 32
    """Real parameters of an entity's vector: `dimension / 2` complex numbers."""
    init_scale: PositiveFloat = 1e-3
    """Standard deviation of all first values."""


class SimpleConfig(BaseKgeConfig):
    """SimplE: two vectors an entity, one as head and one as tail, and two a relation."""

    kind: Literal["simple"] = "simple"
    dimension: Even = 32
    """Real parameters of an entity: `dimension / 2` as head, then as many as tail."""


class TuckerConfig(BaseKgeConfig):
    """TuckER: one core tensor for all relations."""

    kind: Literal["tucker"] = "tucker"
    relation_dimension: PositiveInt | None = None
    """Width of a relation's vector; null takes `dimension`."""
    has_batch_norm: bool = True
    """Whether the head, and what it is mapped to, are normalised over the batch, as in the authors' code; needs reciprocal relations."""
    input_dropout: Share = 0.2
    """Dropout of the head's vector."""
    matrix_dropout: Share = 0.2
    """Dropout of the relation's matrix."""
    output_dropout: Share = 0.3
    """Dropout of what is compared with tails."""


class _Diagonal(nn.Module):
    is_complex, is_bilinear = False, True

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors)

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        return head * self.vectors(relation)

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        return tail * self.vectors(relation)

    def vectors(self, relation: Tensor) -> Tensor:
        return look_up(self.weight, relation)


class _ComplexDiagonal(_Diagonal):
    is_complex = True

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        return complex_product(head, *self.vectors(relation).chunk(2, -1))

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        real, imaginary = self.vectors(relation).chunk(2, -1)
        return complex_product(tail, real, -imaginary)


class _TwoDiagonals(_Diagonal):
    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        forward, inverse = self.vectors(relation).chunk(2, -1)
        as_head, as_tail = head.chunk(2, -1)
        return 0.5 * torch.cat([as_tail * inverse, as_head * forward], -1)

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        forward, inverse = self.vectors(relation).chunk(2, -1)
        as_head, as_tail = tail.chunk(2, -1)
        return 0.5 * torch.cat([as_tail * forward, as_head * inverse], -1)


class _Core(nn.Module):
    is_complex = False

    def __init__(self, config: TuckerConfig, num_maps: int) -> None:
        super().__init__()
        width, depth = config.dimension, config.relation_dimension or config.dimension
        self.is_bilinear = not config.has_batch_norm
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(num_maps, depth)))
        self.core = nn.Parameter(uniform(1.0, depth, width, width))
        self.norm_in, self.norm_out = (
            nn.BatchNorm1d(width) if config.has_batch_norm else nn.Identity() for _ in range(2)
        )
        self.drop_in = nn.Dropout(config.input_dropout)
        self.drop_matrix = nn.Dropout(config.matrix_dropout)
        self.drop_out = nn.Dropout(config.output_dropout)

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        query = self.drop_in(self.norm_in(head))
        mapped = torch.bmm(query[:, None], self._matrix(relation))[:, 0]
        result: Tensor = self.drop_out(self.norm_out(mapped))
        return result

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        mapped = torch.bmm(self._matrix(relation), self.drop_in(tail)[:, :, None])[..., 0]
        result: Tensor = self.drop_out(mapped)
        return result

    def vectors(self, relation: Tensor) -> Tensor:
        return look_up(self.weight, relation)

    def _matrix(self, relation: Tensor) -> Tensor:
        width = self.core.shape[1]
        matrix = (self.vectors(relation) @ self.core.flatten(1)).view(-1, width, width)
        dropped: Tensor = self.drop_matrix(matrix)
        return dropped


def complex_product(x: Tensor, real: Tensor, imaginary: Tensor) -> Tensor:
    """Return [B, D] the product of D/2 complex numbers, real parts of x first, with real [B, D/2] and imaginary [B, D/2]."""
    x_real, x_imaginary = x.chunk(2, -1)
    return torch.cat(
        [x_real * real - x_imaginary * imaginary, x_real * imaginary + x_imaginary * real], -1
    )


def build_distmult(config: DistMultConfig, size: GraphSize) -> KgeModel:
    """Build DistMult, `sum_k h_k r_k t_k`.

    Source: Yang et al. 2015, arXiv 1412.6575; first values as in Lacroix et al.'s code (facebookresearch/kbc).
    """
    relations = _Diagonal(config.init_scale * torch.randn(size.num_maps, config.dimension))
    entity = config.init_scale * torch.randn(size.num_entities, config.dimension)
    return KgeModel(entity, relations, Dot(), size)


def build_complex(config: ComplexConfig, size: GraphSize) -> KgeModel:
    """Build ComplEx, `Re sum_k h_k r_k conj(t_k)`.

    Source: Trouillon et al. 2016, arXiv 1606.06357, section 3; first values as in Lacroix et al. 2018, arXiv 1806.07297 (code
    facebookresearch/kbc), whose recipe is Adagrad with N3.
    """
    relations = _ComplexDiagonal(config.init_scale * torch.randn(size.num_maps, config.dimension))
    entity = config.init_scale * torch.randn(size.num_entities, config.dimension)
    return KgeModel(entity, relations, Dot(), size)


def build_simple(config: SimpleConfig, size: GraphSize) -> KgeModel:
    """Build SimplE, `(<h_H, r, t_T> + <t_H, r^-1, h_T>) / 2`.

    First values are uniform in +-6 / sqrt(D/2), as in the authors' code, which also clips scores at +-20; here they are not.
    Source: Kazemi and Poole 2018, arXiv 1802.04868, section 4.
    """
    bound = 6.0 / (config.dimension / 2) ** 0.5
    relations = _TwoDiagonals(uniform(bound, size.num_maps, config.dimension))
    return KgeModel(uniform(bound, size.num_entities, config.dimension), relations, Dot(), size)


def build_tucker(config: TuckerConfig, size: GraphSize) -> KgeModel:
    """Build TuckER, `W x_1 r x_2 h x_3 t`, with the dropout and batch norm of the authors' code.

    First values: normal by Xavier for vectors, uniform in +-1 for the core. Source: Balazevic et al. 2019, arXiv 1901.09590,
    section 4 (code ibalazevic/TuckER).

    Raises:
        ConfigError: batch norm without reciprocal relations.
    """
    if config.has_batch_norm and not size.is_reciprocal:
        raise ConfigError(
            "tucker with has_batch_norm scores tails alone, and is_reciprocal is false; set one of them otherwise"
        )
    entity = nn.init.xavier_normal_(torch.empty(size.num_entities, config.dimension))
    return KgeModel(entity, _Core(config, size.num_maps), Dot(), size)
