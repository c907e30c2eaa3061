"""Measures the reference that a bundle carries: the rows of a window of the joined set, scored as the bundle will score."""

import numpy as np
import torch
from numpy.typing import NDArray

from loopfm_ray.data.collate import Collator, HistorySource, LatentHistorySource
from loopfm_ray.data.examples import ExampleSet, Rows, iterate_rows
from loopfm_ray.data.joined import USER_SOURCE
from loopfm_ray.data.prepared import PreparedData, read_histories
from loopfm_ray.data.schema import Side
from loopfm_ray.metrics.binary import sigmoid
from loopfm_ray.models.vertical import VerticalModel
from loopfm_ray.serving.bundle import vocabulary_sizes
from loopfm_ray.serving.reference import Reference, make_reference
from loopfm_ray.serving.spec import BundleSpec
from loopfm_ray.store.cache import open_version
from loopfm_ray.store.filesystem import Location
from loopfm_ray.types import UNKNOWN_ID, TimeRange

__all__ = ["MAX_ROWS", "measure_reference"]

MAX_ROWS = 200_000
"""More rows than these are thinned out evenly: deciles are known to a thousandth of the rows by then."""
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
    examples = ExampleSet.open(joined, "requests")
    collate = Collator(
        spec.schema, prepared.items, prepared.users, _sources(spec, joined, prepared.num_buckets)
    )
    columns = list(dict.fromkeys([*collate.columns, *(["latent_len"] if spec.history else [])]))
    files = examples.files(window)
    num_rows = examples.num_rows(window)
    if num_rows == 0:
        return None
    every, seen = -(-num_rows // MAX_ROWS), 0
    kept: dict[str, list[NDArray[np.generic]]] = {"prob": [], "length": [], "user": [], "item": []}
    for block in iterate_rows(files, window, columns=columns, batch_rows=_BATCH_ROWS):
        size = len(block["event_ts"])
        first, seen = -seen % every, seen + size
        rows = {name: values[first::every] for name, values in block.items()}
        if not len(rows["event_ts"]):
            continue
        kept["prob"].append(_score(spec, model, collate, rows))
        kept["user"].append(_is_unknown(spec, Side.USER, rows))
        kept["item"].append(_is_unknown(spec, Side.ITEM, rows))
        if spec.history is not None:
            kept["length"].append(rows["latent_len"])
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


def _score(
    spec: BundleSpec, model: VerticalModel, collate: Collator, rows: Rows
) -> NDArray[np.float64]:
    with torch.inference_mode():
        logit = model(collate(rows))[:, 0].double().numpy()
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
