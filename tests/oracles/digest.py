"""Slow twin of the digest of rows: everything that a model reads of them, one row at a time, as plain values."""

from collections.abc import Sequence
from typing import Any

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema
from tests.oracles.collate import ids_twin, numeric_twin, raw_twin


def inputs_twin(
    data: PreparedData,
    schema: FeatureSchema,
    rows: dict[str, Any],
    columns: Sequence[str],
    max_len: int,
) -> list[Any]:
    """Return a value for each row that differs when anything differs that the row's embedding depends on."""
    out = []
    for row in range(len(rows["item"])):
        sequences = []
        for field in schema.sequences:
            ids = [int(v) if v < field.cardinality else 0 for v in rows[field.name][row]]
            while ids and ids[-1] == 0:
                ids.pop()
            sequences.append(ids)
        out.append(
            (
                [rows[name][row].item() for name in columns],
                ids_twin(data, schema, rows, row),
                numeric_twin(data, schema, rows, row),
                sequences,
                raw_twin(data, schema, rows, row, max_len),
            )
        )
    return out
