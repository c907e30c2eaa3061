"""Open Bandit as Parquet: impressions without a user id; the values are worked out by hand."""

import datetime as dt
from pathlib import Path

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from loopfm_ray.data.config import OpenBanditConfig
from loopfm_ray.data.datasets.open_bandit import open_bandit_log
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.errors import ConfigError, SchemaError
from tests.oracles.logs import readable_examples

START = dt.datetime(2019, 11, 25, tzinfo=dt.UTC)


def write(folder: Path) -> Path:
    # (campaign, item, person, click, day); items 0 of two campaigns are different ones
    shown = [("men", 0, "ab", 0, 0), ("women", 0, "ab", 1, 1), ("men", 1, "cd", 0, 3), ("men", 0, "ab", 0, 5)]  # fmt: skip
    rows = [
        {
            "policy": "random",
            "campaign": campaign,
            "timestamp": START + dt.timedelta(days=day),
            "item_id": item,
            "position": 1 + day % 3,
            "click": click,
            "propensity_score": 0.1,
            "user_feature_0": person[0],
            "user_feature_1": person[1],
            "user_feature_2": "x",
            "user_feature_3": "y",
            "affinity_items": [item] * click,
            "affinity_values": [1.0] * click,
        }
        for campaign, item, person, click, day in shown
    ]
    items = [
        {"campaign": campaign, "item_id": item, "item_feature_0": float(item), "item_feature_1": campaign,
         "item_feature_2": "p", "item_feature_3": "q"}
        for campaign, item in (("men", 0), ("men", 1), ("women", 0))
    ]  # fmt: skip
    # the published files were written by polars: their text is large
    pl.from_arrow(pa.Table.from_pylist(rows)).write_parquet(folder / "open_bandit_small.parquet")
    pl.from_arrow(pa.Table.from_pylist(items)).write_parquet(folder / "item_context.parquet")
    return folder


def test_people_with_the_same_features_are_one_cohort(tmp_path: Path) -> None:
    prepare(OpenBanditConfig(path=str(write(tmp_path))), tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    rows = readable_examples(data)
    assert rows["user"].to_list() == ["a|b|x|y", "a|b|x|y", "c|d|x|y", "a|b|x|y"]
    assert rows["item"].to_list() == ["men/0", "women/0", "men/1", "men/0"]
    assert rows["label"].to_list() == [0, 1, 0, 0]
    assert rows["position"].to_list() == ["1", "2", "1", "3"]
    assert rows["history"].to_list() == [[], [0], [], [0, 1]]
    assert rows["event_ts"].to_list() == [
        int((START + dt.timedelta(days=day)).timestamp()) * 1_000_000 for day in (0, 1, 3, 5)
    ]
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    names = ["", *data.vocabulary("item_feature_1").keys]
    assert [names[i] for i in items["item_feature_1"]] == ["", "men", "women", "men"]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks open_bandit_small\.parquet, item_context"):
        open_bandit_log(OpenBanditConfig(path=str(tmp_path)))
    write(tmp_path)
    path = tmp_path / "open_bandit_small.parquet"
    pq.write_table(pq.read_table(path).drop_columns(["click"]), path)
    with pytest.raises(SchemaError, match="click"):
        list(open_bandit_log(OpenBanditConfig(path=str(tmp_path))).blocks())
