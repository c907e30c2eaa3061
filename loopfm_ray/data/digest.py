"""A digest of all that batches of rows are made from, at a fraction of the cost of making and hashing the batches.

Pointers into the events of a bucket move with every new event, and files of examples lack what is looked up in the tables of
users and items, so checksums of files do not tell whether a batch would be the same. The digest reads what the collator
reads. Histories overlap, so every event that some row reads is taken once, and a row tells where among those its own lie.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopfm_ray.data.collate import Collator, RawHistorySource

__all__ = ["inputs_sha256"]


def inputs_sha256(
    rows: Mapping[str, NDArray[Any]],
    columns: Sequence[str],
    collate: Collator,
    source: RawHistorySource | None = None,
) -> str:
    """Return the hex digest of `columns` of rows of one bucket and of all that a model reads of the rows, labels apart.

    The same rows in another order have another digest.

    Args:
        rows: examples of one bucket, with the columns that `collate` reads.
        columns: those that count as they are; with a source `event_ts` must be one, for ages are taken from it.
        collate: of the schema of the model, without histories.
        source: the raw histories that the model reads, limited to the ids of its schema.
    """
    digest = hashlib.sha256()
    for name in columns:
        _add(digest, name, rows[name])
    batch = collate(rows)
    _add(digest, "ids", batch.ids.numpy())
    _add(digest, "numeric", batch.numeric.numpy())
    for name, ids in sorted(batch.sequences.items()):
        _add(digest, f"sequence {name}", ids.numpy())
    if source is not None:
        for name, values in _history_inputs(rows, source).items():
            _add(digest, f"raw {name}", values)
    return digest.hexdigest()


def _history_inputs(
    rows: Mapping[str, NDArray[Any]], source: RawHistorySource
) -> dict[str, NDArray[Any]]:
    """Return the events that rows read, each once in the order of the bucket, and which stretch of them each row reads."""
    length = np.asarray(rows["raw_len"], dtype=np.int64)
    size = np.minimum(length, source.max_len)
    some = np.flatnonzero(size)
    begin = np.zeros(len(size), dtype=np.int64)
    if not len(some):
        return {"begin": begin, "size": size}
    start = np.asarray(rows["raw_start"], dtype=np.int64)[some] + (length - size)[some]
    order = np.argsort(start, kind="stable")
    low, high = start[order], np.maximum.accumulate((start + size[some])[order])
    # slices that touch are one piece; pieces are laid end to end
    is_first = np.concatenate([[True], low[1:] > high[:-1]])
    first, stop = low[is_first], high[np.append(np.flatnonzero(is_first)[1:] - 1, -1)]
    shift = first - (np.cumsum(stop - first) - (stop - first))
    begin[some[order]] = low - shift[np.cumsum(is_first) - 1]
    places = np.arange(int((stop - first).sum())) + np.repeat(shift, stop - first)
    event_ts, items = source.entries(int(rows["bucket"][some[0]]), places)
    return {"begin": begin, "size": size, "event_ts": event_ts, "items": items}


def _add(digest: "hashlib._Hash", name: str, values: NDArray[Any]) -> None:
    whole = np.ascontiguousarray(values)
    digest.update(f"{name}{whole.shape}{whole.dtype.str}".encode())
    digest.update(whole.view(np.uint8).data)
