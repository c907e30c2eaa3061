"""Measure the FM and the VMs on the test window, each on the same rows, with the probabilities that are served.

The calibrated predictions are kept row by row, in order of (event_ts, example_id), so that models can be compared on the
same rows later.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from loopfm_ray.analysis.progressive import teacher_logit
from loopfm_ray.analysis.slices import is_repeat, slice_masks
from loopfm_ray.data.examples import ExampleSet, Rows, read_rows
from loopfm_ray.data.joined import teacher_prob_of
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.split import Splits
from loopfm_ray.errors import StoreError
from loopfm_ray.jobs.training import score_rows
from loopfm_ray.jobs.vm_data import VmData, VmJob
from loopfm_ray.metrics.calibration import calibration_bins, fit_platt
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.tables import read_parquet, write_parquet, write_text
from loopfm_ray.train.evaluate import Predictions, binary_metrics, task_metrics
from loopfm_ray.train.process import set_up_process
from loopfm_ray.train.trained import load_trained_vm
from loopfm_ray.types import TimeRange

__all__ = [
    "EvaluationRecord",
    "evaluate_fm",
    "evaluate_vm",
    "read_predictions",
    "read_record",
    "write_record",
]

_ROW_COLUMNS = ("example_id", "event_ts", "user", "item", "bucket", "label", "latent_len")


@dataclass(frozen=True)
class EvaluationRecord:
    """One model of one seed, measured on the validation and test windows."""

    name: str
    seed: int
    test: dict[str, float]
    valid: dict[str, float]
    calibration_bins: list[dict[str, float]]
    num_parameters: int
    num_bytes: int
    train_rows_per_s: float
    seconds: float
    slices: dict[str, dict[str, float]] = field(default_factory=dict)
    """The test metrics of parts of the rows, with their `share`; a part where they are not defined is left out."""
    tasks: dict[str, dict[str, float]] = field(default_factory=dict)
    """The test metrics of the model's further labels, by name, of its uncalibrated predictions."""
    inputs_hash: str = ""


def evaluate_vm(job: VmJob, predictions: Path) -> EvaluationRecord:
    """Score the test window with one trained VM and keep its predictions in a file."""
    set_up_process()
    data = VmData.open(job)
    trained = load_trained_vm(job.out_dir)
    manifest = read_manifest(job.out_dir)
    buckets = range(data.prepared.num_buckets)
    files = data.requests.files(job.splits.test)
    found = score_rows(trained.model, data.collator(buckets), files, job.splits.test)
    calibrated = Predictions(trained.calibration.apply(found.logit), found.label, found.user)
    rows = _test_rows(data.requests, job.splits.test)
    _keep(calibrated, rows, predictions)
    return EvaluationRecord(
        name=job.name,
        seed=job.seed,
        test=binary_metrics(calibrated),
        valid=dict(trained.record["valid"]),
        calibration_bins=_bins(calibrated),
        num_parameters=manifest.meta["num_parameters"],
        num_bytes=_weight_bytes(manifest),
        train_rows_per_s=trained.record["rows_per_s"],
        seconds=trained.record["train_s"],
        slices=_slices(calibrated, rows, data.prepared),
        tasks=task_metrics(found, data.schema.tasks),
    )


def evaluate_fm(
    snapshot: Location,
    joined: Location,
    prepared: Location,
    splits: Splits,
    seed: int,
    predictions: Path,
) -> EvaluationRecord:
    """Measure the stored FM predictions, calibrated on the same validation rows as the VMs are."""
    requests = ExampleSet.open(joined, "requests")
    on_valid, _ = _teacher(requests, splits.vm_valid)
    on_test, rows = _teacher(requests, splits.test, read_manifest(joined).meta.get("tasks", ()))
    scaling = fit_platt(on_valid.label, on_valid.logit)
    calibrated = Predictions(scaling.apply(on_test.logit), on_test.label, on_test.user)
    _keep(calibrated, rows, predictions)
    manifest = read_manifest(snapshot)
    record = manifest.meta["record"]
    return EvaluationRecord(
        name="fm",
        seed=seed,
        test=binary_metrics(calibrated),
        valid=binary_metrics(on_valid),
        calibration_bins=_bins(calibrated),
        num_parameters=record["num_parameters"],
        num_bytes=_weight_bytes(manifest),
        train_rows_per_s=record["rows_per_s"],
        seconds=record["train_s"],
        slices=_slices(calibrated, rows, PreparedData.open(prepared)),
        tasks=task_metrics(on_test, ("", *read_manifest(joined).meta.get("tasks", ()))),
    )


