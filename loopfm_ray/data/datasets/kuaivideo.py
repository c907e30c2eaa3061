"""KuaiVideo_x1 of BARS: real impressions of 10,000 users on a video app, with clicks, likes and follows.

The published timestamps keep the order of events but not the true time or its unit. They are scaled linearly to `span_days` days
from `period_origin`, so gaps keep their proportions, and a split at day 80 of 100 is at 80 % of the time.

`pos_items` and `neg_items` are point in time, but the publisher cut them to the FIRST 100 of the user's clicked and skipped
videos, not the latest: for heavy users they are the same old hundred in every row.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from loopfm_ray.data.canonical import BlockPlace, canonical_block
from loopfm_ray.data.config import ColumnsConfig, KuaiVideoConfig
from loopfm_ray.data.datasets.published import Layout, PublishedFile, read_layout, require_files
from loopfm_ray.data.source import EventLog, LogFields
from loopfm_ray.errors import DataError
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S

__all__ = ["kuaivideo_log"]

# Any: pyarrow ships no types.
Table = Any
_FILES = ("train.csv", "test.csv")
_WHERE = (
    "get train.csv and test.csv of KuaiVideo_x1 from huggingface.co/datasets/reczoo/KuaiVideo_x1"
)
_SEQUENCES = ("pos_items", "neg_items")


def _layout(name: str) -> Layout:
    return Layout(
        f"{name} of KuaiVideo_x1",
        {
            "timestamp": "real",
            "user_id": "key",
            "item_id": "key",
            "is_click": "label",
            "is_like": "label",
            "is_follow": "label",
            "pos_items": "keys",
            "neg_items": "keys",
        },
    )


def kuaivideo_log(config: KuaiVideoConfig) -> EventLog:
    """Return the log of train.csv and test.csv in `config.path`; is_like and is_follow are the tasks that the config names.

    Raises:
        ConfigError: files are missing.
        SchemaError, DataError: a file is not as published.
    """
    files = require_files(config.path, _FILES, _WHERE)
    columns = ColumnsConfig(
        user="user_id",
        item="item_id",
        event_ts="event_ts",
        label="is_click",
        tasks={name: name for name in config.tasks},
        sequence={name: name for name in _SEQUENCES},
    )
    return EventLog(
        lambda: _blocks(files, columns, config),
        LogFields(tasks=config.tasks, sequence=_SEQUENCES),
        None,
        None,
    )


def _blocks(
    files: dict[str, PublishedFile], columns: ColumnsConfig, config: KuaiVideoConfig
) -> Iterator[Table]:
    low, high = _span(files)
    scale = config.span_days * MICROS_PER_DAY / (high - low)
    for name in _FILES:
        for first_row, block in read_layout(files[name], _layout(name)):
            moment = block.column("timestamp").to_numpy()
            event_ts = config.period_origin_ts + np.rint((moment - low) * scale).astype(np.int64)
            yield canonical_block(
                block.append_column("event_ts", pa.array(event_ts)),
                columns,
                BlockPlace(str(files[name]), first_row),
                round(config.label_delay_s * MICROS_PER_S),
            )


def _span(files: dict[str, PublishedFile]) -> tuple[float, float]:
    low, high = np.inf, -np.inf
    for name in _FILES:
        for _, block in read_layout(files[name], _layout(name), ["timestamp"]):
            moment = block.column("timestamp").to_numpy()
            low, high = min(low, float(moment.min())), max(high, float(moment.max()))
    if low == high:
        raise DataError(
            f"all timestamps of KuaiVideo_x1 are {low}, expected a span of time; download the files again"
        )
    return low, high
