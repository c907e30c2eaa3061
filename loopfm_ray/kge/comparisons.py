"""How a query vector is compared with entities: one matrix product where the algebra allows it, else in bounded memory.

Every backbone maps a head and a relation to a query [D] that lies where the tails lie; its score is one of these. All are
higher for better matches.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loopfm_ray.kge.candidates import blocks, compare_rows

__all__ = ["Comparison", "Dot", "Euclidean", "Manhattan", "Moduli", "SquaredEuclidean"]

_SMALLEST = 1e-12
"""Squared distances below it count as it: the root has no gradient at 0."""


class Comparison(Protocol):
    """Compares queries with all entities, or each query with its own candidates."""

    def against_all(self, query: Tensor, entity: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, E] from query [B, D] and entity [E, D], with bias [E] added."""
        ...

    def against(self, query: Tensor, entity: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K] from query [B, D], entity [E, D] and candidates [B, K] int64, rows of entity."""
        ...


class Dot:
    """`<q, e>`."""

    def against_all(self, query: Tensor, entity: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, E]."""
        return query @ entity.T if bias is None else torch.addmm(bias, query, entity.T)

    def against(self, query: Tensor, entity: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K]."""
        return compare_rows(self, query, entity, candidates)

    def score_rows(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return [b, K]."""
        return rows.mul_(query).sum(-1)

    def slopes(self, query: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return [b, D] and [b, K, D]."""
        of_query = torch.bmm(grad.mT, rows)[:, 0]
        return of_query, torch.mul(grad, query, out=rows)


class SquaredEuclidean:
    """`-|q - e|^2`, for all entities as `2 <q, e> - |q|^2 - |e|^2`."""

    def against_all(self, query: Tensor, entity: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, E]."""
        of_entity = -entity.square().sum(-1)
        added = of_entity if bias is None else of_entity + bias
        product = torch.addmm(added, query, entity.T, alpha=2.0)
        return product - query.square().sum(-1, keepdim=True)

    def against(self, query: Tensor, entity: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K]."""
        return compare_rows(self, query, entity, candidates)

    def score_rows(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return [b, K]."""
        return -rows.sub_(query).square_().sum(-1)

    def slopes(self, query: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return [b, D] and [b, K, D]."""
        return _opposite(rows.sub_(query).mul_(-2.0 * grad))


class Euclidean:
    """`-|q - e|`, for all entities as the root of the expanded square.

    Where the two nearly coincide, single precision gives the expanded form no more than three digits of the vectors' length.
    """

    def against_all(self, query: Tensor, entity: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, E]."""
        square = -SquaredEuclidean().against_all(query, entity, None)
        return _with_bias(-square.clamp_min(_SMALLEST).sqrt(), bias)

    def against(self, query: Tensor, entity: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K]."""
        return compare_rows(self, query, entity, candidates)

    def score_rows(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return [b, K]."""
        return -rows.sub_(query).square_().sum(-1).clamp_min_(_SMALLEST).sqrt_()

    def slopes(self, query: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return [b, D] and [b, K, D]."""
        difference = rows.sub_(query)
        square = difference.square().sum(-1, keepdim=True)
        return _opposite(difference.mul_(-grad / square.clamp_min_(_SMALLEST).sqrt_()))


class Manhattan:
    """`-|q - e|_1`; memory is that of the scores, forward and backward."""

    def against_all(self, query: Tensor, entity: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, E]."""
        return _with_bias(-torch.cdist(query, entity, p=1.0), bias)

    def against(self, query: Tensor, entity: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K]."""
        return compare_rows(self, query, entity, candidates)

    def score_rows(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return [b, K]."""
        return -rows.sub_(query).abs_().sum(-1)

    def slopes(self, query: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return [b, D] and [b, K, D]."""
        return _opposite(rows.sub_(query).sgn_().mul_(-grad))


class Moduli:
    """`-sum_k |q_k - e_k|` over D/2 complex numbers, the first half of a vector real parts, the second imaginary ones.

    Against all entities the memory is that of the scores, forward and backward; the gradient at 0 is 0.
    """

    def against_all(self, query: Tensor, entity: Tensor, bias: Tensor | None) -> Tensor:
        """Return [B, E]."""
        # type: torch does not type its functions
        distance: Tensor = _ModulusDistance.apply(query, entity)  # type: ignore[no-untyped-call]
        return _with_bias(distance.neg_(), bias)

    def against(self, query: Tensor, entity: Tensor, candidates: Tensor) -> Tensor:
        """Return [B, K]."""
        return compare_rows(self, query, entity, candidates)

    def score_rows(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return [b, K]."""
        real, imaginary = rows.sub_(query).square_().chunk(2, -1)
        return -real.add_(imaginary).sqrt_().sum(-1)

    def slopes(self, query: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return [b, D] and [b, K, D]."""
        difference = rows.sub_(query)
        real, imaginary = difference.chunk(2, -1)
        modulus = _modulus(real, imaginary).clamp_min_(_SMALLEST)
        scale = torch.div(-grad, modulus, out=modulus)
        for part in (real, imaginary):
            part.mul_(scale)
        return _opposite(difference)


def _opposite(of_rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of the query and of the rows, where the score depends on their difference alone."""
    return -of_rows.sum(1), of_rows


def _modulus(real: Tensor, imaginary: Tensor) -> Tensor:
    """Return the root of the squares, which takes half the time of `torch.hypot` and has no need of its range."""
    return (real * real).addcmul_(imaginary, imaginary).sqrt_()


def _with_bias(score: Tensor, bias: Tensor | None) -> Tensor:
    return score if bias is None else score + bias


class _ModulusDistance(torch.autograd.Function):
    """Sum of moduli [B, E], coordinate by coordinate over blocks of rows; backward computes the moduli again."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, entity: Tensor) -> Tensor:  # Any: torch's context
        ctx.save_for_backward(query, entity)
        distance = query.new_zeros(len(query), len(entity))
        columns = entity.T.contiguous()
        for rows in blocks(len(query), len(entity), query.device):
            for real, imaginary in _differences(query[rows], columns):
                distance[rows] += real.mul_(real).addcmul_(imaginary, imaginary).sqrt_()
        return distance

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        query, entity = ctx.saved_tensors
        columns, half = entity.T.contiguous(), query.shape[1] // 2
        of_query, of_columns = torch.zeros_like(query), torch.zeros_like(columns)
        for rows in blocks(len(query), len(entity), query.device):
            for k, (real, imaginary) in enumerate(_differences(query[rows], columns)):
                slope = grad[0][rows] / _modulus(real, imaginary).clamp_min_(_SMALLEST)
                for place, part in ((k, slope * real), (k + half, slope * imaginary)):
                    of_query[rows, place] = part.sum(1)
                    of_columns[place] -= part.sum(0)
        return of_query, of_columns.T


def _differences(query: Tensor, columns: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Give real and imaginary part [b, E] of q_k - e_k for each of the D/2 coordinates."""
    half = query.shape[1] // 2
    for k in range(half):
        yield query[:, k, None] - columns[k], query[:, k + half, None] - columns[k + half]
