"""Scores of each query against its own candidates, block by block: no [B, K, D] is held, forward or backward.

What is gathered for a block stays in the caches and in the same memory, and backward gathers it again: cheaper than the page
faults of fresh arrays of [B, K, D].
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["RowComparison", "blocks", "compare_rows"]

_CELLS = 1 << 17
"""Numbers that are worked on at a time, for each thread: what a core's cache holds."""
_CELLS_OF_ACCELERATOR = 1 << 28


class RowComparison(Protocol):
    """A score and its slopes; both may write over `rows`."""

    def score_rows(self, query: Tensor, rows: Tensor) -> Tensor:
        """Return [b, K] the scores of query [b, 1, D] and rows [b, K, D]."""
        ...

    def slopes(self, query: Tensor, rows: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients [b, D] of the query and [b, K, D] of the rows, from grad [b, K, 1] of the scores."""
        ...


def compare_rows(
    comparison: RowComparison, query: Tensor, entity: Tensor, candidates: Tensor
) -> Tensor:
    """Return [B, K] the scores of query [B, D] and the rows candidates [B, K] int64 of entity [E, D]."""
    # type: torch does not type its functions
    scores: Tensor = _Rows.apply(comparison, query, entity, candidates)  # type: ignore[no-untyped-call]
    return scores


def blocks(num: int, width: int, device: torch.device) -> Iterator[slice]:
    """Cut `num` rows of `width` numbers into blocks that the caches hold."""
    is_cpu = device.type == "cpu"
    cells = _CELLS * torch.get_num_threads() if is_cpu else _CELLS_OF_ACCELERATOR
    step = max(1, cells // max(1, width))
    for start in range(0, num, step):
        yield slice(start, min(num, start + step))


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(  # Any: torch's context
        ctx: Any, comparison: RowComparison, query: Tensor, entity: Tensor, candidates: Tensor
    ) -> Tensor:
        ctx.save_for_backward(query, entity, candidates)
        ctx.comparison = comparison
        scores = query.new_empty(candidates.shape)
        for block, _, rows in _gathered(entity, candidates):
            scores[block] = comparison.score_rows(query[block, None], rows)
        return scores

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad: Tensor) -> tuple[None, Tensor, Tensor, None]:
        query, entity, candidates = ctx.saved_tensors
        of_query, of_entity = torch.empty_like(query), torch.zeros_like(entity)
        for block, ids, rows in _gathered(entity, candidates):
            slopes = ctx.comparison.slopes(query[block, None], rows, grad[0][block, :, None])
            of_query[block] = slopes[0]
            of_entity.index_add_(0, ids, slopes[1].flatten(0, 1))
        return None, of_query, of_entity, None


def _gathered(entity: Tensor, candidates: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Give each block, its ids [b * K] and their rows [b, K, D], always in the same memory."""
    num, width = candidates.shape
    memory: Tensor | None = None
    for block in blocks(num, width * entity.shape[1], entity.device):
        ids = candidates[block].flatten()
        if memory is None:
            memory = entity.new_empty(len(ids), entity.shape[1])
        rows = torch.index_select(entity, 0, ids, out=memory[: len(ids)])
        yield block, ids, rows.view(-1, width, entity.shape[1])