def _weight_bytes(manifest: Manifest) -> int:
    return sum(entry.num_bytes for entry in manifest.files if entry.path.endswith(".safetensors"))


def read_predictions(path: Path) -> dict[str, NDArray[Any]]:
    """Read what an evaluation kept: example_id, user, label and calibrated logit of each test row.

    Raises:
        StoreError: there is none, or it is damaged.
    """
    table = read_parquet(path)
    return {name: table.column(name).to_numpy() for name in table.column_names}


def _test_rows(requests: ExampleSet, window: TimeRange, *more: str) -> Rows:
    """Return what identifies the rows of a window, in the order in which they are scored."""
    columns = [*_ROW_COLUMNS, *more]
    rows = read_rows(requests.files(window), window, columns=columns)
    order = np.lexsort((rows["example_id"], rows["event_ts"]))
    return {name: values[order] for name, values in rows.items()}


def _teacher(
    requests: ExampleSet, window: TimeRange, tasks: Sequence[str] = ()
) -> tuple[Predictions, Rows]:
    """Return what the FM predicted of the first label and of `tasks`, and the rows."""
    rows = _test_rows(requests, window, "teacher_prob", *tasks, *map(teacher_prob_of, tasks))
    others = tuple(
        Predictions(teacher_logit(rows[teacher_prob_of(task)]), rows[task], rows["user"])
        for task in tasks
    )
    logit = teacher_logit(rows["teacher_prob"])
    return Predictions(logit, rows["label"], rows["user"], others), rows


def _keep(predictions: Predictions, rows: Rows, path: Path) -> None:
    if not np.array_equal(predictions.user, rows["user"]):
        raise AssertionError("rows were scored in another order than they were listed in")
    table = {
        "example_id": rows["example_id"],
        "user": rows["user"],
        "label": np.asarray(predictions.label, np.float32),
        "logit": np.asarray(predictions.logit, np.float64),
    }
    write_parquet(pa.table(table), path)


def _slices(
    predictions: Predictions, rows: Rows, prepared: PreparedData
) -> dict[str, dict[str, float]]:
    """Return the metrics of parts of the rows."""
    repeat = np.zeros(len(rows["user"]), dtype=bool)
    for bucket in np.unique(rows["bucket"]):
        mine = np.flatnonzero(rows["bucket"] == bucket)
        events = prepared.events(int(bucket))
        repeat[mine] = is_repeat(
            (rows["user"][mine], rows["item"][mine], rows["event_ts"][mine]),
            tuple(
                events.column(name).to_numpy()
                for name in ("user", "item", "event_ts", "available_ts")
            ),
        )
    found = {}
    for name, mask in slice_masks(repeat, rows["latent_len"]).items():
        part = Predictions(predictions.logit[mask], predictions.label[mask], predictions.user[mask])
        if 0 < part.label.sum() < len(part.label):
            found[name] = {**binary_metrics(part), "share": float(mask.mean())}
    return found


def _bins(predictions: Predictions) -> list[dict[str, float]]:
    return [asdict(item) for item in calibration_bins(predictions.label, predictions.prob)]


def write_record(record: EvaluationRecord, path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    text = json.dumps(asdict(record), indent=1)
    write_text(path, text)


def read_record(path: Path) -> EvaluationRecord | None:
    """Read what `write_record` wrote; None if there is nothing.

    Raises:
        StoreError: the file is damaged.
    """
    try:
        tree: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return EvaluationRecord(**tree)
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise StoreError(f"{path} is damaged ({error}); remove it and evaluate again") from error
