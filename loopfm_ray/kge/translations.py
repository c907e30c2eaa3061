"""Backbones whose score is a distance after a motion: TransE, RotatE and RotE."""

import math
from typing import Literal

import torch
from pydantic import PositiveFloat
from torch import Tensor, nn
from torch.nn import functional

from loopfm_ray.kge.backbone import BaseKgeConfig, Even, GraphSize, KgeModel, uniform
from loopfm_ray.kge.bilinear import complex_product
from loopfm_ray.kge.comparisons import Comparison, Euclidean, Manhattan, Moduli, SquaredEuclidean
from loopfm_ray.models.embeddings import look_up

__all__ = [
    "RotateConfig",
    "RoteConfig",
    "TranseConfig",
    "build_rotate",
    "build_rote",
    "build_transe",
]

_EPSILON = 2.0
"""What RotatE's code adds to the margin for the range of first values."""


class TranseConfig(BaseKgeConfig):
    """TransE: a relation is a translation."""

    kind: Literal["transe"] = "transe"
    norm: Literal["l1", "l2"] = "l1"
    """The distance."""
    init_margin: PositiveFloat = 9.0
    """gamma of the first values; take the margin of the loss."""


class RotateConfig(BaseKgeConfig):
    """RotatE: a relation turns each complex number."""

    kind: Literal["rotate"] = "rotate"
    dimension: Even = 32
    """Real parameters of an entity's vector: `dimension / 2` complex numbers."""
    init_margin: PositiveFloat = 9.0
    """gamma of the first values, and of the unit that phases are learnt in; take the margin of the loss."""


class RoteConfig(BaseKgeConfig):
    """RotE: a relation turns each pair of numbers, then moves them."""

    kind: Literal["rote"] = "rote"
    dimension: Even = 32
    """Real parameters of an entity's vector, turned in pairs; two biases an entity come beside."""
    init_scale: PositiveFloat = 1e-3
    """Standard deviation of the first values of entities and translations."""


class _Translation(nn.Module):
    is_complex, is_bilinear = False, False

    def __init__(self, vectors: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(vectors)

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        return head + self.vectors(relation)

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        return tail - self.vectors(relation)

    def vectors(self, relation: Tensor) -> Tensor:
        return look_up(self.weight, relation)


class _Phases(nn.Module):
    is_complex, is_bilinear = True, False

    def __init__(self, num_maps: int, num_phases: int, bound: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(uniform(bound, num_maps, num_phases))
        self.radians = math.pi / bound

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        phase = self._phase(relation)
        return complex_product(head, torch.cos(phase), torch.sin(phase))

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        phase = self._phase(relation)
        return complex_product(tail, torch.cos(phase), -torch.sin(phase))

    def vectors(self, relation: Tensor) -> None:  # noqa: ARG002  every relation has length 1
        return None

    def _phase(self, relation: Tensor) -> Tensor:
        return look_up(self.weight, relation) * self.radians


class _Motion(nn.Module):
    is_complex, is_bilinear = False, False

    def __init__(self, rotation: Tensor, translation: Tensor) -> None:
        super().__init__()
        self.rotation = nn.Parameter(rotation)
        self.translation = nn.Parameter(translation)

    def to_tail(self, head: Tensor, relation: Tensor) -> Tensor:
        cosine, sine = self._rotation(relation)
        return complex_product(head, cosine, sine) + self.vectors(relation)

    def to_head(self, tail: Tensor, relation: Tensor) -> Tensor:
        cosine, sine = self._rotation(relation)
        return complex_product(tail - self.vectors(relation), cosine, -sine)

    def vectors(self, relation: Tensor) -> Tensor:
        return look_up(self.translation, relation)

    def _rotation(self, relation: Tensor) -> tuple[Tensor, Tensor]:
        half = self.rotation.shape[1] // 2
        pairs = look_up(self.rotation, relation).view(-1, 2, half)
        cosine, sine = functional.normalize(pairs, dim=1).unbind(1)
        return cosine, sine


def build_transe(config: TranseConfig, size: GraphSize) -> KgeModel:
    """Build TransE, `-|h + r - t|` in the L1 or L2 norm.

    First values are uniform in +-(gamma + 2) / D, as in RotatE's code, which published TransE's usual figures; entities are not
    kept on the unit sphere as in the first paper. Source: Bordes et al. 2013 (NIPS), section 2; Sun
    et al. 2019, arXiv 1902.10197 (code DeepGraphLearning/KnowledgeGraphEmbedding).
    """
    bound = (config.init_margin + _EPSILON) / config.dimension
    comparison: Comparison = Manhattan() if config.norm == "l1" else Euclidean()
    relations = _Translation(uniform(bound, size.num_maps, config.dimension))
    return KgeModel(
        uniform(bound, size.num_entities, config.dimension), relations, comparison, size
    )


def build_rotate(config: RotateConfig, size: GraphSize) -> KgeModel:
    """Build RotatE, `-sum_k |h_k r_k - t_k|` with `|r_k| = 1`.

    First values are uniform in +-(gamma + 2) / (D/2); phases are uniform over the circle and learnt in units of that range over
    pi. Source: Sun et al. 2019, arXiv 1902.10197, section 3 (code DeepGraphLearning/KnowledgeGraphEmbedding).
    """
    num_numbers = config.dimension // 2
    bound = (config.init_margin + _EPSILON) / num_numbers
    relations = _Phases(size.num_maps, num_numbers, bound)
    return KgeModel(uniform(bound, size.num_entities, config.dimension), relations, Moduli(), size)


def build_rote(config: RoteConfig, size: GraphSize) -> KgeModel:
    """Build RotE, `-|Rot(r) h + r - t|^2 + b_h + b_t`.

    Chosen among low-dimensional backbones because all tails are one matrix product; at dimension 32 its MRR on WN18RR is .455, where
    ComplEx-N3 has .407 and hyperbolic RotH .473. First values as in the authors' code: small normal vectors, rotations uniform in
    +-1 before they are normalised, biases 0; pairs there are neighbours, here halves, which is the same up to order. Source: Chami
    et al. 2020, arXiv 2005.00545 (code HazyResearch/KGEmb).
    """
    rotation = uniform(1.0, size.num_maps, config.dimension)
    relations = _Motion(rotation, config.init_scale * torch.randn(size.num_maps, config.dimension))
    entity = config.init_scale * torch.randn(size.num_entities, config.dimension)
    return KgeModel(entity, relations, SquaredEuclidean(), size, biases=(True, True))
