"""Score batches and measure: the numbers of a run's summary."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loopfm_ray.data.collate import Batch
from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import BinarySums, Floats, auc, sigmoid
from loopfm_ray.metrics.grouped import grouped_auc
from loopfm_ray.train.step import first_logit

__all__ = ["Predictions", "binary_metrics", "predict"]


@dataclass(frozen=True)
class Predictions:
    """Outputs for the first task, row by row."""

    logit: NDArray[np.floating[Any]]
    """[N]"""
    label: NDArray[np.float32]
    """[N]"""
    user: NDArray[Any]
    """[N] whole numbers: whose row it is, for metrics per user."""

    @property
    def prob(self) -> Floats:
        """[N] predicted probabilities."""
        return sigmoid(self.logit)


def predict(
    model: nn.Module,
    batches: Iterable[tuple[NDArray[Any], Batch]],
    device: torch.device | str = "cpu",
) -> Predictions:
    """Score batches with an FM or a VM, without gradient and in evaluation mode.

    Args:
        model: on `device`; its mode is restored.
        batches: (users [B], batch) pairs.
        device: where to compute.
    """
    users, logits, labels = [], [], []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for user, batch in batches:
            logit = first_logit(model, batch.to(device))
            users.append(np.asarray(user))
            logits.append(logit.float().cpu().numpy())
            labels.append(batch.label[:, 0].cpu().numpy())
    model.train(was_training)
    if not users:
        raise MetricError("there are no rows to score; check the split and its time range")
    return Predictions(np.concatenate(logits), np.concatenate(labels), np.concatenate(users))


def binary_metrics(predictions: Predictions) -> dict[str, float]:
    """Return ne, auc, gauc, gauc_share, logloss and calibration of all rows.

    `gauc` is absent, and `gauc_share` 0, when no user has both labels.

    Raises:
        MetricError: no rows, or all labels equal.
    """
    label, prob = predictions.label, predictions.prob
    sums = BinarySums.from_probs(label, prob)
    result = {
        "ne": sums.normalized_entropy,
        "auc": auc(label, predictions.logit),
        "logloss": sums.logloss,
        "calibration": sums.calibration,
        "gauc_share": 0.0,
    }
    try:
        grouped = grouped_auc(label, predictions.logit, predictions.user)
    except MetricError:
        return result
    return {**result, "gauc": grouped.value, "gauc_share": grouped.share}
