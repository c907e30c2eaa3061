"""Progressive metrics: each row measured by the prediction that was made before its label was known."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.joined import teacher_prob_of
from loopfm_ray.errors import MetricError
from loopfm_ray.metrics.binary import BinarySums, sigmoid
from loopfm_ray.train.evaluate import Predictions, binary_metrics

__all__ = ["logit_of", "measure_stream", "teacher_logit"]

_EPSILON = 1e-7
_NAMES = ("ne", "auc", "logloss", "calibration")

Rows = Mapping[str, NDArray[Any]]
Json = dict[str, Any]  # Any: JSON


def teacher_logit(prob: NDArray[Any]) -> NDArray[np.float64]:
    """Return the logits [n] of the FM's probabilities."""
    clipped = np.clip(prob.astype(np.float64), _EPSILON, 1 - _EPSILON)
    logit: NDArray[np.float64] = np.log(clipped / (1 - clipped))
    return logit


def logit_of(task: str) -> str:
    """Return the column of the VM's logit for a task beside the first."""
    return f"logit_{task}"


def measure_stream(rows: Rows, measure_from_ts: int, tasks: Sequence[str] = ()) -> Json:
    """Measure the predictions of one stream, and the FM's on the same rows.

    Args:
        rows: [n] columns chunk, event_ts, user, label, logit and teacher_prob; of each of `tasks` its label and its logit, and the
            FM's prediction if it has one.
        measure_from_ts: rows from here on are the `test` part, those before the `valid` part.
        tasks: those beside the first.

    Returns:
        `test` and `valid`: ne, auc, logloss, calibration (mean prediction over mean label) and num_rows of the VM; `fm`: the same of
        the FM on the `test` rows; `chunks`: for each chunk its start among the rows, num_rows, and sums from which any
        stretch can be measured (label, prob, teacher: sums; logloss: a mean); `tasks`: by name `test` and `fm` of the others. `valid` is None
        where it can not be measured, and so are `test` and `fm` of the others.

    Raises:
        MetricError: the test part has no rows, or all its labels are equal.
    """
    is_test = rows["event_ts"] >= measure_from_ts
    return {
        "test": _metrics(rows, rows["logit"], is_test),
        "valid": _if_any(rows, rows["logit"], ~is_test),
        "fm": _metrics(rows, teacher_logit(rows["teacher_prob"]), is_test),
        "tasks": {task: _task(rows, task, is_test) for task in tasks},
        "chunks": _chunks(rows),
    }


def _task(rows: Rows, task: str, mask: NDArray[np.bool_]) -> Json:
    prob = rows.get(teacher_prob_of(task))
    own = {"user": rows["user"], "label": rows[task]}
    fm = None if prob is None else _if_any(own, teacher_logit(prob), mask)
    return {"test": _if_any(own, rows[logit_of(task)], mask), "fm": fm}


def _if_any(rows: Rows, logit: NDArray[Any], mask: NDArray[np.bool_]) -> Json | None:
    try:
        return _metrics(rows, logit, mask)
    except MetricError:
        return None


def _metrics(rows: Rows, logit: NDArray[Any], mask: NDArray[np.bool_]) -> Json:
    if not mask.any():
        raise MetricError(
            "a stream has no rows to measure; move stream.measure_from or stream.stop"
        )
    found = binary_metrics(Predictions(logit[mask], rows["label"][mask], rows["user"][mask]))
    return {**{name: found[name] for name in _NAMES}, "num_rows": int(mask.sum())}


def _chunks(rows: Rows) -> list[Json]:
    prob = sigmoid(rows["logit"])
    chunks = []
    for number in np.unique(rows["chunk"]):
        mask = rows["chunk"] == number
        sums = BinarySums.from_logits(rows["label"][mask], rows["logit"][mask])
        of_fm = BinarySums.from_logits(
            rows["label"][mask], teacher_logit(rows["teacher_prob"][mask])
        )
        chunks.append(
            {
                "chunk": int(number),
                "first_ts": int(rows["event_ts"][mask].min()),
                "num_rows": int(mask.sum()),
                "labels": float(rows["label"][mask].sum()),
                "probs": float(prob[mask].sum()),
                "teacher_probs": float(rows["teacher_prob"][mask].sum()),
                "logloss": sums.logloss,
                "fm_logloss": of_fm.logloss,
            }
        )
    return chunks
