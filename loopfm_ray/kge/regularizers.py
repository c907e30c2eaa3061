"""Regularisers over the factors of a batch of triples: N3 and DURA."""

from torch import Tensor

from loopfm_ray.errors import ConfigError
from loopfm_ray.kge.backbone import Factors

__all__ = ["dura", "n3"]


def n3(factors: Factors) -> Tensor:
    """Return [] the mean over triples of `|h|_3^3 + |r|_3^3 + |t|_3^3`, of moduli where vectors are complex.

    The paper's weight multiplies the sum, as in the authors' code. Source: Lacroix et al. 2018, arXiv 1806.07297
    (code facebookresearch/kbc).
    """
    parts = (factors.head, factors.relation, factors.tail)
    cubes = [part.abs().pow(3).sum() for part in parts if part is not None]
    return sum(cubes[1:], cubes[0]) / len(factors.head)


def dura(factors: Factors, plain: float = 1.0, mapped: float = 1.0) -> Tensor:
    """Return [] the mean over triples of `plain (|h|^2 + |t|^2) + mapped (|h M_r|^2 + |M_r t|^2)`.

    The authors' code weighs the two by .5 and 1.5 for some sets. Source: Zhang et al. 2020, arXiv 2011.05816
    (code MIRALab-USTC/KGE-DURA).

    Raises:
        ConfigError: the backbone is not bilinear.
    """
    if factors.mapped_head is None or factors.mapped_tail is None:
        raise ConfigError(
            "DURA is defined for scores h M_r t: distmult, complex, simple, and tucker without batch norm; take N3"
        )
    lengths = factors.head.square().sum() + factors.tail.square().sum()
    images = factors.mapped_head.square().sum() + factors.mapped_tail.square().sum()
    return (plain * lengths + mapped * images) / len(factors.head)
