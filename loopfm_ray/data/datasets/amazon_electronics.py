"""AmazonElectronics_x1 of BARS: will this user review this item next? One sampled negative for each review.

The files hold no time. What is certain is the order within a user: a row's history has one item more than that of the review
before. Reviews are laid out one a day, counted back from the user's last, which stands on `LAST_TS`: the published test set, the last
review of each user, is then exactly what lies on that day. Across users these times mean nothing.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from loopfm_ray.data.canonical import BlockPlace, canonical_block
from loopfm_ray.data.config import AmazonElectronicsConfig, ColumnsConfig
from loopfm_ray.data.datasets.collect import TableOf, collect
from loopfm_ray.data.datasets.published import (
    Layout,
    PublishedFile,
    bad_cell,
    read_layout,
    require_files,
)
from loopfm_ray.data.source import EventLog, LogFields
from loopfm_ray.errors import DataError
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S

__all__ = ["LAST_TS", "amazon_electronics_log"]

# Any: pyarrow ships no types.
Table = Any
LAST_TS = 1_404_172_800_000_000
"""The day that the last review of every user is put on: 2014-07-01, about when the log ends."""
_FILES = ("train.csv", "test.csv")
_WHERE = "get train.csv and test.csv of AmazonElectronics_x1 from huggingface.co/datasets/reczoo/AmazonElectronics_x1"
_SEQUENCES = ("item_history", "cate_history")
_COLUMNS = ColumnsConfig(
    user="user_id",
    item="item_id",
    event_ts="event_ts",
    label="label",
    sequence={name: name for name in _SEQUENCES},
)


def _layout(name: str) -> Layout:
    return Layout(
        f"{name} of AmazonElectronics_x1",
        {
            "label": "label",
            "user_id": "key",
            "item_id": "key",
            "cate_id": "category",
            "item_history": "keys",
            "cate_history": "keys",
        },
    )


def amazon_electronics_log(config: AmazonElectronicsConfig) -> EventLog:
    """Return the log of train.csv and test.csv in `config.path`; an item has the field cate_id.

    Raises:
        ConfigError: files are missing.
        SchemaError, DataError: a file is not as published.
    """
    files = require_files(config.path, _FILES, _WHERE)
    items = TableOf("item_id", ("cate_id",))
    for name in _FILES:
        collect(files[name], _layout(name), [items])
    return EventLog(
        lambda: _blocks(files, config),
        LogFields(sequence=_SEQUENCES),
        items.source("compare the files with the published ones"),
        None,
    )


def _blocks(files: dict[str, PublishedFile], config: AmazonElectronicsConfig) -> Iterator[Table]:
    last = _last_positions(files["test.csv"])
    for name in _FILES:
        file, layout = files[name], _layout(name)
        for first_row, block in read_layout(file, layout):
            yield _with_times(block, last, BlockPlace(str(file), first_row), (file, layout, config))


def _last_positions(file: PublishedFile) -> pl.DataFrame:
    """Return each user and the length of the history of the user's last review."""
    parts = []
    for _, block in read_layout(file, _layout("test.csv"), ["user_id", "item_history"]):
        length = pl.Series("last", pc.list_value_length(block.column("item_history")).to_numpy())
        parts.append(pl.DataFrame(block.select(["user_id"])).with_columns(length).unique())
    last = pl.concat(parts).unique()
    repeated = last.filter(pl.col("user_id").is_duplicated()).sort("user_id")
    if repeated.height:
        raise DataError(
            f"{file}: user {repeated['user_id'][0]} has test rows with histories of different lengths, expected one last"
            " review for each user; is this test.csv of AmazonElectronics_x1?"
        )
    return last


def _with_times(
    block: Table,
    last: pl.DataFrame,
    place: BlockPlace,
    context: tuple[PublishedFile, Layout, AmazonElectronicsConfig],
) -> Table:
    file, layout, config = context
    position = pc.list_value_length(block.column("item_history")).to_numpy().astype(np.int64)
    users = pl.DataFrame(block.select(["user_id"])).join(
        last, on="user_id", how="left", maintain_order="left"
    )
    back = users["last"].fill_null(-1).to_numpy().astype(np.int64) - position
    is_train = layout.name.startswith("train")
    wrong = np.flatnonzero(back < int(is_train))
    if len(wrong):
        row = int(wrong[0])
        words = (
            f"a history of {position[row]} items",
            f"fewer than in the user's rows of test.csv ({users['last'][row]})",
        )
        raise bad_cell(file, layout, place.first_row + row, "item_history", words)
    event_ts = LAST_TS - back * MICROS_PER_DAY
    rows = block.append_column("event_ts", pa.array(event_ts))
    return canonical_block(rows, _COLUMNS, place, round(config.label_delay_s * MICROS_PER_S))
