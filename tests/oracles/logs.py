"""Small logs for tests: rows to files, whole preparations, and errors planted in a good log."""

import datetime
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from loopfm_ray.data.config import ColumnsConfig, EntityConfig, EventsConfig, SplitConfig
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData

DAY_US = 86_400_000_000
ORIGIN = "2024-01-01"
ORIGIN_TS = 1_704_067_200_000_000

COLUMNS = ColumnsConfig(
    user="uid", item="sku", event_ts="at", label="clicked", label_ts="known_at", categorical={"shop": "shop"},
    numeric={"price": "price"},
)  # fmt: skip


def good_rows(num: int = 40) -> list[dict[str, Any]]:
    """Return rows of a log that is right: 5 users, 7 items, four weeks, one row about every 17 hours."""
    step = 28 * DAY_US // num
    return [
        {
            "uid": f"u{n % 5}",
            "sku": n % 7,
            "at": ORIGIN_TS + n * step,
            "clicked": int(n % 3 == 0),
            "known_at": ORIGIN_TS + n * step + (n % 2) * DAY_US,
            "shop": f"s{n % 2}",
            "price": float(n % 4),
        }
        for n in range(num)
    ]


def item_rows() -> list[dict[str, Any]]:
    return [{"sku": n, "kind": f"k{n % 3}", "weight": float(n)} for n in range(7)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return str(path)


def config_for(folder: Path, rows: Sequence[dict[str, Any]], **settings: Any) -> EventsConfig:
    """Write the log and the item table below `folder` and return the config that reads them."""
    items = EntityConfig(
        path=write_rows(folder / "items.parquet", item_rows()),
        key="sku",
        categorical={"kind": "kind"},
        numeric={"weight": "weight"},
    )
    values: dict[str, Any] = {
        "path": write_rows(folder / "log" / "part.parquet", rows),
        "columns": COLUMNS,
        "items": items,
        "split": SplitConfig(fm_stop="2024-01-10", vm_stop="2024-01-20", valid_s=86_400),
        "period_origin": ORIGIN,
        "num_buckets": 3,
        "past": {"count_fields": ("item", "kind"), "max_len": 4},
        **settings,
    }
    return EventsConfig(**values)


def prepare_rows(
    folder: Path, rows: Sequence[dict[str, Any]], name: str = "prepared", **settings: Any
) -> PreparedData:
    """Prepare a log and open it."""
    prepare(config_for(folder / f"{name}-input", rows, **settings), folder / name)
    return PreparedData.open(folder / name)


def readable_examples(data: PreparedData) -> pl.DataFrame:
    """Return all examples with keys instead of ids and histories instead of pointers, by example id."""
    frames = []
    for bucket in range(data.num_buckets):
        files = data.examples.files(buckets=[bucket])
        if not files:
            continue
        frame = pl.concat([pl.read_parquet(file.path, hive_partitioning=False) for file in files])
        events = data.events(bucket).to_pylist()
        histories = [
            [events[row]["example_id"] for row in range(start, start + length)]
            for start, length in frame.select("raw_start", "raw_len").iter_rows()
        ]
        frames.append(
            frame.drop("bucket", "raw_start", "raw_len").with_columns(
                pl.Series("history", histories, dtype=pl.List(pl.Int64))
            )
        )
    frame = pl.concat(frames).sort("example_id")
    fields = [f.name for f in data.schema.categorical if f.name in frame.columns]
    for name in fields:
        keys = ["", *data.vocabulary(name).keys]
        frame = frame.with_columns(pl.Series(name, [keys[i] for i in frame[name]], dtype=pl.String))
    return frame


PLANTED = {
    "missing column": ("shop", None),
    "wrong type of key": ("sku", [1.5]),
    "wrong type of number": ("price", ["three"]),
    "wrong type of label": ("clicked", ["yes"]),
    "wrong type of time": ("at", [1.5]),
    "nan": ("price", [float("nan")]),
    "infinite": ("price", [float("inf")]),
    "label 2": ("clicked", [2]),
    "label missing": ("clicked", [None]),
    "time missing": ("at", [None]),
    "time not a time": ("at", ["yesterday"]),
    "user missing": ("uid", [None]),
    "item missing": ("sku", [None]),
    "label before the event": ("known_at", [ORIGIN_TS - DAY_US]),
}
"""Name of an error -> the column it is in, and the values that make it (None: the column is left out)."""


def planted(error: str, row: int = 3) -> list[dict[str, Any]]:
    """Return `good_rows` with one error of `PLANTED`, at `row`."""
    column, values = PLANTED[error]
    rows = good_rows()
    if values is None:
        return [{k: v for k, v in r.items() if k != column} for r in rows]
    if isinstance(values[0], str) and column == "at":
        for r in rows:
            r["at"] = (
                datetime.datetime(1970, 1, 1, tzinfo=datetime.UTC)
                + datetime.timedelta(microseconds=r["at"])
            ).isoformat()
    elif isinstance(values[0], str):
        for r in rows:
            r[column] = str(r[column])
    elif isinstance(values[0], float):
        for r in rows:
            r[column] = float(r[column])
    rows[row][column] = values[0]
    return rows
