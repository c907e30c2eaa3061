"""Taobao's ads in both publications; the values are worked out by hand."""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pytest

from loopfm_ray.data.config import TaobaoAdConfig
from loopfm_ray.data.datasets.behaviors import with_behaviors
from loopfm_ray.data.datasets.published import PublishedFile
from loopfm_ray.data.datasets.taobao_ad import FIRST_TS, taobao_ad_log
from loopfm_ray.data.examples import read_rows
from loopfm_ray.data.log import open_log
from loopfm_ray.data.prepare import prepare
from loopfm_ray.data.prepared import PreparedData
from loopfm_ray.data.schema import Kind
from loopfm_ray.errors import ConfigError, DataError
from tests.oracles.logs import DAY_US, readable_examples

HEADER = (
    "clk,btag_his,cate_his,brand_his,userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,"
    "shopping_level,occupation,new_user_class_level,adgroup_id,cate_id,campaign_id,customer,brand,price,pid,btag"
)
PROFILES = {"7": "0,5,2,5,0,3,0,3", "8": "49,6,1,3,2,3,0,1"}
ADS = {"100": "11,21,31,41,0.5", "101": "12,22,32,0,0.25"}
FIRST_S = FIRST_TS // 1_000_000


def x1_row(clk: int, user: str, ad: str, btag: str = "", cate: str = "", brand: str = "") -> str:
    return f"{clk},{btag},{cate},{brand},{user},{PROFILES[user]},{ad},{ADS[ad]},1,1"


def write_x1(folder: Path) -> Path:
    train = [x1_row(int(n % 7 == 0), "78"[n % 2], str(100 + n % 2)) for n in range(14)]
    train[2] = x1_row(0, "7", "100", "1^2", "11^12", "41")
    test = [x1_row(1, "7", "101", "1", "13", "42"), x1_row(0, "8", "100")]
    (folder / "train.csv").write_text("\n".join([HEADER, *train]) + "\n")
    (folder / "test.csv").write_text("\n".join([HEADER, *test]) + "\n")
    return folder


def config_for(folder: Path, **settings: object) -> TaobaoAdConfig:
    values = {"path": str(folder), "num_buckets": 2, "period_s": 86_400.0, **settings}
    return TaobaoAdConfig.model_validate(values)


