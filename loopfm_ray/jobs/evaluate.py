"""Measure the FM and the VMs on the test window, each on the same rows, with the probabilities that are served."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from loopfm_ray.data.examples import ExampleSet, Rows, read_rows
from loopfm_ray.errors import StoreError
from loopfm_ray.jobs.train_vm import VmData, VmJob
from loopfm_ray.jobs.training import score_rows
from loopfm_ray.metrics.calibration import calibration_bins, fit_platt
from loopfm_ray.store.filesystem import Location
from loopfm_ray.store.manifest import Manifest, read_manifest
from loopfm_ray.store.tables import write_atomically
from loopfm_ray.train.evaluate import Predictions, binary_metrics
from loopfm_ray.train.trained import load_trained_vm
from loopfm_ray.types import TimeRange

__all__ = ["EvaluationRecord", "evaluate_fm", "evaluate_vm", "read_record", "write_record"]

_PROB_EPSILON = 1e-7


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
    inputs_hash: str = ""


def evaluate_vm(job: VmJob) -> EvaluationRecord:
    """Score the test window with one trained VM."""
    torch.set_num_threads(1)
    data = VmData.open(job)
    trained = load_trained_vm(job.out_dir)
    manifest = read_manifest(job.out_dir)
    buckets = range(data.prepared.num_buckets)
    files = data.requests.files(job.splits.test)
    found = score_rows(trained.model, data.collator(buckets), files, job.splits.test)
    calibrated = Predictions(trained.calibration.apply(found.logit), found.label, found.user)
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
    )


def evaluate_fm(
    snapshot: Location, joined: Location, valid: TimeRange, test: TimeRange, seed: int
) -> EvaluationRecord:
    """Measure the stored FM predictions, calibrated on the same validation rows as the VMs are."""
    requests = ExampleSet.open(joined, "requests")
    on_valid, on_test = (_teacher(requests, window) for window in (valid, test))
    scaling = fit_platt(on_valid.label, on_valid.logit)
    calibrated = Predictions(scaling.apply(on_test.logit), on_test.label, on_test.user)
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
    )


def _weight_bytes(manifest: Manifest) -> int:
    return sum(entry.num_bytes for entry in manifest.files if entry.path.endswith(".safetensors"))


def _teacher(requests: ExampleSet, window: TimeRange) -> Predictions:
    columns = ["user", "label", "teacher_prob"]
    rows: Rows = read_rows(requests.files(window), window, columns=columns)
    prob = np.clip(rows["teacher_prob"].astype(np.float64), _PROB_EPSILON, 1 - _PROB_EPSILON)
    return Predictions(np.log(prob / (1 - prob)), rows["label"], rows["user"])


def _bins(predictions: Predictions) -> list[dict[str, float]]:
    return [asdict(item) for item in calibration_bins(predictions.label, predictions.prob)]


def write_record(record: EvaluationRecord, path: Path) -> None:
    """Write a record as JSON, whole or not at all."""
    text = json.dumps(asdict(record), indent=1)
    write_atomically(path, lambda staged: staged.write_text(text, encoding="utf-8"))


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
