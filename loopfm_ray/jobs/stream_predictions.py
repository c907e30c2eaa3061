"""What a stream predicted, kept chunk by chunk while it runs."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from loopfm_ray.analysis.progressive import logit_of
from loopfm_ray.data.examples import Rows, concat_rows, count_rows
from loopfm_ray.data.joined import teacher_prob_of
from loopfm_ray.jobs.evaluate import read_predictions
from loopfm_ray.store.tables import write_parquet
from loopfm_ray.train.evaluate import Predictions

__all__ = ["KEPT", "make_keeper", "merge_kept"]

KEPT = ("example_id", "event_ts", "user", "label", "teacher_prob")
"""Columns of the rows that are kept beside the predictions."""


def make_keeper(work: Path, tasks: Sequence[str]) -> Callable[[int, Rows, Predictions], None]:
    """Return what writes the predictions of a chunk to a file of its own under `work`.

    Args:
        work: folder of the stream.
        tasks: of the VM; of those beside the first the label, the logit and, where it is known, the FM's prediction are kept.
    """

    def keep(number: int, rows: Rows, predicted: Predictions) -> None:
        columns = {name: rows[name] for name in KEPT}
        columns["chunk"] = np.full(count_rows(rows), number, dtype=np.int32)
        columns["logit"] = predicted.logit.astype(np.float32)
        for task, found in zip(tasks[1:], predicted.further, strict=True):
            columns[task] = rows[task]
            columns[logit_of(task)] = found.logit.astype(np.float32)
            if teacher_prob_of(task) in rows:
                columns[teacher_prob_of(task)] = rows[teacher_prob_of(task)]
        path = work / "predictions" / f"{number:06d}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_parquet(pa.table(columns), path)

    return keep


def merge_kept(work: Path) -> Rows | None:
    """Return the predictions of all chunks; None if there are none."""
    paths = sorted((work / "predictions").glob("*.parquet"))
    return concat_rows([read_predictions(path) for path in paths]) if paths else None