def test_rows_of_x1_are_spread_over_the_published_days(tmp_path: Path) -> None:
    config = config_for(write_x1(tmp_path), times="row_order", past={"count_fields": ["brand"]})
    prepare(config, tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    rows = readable_examples(data)
    train_ts = [FIRST_TS + n * DAY_US // 2 for n in range(14)]  # 14 rows in 7 days
    test_ts = [FIRST_TS + 7 * DAY_US, FIRST_TS + 7 * DAY_US + DAY_US // 2]
    assert rows["event_ts"].to_list() == train_ts + test_ts
    assert rows["label"].to_list() == [int(n % 7 == 0) for n in range(14)] + [1, 0]
    assert rows["user"].to_list() == [*"78" * 7, "7", "8"]
    assert rows["item"].to_list() == [*["100", "101"] * 7, "101", "100"]
    assert rows["history"].to_list()[-2:] == [[0, 2, 4, 6, 8, 10, 12], [1, 3, 5, 7, 9, 11, 13]]
    keys = {
        name: ["", *data.vocabulary(name).keys] for name in ("btag_his", "cate_his", "brand_his")
    }
    found = {
        name: [[words[i] for i in ids if i] for ids in rows[name]] for name, words in keys.items()
    }
    assert found["btag_his"] == [[], [], ["1", "2"], *[[]] * 11, ["1"], []]
    assert found["cate_his"] == [[], [], ["11", "12"], *[[]] * 11, ["13"], []]
    assert found["brand_his"] == [[], [], ["41"], *[[]] * 11, ["42"], []]
    # the published test set is the test window, and days 5 to 7 are the VMs'
    splits = config.split.ranges(*data.log_range)
    assert [len(read_rows(data.examples.files(span), span)["label"]) for span in
            (splits.fm, splits.vm, splits.test)] == [8, 6, 2]  # fmt: skip


def test_ads_and_users_of_x1_become_tables_or_stay_in_the_rows(tmp_path: Path) -> None:
    write_x1(tmp_path)
    prepare(config_for(tmp_path, times="row_order"), tmp_path / "table")
    items = pl.read_parquet(tmp_path / "table/items.parquet")
    assert items.columns == ["cate_id", "campaign_id", "customer", "brand", "price"]
    assert items["price"].to_list() == [0, 1, -1]  # 0.5 and 0.25 about their mean
    prepare(config_for(tmp_path, times="row_order", entities="rows"), tmp_path / "rows")
    data = PreparedData.open(tmp_path / "rows")
    rows = readable_examples(data)
    assert rows["cate_id"].to_list()[:2] == ["11", "12"]
    assert rows["shopping_level"].to_list()[:2] == ["3", "3"]
    assert [field.name for field in data.schema.of(Kind.NUMERIC)][:1] == ["price"]


def test_an_ad_that_changes_is_refused_as_a_table_and_read_as_rows(tmp_path: Path) -> None:
    write_x1(tmp_path)
    with (tmp_path / "test.csv").open("a") as out:
        out.write(x1_row(0, "7", "100").replace("41,0.5", "41,0.75") + "\n")
    with pytest.raises(DataError, match=r"'100'.*0\.5, 0\.75.*data\.entities to rows"):
        taobao_ad_log(config_for(tmp_path, times="row_order"))
    prepare(config_for(tmp_path, times="row_order", entities="rows"), tmp_path / "out")


def test_times_are_not_made_up_unasked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no time; set data\.times to row_order"):
        taobao_ad_log(config_for(write_x1(tmp_path)))


def test_missing_files_are_named_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"lacks train\.csv, test\.csv; get .*tianchi"):
        taobao_ad_log(config_for(tmp_path))
    write_raw(tmp_path)
    (tmp_path / "ad_feature.csv").unlink()
    (tmp_path / "behavior_log.csv").unlink()
    with pytest.raises(ConfigError, match=r"lacks ad_feature\.csv, behavior_log\.csv; get "):
        taobao_ad_log(config_for(tmp_path))


def test_fields_of_the_past_must_be_those_of_the_ad(tmp_path: Path) -> None:
    config = config_for(write_x1(tmp_path), times="row_order", past={"count_fields": ["pid"]})
    with pytest.raises(ConfigError, match=r"count_fields \['pid'\]"):
        open_log(config)


def write_raw(folder: Path) -> Path:
    sample = [
        "user,time_stamp,adgroup_id,pid,nonclk,clk",
        f"8,{FIRST_S + 500},101,430548_1007,1,0",
        f"7,{FIRST_S + 100},100,430548_1007,1,0",
        f"7,{FIRST_S + 200},101,430539_1007,0,1",
        f"9,{FIRST_S + 7 * 86_400},100,430539_1007,1,0",
    ]
    ads = ["adgroup_id,cate_id,campaign_id,customer,brand,price", "100,11,21,31,41,170.0"]
    ads += ["101,12,22,32,NULL,9.5"]
    people = [
        "userid,cms_segid,cms_group_id,final_gender_code,age_level,pvalue_level,shopping_level,"
        "occupation,new_user_class_level ",
        "7,0,5,2,5,,3,0,3",
        "8,49,6,1,3,2,3,0,",
    ]
    behaviors = [
        "user,time_stamp,btag,cate,brand",
        f"7,{FIRST_S + 150},cart,12,42",
        f"7,{FIRST_S - 50},pv,11,41",
        f"7,{FIRST_S + 100},pv,13,43",
        f"7,{FIRST_S - 60},fav,14,44",
        f"8,{FIRST_S + 501},buy,11,41",
        f"6,{FIRST_S},pv,11,41",
    ]
    files = {"raw_sample": sample, "ad_feature": ads, "user_profile": people}
    for name, lines in {**files, "behavior_log": behaviors}.items():
        (folder / f"{name}.csv").write_text("\n".join(lines) + "\n")
    return folder


def test_raw_rows_have_their_times_and_the_behaviour_before_them(tmp_path: Path) -> None:
    write_raw(tmp_path)
    split = {"fm_stop": FIRST_TS + 150_000_000, "vm_stop": FIRST_TS + 300_000_000, "valid_s": 40}
    prepare(config_for(tmp_path, split=split, sequence_len=3), tmp_path / "out")
    data = PreparedData.open(tmp_path / "out")
    rows = readable_examples(data)
    assert rows["user"].to_list() == ["7", "7", "8", "9"]
    assert rows["label"].to_list() == [0, 1, 0, 0]
    assert rows["event_ts"].to_list() == [
        FIRST_TS + 100_000_000,
        FIRST_TS + 200_000_000,
        FIRST_TS + 500_000_000,
        FIRST_TS + 7 * DAY_US,
    ]
    assert rows["history"].to_list() == [[], [0], [], []]
    found = {}
    for name in ("btag_his", "cate_his", "brand_his"):
        words = ["", *data.vocabulary(name).keys]
        found[name] = [[words[i] for i in ids if i] for ids in rows[name]]
    # at +100 the behaviour of that second is not before it; at +200 the newest three are left
    assert found["btag_his"] == [["fav", "pv"], ["pv", "pv", "cart"], [], []]
    assert found["cate_his"] == [["14", "11"], ["11", "13", "12"], [], []]
    assert found["brand_his"] == [["44", "41"], ["41", "43", "42"], [], []]
    counts = data.manifest.meta["counts"]
    assert (counts["users_without_row"], counts["items_without_row"]) == (1, 0)
    items = pl.read_parquet(tmp_path / "out/items.parquet")
    assert items["brand"].to_list() == [0, 1, 0]  # NULL is unknown


def test_the_behaviour_log_can_be_left_out(tmp_path: Path) -> None:
    (write_raw(tmp_path) / "behavior_log.csv").unlink()
    log = taobao_ad_log(config_for(tmp_path, behaviors=False))
    assert log.fields.sequence == ()
    assert sum(block.num_rows for block in log.blocks()) == 4


def test_a_row_that_contradicts_itself_is_an_error(tmp_path: Path) -> None:
    write_raw(tmp_path)
    with (tmp_path / "raw_sample.csv").open("a") as out:
        out.write(f"7,{FIRST_S},100,430539_1007,1,1\n")
    with pytest.raises(DataError, match=r"raw_sample\.csv, line 6, column 'nonclk'"):
        list(taobao_ad_log(config_for(tmp_path)).blocks())


@pytest.mark.parametrize(("num_parts", "buffer_rows"), [(1, 10**6), (3, 50), (256, 10**6)])
def test_behaviours_equal_a_plain_loop(tmp_path: Path, num_parts: int, buffer_rows: int) -> None:
    generator = np.random.default_rng(3)
    done = [
        (int(u), int(t), str(b), int(c), int(c) * 10)
        for u, t, b, c in zip(
            generator.integers(0, 9, 400), generator.integers(-20, 60, 400),
            generator.choice(["pv", "cart", "buy"], 400), generator.integers(0, 50, 400), strict=True,
        )
    ]  # fmt: skip
    path = tmp_path / "behavior_log.csv"
    lines = ["user,time_stamp,btag,cate,brand", *(",".join(map(str, row)) for row in done)]
    path.write_text("\n".join(lines) + "\n")
    asked = pa.table(
        {
            "user": generator.integers(0, 12, 200),
            "time_stamp": generator.integers(-20, 60, 200),
            "row": np.arange(200),
        }
    )
    blocks = with_behaviors(
        iter([asked.slice(0, 70), asked.slice(70)]), PublishedFile(path), 5, None, num_parts, buffer_rows
    )  # fmt: skip
    found = pa.concat_tables(blocks).sort_by("row").to_pylist()
    assert len(found) == 200
    for row, request in zip(found, asked.to_pylist(), strict=True):
        user, ts = request["user"], request["time_stamp"]
        before = sorted([b for b in done if b[0] == user and b[1] < ts], key=lambda b: b[1])[-5:]
        assert row["btag_his"] == [b[2] for b in before]
        assert row["cate_his"] == [str(b[3]) for b in before]
        assert row["brand_his"] == [str(b[4]) for b in before]
