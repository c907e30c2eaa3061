"""The best scores of each row: what `topk` finds, faster on a CPU where a few of many are wanted."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["best_columns"]

_WIDE = 8
"""Rows with less than so many times the wanted scores are left to `topk`."""
_SAMPLE_RANK = 10
"""The bound is this score of a sample; about so many times the sample's step of all scores reach it."""


def best_columns(scores: Tensor, num: int) -> Tensor:
    """Return [B, num] int64 the columns of the best of scores [B, E], best first; between ties any may come.

    A bound from a sample leaves about 2.5 times as many as are wanted, which one pass finds; `topk` chooses among these alone. Rows
    in which too few reach the bound are left to it whole.
    """
    width, step = scores.shape[1], num // 4
    if scores.device.type != "cpu" or width < _WIDE * num or step < 1:
        return scores.topk(num, dim=1).indices
    bound = scores[:, ::step].topk(_SAMPLE_RANK, dim=1).values[:, -1:]
    flat = np.flatnonzero((scores >= bound).numpy())
    row, column = np.divmod(flat, width)
    counts = np.bincount(row, minlength=len(scores))
    place = np.arange(len(flat)) - np.repeat(np.cumsum(counts) - counts, counts)
    rows, places = torch.from_numpy(row), torch.from_numpy(place)
    shape = len(scores), max(num, int(counts.max()))
    near, columns = scores.new_full(shape, -torch.inf), torch.zeros(shape, dtype=torch.int64)
    near[rows, places] = scores.reshape(-1)[torch.from_numpy(flat)]
    columns[rows, places] = torch.from_numpy(column)
    found = columns.gather(1, near.topk(num, dim=1).indices)
    few = torch.from_numpy(np.flatnonzero(counts < num))
    if len(few):
        found[few] = scores[few].topk(num, dim=1).indices
    return found
