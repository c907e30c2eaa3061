"""Measures on a window of the joined set what a bundle carries, the reference, and what 8-bit weights would cost it."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.data.batch import Batch
from loopfm_ray.data.collate import Collator, HistorySource, LatentHistorySource
from loopfm_ray.data.examples import ExampleSet, Rows, iterate_rows
from loopfm_ray.data.joined import USER_SOURCE
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.data.schema import Side
from loopfm_ray.metrics.binary import normalized_entropy, sigmoid
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.serving.bundle import vocabulary_sizes
from loopfm_ray.serving.onnx import OnnxModel, export_onnx, quantize_onnx
from loopfm_ray.serving.reference import Reference, make_reference
from loopfm_ray.serving.spec import BundleSpec
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.types import UNKNOWN_ID, TimeRange

__all__ = ["MAX_ROWS", "measure_int8_loss", "measure_reference"]

MAX_ROWS = 200_000
"""More rows than these are thinned out evenly: deciles are known to a thousandth of the rows by then."""
_INT8_ROWS = 50_000
_BATCH_ROWS = 4096


def measure_reference(
    spec: BundleSpec,
    model: VerticalModel,
    prepared: PreparedData,
    joined: Location,
    window: TimeRange,
) -> Reference | None:
    """Return the reference of the rows of `window`; None when the joined set has none there.

    Args:
        spec: what the VM is, with its calibration.
        model: its weights, in evaluation mode.
        prepared: the data that was joined.
        joined: the joined version that the VM was trained on.
        window: of time, after what the VM learnt from.
    """
    kept: dict[str, list[NDArray[np.generic]]] = {"prob": [], "length": [], "user": [], "item": []}
    for rows, batch in _sampled(spec, prepared, joined, window, MAX_ROWS):
        kept["prob"].append(_score(spec, _logits(model, batch)))
        kept["user"].append(_is_unknown(spec, Side.USER, rows))
        kept["item"].append(_is_unknown(spec, Side.ITEM, rows))
        if spec.history is not None:
            kept["length"].append(rows["latent_len"])
    if not kept["prob"]:
        return None
    history = None
    if spec.history is not None:
        history = (np.concatenate(kept["length"]).astype(np.int64), spec.history.max_len)
    return make_reference(
        (window.start_ts, window.stop_ts),
        np.concatenate(kept["prob"]).astype(np.float64),
        history,
        float(np.concatenate(kept["user"]).mean()),
        float(np.concatenate(kept["item"]).mean()),
    )


def _sources(spec: BundleSpec, joined: Location, num_buckets: int) -> dict[str, HistorySource]:
    pin = spec.history
    if pin is None:
        return {}
    tables = read_histories(open_version(joined, "joined"), "history", range(num_buckets))
    return {USER_SOURCE: LatentHistorySource(tables, pin.code_spec, pin.max_len)}


def _sampled(
    spec: BundleSpec, prepared: PreparedData, joined: Location, window: TimeRange, max_rows: int
) -> Iterator[tuple[Rows, Batch]]:
    """Yield the rows of `window`, thinned out evenly to at most `max_rows`, with the batch that the model reads of them."""
    examples = ExampleSet.open(joined, "requests")
    collate = Collator(
        spec.schema, prepared.items, prepared.users, _sources(spec, joined, prepared.num_buckets)
    )
    columns = list(dict.fromkeys([*collate.columns, *(["latent_len"] if spec.history else [])]))
    every, seen = max(1, -(-examples.num_rows(window) // max_rows)), 0
    for block in iterate_rows(
        examples.files(window), window, columns=columns, batch_rows=_BATCH_ROWS
    ):
        size = len(block["event_ts"])
        first, seen = -seen % every, seen + size
        rows = {name: values[first::every] for name, values in block.items()}
        if len(rows["event_ts"]):
            yield rows, collate(rows)


def measure_int8_loss(
    spec: BundleSpec,
    model: VerticalModel,
    prepared: PreparedData,
    joined: Location,
    window: TimeRange,
) -> float:
    """Return the NE of the model with 8-bit weights less its own, on rows of `window`; NaN when there are none.

    Args:
        spec: what the VM is, with its calibration.
        model: its weights, in evaluation mode.
        prepared: the data that was joined.
        joined: the joined version that the VM was trained on.
        window: of time, after what the VM learnt from.

    Raises:
        BundleError: the model can not be exported to ONNX.
    """
    with tempfile.TemporaryDirectory() as folder:
        whole, rounded_to = Path(folder, "model.onnx"), Path(folder, "int8.onnx")
        latent_dim = spec.history.code_spec.dim if spec.history else None
        export_onnx(model, spec.schema, latent_dim, whole)
        quantize_onnx(whole, rounded_to)
        rounded = OnnxModel(rounded_to, spec.schema, latent_dim)
        labels, own, other = [], [], []
        for rows, batch in _sampled(spec, prepared, joined, window, _INT8_ROWS):
            labels.append(rows[spec.schema.tasks[0]])
            own.append(_score(spec, _logits(model, batch)))
            other.append(_score(spec, rounded.logits(batch)))
    if not labels:
        return float("nan")
    label = np.concatenate(labels)
    ne = [normalized_entropy(label, np.concatenate(probs)) for probs in (other, own)]
    return ne[0] - ne[1]


def _logits(model: VerticalModel, batch: Batch) -> NDArray[np.float64]:
    with torch.inference_mode():
        return model(batch)[:, 0].double().numpy()  # type: ignore[no-any-return]


def _score(spec: BundleSpec, logit: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(sigmoid(spec.calibration.apply(logit)))


def _is_unknown(spec: BundleSpec, side: Side, rows: Rows) -> NDArray[np.bool_]:
    """Return [B] whether a request with this user or item would find the VM without it, as serving counts it."""
    sizes, ids = vocabulary_sizes(spec.schema), rows[side.value]
    if (
        side.value not in sizes
    ):  # a VM that reads nothing of a user knows none; nobody is unknown to it then
        return np.full(len(ids), side == Side.ITEM)
    size = sizes[side.value]
    unknown = ids == UNKNOWN_ID
    return np.asarray(unknown if size is None else unknown | (ids >= size))
