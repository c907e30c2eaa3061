"""Taobao display ads: impressions with clicks of 1.14 million users on eight days, with their shopping behaviour before.

Two publications of the same log. The raw files (Tianchi data set 56) have true times. TaobaoAd_x1 of BARS has none, and ids of its
own; `times: row_order` makes up times from the order of its rows (see `TaobaoAdConfig`), on the grounds that train.csv was made
from a file called train_sorted and the split is by day. Rows of one page view then differ by some milliseconds, so a row may
see its neighbours on the page as history: use the raw files where that matters.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from loopfm_ray.data.canonical import BlockPlace, canonical_block
from loopfm_ray.data.config import ColumnsConfig, TaobaoAdConfig
from loopfm_ray.data.datasets.behaviors import SEQUENCES, with_behaviors
from loopfm_ray.data.datasets.collect import TableOf, collect
from loopfm_ray.data.datasets.published import (
    Cell,
    Layout,
    PublishedFile,
    bad_cell,
    find_files,
    missing_files,
    read_layout,
    read_table,
)
from loopfm_ray.data.entities import EntitySource
from loopfm_ray.data.source import EventLog, LogFields
from loopfm_ray.errors import ConfigError
from loopfm_ray.types import MICROS_PER_DAY, MICROS_PER_S

__all__ = ["FIRST_TS", "taobao_ad_log"]

# Any: pyarrow ships no types.
Table = Any
FIRST_TS = 1_494_000_000_000_000
"""2017-05-06 00:00 in Beijing, when the log starts."""
_X1_DAYS = {"train.csv": (0, 7), "test.csv": (7, 1)}
"""First day and number of days of each file."""
_RAW_FILES = ("raw_sample.csv", "ad_feature.csv", "user_profile.csv")
_BEHAVIOR_FILE = "behavior_log.csv"
_WHERE = (
    "get train.csv and test.csv of TaobaoAd_x1 from huggingface.co/datasets/reczoo/TaobaoAd_x1, or raw_sample.csv,"
    " ad_feature.csv, user_profile.csv and behavior_log.csv from tianchi.aliyun.com/dataset/56"
    " (data.behaviors false does without the last)"
)
_PROFILE = (
    "cms_segid",
    "cms_group_id",
    "final_gender_code",
    "age_level",
    "pvalue_level",
    "shopping_level",
    "occupation",
    "new_user_class_level",
)
_AD = ("cate_id", "campaign_id", "customer", "brand")
_TEXT: Cell = "category"


def _x1_layout(name: str) -> Layout:
    return Layout(
        f"{name} of TaobaoAd_x1",
        {
            "clk": "label",
            **dict.fromkeys(SEQUENCES, "keys"),
            "userid": "key",
            **dict.fromkeys(_PROFILE, _TEXT),
            "adgroup_id": "key",
            **dict.fromkeys(_AD, _TEXT),
            "price": "number",
            "pid": "category",
            "btag": "category",
        },
    )


_RAW_SAMPLE = Layout(
    "raw_sample.csv of Tianchi data set 56",
    {
        "user": "integer",
        "time_stamp": "integer",
        "adgroup_id": "key",
        "pid": "category",
        "nonclk": "label",
        "clk": "label",
    },
)
_AD_FEATURE = Layout(
    "ad_feature.csv of Tianchi data set 56",
    {"adgroup_id": "key", **dict.fromkeys(_AD, _TEXT), "price": "number"},
    missing=("", "NULL"),
)
_USER_PROFILE = Layout(
    "user_profile.csv of Tianchi data set 56",
    {"userid": "key", **dict.fromkeys(_PROFILE[:-1], _TEXT), "new_user_class_level ": "category"},
    names={"new_user_class_level ": "new_user_class_level"},
)


def taobao_ad_log(config: TaobaoAdConfig) -> EventLog:
    """Return the log of either publication in `config.path`; the fields have the same names.

    Fields of an item: cate_id, campaign_id, customer, brand, price. Fields of a user: the eight of the profile. Context: pid. Sequences:
    btag_his, cate_his and brand_his, the shopping behaviour before the impression.

    Raises:
        ConfigError: files are missing, or times would have to be made up.
        SchemaError, DataError: a file is not as published.
    """
    raw = [*_RAW_FILES, *([_BEHAVIOR_FILE] if config.behaviors else [])]
    found = find_files(config.path, [*_X1_DAYS, *raw])
    if all(name in found for name in raw):
        return _raw_log(found, config)
    if all(name in found for name in _X1_DAYS):
        return _x1_log(found, config)
    wanted = raw if any(name in found for name in raw) else list(_X1_DAYS)
    raise missing_files(config.path, [name for name in wanted if name not in found], _WHERE)


def _x1_log(files: dict[str, PublishedFile], config: TaobaoAdConfig) -> EventLog:
    if config.times == "refuse":
        raise ConfigError(
            f"{config.path} is TaobaoAd_x1, whose rows have no time; set data.times to row_order to take the order of the"
            " rows for time, or use the raw files of Tianchi data set 56"
        )
    is_table = config.entities == "table"
    ads = TableOf("adgroup_id", _AD, ("price",))
    users = TableOf("userid", _PROFILE)
    tables = [ads, users] if is_table else [TableOf("adgroup_id", ())]
    num_rows = {name: collect(files[name], _x1_layout(name), tables) for name in _X1_DAYS}
    context = ("pid",) if is_table else ("pid", *_AD, *_PROFILE)
    numeric = () if is_table else ("price",)
    columns = ColumnsConfig(
        user="userid",
        item="adgroup_id",
        event_ts="event_ts",
        label="clk",
        categorical={name: name for name in context},
        numeric={name: name for name in numeric},
        sequence={name: name for name in SEQUENCES},
    )
    advice = "set data.entities to rows"
    return EventLog(
        lambda: _x1_blocks(files, num_rows, columns, config),
        LogFields((), context, numeric, SEQUENCES),
        ads.source(advice) if is_table else None,
        users.source(advice) if is_table else None,
    )


def _x1_blocks(
    files: dict[str, PublishedFile],
    num_rows: dict[str, int],
    columns: ColumnsConfig,
    config: TaobaoAdConfig,
) -> Iterator[Table]:
    delay_us = round(config.label_delay_s * MICROS_PER_S)
    for name, (first_day, num_days) in _X1_DAYS.items():
        start_ts = FIRST_TS + first_day * MICROS_PER_DAY
        for first_row, block in read_layout(files[name], _x1_layout(name)):
            row = np.arange(first_row, first_row + block.num_rows, dtype=np.int64)
            event_ts = start_ts + row * (num_days * MICROS_PER_DAY) // num_rows[name]
            rows = block.append_column("event_ts", pa.array(event_ts))
            yield canonical_block(rows, columns, BlockPlace(str(files[name]), first_row), delay_us)


def _raw_log(files: dict[str, PublishedFile], config: TaobaoAdConfig) -> EventLog:
    ads = read_table(files["ad_feature.csv"], _AD_FEATURE)
    people = read_table(files["user_profile.csv"], _USER_PROFILE)
    sequences = SEQUENCES if config.behaviors else ()
    return EventLog(
        lambda: _raw_blocks(files, sequences, config),
        LogFields(categorical=("pid",), sequence=sequences),
        EntitySource.from_table(ads, "adgroup_id", _AD, ("price",)),
        EntitySource.from_table(people, "userid", _PROFILE, ()),
    )


def _raw_blocks(
    files: dict[str, PublishedFile], sequences: tuple[str, ...], config: TaobaoAdConfig
) -> Iterator[Table]:
    file = files["raw_sample.csv"]
    impressions = _impressions(file)
    if sequences:
        behaviors = files[_BEHAVIOR_FILE]
        impressions = with_behaviors(impressions, behaviors, config.sequence_len, config.spill_dir)
    columns = ColumnsConfig(
        user="user",
        item="adgroup_id",
        event_ts="time_stamp",
        timestamp_unit="s",
        label="clk",
        categorical={"pid": "pid"},
        sequence={name: name for name in sequences},
    )
    delay_us = round(config.label_delay_s * MICROS_PER_S)
    for block in impressions:
        yield canonical_block(block, columns, BlockPlace(str(file), 0), delay_us)


def _impressions(file: PublishedFile) -> Iterator[Table]:
    for first_row, block in read_layout(file, _RAW_SAMPLE):
        both = pc.equal(block.column("nonclk"), block.column("clk"))
        row = pc.index(both, True).as_py()
        if row >= 0:
            words = (f"the value of clk, {block.column('clk')[row].as_py():g}", "the other one")
            raise bad_cell(file, _RAW_SAMPLE, first_row + row, "nonclk", words)
        yield block.drop_columns(["nonclk"])
