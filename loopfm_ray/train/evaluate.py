"""Score batches and measure: the numbers of a run's summary."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from loopfm_ray.data.collate import Batch
from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import BinarySums, Floats, auc, sigmoid
from loopfm_ray.metrics.grouped import grouped_auc
from loopfm_ray.train.step import task_logits

__all__ = ["Predictions", "binary_metrics", "concat_predictions", "predict", "task_metrics"]


@dataclass(frozen=True)
class Predictions:
    """Outputs for one task, row by row."""

    logit: NDArray[np.floating[Any]]
    """[N]"""
    label: NDArray[np.float32]
    """[N]"""
    user: NDArray[Any]
    """[N] whole numbers: whose row it is, for metrics per user."""
    further: tuple["Predictions", ...] = ()
    """Of the model's other tasks on the same rows, in their order."""

    @property
    def prob(self) -> Floats:
        """[N] predicted probabilities."""
        return sigmoid(self.logit)


def predict(
    model: nn.Module,
    batches: Iterable[tuple[NDArray[Any], Batch]],
    device: torch.device | str = "cpu",
) -> Predictions:
    """Score batches with an FM or a VM, without gradient and in evaluation mode; for its first task, with the others beside it.

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
            logit = task_logits(model, batch.to(device))
            users.append(np.asarray(user))
            logits.append(logit.float().cpu().numpy())
            labels.append(batch.label.cpu().numpy())
    model.train(was_training)
    if not users:
        raise MetricError("there are no rows to score; check the split and its time range")
    logit_of, label_of = np.concatenate(logits).T, np.concatenate(labels).T
    first, *others = (
        Predictions(np.ascontiguousarray(one), np.ascontiguousarray(label), np.concatenate(users))
        for one, label in zip(logit_of, label_of, strict=True)
    )
    return replace(first, further=tuple(others))


def concat_predictions(parts: Sequence[Predictions]) -> Predictions:
    """Return the predictions of all `parts`, which are of one model, one after another."""
    others = zip(*(part.further for part in parts), strict=True)
    return Predictions(
        np.concatenate([part.logit for part in parts]),
        np.concatenate([part.label for part in parts]),
        np.concatenate([part.user for part in parts]),
        tuple(concat_predictions(other) for other in others),
    )


def task_metrics(predictions: Predictions, tasks: Sequence[str]) -> dict[str, dict[str, float]]:
    """Return the metrics of the model's further tasks by name; one whose labels are all equal has none.

    Args:
        predictions: of the model.
        tasks: names of all its tasks, the first one as well.
    """
    named: Mapping[str, Predictions] = dict(zip(tasks[1:], predictions.further, strict=True))
    return {
        name: binary_metrics(found)
        for name, found in named.items()
        if 0 < found.label.sum() < len(found.label)
    }


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
