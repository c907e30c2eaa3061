"""AUC within groups: does the model order one user's rows, whatever it says across users."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from loopfm_ray.errors import MetricError, ShapeError
from loopfm_ray.metrics.binary import as_columns, is_positive

__all__ = ["GroupedAuc", "grouped_auc"]


@dataclass(frozen=True)
class GroupedAuc:
    """Result of `grouped_auc`."""

    value: float
    """Mean AUC over users with both labels, weighted by their rows."""
    share: float
    """Share of all rows that belong to those users."""
    num_groups: int
    """How many users had both labels."""


def grouped_auc(label: ArrayLike, score: ArrayLike, group: ArrayLike) -> GroupedAuc:
    """Return the AUC per group, weighted by rows over the groups that hold both labels.

    One sort by (group, score) gives every rank, so the cost is O(N log N).

    Args:
        label: [N] 0 or 1.
        score: [N] any monotone score; ties count half.
        group: [N] whole numbers, one per user.

    Raises:
        MetricError: no group holds both labels.
        ShapeError: the lengths differ.
    """
    label, score = as_columns(label, score)
    groups = np.asarray(group)
    if groups.shape != label.shape:
        raise ShapeError(f"group must have shape {label.shape}, found {groups.shape}")
    if len(label) == 0:
        raise MetricError("grouped AUC needs at least one row, found none; check the split")
    order = np.lexsort((score, groups))
    positive, score, groups = is_positive(label)[order], score[order], groups[order]
    is_new_group = np.concatenate(([True], groups[1:] != groups[:-1]))
    is_new_tie = is_new_group | np.concatenate(([True], score[1:] != score[:-1]))
    group_start = np.flatnonzero(is_new_group)
    tie_start = np.flatnonzero(is_new_tie)
    tie_size = np.diff(np.append(tie_start, len(score)))
    group_size = np.diff(np.append(group_start, len(score)))
    group_of = np.cumsum(is_new_group) - 1
    rank = np.repeat(tie_start + (tie_size + 1) / 2.0, tie_size) - group_start[group_of]
    num_positive = np.add.reduceat(positive.astype(np.int64), group_start)
    rank_sum = np.add.reduceat(np.where(positive, rank, 0.0), group_start)
    num_pairs = num_positive * (group_size - num_positive)
    kept = num_pairs > 0
    if not kept.any():
        raise MetricError(
            f"grouped AUC needs a group with both labels, found none in {len(kept)} groups;"
            " evaluate on more rows"
        )
    wins = rank_sum[kept] - num_positive[kept] * (num_positive[kept] + 1) / 2.0
    weight = group_size[kept]
    value = float(np.sum(wins / num_pairs[kept] * weight) / weight.sum())
    return GroupedAuc(value, float(weight.sum() / len(score)), int(kept.sum()))
