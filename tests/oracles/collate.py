"""Slow twin of the collator: one row, one history, one cell at a time."""

from typing import Any

import numpy as np

from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import FeatureSchema, Side


def ids_twin(
    data: PreparedData, schema: FeatureSchema, rows: dict[str, Any], row: int
) -> list[int]:
    """Return the ids of one row in schema order."""
    out = []
    for field in schema.categorical:
        if field.side == Side.CONTEXT:
            value = int(rows[field.name][row])
        else:
            entity = int(rows[field.side.value][row])
            table = data.users if field.side == Side.USER else data.items
            value = entity if field.name == field.side.value else int(table.ids[field.name][entity])
        out.append(value if value < field.cardinality else 0)
    return out


def numeric_twin(
    data: PreparedData, schema: FeatureSchema, rows: dict[str, Any], row: int
) -> list[float]:
    """Return the numbers of one row in schema order."""
    out = []
    for field in schema.numeric:
        if field.side in (Side.CONTEXT, Side.PAST):
            out.append(float(rows[field.name][row]))
        else:
            table = data.users if field.side == Side.USER else data.items
            out.append(float(table.numeric[field.name][int(rows[field.side.value][row])]))
    return out


def raw_twin(
    data: PreparedData, schema: FeatureSchema, rows: dict[str, Any], row: int, max_len: int
) -> tuple[list[list[int]], list[float]]:
    """Return the item ids and ages of the history of one row, oldest first, from the events of its user."""
    events = [
        event
        for event in data.events(int(rows["bucket"][row])).to_pylist()
        if event["user"] == rows["user"][row]
        and event["event_ts"] < rows["event_ts"][row]
        and event["available_ts"] <= rows["event_ts"][row]
    ]
    # Late labels append copies of rows to the table, so count each event once.
    events = list({event["example_id"]: event for event in events}.values())
    events.sort(key=lambda event: (event["event_ts"], event["example_id"]))
    ids, ages = [], []
    for event in events[-max_len:]:
        cell = []
        for field in schema.of("categorical", Side.ITEM):  # type: ignore[arg-type]  # a StrEnum equals its text
            value = (
                event["item"]
                if field.name == "item"
                else int(data.items.ids[field.name][event["item"]])
            )
            cell.append(value if value < field.cardinality else 0)
        ids.append(cell)
        ages.append(float(np.float32((int(rows["event_ts"][row]) - event["event_ts"]) / 1e6)))
    return ids, ages
