"""Losses of the VM against labels and against the teacher, as sums that data-parallel shards normalise exactly."""

import torch
from torch import Tensor
from torch.nn import functional

from loopfm_ray.errors import ShapeError

__all__ = ["bce", "hint_mse", "kd_bce", "normalise", "weighted_bce_sum", "weighted_mse_sum"]


def weighted_bce_sum(logit: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([] sum over rows of weight * cross entropy, [] sum of weights).

    Args:
        logit: [B] output before the sigmoid.
        target: [B] in [0, 1]; takes no gradient.
        weight: [B] not negative; 0 drops a row, whatever its other values.

    Raises:
        ShapeError: the lengths differ.
    """
    if not (logit.dim() == 1 and logit.shape == target.shape == weight.shape):
        raise ShapeError(
            "a loss takes logit, target and weight of one length, found"
            f" {tuple(logit.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}"
        )
    is_kept = weight > 0
    # A dropped row may hold nan, which no weight of 0 would silence, forward or backward.
    logit = torch.where(is_kept, logit, 0.0)
    target = torch.where(is_kept, target.detach(), 0.0)
    loss = functional.binary_cross_entropy_with_logits(logit, target, reduction="none")
    return (loss * weight).sum(), weight.sum()


def bce(logit: Tensor, label: Tensor, weight: Tensor) -> Tensor:
    """Return [] the weighted mean cross entropy of logits [B] against labels [B]; 0 when no row has weight.

    Raises:
        ShapeError: the lengths differ.
    """
    total, weights = weighted_bce_sum(logit, label, weight)
    return total / weights.clamp_min(torch.finfo(weights.dtype).tiny)


def kd_bce(logit: Tensor, teacher_prob: Tensor, weight: Tensor) -> Tensor:
    """Return the weighted cross entropy of the VM against the teacher.

    Args:
        logit: [B] VM output before the sigmoid.
        teacher_prob: [B] FM probability in [0, 1]; takes no gradient.
        weight: [B] not negative; 0 drops a row.

    Returns:
        [] mean over rows with weight; 0 when there are none.

    Raises:
        ShapeError: the lengths differ.

    Source: ExFM, arXiv 2502.17494, section 3.3 equation 1, with the teacher's probability as a soft label.
    """
    return bce(logit, teacher_prob, weight)


def weighted_mse_sum(found: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return ([] sum over rows of weight * mean square difference of the row's numbers, [] sum of weights).

    Args:
        found: [B, D] what is trained.
        target: [B, D] takes no gradient.
        weight: [B] not negative; 0 drops a row, whatever its other values.

    Raises:
        ShapeError: the shapes differ.
    """
    if not (found.dim() == 2 and found.shape == target.shape and weight.shape == found.shape[:1]):
        raise ShapeError(
            "a square loss takes two tables of one shape and a weight for each row, found"
            f" {tuple(found.shape)}, {tuple(target.shape)} and {tuple(weight.shape)}"
        )
    is_kept = (weight > 0)[:, None]
    gap = torch.where(is_kept, found, 0.0) - torch.where(is_kept, target.detach(), 0.0)
    return (gap.square().mean(-1) * weight).sum(), weight.sum()


def hint_mse(hint: Tensor, teacher_latent: Tensor, weight: Tensor) -> Tensor:
    """Return [] the weighted mean square error of a mapped hidden layer [B, D] against the FM's latents [B, D].

    Raises:
        ShapeError: the shapes differ.

    Source: FitNets, arXiv 1412.6550, equation 3; the mean over the numbers of a row in place of half their sum, so that
    its weight does not depend on their count.
    """
    total, weights = weighted_mse_sum(hint, teacher_latent, weight)
    return total / weights.clamp_min(torch.finfo(weights.dtype).tiny)


def normalise(loss_sum: Tensor, global_rows: float, world_size: int = 1) -> Tensor:
    """Return [] a shard's loss such that the mean of gradients over workers is that of the whole batch.

    Data parallelism averages gradients over workers, so a shard's sum is divided by the rows of all shards and
    multiplied by the number of workers: shards of any size give exactly the single-process gradient.
    """
    return loss_sum * (world_size / max(global_rows, 1.0))
